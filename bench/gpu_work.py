"""The pieces of work of bench.gpu_first and bench.gpu_second, each a process of its own that writes rows.

    python -m bench.gpu_work NAME --rows FILE [--rehearse]

Not meant to be called by hand, though it can be. --rehearse: on a CPU, on a few numbers; times then mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from bench import attention, bench_host, correctness, layer_norm, machine, training_speed
from bench.accounting import SEED, AttentionCase, Direction
from bench.ahead import compile_all
from bench.check import WrongResult
from bench.gpu_plan import ATTENTION, COMPILE, DIRECTIONS, FLEX, FLEX_CASES, MAIN, NORMS, SECONDS, SHORT, Context, brief
from bench.record import Job, Refused, measure_job
from bench.rows import read_rows
from bench.stages import NO_GPU
from kernels.launch import capability

QUICK = [provider for provider in attention.PROVIDERS if provider != FLEX]
Prepared = tuple[str, str, Callable[[], Job]]  # group, provider, and what prepares it


def look(context: Context) -> None:
    """The machine, its versions, and the key of Triton's cache."""
    from triton.runtime.cache import triton_key

    context.write("machine", **machine.describe(), triton_key=triton_key())


# Compiling what the peers and the training need


def warm_up(context: Context, jobs: Iterable[Prepared]) -> None:
    """Have Inductor compile what these jobs need, into its cache; what is refused or wrong is told when it is timed."""
    for _, _, prepare in jobs:
        try:
            job = prepare()
            with torch.no_grad():  # as when it is timed: another variant for Inductor
                job.calls[0]()
        except Exception as error:  # noqa: BLE001 - it is told when it is timed
            print(brief(error), flush=True)
        machine.leave_after_fault(context.device)


def warm_up_training(context: Context) -> None:
    """Two epochs of each way to train; Triton's and Inductor's caches then have it."""
    for batch_size, ways in training_plan("compiled-training", context):
        torch.manual_seed(0)
        with training_speed.build_epochs(context.device, ways, batch_size) as epochs:
            training_speed.warm_up(epochs, lambda provider, way, error: print(provider, way, brief(error), flush=True))


# Right or wrong


def judge(work: str, context: Context) -> None:
    """Each case's tensors beside the exact ones; at the end whether all were right, and which not."""
    problems = context.some(correctness.PROBLEMS[work]())
    if any(getattr(problem, "hopper", ()) for problem in problems) and capability(context.device) != 90:
        context.write("verdict", kernel=work, passed=False, failed=["not run: there is no Hopper chip"])
        return
    for problem in context.untried(work, problems):
        try:
            findings = list(correctness.find(problem, str(context.device)))
            context.synchronize()  # a fault counts, though the results were right
            for found in findings:
                context.write("error", work=work, case=str(problem), **found._asdict())
        except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
            context.write("error", work=work, case=str(problem), problem=brief(error))
        machine.leave_after_fault(context.device)
    told = {str(problem): "" for problem in problems}  # the first thing that is wrong with each
    rows = [row for row in read_rows(context.rows) if row["kind"] == "error" and row["work"] == work]
    for row in rows:
        told[row["case"]] = told[row["case"]] or row["problem"]
    told.update({case: "crashed" for case in set(told) - {row["case"] for row in rows}})
    failed = [f"{case}: {problem}" for case, problem in told.items() if problem]
    context.write("verdict", kernel=work, passed=not failed, failed=failed)
    print(f"{work}: {len(problems)} cases, {len(failed)} failures", *failed, sep="\n  ")


# Timed


def time_all(work: str, context: Context, jobs: Iterable[Prepared]) -> None:
    """Measure them one after the other, a row each."""
    for group, provider, prepare in context.untried(work, list(jobs), lambda job: f"{job[0]}: {job[1]}"):
        line = f"{group:<58} {provider:<24}"
        try:
            job = prepare()
            samples, info = measure_job(job, context.device, 0.01 if context.rehearse else SECONDS)
            context.write("time", case=f"{group}: {provider}", group=group, provider=job.provider,
                          seconds=samples.median, samples=samples.seconds, info=info)  # fmt: skip
            print(f"{line} {samples.median * 1e6:12.1f} us", flush=True)
        except Refused as refusal:
            context.write("refused", case=f"{group}: {provider}", problem=str(refusal))
        except WrongResult as wrong:
            context.write("wrong", case=f"{group}: {provider}", problem=str(wrong))
            print(f"{line} WRONG: {wrong}", flush=True)
        except Exception as error:  # noqa: BLE001 - ours, or out of memory: the next row may fare better
            context.write("failed", case=f"{group}: {provider}", problem=brief(error))
            print(f"{line} {brief(error)}", flush=True)
        machine.leave_after_fault(context.device)


def attention_jobs(
    context: Context, cases: Sequence[AttentionCase], direction: Direction, providers: Sequence[str]
) -> Iterator[Prepared]:
    for case in context.some(cases):
        for provider in providers:
            prepare = functools.partial(attention.prepare, provider, case, direction, context.device)
            yield f"attention {direction} {case}", provider, prepare


def whole_jobs(context: Context, direction: Direction) -> Iterator[Prepared]:
    """FlexAttention, which compiles for seconds, with two cases only."""
    for case in ATTENTION:
        yield from attention_jobs(context, [case], direction, attention.PROVIDERS if case in FLEX_CASES else QUICK)


def flex_jobs(context: Context) -> Iterator[Prepared]:
    for direction in DIRECTIONS:
        yield from attention_jobs(context, FLEX_CASES, direction, [FLEX])


def main_jobs(context: Context) -> Iterator[Prepared]:
    for direction in DIRECTIONS:
        yield from attention_jobs(context, MAIN, direction, QUICK)


def short_jobs(context: Context) -> Iterator[Prepared]:
    for direction in DIRECTIONS:
        yield from attention_jobs(context, SHORT, direction, QUICK)


def norm_jobs(context: Context, providers: Sequence[str]) -> Iterator[Prepared]:
    for case in context.some(NORMS):
        for direction in DIRECTIONS:
            for provider in providers:
                prepare = functools.partial(layer_norm.prepare, provider, case, direction, context.device)
                yield case.group(direction), provider, prepare


def all_norm_jobs(context: Context) -> Iterator[Prepared]:
    """What has to be compiled for seconds comes last."""
    yield from norm_jobs(context, [provider for provider in layer_norm.PROVIDERS if provider != COMPILE])
    yield from norm_jobs(context, [COMPILE])


TRAINING = {
    "training": (training_speed.EAGER, training_speed.GRAPH),
    "compiled-training": (training_speed.GRAPH, training_speed.COMPILED, training_speed.COMPILED_GRAPH),
}


def training_plan(work: str, context: Context) -> list[tuple[int, tuple[str, ...]]]:
    """Batch sizes, and ways to train."""
    if context.rehearse:
        training_speed.EXAMPLES = 500
        return [(training_speed.BATCH, (training_speed.ONE,))]
    return [(batch_size, TRAINING[work]) for batch_size in (training_speed.BATCH, training_speed.LARGE_BATCH)]


def train(work: str, context: Context) -> None:
    """Training steps of S1's model in these ways; the rows are written anew after every turn. A way that fails is left
    out, and costs the others nothing."""
    for batch_size, ways in training_plan(work, context):
        group = f"S1 training step B{batch_size} fp32 on GPU"
        failed = {row["case"] for row in read_rows(context.rows) if row["kind"] == "failed"}
        without = {key for key in training_speed.cases(context.device, ways) if f"{group}: {', '.join(key)}" in failed}

        def left_out(provider: str, way: str, error: Exception, group: str = group) -> None:
            context.write("failed", case=f"{group}: {provider}, {way}", problem=brief(error))
            print(f"{group}: {provider}, {way}: {brief(error)}", flush=True)
            machine.leave_after_fault(context.device)

        seconds = 0.0 if context.rehearse else 12.0
        for speeds in training_speed.turns(context.device, seconds, ways, batch_size, without, left_out):
            for (provider, way), speed in speeds.items():
                context.write(
                    "time", case=f"{group}: {provider}, {way}", group=group, provider=f"{provider}, {way}",
                    seconds=batch_size / speed.examples_per_second, samples=speed.seconds,
                    info={"examples_per_second": speed.examples_per_second},
                )  # fmt: skip
            told = (f"{', '.join(key)} {speed.examples_per_second:,.0f}/s" for key, speed in speeds.items())
            print(f"{group}: {'; '.join(told)}", flush=True)


def host(context: Context) -> None:
    """Host time of one tiny call."""
    rounds = 2 if context.rehearse else bench_host.ROUNDS
    for case in bench_host.CASES:
        for provider in bench_host.PROVIDERS:
            group = bench_host.group(case)
            try:
                samples = bench_host.measure(case, provider, context.device, rounds)
            except Exception as error:  # noqa: BLE001
                context.write("failed", case=f"{group}: {provider}", problem=brief(error))
                machine.leave_after_fault(context.device)
                continue
            seconds = sorted(samples)[len(samples) // 2]
            context.write("time", case=f"{group}: {provider}", group=group, provider=provider, seconds=seconds,
                          samples=samples, info={})  # fmt: skip
            print(f"{group:<58} {provider:<24} {seconds * 1e6:12.1f} us", flush=True)


def timed(work: str, jobs: Callable[[Context], Iterable[Prepared]]) -> Callable[[Context], None]:
    return lambda context: time_all(work, context, jobs(context))


WORK: dict[str, Callable[[Context], None]] = {
    "look": look,
    "compile": compile_all,
    "warm-up-flex": lambda context: warm_up(context, flex_jobs(context)),
    "warm-up-norms": lambda context: warm_up(context, norm_jobs(context, [COMPILE])),
    "warm-up-training": warm_up_training,
    **{work: functools.partial(judge, work) for work in correctness.PROBLEMS},
    "attention-forward": timed("attention-forward", lambda context: whole_jobs(context, "forward")),
    "attention-backward": timed("attention-backward", lambda context: whole_jobs(context, "backward")),
    "main-shapes": timed("main-shapes", main_jobs),
    "short-sequences": timed("short-sequences", short_jobs),
    "norms-timed": timed("norms-timed", all_norm_jobs),
    **{work: functools.partial(train, work) for work in TRAINING},
    "host-time": host,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=WORK, metavar="NAME", help=", ".join(WORK))
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="rows are appended to it")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, on a few numbers")
    options = parser.parse_args(argv)
    device = machine.pick_device()
    if options.rehearse:
        from tests.interpreter import round_bfloat16_to_nearest

        device = torch.device("cpu")
        torch.set_num_threads(1)
        round_bfloat16_to_nearest()
    elif device.type == "cpu":
        print(f"there is no CUDA GPU here, found torch {torch.__version__}; --rehearse tries everything on the CPU")
        return NO_GPU
    warnings.simplefilter("ignore")  # a peer's warning costs nobody's figures
    context = Context(options.rows, device, options.rehearse)
    torch.manual_seed(SEED)
    if device.type == "cpu":
        WORK[options.name](context)
        return 0
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are not captured on the default one
        WORK[options.name](context)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())

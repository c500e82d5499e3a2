"""The two commands for a GPU that is there for minutes: each stage ends in time, nothing is lost, what is wrong is
called so; and a rehearsal of all of it on the CPU."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import bench  # noqa: E402
import kernels  # noqa: E402
from bench import (  # noqa: E402
    bench_attention,
    bench_layer_norm,
    benchmark,
    correctness,
    gpu_first,
    gpu_second,
    gpu_work,
    record,
    report,
    stages,
)
from bench.benchmark import gpu_stages  # noqa: E402
from bench.record import Context  # noqa: E402
from bench.rows import ROOT, Row, by_group, newest_with, read_rows, standings, write_row  # noqa: E402
from bench.stages import ROWS, Stage, run_stages  # noqa: E402
from bench.summary import summarise  # noqa: E402
from kernels.attention import measured, plan  # noqa: E402

posix = pytest.mark.skipif(os.name != "posix", reason="process groups as POSIX has them")


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", textwrap.dedent(code)


def run(out: Path, *stages: Stage, seconds: float = 60.0) -> list[Row]:
    assert run_stages(stages, out, seconds, lambda *_: {})
    return [row for row in read_rows(out / ROWS) if row["kind"] == "stage"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


# Stages


@pytest.mark.long
@posix
def test_what_hangs_is_killed_with_all_it_started_and_the_next_stage_runs(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    hangs = python(f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        print("begun", flush=True)
        while True: pass
    """)
    started = time.monotonic()
    beside, then = python("print('beside')"), python("print('then')")
    rows = run(tmp_path, Stage("hangs", 5, (hangs, beside)), Stage("next", 60, (then,)))
    assert [(row["stage"], row["result"]) for row in rows] == [
        ("hangs", "passed"),
        ("hangs", "killed at its limit"),
        ("next", "passed"),
    ]
    assert time.monotonic() - started < 60
    log = (tmp_path / stages.LOG).read_text()
    assert all(word in log for word in ("begun", "beside", "then"))
    assert wait_for(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))


@posix
def test_what_crashes_is_started_again_and_costs_no_other(tmp_path: Path) -> None:
    crashes = python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    again = python(f"""
        import os, sys
        path = {str(tmp_path / "starts")!r}
        open(path, "a").write("x")
        sys.exit(91 if len(open(path).read()) < 3 else 0)
    """)
    fails = python("raise SystemExit(4)")  # a usage error of pytest
    rows = run(tmp_path, Stage("crash", 40, (crashes, again, fails)), Stage("next", 60, (python("print('then')"),)))
    found = {row["command"].split()[-1]: (row["result"], row["starts"]) for row in rows}
    assert sorted(found.values()) == [
        ("died of SIGSEGV", stages.MOST_STARTS),
        ("exit code 4", 1),
        ("passed", 1),
        ("passed", 3),
    ]
    assert rows[-1]["stage"] == "next"


def test_a_stage_whose_time_is_gone_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    sleeps = Stage("long", 2, (python("import time; time.sleep(60)"),))
    rows = run(tmp_path, sleeps, Stage("short", 2, (python("pass"),)), seconds=2)
    assert [row["result"] for row in rows] == ["killed at its limit", "left out, the time is used up"]


@posix
def test_rows_before_a_kill_of_the_parent_are_there_and_nothing_runs_on(tmp_path: Path) -> None:
    writes = f"""
        import os, time
        from pathlib import Path
        from bench.rows import write_row
        for i in range(10**6):
            write_row(Path({str(tmp_path / ROWS)!r}), "time", number=i, pid=os.getpid())
            time.sleep(0.01)
    """
    parent = python(f"""
        import sys
        from pathlib import Path
        from bench.stages import Stage, run_stages
        command = sys.executable, "-c", {textwrap.dedent(writes)!r}
        run_stages([Stage("writes", 60, (command, command))], Path({str(tmp_path)!r}), 60.0, lambda *_: {{}})
    """)
    process = subprocess.Popen(parent, cwd=ROOT)
    assert wait_for(lambda: len(read_rows(tmp_path / ROWS)) > 40)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pids = {row["pid"] for row in read_rows(tmp_path / ROWS)}
    assert len(pids) == 2 and wait_for(lambda: not any(map(is_alive, pids)))
    text = (tmp_path / ROWS).read_text()
    for pid in pids:  # each process's rows, none lost and none torn
        numbers = [row["number"] for row in read_rows(tmp_path / ROWS) if row["pid"] == pid]
        assert numbers == list(range(len(numbers)))
    assert text.endswith("\n") and len(text.splitlines()) == len(read_rows(tmp_path / ROWS))


def test_of_rows_whose_last_was_torn_the_others_are_read(tmp_path: Path) -> None:
    write_row(tmp_path / ROWS, "time", number=1)
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"kind": "time", "num')
    assert read_rows(tmp_path / ROWS) == [{"kind": "time", "number": 1}] and read_rows(tmp_path / "none") == []


def test_the_parents_import_neither_torch_nor_triton() -> None:
    code = "import sys, bench.gpu_first, bench.gpu_second; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main(["--out", str(tmp_path / "out")]) == 2
    told, found = capsys.readouterr(), f"found torch {torch.__version__}"
    assert told.err == f"there is no CUDA GPU here, {found}; --rehearse tries everything on the CPU\n"
    assert "killed since there is no GPU" in told.out and not list((tmp_path / "out").iterdir())  # to be used again


@pytest.mark.parametrize("main", [gpu_first.main, gpu_second.main])
def test_what_a_user_gets_wrong_is_told_in_one_line(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "required: --out" in told()
    for seconds in "0", "-5", "nan", "inf":
        assert "--seconds must be 60 or more, found" in told("--out", str(tmp_path), "--seconds", seconds)
    (tmp_path / "file").touch()
    assert "cannot write to --out" in told("--out", str(tmp_path / "file"))
    assert "cannot write to --out" in told("--out", str(tmp_path / "file" / "below"))
    (tmp_path / ROWS).write_text("")  # results are not written over
    assert "is there already; name another folder" in told("--out", str(tmp_path))
    monkeypatch.setattr(gpu_first, "NEEDED", ("torch", "no_such_package"))
    assert "these packages are missing: no_such_package; pip install" in told("--out", str(tmp_path / "new"))


def test_what_the_second_command_is_given_is_checked_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first in tmp_path, tmp_path / "none", ROOT / "README.md":
        with pytest.raises(SystemExit):
            gpu_second.main(["--out", str(tmp_path / "out"), "--first", str(first)])
        assert f"--first must be the rows.jsonl of bench.gpu_first, found {first}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_second.main(["--out", str(tmp_path / "out"), "foward", "D128"])
    assert "no search is called 'foward D128'; see --list" in capsys.readouterr().err


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("sent", "seconds"),
    [  # while the processes start, and when they work
        (signal.SIGINT, 0.0),
        pytest.param(signal.SIGKILL, 0.0, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 5.0, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 5.0, marks=pytest.mark.long),
        (signal.SIGKILL, 5.0),
    ],
)
def test_a_signal_leaves_no_process_behind(sent: signal.Signals, seconds: float, tmp_path: Path) -> None:
    """Compiling has the most of them: workers of a worker."""
    command = [sys.executable, "-m", "bench.gpu_first", "--out", str(tmp_path), "--rehearse"]
    variables = {**os.environ, "STARTED_BY": str(tmp_path)}
    parent = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs in the background
    )
    log = tmp_path / stages.LOG
    assert wait_for(lambda: log.exists() and "== compile" in log.read_text())  # the first stage begins
    time.sleep(seconds)
    parent.send_signal(sent)
    out, errors = parent.communicate(timeout=120)
    assert wait_for(lambda: not processes(str(tmp_path))), processes(str(tmp_path))
    if sent != signal.SIGKILL and seconds > 1:
        assert parent.returncode == 130 and "stopped; what is known so far:" in out and not errors


def processes(word: str) -> list[int]:
    """Those with this word in their environment, which they have from those that started them."""
    found = []
    for folder in Path("/proc").iterdir() if Path("/proc").exists() else ():
        try:
            if word.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


# What is decided by rows


def test_hopper_kernels_that_passed_or_were_decided_for_before_run_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = tmp_path / "measured.py"
    measured.write_text('HOPPER = {("forward", 128): "file", ("backward", 128): "file"}')
    monkeypatch.setattr(gpu_first, "MEASURED", measured)
    stage = Stage("any", 1, (("python", "--rows"),))
    rows = [
        {"kind": "verdict", "kernel": name, "passed": name != "forward128", "failed": []}
        for name in ("general", "forward64", "forward128", "backward64")
    ]
    assert gpu_first.environment(stage, rows)["KERNELS_HOPPER"] == "forward64 backward64 backward128"
    assert gpu_first.environment(stage, [])["KERNELS_HOPPER"] == "forward128 backward128"
    measured.write_text("HOPPER = {}")
    assert gpu_first.environment(stage, [])["KERNELS_HOPPER"] == "0"
    assert [name for names in gpu_first.HOPPER.values() for name in names] == [
        f"{direction}{size}" for direction, sizes in plan.HOPPER_HEAD_SIZES.items() for size in sizes
    ]


def timed(group: str, **providers: float) -> list[Row]:
    return [
        {
            "kind": "time",
            "group": group,
            "provider": name.replace("_", " "),
            "seconds": 1 / rate,
            "samples": [],
            "info": {"tflops_per_second": rate},
        }
        for name, rate in providers.items()
    ]


LOST = [
    *timed("attention forward B4 H16 S4096 D128 causal bf16", kernels_hopper=500.0, torch_cuDNN=1e3, torch_math=1.0),
    *timed("attention backward B4 H16 S4096 D64 full dropout 0.1 bf16", kernels_general=90.0, torch_flash=100.0),
    *timed("attention forward B8192 H4 S9 D32 full bf16", kernels_short=9.0, torch_flash=10.0),
    *timed("attention forward B4 H16 S4096 D64 causal bf16", kernels_general=9.0, torch_flash=8.0),
]


def test_searches_are_made_where_the_first_run_lost() -> None:
    assert [round(ratio, 2) for ratio, *_ in standings(LOST)] == [0.5, 0.9, 0.9, 1.12]
    found = gpu_second.lost_searches(LOST)
    assert found[0] == "forward D128 causal" and set(found) == {
        "forward D128 causal",
        "key_value D64 dropout",
        "query D64 dropout",
        "short forward L9 D32",
    }
    from bench import tune

    names = [str(search) for search in tune.searches(" or ".join(found).split())]
    assert set(found) <= set(names)


def test_a_limit_is_no_peer_and_the_last_row_counts() -> None:
    rows = timed("norm", kernels=1.0, device_copy=9.0, torch_eager=2.0) + timed("norm", kernels=4.0)
    assert standings(rows) == [(2.0, "norm", "kernels", "torch eager")]
    assert by_group(rows)["norm"]["kernels"]["info"]["tflops_per_second"] == 4.0


def test_decisions_rest_on_results_that_are_there() -> None:
    for file in [*measured.HOPPER.values(), *(file for _, file in measured.TILES.values())]:
        assert (ROOT / file).exists(), file
    for (direction, size), file in measured.HOPPER.items():
        verdicts = [row for row in read_rows(ROOT / file) if row["kind"] == "verdict"]
        assert any(row["kernel"] == f"{direction}{size}" and row["passed"] for row in verdicts)


def test_a_measured_tile_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention.tiles import Tile, choose_tile

    choose_tile = choose_tile.__wrapped__  # not what it remembers
    monkeypatch.setitem(measured.TILES, ("key_value", 90, 128, "plain"), ((32, 256, 8, 2), "a file"))
    assert choose_tile("key_value", 96, 2, 4096, 90, "plain") == Tile(32, 256, 8, 2)
    assert choose_tile("key_value", 96, 2, 16, 90, "plain") == Tile(16, 256, 8, 2)  # few queries
    for other in (
        ("key_value", 96, 4, 4096, 90, "plain"),
        ("key_value", 96, 2, 4096, 90, "dropout"),
        ("key_value", 96, 2, 4096, 80, "plain"),
        ("query", 96, 2, 4096, 90, "plain"),
    ):
        assert choose_tile(*other) != Tile(32, 256, 8, 2)


def test_the_newest_results_go_by_date(tmp_path: Path) -> None:
    assert newest_with("verdict", tmp_path) is None
    names = "h200-2026-01-02-abc", "h100-2026-01-03-abc-first", "h200-2025-12-30-abc", "h100-2026-01-03-abc-second"
    for name in names:
        write_row(tmp_path / f"{name}.jsonl", "time" if name.endswith("second") else "verdict")
    newest = newest_with("verdict", tmp_path)
    assert newest and newest.name == "h100-2026-01-03-abc-first.jsonl"
    newest = newest_with("time", tmp_path)
    assert newest and newest.name == "h100-2026-01-03-abc-second.jsonl"


# Right or wrong


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / ROWS, torch.device("cpu"), rehearse=True)


def rows_of(context: Context, *kinds: str) -> list[Row]:
    return [row for row in read_rows(context.rows) if row["kind"] in kinds]


def test_a_wrong_kernel_is_called_wrong_and_not_timed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.scaled_dot_product_attention
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", lambda *x, **options: 1.05 * right(*x, **options))
    case = bench_attention.WHOLE[0]
    jobs = bench_attention.jobs(context, [case], "forward", ["kernels", "torch math"])
    record.time_all("attention forward", context, jobs)
    assert [row["provider"] for row in rows_of(context, "time")] == ["torch math"]
    (wrong,) = rows_of(context, "wrong")
    assert wrong["case"].endswith(": kernels") and "from the exact one" in wrong["problem"]
    assert any("WRONG, not timed" in line for line in summarise(read_rows(context.rows)))

    monkeypatch.setattr(Context, "some", lambda self, cases: [case.small() for case in cases[:2]])
    gpu_work.judge("short", context)
    (verdict,) = rows_of(context, "verdict")
    assert not verdict["passed"] and len(verdict["failed"]) == 2 and "output: error" in verdict["failed"][0]


def test_a_case_that_crashed_is_not_tried_again_and_is_not_right(context: Context) -> None:
    problems = context.some(correctness.short())
    context.write("trying", work="short", case=str(problems[0]))  # and then the process died
    gpu_work.judge("short", context)
    tried = [row["case"] for row in rows_of(context, "trying")]
    assert tried == list(map(str, problems))
    (verdict,) = rows_of(context, "verdict")
    assert verdict["failed"] == [f"{problems[0]}: crashed"]


def test_a_peer_that_fails_or_refuses_leaves_the_rest(context: Context) -> None:
    def refuse() -> Any:
        raise record.Refused("not for me")

    def fail() -> Any:
        raise MemoryError("too large")

    prepare = bench_layer_norm.jobs(context, ["torch eager"])
    record.time_all("norms", context, [("a", "x", refuse), ("a", "y", fail), next(iter(prepare))])
    assert [(row["kind"], row["problem"]) for row in rows_of(context, "refused", "failed")] == [
        ("refused", "not for me"),
        ("failed", "MemoryError: too large"),
    ]
    assert len(rows_of(context, "time")) == 1


def test_each_kind_of_problem_has_a_name_of_its_own_and_rejects_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in correctness.PROBLEMS.items():
        problems = list(map(str, make()))
        assert len(set(problems)) == len(problems) >= 10, name
    norm = correctness.NormProblem((3, 64), True, (torch.bfloat16, torch.bfloat16, torch.bfloat16), 0.1)
    assert not any(finding.problem for finding in correctness.find(norm, "cpu"))
    right = kernels.add_layer_norm
    monkeypatch.setattr(
        kernels, "add_layer_norm", lambda *args, **options: tuple(x + 0.02 for x in right(*args, **options))
    )
    assert "output 0" in [finding.tensor for finding in correctness.find(norm, "cpu") if finding.problem]


# Compiled ahead


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_is_launched() -> None:
    """The same kernels come out for tensors without memory and for real ones."""
    code = """
        from bench import correctness
        from bench.pretended import Chip, made_from

        found = {"meta": set(), "cpu": set()}
        for device, kernels in found.items():
            for name in "general", "short", "norms":
                for problem in correctness.PROBLEMS[name]()[::4]:
                    kernels.update(made_from(Chip(), lambda: problem.run(device)))
        assert found["meta"] == found["cpu"] and len(found["meta"]) > 8, found
    """
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(python(code), cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_everything_that_is_timed_or_judged_can_be_launched_ahead() -> None:
    """But for training, whose kernels its warming up compiles."""
    whole = Context(Path(), torch.device("cpu"), rehearse=False)
    counts = {work: len(gpu_work.launches(work, whole)) for work in (*correctness.PROBLEMS, *gpu_stages("first"))}
    assert {work for work, count in counts.items() if count < 4} == {
        "bench_attention::attention backward",
        "bench_language_model::language model",
        "bench_training::training",
        "bench_training::compiled training",
    }


# Benchmarks say themselves what is done with them


def test_every_stage_has_its_work_and_enough_time() -> None:
    out = Path("out")
    first, second = gpu_first.make_stages(out, False), gpu_second.make_stages(["forward", "D128"], out, False)
    for found, module in (first, gpu_first), (second, gpu_second):
        assert found[-1].end <= 1.2 * module.STAGES_END, "every stage would get less than five sixths of its time"
        work = [command[3] for stage in found for command in stage.commands if command[2] == "bench.gpu_work"]
        assert work and set(work) <= set(gpu_work.pieces_of_work())
    assert gpu_first.END + gpu_second.END <= 12 * 60
    assert [stage.name for stage in first][:6] == [
        "compile",
        "correctness",
        "Hopper forward",
        "Hopper backward",
        "attention forward",
        "attention backward",
    ]
    assert [stage.name for stage in second] == ["tiles", "main shapes", "tests"]


@pytest.mark.slow
def test_benchmarks_have_what_they_declare_and_do_without_pytest_benchmark() -> None:
    """The machine with the GPU lacks it."""
    code = """
        import importlib, sys
        sys.modules["pytest_benchmark"] = None
        from bench.benchmark import benchmarks
        for name, found in benchmarks().items():
            module = importlib.import_module(f"bench.{name}")
            assert module.BENCHMARK == found
            assert hasattr(module, "time_stage") == bool(found.first or found.second), name
            assert hasattr(module, "warm_up") == found.warms_up, name
    """
    done = subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class Pool(contextlib.nullcontext):
    """Remembers what it is asked to do."""

    asked: list[tuple[Any, ...]] = []

    def __enter__(self) -> Pool:
        return self

    def submit(self, *asked: Any) -> concurrent.futures.Future[None]:
        self.asked.append(asked)
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done


@pytest.fixture
def softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example of bench/README.md, as if it lay in bench/."""
    text = (ROOT / "bench" / "README.md").read_text()
    file = tmp_path / "more" / "bench_softmax.py"
    file.parent.mkdir()
    file.write_text(text.partition("```python\n")[2].partition("```")[0])
    monkeypatch.setattr("bench.__path__", [*bench.__path__, str(file.parent)])
    yield file
    sys.modules.pop("bench.bench_softmax", None)


@pytest.mark.long
def test_a_benchmark_is_one_file(softmax: Path, context: Context) -> None:
    """Found by the GPU run, the report and pytest, and nothing else was changed."""
    found = gpu_first.make_stages(context.rows.parent, True)
    place = [stage.name for stage in found].index("softmax")
    assert found[place].end == found[place - 1].end + 10
    work = found[place].commands[0][3]
    context.write("machine", gpu="A GPU", torch="2.0", triton="3.0", commit="abc")
    gpu_work.pieces_of_work()[work](context)
    assert {row["group"] for row in rows_of(context, "time")} == {"softmax M64 N64 fp32", "softmax M64 N1024 fp32"}
    assert not rows_of(context, "failed", "wrong", "refused")
    section = report.make_section(report.read_results(context.rows.parent))
    assert "| Softmax, GB/s by row width | 64 | 1,024 |\n|---|---|---|\n| torch eager | " in section
    assert "\n| formula | " in section
    command = ["-m", "pytest", "-q", "-p", "bench.conftest", "-c", os.devnull, "--benchmark-disable", str(softmax)]
    variables = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, cwd=softmax.parent)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "bench_a.py must have a line BENCHMARK = Benchmark(...)"),
        ("BENCHMARK = 3", "bench_a.py must have a line BENCHMARK = Benchmark(...)"),
        ("NEED = 1\nBENCHMARK = Benchmark(first=[GpuStage('a', NEED, 3)])", "(name 'NEED' is not defined); it may"),
        ("BENCHMARK = Benchmark(first=[GpuStage('a', 1)])", "missing 1 required positional argument: 'seconds'"),
    ],
)
def test_what_a_benchmark_says_wrong_is_told(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bench_a.py").write_text(text)
    with pytest.raises(ValueError) as error:
        benchmark.read_benchmark(tmp_path / "bench_a.py")
    assert told in str(error.value)


def test_a_benchmark_that_cannot_be_imported_costs_the_others_nothing(
    softmax: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax.write_text(softmax.read_text() + "\nimport no_such_package\n")
    monkeypatch.setattr(gpu_work, "worker_pool", lambda *_: Pool())
    gpu_work.compile_all(context)
    (row,) = rows_of(context, "compile")
    assert row["work"] == "bench_softmax::softmax" and "no_such_package" in row["failures"][0]
    assert len(Pool.asked) > 4


# All of it


@pytest.mark.long
@posix
def test_rehearsal_of_both_commands(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    variables = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    for module, out, more in (("gpu_first", first, ()), ("gpu_second", second, ("--first", str(first / ROWS)))):
        command = [sys.executable, "-m", f"bench.{module}", "--out", str(out), "--rehearse", "--commit", "abc", *more]
        command += ["--seconds", "3600"]  # stages that end in time are tested above; here other tests may run beside
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr + (out / stages.LOG).read_text()[-3000:]
        rows = read_rows(out / ROWS)
        results = {(row["stage"], row["result"]) for row in rows if row["kind"] == "stage"}
        assert {result for _, result in results} == {"passed"}, results
        assert "a rehearsal on a CPU" in done.stdout and "ours over the best peer" in done.stdout
        assert "BEGUN, NOT ENDED" not in done.stdout
    rows = read_rows(first / ROWS)
    assert next(row for row in rows if row["kind"] == "machine")["commit"] == "abc"
    assert len({row["stage"] for row in rows if row["kind"] == "stage"}) == len(gpu_first.make_stages(first, True))
    verdicts = {row["kernel"]: row["passed"] for row in rows if row["kind"] == "verdict"}
    assert [verdicts.pop(name) for name in ("general", "short", "norms")] == [True] * 3
    assert len(verdicts) == 5 and not any(verdicts.values())  # no Hopper chip
    groups = by_group(rows)
    for word in "attention forward", "attention backward", "norm forward", "norm backward", "training", "host time":
        assert any(word in group and len(providers) > 1 for group, providers in groups.items()), word
    assert not [row for row in rows if row["kind"] in ("wrong", "failed")]
    assert any(row["kind"] == "tile" for row in read_rows(second / ROWS))
    assert any(row["kind"] == "test" and row.get("skipped") for row in read_rows(second / ROWS))


@pytest.mark.slow
def test_failures_of_tests_are_rows_at_once_and_come_first_the_next_time(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "def test_a(): pass\ndef test_b(): assert 1 == 2, 'why'\ndef test_c(): pass\ndef test_d(): assert 0\n"
    )
    plugin = ["-p", "bench.pytest_rows", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-v", *plugin, "--rows", str(tmp_path / ROWS), str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    for last in ([], ["--last", str(tmp_path / ROWS)]):
        done = subprocess.run([*command, *last], env=variables, capture_output=True, text=True, cwd=tmp_path)
    rows = read_rows(tmp_path / ROWS)
    assert [row["id"] for row in rows[:3]] == ["test_some.py::test_b", "test_some.py::test_d", ""]
    assert rows[0]["message"].startswith("AssertionError: why") and rows[2] == {
        "kind": "test",
        "id": "",
        "passed": 2,
        "failed": 2,
    }
    order = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("test_some.py::")]
    assert order[:4] == [f"test_some.py::test_{x}" for x in "bdac"]


@pytest.mark.slow
def test_a_fault_on_the_gpu_ends_its_worker_and_fails_no_other_test(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "broken = False\n"
        "def test_a():\n    global broken\n    broken = True\n    raise RuntimeError('CUDA error: an illegal access')\n"
        + "".join(f"def test_{x}(): assert not broken, 'CUDA error: the same again'\n" for x in "bcdef")
    )
    plugin = ["-p", "bench.pytest_rows", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-n", "1", *plugin, "--rows", str(tmp_path / ROWS), str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, cwd=tmp_path)
    rows = read_rows(tmp_path / ROWS)
    assert {row["id"] for row in rows if row["id"]} == {"test_some.py::test_a"} and rows[-1]["passed"] == 5


@pytest.mark.parametrize(
    "markexpr, asked",
    [
        ("gpu", True),
        ("gpu and not large", True),
        ("not slow and gpu", True),
        ("(gpu and not slow)", True),
        ("not gpu", False),
        ("gpu or slow", False),
        ("", False),
        ("slow", False),
    ],
)
def test_which_mark_expressions_ask_for_a_gpu(
    markexpr: str, asked: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    conftest = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "runs_on_gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = type("Config", (), {"option": type("Option", (), {"markexpr": markexpr})})
    assert conftest.runs_on_gpu(config) == asked

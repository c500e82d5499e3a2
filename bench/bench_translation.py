"""Translation on a CPU, eager and in float32: calcformer beside torch.nn.Transformer, with the peak of memory.

    python -m bench.bench_translation [--data FOLDER] [--seconds 20] [--threads 1] [--matmul-precision medium]

The model and its training are those of the preset "translate". Without --data sentences are made up, as long as
captions of pictures in English and French are: 17 byte pairs on average.

Training: a step is forward, cross-entropy with label smoothing, backward, clipping and AdamW. calcformer's is
`Trainer.step`, which counts right tokens too. The peer is nn.Transformer as one writes it, with its own masks; "lean"
has the fused AdamW. All begin with the same weights, take turns on the same batches, padded to the longest sentence of
each, and must have the same losses where nothing is dropped, at the highest precision of products. Freed memory is kept
(`keep_memory`), for all alike. A token is one of source or target, the end among them, not padding.

Decoding: greedy, in batches of like sources, as `calcformer.decoding` makes them. Without the cache the decoder is
given all tokens so far at each step; the encoder's states are made once, scores for the last token only. A model that
has not learned ends its answers nowhere or at once: here each ends where the sentence's translation does, in every way,
and all ways must give the same answers.

The peak is that of the resident set of a process of its own, beyond what it had before: Python, its imports and the
sentences; 0 without /proc.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from bench.bench_decoding import recompute_greedy
from bench.benchmark import Benchmark
from bench.check import WrongResult
from bench.machine import describe
from bench.nn_transformer import PlainTransformer
from bench.record import name_row
from bench.timing import play_samples
from calcformer.config import PRESETS, RunConfig
from calcformer.data import Pairs, Task
from calcformer.decoding import greedy_decode
from calcformer.model.cache import Cache
from calcformer.model.layers import Memory
from calcformer.model.settings import ModelConfig
from calcformer.runs.device import keep_memory
from calcformer.tasks.language.tokenizers import SPECIAL, Tokenizer
from calcformer.tasks.language.translations import TOGETHER, TranslationTask
from calcformer.training.trainer import Trainer

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark()

OURS, PLAIN, LEAN = "calcformer", "nn.Transformer", "nn.Transformer, lean"
CACHED, AGAIN, PLAIN_AGAIN = "calcformer, cache", "calcformer, all tokens again", "nn.Transformer, all tokens again"
LIKE, MIXED, DECODING = "2,000 tokens of like lengths", "64 sentences of any length", "greedy decoding"
BATCHES: dict[str, dict[str, int]] = {LIKE: {"batch_tokens": 2_000}, MIXED: {"batch_tokens": 0, "batch_size": 64}}
TRAINED, TESTED = 5_000, 1_000  # sentences made up
ASKED = 200  # of them at once, at most
RATE = 3e-4
SAME = 1e-4  # relative difference of losses that rounding may make in the first steps
TIES = 1e-2  # share of answers that may differ: where two tokens are equally probable but for rounding
STEPS = 4  # of a round
TURNS = 3, 40  # rounds, fewest and most


class Sentences(Task):
    """Pairs of sentences, made up or of a corpus."""

    vocabulary: Any  # a Tokenizer

    def __init__(self, vocabulary: Any, trained: Pairs, tested: Pairs) -> None:
        self.vocabulary, self.trained, self.tested = vocabulary, trained, tested
        self.source_length = max(x.source.shape[1] for x in (trained, tested))
        self.target_length = max(x.target.shape[1] for x in (trained, tested))

    def split(self) -> tuple[Pairs, Pairs]:
        return self.trained, self.tested


def made_up(size: int, trained: int, tested: int) -> Sentences:
    """Tokens by Zipf's law. Lengths are log-normal, those of a pair alike, as those of captions are."""
    vocabulary: Any = Tokenizer([*SPECIAL, *map(str, range(size - len(SPECIAL)))])
    generator = torch.Generator().manual_seed(0)

    def lengths(middle: torch.Tensor, spread: float) -> torch.Tensor:
        drawn = torch.randn(len(middle), generator=generator)
        return (middle * (spread * drawn).exp()).round().clamp(4, 60).long()

    def sentences(counts: torch.Tensor, *begin: int) -> torch.Tensor:
        """Rows of `begin`, so many tokens, the end, and padding."""
        start, longest = len(begin), int(counts.max())
        drawn = torch.rand(len(counts), longest, generator=generator)
        ids = len(SPECIAL) - 1 + ((size - len(SPECIAL)) ** drawn).long()  # as often as 1 / rank
        ids = torch.cat((torch.tensor([begin]).expand(len(counts), -1).long(), ids, ids[:, :1]), dim=1)
        place, end = torch.arange(ids.shape[1]), start + counts[:, None]
        return ids.masked_fill(place == end, vocabulary.eos_id).masked_fill(place > end, vocabulary.pad_id)

    def pairs(count: int) -> Pairs:
        source = lengths(torch.full((count,), 14.5), 0.31)
        target = lengths(1.13 * source, 0.16)
        return Pairs(sentences(source), sentences(target, vocabulary.bos_id))

    return Sentences(vocabulary, pairs(trained), pairs(tested))


class Work(NamedTuple):
    """What is trained and decoded.

    Args:
        data: folder of a corpus; empty for what is made up.
        smoke: as little as shows that it runs.
        precision: of products in training, as torch.set_float32_matmul_precision has it.
    """

    data: str = ""
    smoke: bool = False
    precision: str = "highest"

    def config(self, batches: str = LIKE, **changes: Any) -> RunConfig:
        """The preset, in one process."""
        small = {"batch_tokens": 300} if batches == LIKE else {"batch_tokens": 0, "batch_size": 16}
        sizes = {"width": 64, "hidden": 64, "vocabulary_size": 300, **small} if self.smoke else BATCHES.get(batches, {})
        known = {"data": self.data, "device": "cpu", "processes": 1, "epochs": 1_000}
        return PRESETS["translate"].with_settings({**known, **sizes, **changes})

    def task(self) -> Sentences:
        config = self.config()
        if not self.data:
            counts = (300, 40) if self.smoke else (TRAINED, TESTED)
            return made_up(config.data.vocabulary_size, *counts)  # type: ignore[attr-defined]
        task = config.data.build()
        assert isinstance(task, TranslationTask)
        trained, tested = task.split()
        if task.tests:
            tested = task.test(task.tests[0])
        assert isinstance(trained, Pairs) and isinstance(tested, Pairs)
        return Sentences(task.vocabulary, trained, tested)


# Training

Step = Callable[[Pairs], float]  # trains a step, and returns the loss of a token before it


def build_step(provider: str, task: Task, config: RunConfig) -> Step:
    """The step of a provider; all begin with the same weights."""
    trainer, training, pad_id = Trainer(config, bar=False, task=task), config.training, task.vocabulary.pad_id
    assert isinstance(config.model, ModelConfig) and pad_id is not None
    trainer.model.train()

    def ours(batch: Pairs) -> float:
        trainer.totals.sums.zero_()
        trainer.step(batch, RATE)
        return trainer.totals.result()[0]

    if provider == OURS:
        return ours
    model = PlainTransformer(task, config.model)
    model.copy_weights(trainer.model)
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, (0.9, training.beta2), weight_decay=0.0, fused=provider == LEAN or None
    )

    def theirs(batch: Pairs) -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch.source, batch.decoder_input)
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=pad_id, label_smoothing=training.label_smoothing
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        return loss.item()

    return theirs


def draw_batches(task: Sentences, config: RunConfig) -> Iterator[Pairs]:
    """Those of calcformer's epochs, without the padding that a batch has in common; the same each time."""
    torch.manual_seed(0)
    trainer = Trainer(config, bar=False, task=task)
    while True:
        order, sizes = trainer.order_epoch()
        for batch in task.trained.select(order).batches(sizes):
            yield batch.trim(task.vocabulary.pad_id)


def check_training(task: Sentences, config: RunConfig, steps: int = 3) -> None:
    """Raise WrongResult unless all providers have the same losses in the first steps, where nothing is dropped."""
    config = config.with_settings({"dropout": 0.0})
    batches = list(itertools.islice(draw_batches(task, config), steps))
    losses = {}
    for provider in (OURS, PLAIN, LEAN):
        step = build_step(provider, task, config)
        losses[provider] = [step(batch) for batch in batches]
    require_same_losses(losses)


def require_same_losses(losses: dict[str, list[float]]) -> None:
    for provider, found in losses.items():
        if not all(abs(a / b - 1) <= SAME for a, b in zip(found, losses[OURS], strict=True)):
            raise WrongResult(f"{provider}: losses {found} where calcformer has {losses[OURS]}")


class Speed(NamedTuple):
    """Of each round, the same work for all: seconds by the wall clock, and of this process's CPU time; its tokens."""

    seconds: list[float]
    cpu_seconds: list[float]
    tokens: list[int]

    def times(self, other: Speed, cpu: bool = False) -> float:
        """How many times as fast as another, the median of the rounds."""
        pairs = zip(self.cpu_seconds, other.cpu_seconds) if cpu else zip(self.seconds, other.seconds)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(count / seconds for count, seconds in zip(self.tokens, self.seconds))


Speeds = dict[str, Speed]
Rounds = Iterator[tuple[int, Mapping[str, Callable[[], object]]]]  # tokens, and what each provider does with them


def take_turns(rounds: Rounds, seconds: float) -> Speeds:
    """Time the calls of each round for about `seconds`."""
    speeds: Speeds = {}
    end = time.perf_counter() + seconds
    for turn, (tokens, calls) in enumerate(itertools.islice(rounds, TURNS[1])):
        if turn >= TURNS[0] and time.perf_counter() > end:
            break
        for provider in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            speed = speeds.setdefault(provider, Speed([], [], []))
            started, cpu_started = time.perf_counter(), time.process_time()
            calls[provider]()
            speed.seconds.append(time.perf_counter() - started)
            speed.cpu_seconds.append(time.process_time() - cpu_started)
            speed.tokens.append(tokens)
    return speeds


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def time_training(task: Sentences, config: RunConfig, seconds: float, precision: str = "highest") -> Speeds:
    """Steps in turns, after a check."""
    keep_memory()
    check_training(task, config)
    with matmul_precision(precision):
        return time_steps(task, config, seconds)


def time_steps(task: Sentences, config: RunConfig, seconds: float) -> Speeds:
    steps = {provider: build_step(provider, task, config) for provider in (OURS, PLAIN, LEAN)}
    batches = draw_batches(task, config)
    warm = next(batches)
    for step in steps.values():
        step(warm)

    def take(step: Step, batches: list[Pairs]) -> None:
        for batch in batches:
            step(batch)

    def rounds() -> Rounds:
        while True:
            taken = list(itertools.islice(batches, STEPS))
            sides = [x for batch in taken for x in (batch.source, batch.labels)]
            tokens = sum(int((x != task.vocabulary.pad_id).sum()) for x in sides)
            yield tokens, {provider: partial(take, step, taken) for provider, step in steps.items()}

    return take_turns(rounds(), seconds)


# Decoding


class EndingCache(Cache):
    """A cache that knows how many tokens each of its rows says; made of another."""

    def __init__(self, known: Cache, lengths: torch.Tensor) -> None:
        vars(self).update(vars(known))
        self.lengths = lengths

    def select(self, index: torch.Tensor) -> Cache:
        self.lengths = self.lengths[index]
        return super().select(index)


class Speaker:
    """A model whose greedy answers end where the known translations do.

    Args:
        model: in evaluation mode.
        pairs: the sentences that it will be asked.
    """

    def __init__(self, model: Any, pairs: Pairs, vocabulary: Any) -> None:
        self.model, self.pad_id, self.eos_id = model, vocabulary.pad_id, vocabulary.eos_id
        self.states = deepcopy(model)
        self.states.prediction = torch.nn.Identity()  # so that scores are made where they are asked for
        lengths = (pairs.labels != self.pad_id).sum(dim=1).tolist()
        self.known = {self._real(source): length for source, length in zip(pairs.source, lengths)}

    def _real(self, source: torch.Tensor) -> tuple[int, ...]:
        return tuple(source[source != self.pad_id].tolist())

    def encode(self, source: torch.Tensor) -> Any:
        self.lengths = torch.tensor([self.known[self._real(row)] for row in source])
        return self.model.encode(source)

    def start(self, memory: Memory, length: int) -> EndingCache:
        return EndingCache(self.model.start(memory, length), self.lengths)

    def _end(self, scores: torch.Tensor, lengths: torch.Tensor, said: int) -> torch.Tensor:
        """The end token where `said` tokens are all, and nowhere else."""
        scores[:, self.eos_id] = torch.where(lengths == said, math.inf, -math.inf)
        return scores

    def next(self, token: torch.Tensor, cache: EndingCache) -> torch.Tensor:
        return self._end(self.model.next(token, cache), cache.lengths, cache.length)

    def decode(self, said: torch.Tensor, memory: Any) -> torch.Tensor:
        """Scores (B, 1, V) of what follows all of said (B, T) int64, which is computed again."""
        scores = self.model.prediction(self.states.decode(said, memory)[:, -1])
        return self._end(scores, self.lengths, said.shape[1])[:, None]


Answer = Callable[[Any, torch.Tensor, int, Any], torch.Tensor]


def answer_all(speaker: Speaker, way: Answer, pairs: Pairs, vocabulary: Any) -> torch.Tensor:
    """Answers (N, T) int64, in batches of like sources."""
    source, said = pairs.source, torch.empty_like(pairs.labels)
    lengths = (source != vocabulary.pad_id).sum(dim=1)
    for rows in lengths.argsort(stable=True).split(TOGETHER // source.shape[1]):
        said[rows] = way(speaker, source[rows, : int(lengths[rows].max())], said.shape[1], vocabulary)
    return said


def build_answers(task: Sentences, config: RunConfig) -> dict[str, Callable[[Pairs], torch.Tensor]]:
    """How each provider answers test sentences; all have the same weights."""
    assert isinstance(config.model, ModelConfig)
    torch.manual_seed(0)
    model, peer = config.model.build(task).eval(), PlainTransformer(task, config.model).eval()
    peer.copy_weights(model)
    ours, theirs = (Speaker(x, task.tested, task.vocabulary) for x in (model, peer))
    ways: dict[str, tuple[Speaker, Answer]] = {
        CACHED: (ours, greedy_decode),
        AGAIN: (ours, recompute_greedy),
        PLAIN_AGAIN: (theirs, recompute_greedy),
    }
    return {name: partial(answer_all, *pair, vocabulary=task.vocabulary) for name, pair in ways.items()}


def require_same_answers(answers: dict[str, torch.Tensor]) -> None:
    """Raise WrongResult unless all providers say the same."""
    for provider, said in answers.items():
        differing = float((said != answers[CACHED]).any(dim=1).float().mean())
        if differing > TIES:
            raise WrongResult(f"{provider}: {differing:.1%} of the answers are not those of {CACHED}")


def parts_tested(task: Sentences) -> Iterator[Pairs]:
    """The test sentences, some each time, again and again."""
    count = math.ceil(len(task.tested) / ASKED)
    for place in itertools.cycle(range(count)):
        yield task.tested.select(torch.arange(place, len(task.tested), count)).trim(task.vocabulary.pad_id)


def time_decoding(task: Sentences, config: RunConfig, seconds: float) -> Speeds:
    """Answers to test sentences in turns; all are compared."""
    keep_memory()
    answers = build_answers(task, config)

    def rounds() -> Rounds:
        for pairs in parts_tested(task):
            said: dict[str, torch.Tensor] = {}

            def answer(provider: str, pairs: Pairs = pairs, said: dict[str, torch.Tensor] = said) -> None:
                said[provider] = answers[provider](pairs)

            tokens = int((pairs.labels != task.vocabulary.pad_id).sum())
            yield tokens, {provider: partial(answer, provider) for provider in answers}
            require_same_answers(said)

    return take_turns(rounds(), seconds)


# Memory


RESET = Path("/proc/self/clear_refs")


def resident(word: str) -> int:
    """Bytes of this process's resident set: "VmRSS" now, "VmHWM" at most so far."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(word)), 0)


def peak_here(work: Work, provider: str, batches: str, threads: int) -> int:
    """Bytes that this process takes at most for a provider's work, beyond what it has now."""
    torch.set_num_threads(threads)
    task, config = work.task(), work.config(batches)
    keep_memory()
    if RESET.exists():
        RESET.write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    if provider in (OURS, PLAIN, LEAN):
        step, drawn = build_step(provider, task, config), list(itertools.islice(draw_batches(task, config), 20))
        with matmul_precision(work.precision):
            for batch in drawn:
                step(batch)
    else:
        build_answers(task, config)[provider](next(parts_tested(task)))
    return resident("VmHWM") - before


def peak(*arguments: Any) -> int:
    """`peak_here` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_here, *arguments).result()


def group_of(batches: str, threads: int) -> str:
    what = "greedy decoding" if batches == DECODING else f"training step, {batches}"
    return f"translation {what}, fp32 on CPU, {threads} thread{'s' if threads > 1 else ''}"


def measure(task: Sentences, work: Work, batches: str, seconds: float) -> Speeds:
    config = work.config(batches)
    if batches == DECODING:
        return time_decoding(task, config, seconds)
    return time_training(task, config, seconds, work.precision)


@cache
def measured(batches: str, smoke: bool) -> Speeds:
    work = Work(smoke=smoke)
    return measure(work.task(), work, batches, 0.0 if smoke else 20.0)


ROWS = [(batches, provider) for batches in BATCHES for provider in (OURS, PLAIN, LEAN)]
ROWS += [(DECODING, provider) for provider in (CACHED, AGAIN, PLAIN_AGAIN)]


@pytest.mark.parametrize(("batches", "provider"), ROWS)
def test_translation(benchmark: BenchmarkFixture, batches: str, provider: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("measured on a CPU")
    name_row(benchmark, group_of(batches, torch.get_num_threads()), provider)
    speeds = measured(batches, benchmark.disabled)
    benchmark.extra_info.update(
        tokens_per_second=speeds[provider].tokens_per_second,
        calcformer_times_this=speeds[OURS if OURS in speeds else CACHED].times(speeds[provider]),
        method="wall clock, providers in turns",
    )
    play_samples(benchmark, speeds[provider].seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with a corpus, English and French")
    parser.add_argument("--seconds", type=float, default=20, help="for each of three tables (20)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of products in training, as torch.set_float32_matmul_precision has it (highest)",
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    info, work = describe(), Work(options.data, precision=options.matmul_precision)
    print(f"CPU, {info['cpu_count']} cores, torch {info['torch']}, commit {info['commit']}, {work.precision} precision")
    task = work.task()
    for batches in (*BATCHES, DECODING):
        speeds = measure(task, work, batches, options.seconds)
        first = next(iter(speeds.values()))
        print(f"\n{group_of(batches, options.threads)}, medians of {len(first.seconds)} rounds in turns")
        print(f"{'provider':<32} tokens/s  calcformer is  by CPU time  peak MB")
        for provider, speed in speeds.items():
            bytes_ = peak(work, provider, batches, options.threads)
            print(
                f"{provider:<32} {speed.tokens_per_second:>8,.0f}  {first.times(speed):>11.2f} x  "
                f"{first.times(speed, cpu=True):>9.2f} x  {bytes_ / 1e6:>7,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Problems a second of S1's model, untrained: greedy decoding with and without a cache, and a beam of four.

Every answer has six tokens, the most there are: no row is finished early, and both ways of greedy decoding make as many
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from bench.benchmark import Benchmark
from bench.check import WrongResult
from bench.record import name_row
from bench.timing import measure, play_samples
from calcformer.config import PRESETS
from calcformer.data import Vocabulary
from calcformer.decoding import beam_search, greedy_decode, log_probability
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.tasks.arithmetic.formulas import FormulaTask

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BENCHMARK = Benchmark()

Decode = Callable[[EncoderDecoder, torch.Tensor, int, Vocabulary], torch.Tensor]

ROUNDING = 1e-4  # in a log-probability
TIES = 2e-3  # share of rows that may differ, where two tokens are equally probable but for rounding


@torch.no_grad()
def recompute_greedy(model: EncoderDecoder, source: torch.Tensor, length: int, vocabulary: Vocabulary) -> torch.Tensor:
    """`greedy_decode` as it was before there was a cache: every token computes all tokens before it again."""
    fill = vocabulary.eos_id if vocabulary.pad_id is None else vocabulary.pad_id
    memory = model.encode(source)
    said = torch.full((source.shape[0], length + 1), fill, dtype=torch.long, device=source.device)
    said[:, 0] = vocabulary.bos_id
    finished = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
    for place in range(length):
        scores = model.decode(said[:, : place + 1], memory)[:, -1]
        if vocabulary.pad_id is not None:
            scores[:, vocabulary.pad_id] = -torch.inf
        token = scores.argmax(dim=-1)
        said[:, place + 1] = torch.where(finished, fill, token)
        finished |= token == vocabulary.eos_id
        if finished.all():
            break
    return said[:, 1:]


def beam_of_four(model: EncoderDecoder, source: torch.Tensor, length: int, vocabulary: Vocabulary) -> torch.Tensor:
    return beam_search(model, source, length, vocabulary, 4)[0][:, 0]


WAYS: dict[str, dict[str, Decode]] = {
    "greedy": {"cache": greedy_decode, "prefix computed again": recompute_greedy},
    "beam of 4": {"cache": beam_of_four},
}
ROWS = [(batch, way, provider) for batch in (1, 100, 1_000, 10_000) for way in WAYS for provider in WAYS[way]]
CHECKED = 1_000  # problems


class S1:
    """An untrained model of S1's size, which never says the end token: every answer takes all its six tokens."""

    def __init__(self, device: torch.device) -> None:
        config = PRESETS["formula"]
        self.task = FormulaTask()
        torch.manual_seed(0)
        self.model = config.model.build(self.task).to(device).eval()
        torch.nn.init.constant_(self.model.prediction.bias[self.task.vocabulary.eos_id], -1e4)

    def problems(self, count: int) -> torch.Tensor:
        """Sources (count, S) on the model's device."""
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(0, self.task.size, (count,), generator=generator)
        return self.task.encode(index).source.to(self.model.prediction.bias.device)

    def decode(self, decode: Decode, source: torch.Tensor) -> torch.Tensor:
        return decode(self.model, source, self.task.target_length - 1, self.task.vocabulary)


def check(s1: S1, source: torch.Tensor) -> None:
    """Raise WrongResult unless greedy answers are those without a cache, and a beam's scores those of its answers.

    Nothing says that the answers of a beam are more probable than greedy ones: it can lose what is good only later.
    """
    known, found = (s1.decode(decode, source) for decode in (recompute_greedy, greedy_decode))
    differing = float((known != found).any(dim=1).float().mean())
    if differing > TIES:
        raise WrongResult(f"greedy decoding: {differing:.1%} of the answers are not those without a cache")
    vocabulary = s1.task.vocabulary
    answers, scores = beam_search(s1.model, source, s1.task.target_length - 1, vocabulary, 4)
    error = float((scores[:, 0] - log_probability(s1.model, source, answers[:, 0], vocabulary)).abs().max())
    if not error <= ROUNDING:
        raise WrongResult(f"beam search: a score is {error:.1e} from its answer's log-probability")


@pytest.fixture(scope="module")
def s1(device: torch.device) -> S1:
    """The model, whose decoding was found to be right."""
    found = S1(device)
    check(found, found.problems(CHECKED))
    return found


@pytest.mark.parametrize(("batch", "way", "provider"), ROWS)
def test_decoding(
    benchmark: BenchmarkFixture, batch: int, way: str, provider: str, device: torch.device, s1: S1
) -> None:
    if benchmark.disabled and batch > 100:
        pytest.skip("the smoke test decodes few problems")
    where = "GPU" if device.type == "cuda" else "CPU"
    name_row(benchmark, f"S1 {way} decoding B{batch} T6 fp32 on {where}", provider)
    source, function = s1.problems(batch), WAYS[way][provider]

    def call() -> None:
        s1.decode(function, source)

    if benchmark.disabled:
        benchmark(call)
        return
    samples = measure([call], device, graph=False)  # after each token the host asks whether all have finished
    benchmark.extra_info.update(problems_per_second=batch / samples.median, method=samples.method)
    play_samples(benchmark, samples.seconds)

"""Examples as tensors: the form in which data sets, batches and generated problems are all held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

__all__ = ["Examples", "Labelled", "Pairs", "Texts", "held_out_side", "like_lengths", "shared"]

AnyExamples = TypeVar("AnyExamples", bound="Examples")


@dataclass(frozen=True)
class Examples:
    """N examples: tensors with a row for each. What they are, and what a model reads and must say, subclasses tell.

    Args:
        problem: (N, P) int64, what a task knows of each example beside its tokens, None where that is nothing.
    """

    problem: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model is called with; first comes what is asked."""
        raise NotImplementedError

    @property
    def labels(self) -> torch.Tensor:
        """What it must say, (N, T) or (N,) int64: its scores are (N, T, V) or (N, V)."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def apply(self: AnyExamples, function: Callable[[torch.Tensor], torch.Tensor]) -> AnyExamples:
        """What a function makes of each tensor."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return type(self)(**{name: x if x is None else function(x) for name, x in tensors.items()})

    def select(self: AnyExamples, index: torch.Tensor) -> AnyExamples:
        """The rows `index` (M,) int64, in that order."""
        return self.apply(lambda x: x.index_select(0, index))

    def to(self: AnyExamples, device: torch.device | str) -> AnyExamples:
        return self.apply(lambda x: x.to(device))

    def part(self: AnyExamples, index: int, parts: int) -> AnyExamples:
        """The part `index` of `parts`, in order and as equal as can be."""
        start, end = (len(self) * place // parts for place in (index, index + 1))
        return self.apply(lambda x: x[start:end])

    def trim(self: AnyExamples, pad_id: int | None) -> AnyExamples:
        """Cut the columns at the end that are padding in every row: fewer places to compute, the same results.

        Looks at the values, so on a GPU it waits for the device, and batches then differ in shape.
        """
        if pad_id is None:
            return self
        tokens = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "problem"}
        cut: dict[str, Any] = {
            name: ids[:, : int((ids != pad_id).any(dim=0).sum())] for name, ids in tokens.items() if ids.dim() == 2
        }
        return replace(self, **cut)

    def batches(self: AnyExamples, sizes: int | Sequence[int]) -> Iterator[AnyExamples]:
        """Consecutive batches: of so many rows each, the last perhaps fewer; or of `sizes`, one after the other."""
        if isinstance(sizes, int):
            sizes = [min(sizes, len(self) - start) for start in range(0, len(self), sizes)]
        start = 0
        for size in sizes:
            yield self.apply(lambda x: x[start : start + size])
            start += size

    def lengths(self, pad_id: int | None) -> torch.Tensor:
        """How many tokens each of an example's sequences has, (N, sequences) int64: what it must say first."""
        tokens = [ids for ids in (self.labels, *self.inputs) if ids.dim() == 2]
        real = [torch.ones_like(ids) if pad_id is None else (ids != pad_id).long() for ids in tokens]
        return torch.stack([ids.sum(dim=1) for ids in real], dim=1)


@dataclass(frozen=True)
class Pairs(Examples):
    """Problems with answers, for an encoder-decoder.

    Args:
        source: (N, S) int64, the problem, ending with the end token, then padding.
        target: (N, T) int64, the begin token, the answer, the end token, then padding.
    """

    source: torch.Tensor
    target: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.source, self.decoder_input

    @property
    def decoder_input(self) -> torch.Tensor:
        """(N, T - 1): what the decoder reads."""
        return self.target[:, :-1]

    @property
    def labels(self) -> torch.Tensor:
        return self.target[:, 1:]


@dataclass(frozen=True)
class Texts(Examples):
    """Texts for a language model: ids (N, T) int64, and the token that follows each, (N, T) int64."""

    ids: torch.Tensor
    following: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return (self.ids,)

    @property
    def labels(self) -> torch.Tensor:
        return self.following

    def trim(self, pad_id: int | None) -> Texts:
        used = self.ids.shape[1] if pad_id is None else int((self.ids != pad_id).any(dim=0).sum())
        return replace(self, ids=self.ids[:, :used], following=self.following[:, :used])


@dataclass(frozen=True)
class Labelled(Examples):
    """Texts of a class: ids (N, T) int64, padded, and label (N,) int64."""

    ids: torch.Tensor
    label: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return (self.ids,)

    @property
    def labels(self) -> torch.Tensor:
        return self.label


def like_lengths(lengths: torch.Tensor, order: torch.Tensor, most: int) -> tuple[torch.Tensor, list[int]]:
    """Batches of examples whose lengths are alike, so that next to nothing of them is padding.

    Where the batches are cut is decided by the lengths alone: in any order there are as many.

    Args:
        lengths: (N, K) int64, of the K sequences of each example.
        order: (N,) int64, a random order: which of two examples of the same lengths comes first, and which batch.
        most: tokens of a batch, its padding among them, counted on the longer side; one example may have more.

    Returns:
        The examples in the order of the epoch, (N,) int64, and the sizes of its batches.
    """
    for column in reversed(range(lengths.shape[1])):
        order = order[lengths[order, column].argsort(stable=True)]
    longest = lengths[order].amax(dim=1).tolist()
    sizes, widest = [0], 0
    for length in longest:
        widest = max(widest, length)
        if sizes[-1] and (sizes[-1] + 1) * widest > most:
            sizes.append(0)
            widest = length
        sizes[-1] += 1
    batches = order.split(sizes)
    chosen = torch.randperm(len(sizes)).tolist()
    return torch.cat([batches[place] for place in chosen]), [sizes[place] for place in chosen]


def shared(trained: Examples, held_out: Examples) -> int:
    """How many of the held-out examples ask what one of the others asks."""
    asked = trained.inputs[0].flatten(1), held_out.inputs[0].flatten(1)
    width = max(rows.shape[1] for rows in asked)  # sentences are padded by zeros, on each side to its longest
    rows = torch.cat([torch.nn.functional.pad(rows, (0, width - rows.shape[1])) for rows in asked])
    factors = torch.randint(-(2**62), 2**62, rows.shape[1:], generator=torch.Generator().manual_seed(0))
    keys = (rows * factors.to(rows.device)).sum(dim=1)  # wraps; of different rows it is alike once in 2^63
    return int(torch.isin(keys[len(trained) :], keys[: len(trained)]).sum())


def held_out_side(key: torch.Tensor, fraction: float, seed: int = 0) -> torch.Tensor:
    """Which problems are held out, decided by a hash of the problem and nothing else.

    A problem therefore falls on the same side in every stream that is drawn, on every device: training on
    generated problems cannot leak into the held-out side.

    Args:
        key: (N,) int64, one number for each distinct problem.
        fraction: the share held out, in 0..1.
        seed: chooses another split.

    Returns:
        (N,) bool, True = held out.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    offset = (seed + 1) * 0x1E3779B97F4A7C15 % 2**64
    value = key + (offset - 2**64 if offset >= 2**63 else offset)  # all wraps modulo 2^64, as the hash wants
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    value = value ^ ((value >> 31) & ((1 << 33) - 1))
    return (value & 0xFFFFFFFF) < int(fraction * 2**32)

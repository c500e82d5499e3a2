"""Examples as two tensors: the form in which data sets, batches and generated problems are all held."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from calcformer.data.vocab import Vocabulary

__all__ = ["Examples", "Task", "held_out_side"]


@dataclass(frozen=True)
class Examples:
    """N problems with their answers.

    Args:
        source: (N, S) int64, the problem, ending with the end token, then padding.
        target: (N, T) int64, the begin token, the answer, the end token, then padding.
    """

    source: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return self.source.shape[0]

    @property
    def decoder_input(self) -> torch.Tensor:
        """(N, T - 1): what the decoder reads."""
        return self.target[:, :-1]

    @property
    def labels(self) -> torch.Tensor:
        """(N, T - 1): what it must say at each of those places."""
        return self.target[:, 1:]

    def select(self, index: torch.Tensor) -> "Examples":
        """The rows `index` (M,) int64, in that order."""
        return Examples(self.source.index_select(0, index), self.target.index_select(0, index))

    def to(self, device: torch.device | str) -> "Examples":
        return Examples(self.source.to(device), self.target.to(device))

    def part(self, index: int, parts: int) -> "Examples":
        """The part `index` of `parts`, in order and as equal as can be."""
        start, end = (len(self) * place // parts for place in (index, index + 1))
        return Examples(self.source[start:end], self.target[start:end])

    def trim(self, pad_id: int | None) -> "Examples":
        """Cut the columns at the end that are padding in every row: fewer places to compute, the same results.

        Looks at the values, so on a GPU it waits for the device, and batches then differ in shape.
        """
        if pad_id is None:
            return self
        source, target = (ids[:, : int((ids != pad_id).any(dim=0).sum())] for ids in (self.source, self.target))
        return Examples(source, target)

    def batches(self, size: int, order: torch.Tensor | None = None) -> Iterator["Examples"]:
        """Consecutive batches of `size` rows (the last may be smaller), in the `order` (N,) given, if any."""
        chosen = self if order is None else self.select(order)
        for start in range(0, len(self), size):
            yield Examples(chosen.source[start : start + size], chosen.target[start : start + size])


class Task(Protocol):
    """What training, decoding and the command line need to know of a kind of problem."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Shared by source and target."""

    @property
    def source_length(self) -> int:
        """Tokens of the longest source, end token included."""

    @property
    def target_length(self) -> int:
        """Tokens of the longest target, begin and end token included."""

    @property
    def size(self) -> int:
        """The number of distinct problems."""

    @property
    def fresh(self) -> bool:
        """Whether each epoch draws its problems anew."""

    def operands(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The problems numbered `index` (N,) in 0..size-1: a, b (N,) int64, and True (N,) where they are added."""

    def write(self, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> Examples:
        """Problems as tokens, with their answers.

        Args:
            a, b: (N,) int64, the operands.
            plus: (N,) bool, True = a+b, False = a-b.
        """

    def encode(self, index: torch.Tensor) -> Examples:
        """The problems numbered `index` (N,) in 0..size-1."""

    def trained_on(self, index: torch.Tensor) -> torch.Tensor:
        """Which of the problems numbered `index` (N,) may have been in training: (N,) bool."""

    def draw(self, generator: torch.Generator) -> Examples:
        """The problems of an epoch where they are `fresh`, on the generator's device."""

    def split(self) -> tuple[Examples, Examples]:
        """Training and held-out examples; where problems are fresh, those of one epoch."""

    def read_question(self, text: str) -> tuple[int, int, bool]:
        """A problem typed by a user: a, b, and True for a+b; InputError where the model cannot know it."""

    def question(self, a: int, b: int, plus: bool) -> str:
        """A problem as a user types it."""

    def right_answer(self, a: int, b: int, plus: bool) -> str:
        """What arithmetic says, as `decode_answer` writes it."""

    def decode_answer(self, ids: list[int]) -> str:
        """The answer as text."""


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

"""What a piece of work costs at least: floating-point operations, and bytes through device memory.

Operations are those of matrix products, a multiplication and an addition counting two. Bytes count each input once and
each output once, whatever an implementation reads again. The floor of a time is the larger of operations over the rate
of the matrix units and bytes over the bandwidth of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = "forward", "backward"

SEED = 20_260_101  # of the random inputs
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Work:
    """One call: flops for the matrix units, bytes, and the dtype whose matrix rate bounds it."""

    flops: int
    bytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionCase:
    """Attention on query (B, H, S, D), key and value (B, Hkv, S, D).

    Args:
        kv_heads: Hkv, 0 for H.
        mask: "padding" is bool (B, 1, 1, S), True = may attend; "bias" is a learned (1, H, S, S) of the inputs' dtype.
    """

    batch: int
    heads: int
    length: int
    head_size: int
    is_causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 0
    mask: Literal["", "padding", "bias"] = ""
    dropout: float = 0.0

    @property
    def groups(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // (self.kv_heads or self.heads)

    def __str__(self) -> str:
        words = [f"B{self.batch} H{self.heads}"]
        words += [f"Hkv{self.kv_heads}"] if self.kv_heads else []
        words += [f"S{self.length} D{self.head_size}", "causal" if self.is_causal else "full"]
        words += [self.mask] if self.mask else []
        words += [f"dropout {self.dropout}"] if self.dropout else []
        return " ".join([*words, NAMES[self.dtype]])

    def without_dropout(self) -> AttentionCase:
        return replace(self, dropout=0.0)

    def small(self) -> AttentionCase:
        """The same on a few numbers, for a rehearsal."""
        length = min(self.length, 128)
        return AttentionCase(8, 4, length, 16, self.is_causal, torch.float32, 0, self.mask, self.dropout)

    def work(self, direction: Direction) -> Work:
        """Forward: 2 products of S x S x D a head. Backward: 5 of them, the scores being made anew. Causal: half.

        Backward reads query, key, value and the output's gradient and writes three gradients; padding is not deducted.
        """
        products = 2 if direction == "forward" else 5
        flops = products * 2 * self.batch * self.heads * self.length**2 * self.head_size // (1 + self.is_causal)
        query = self.batch * self.heads * self.length * self.head_size
        key = query // self.groups
        elements = 2 * query + 2 * key if direction == "forward" else 3 * query + 4 * key
        size = elements * self.dtype.itemsize
        if self.mask == "padding":
            size += self.batch * self.length
        elif self.mask == "bias":
            bias = self.heads * self.length**2 * self.dtype.itemsize
            size += bias if direction == "forward" else 2 * bias
        return Work(flops, size, self.dtype)


@dataclass(frozen=True)
class NormCase:
    """A norm of M rows of N columns, with a weight, and for layer norm a bias, of the same dtype.

    Args:
        kind: those with "add" first add dropout(input) to a residual, and give that sum back beside the output, as a
            transformer with pre-norm asks for it.
        dropout: its probability.
    """

    rows: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    kind: Literal["layer norm", "rms norm", "add + layer norm", "add + rms norm"] = "layer norm"
    dropout: float = 0.0

    def __str__(self) -> str:
        return self.group()

    def group(self, direction: str = "") -> str:
        """The work in words."""
        words = [self.kind, direction, f"M{self.rows} N{self.columns}"]
        words += [f"dropout {self.dropout}"] if self.dropout else []
        return " ".join(filter(None, [*words, NAMES[self.dtype]]))

    def small(self) -> NormCase:
        """The same on a few numbers, for a rehearsal."""
        return NormCase(16, 64, torch.float32, self.kind, self.dropout)

    @property
    def centre(self) -> bool:
        """Whether the mean is taken off, and a bias added."""
        return "layer" in self.kind

    @property
    def adds(self) -> bool:
        return "add" in self.kind

    def work(self, direction: Direction) -> Work:
        """Bytes alone; no matrix products.

        Forward reads the input and writes the output; the sum adds a residual read and a sum written. Backward reads
        what was normalised and the output's gradient and writes the input's; the sum adds a gradient read, and with
        dropout one written, since only then do input and residual differ in theirs. Parameters and their gradients
        count, and so do 1 / deviation of each row and for layer norm its mean (float32): written, then read. The
        numbers that dropout draws can be drawn again, and do not count.
        """
        if direction == "forward":
            tensors, parameters = 2 + 2 * self.adds, 1 + self.centre
        else:
            tensors, parameters = 3 + self.adds + bool(self.dropout), 2 + self.centre
        elements = (tensors * self.rows + parameters) * self.columns
        return Work(0, elements * self.dtype.itemsize + 4 * self.rows * (1 + self.centre), self.dtype)


def attention_cases(on_gpu: bool) -> list[AttentionCase]:
    """The full set for a GPU, at constant tokens and width; a small one for a CPU."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if not on_gpu:
        return [
            AttentionCase(2, 4, 256, 64, dtype=fp32),
            AttentionCase(2, 4, 256, 64, True, fp32),
            AttentionCase(2, 4, 256, 64, True, bf16),
            AttentionCase(2, 4, 128, 64, dtype=fp32, mask="bias"),
            AttentionCase(2, 4, 128, 64, True, fp32, kv_heads=2),
            AttentionCase(2, 4, 128, 64, dtype=fp32, dropout=0.1),
        ]
    tokens, width = 16_384, 2_048
    cases = [
        AttentionCase(tokens // length, width // head_size, length, head_size, is_causal)
        for head_size in (64, 128, 256)
        for is_causal in (True, False)
        for length in (128, 512, 1_024, 2_048, 4_096, 8_192, 16_384)
    ]
    return cases + [
        AttentionCase(4, 16, 4_096, 128, True, fp16),
        AttentionCase(4, 16, 1_024, 64, True, fp32),
        AttentionCase(1, 64, 4_096, 128, True, kv_heads=8),
        AttentionCase(1, 64, 8_192, 128, True, kv_heads=8),
        AttentionCase(8, 16, 2_048, 128, mask="padding"),
        AttentionCase(8, 16, 1_024, 64, mask="bias"),
        AttentionCase(4, 16, 2_048, 128, mask="bias"),
        AttentionCase(8, 16, 2_048, 128, True, dropout=0.1),
    ]


def short_cases(on_gpu: bool) -> list[AttentionCase]:
    """Short sequences, the full set for a GPU: 32,768 heads, then from 4,096 to 262,144 of them."""
    if not on_gpu:
        return [AttentionCase(125, 4, 9, 16, dtype=torch.float32, mask=mask) for mask in ("", "padding")]
    lengths = ((5, True), (9, False), (16, False), (32, True), (64, False))
    cases = [AttentionCase(8_192, 4, n, size, is_causal) for size in (16, 32, 64) for n, is_causal in lengths]
    cases += [AttentionCase(batch, 4, n, 32, n == 5) for n in (5, 16) for batch in (1_024, 16_384, 65_536)]
    return cases + [
        AttentionCase(8_192, 4, 9, 16, mask="padding"),
        AttentionCase(8_192, 4, 9, 16, dropout=0.1),
        AttentionCase(8_192, 4, 9, 16, dtype=torch.float32),
        AttentionCase(2_048, 16, 16, 64, kv_heads=4),
    ]


def norm_cases(on_gpu: bool) -> list[NormCase]:
    """The full set for a GPU, 128 MiB of bf16 an input; a small one for a CPU."""
    fp32, fp16 = torch.float32, torch.float16
    if not on_gpu:
        return [
            NormCase(1_125, 64, fp32),
            NormCase(512, 1_024, fp32),
            NormCase(1_125, 64, fp32, "rms norm"),
            NormCase(1_125, 64, fp32, "add + layer norm"),
            NormCase(1_125, 64, fp32, "add + layer norm", 0.1),
            NormCase(512, 1_024, fp32, "add + rms norm"),
        ]
    elements, some = 2**26, (256, 1_024, 4_096, 8_192)
    cases = [NormCase(elements // columns, columns) for columns in (64, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384)]
    cases += [NormCase(elements // columns, columns, kind="rms norm") for columns in some]
    cases += [NormCase(elements // columns, columns, kind="add + layer norm") for columns in some]
    cases += [NormCase(elements // columns, columns, kind="add + layer norm", dropout=0.1) for columns in some]
    cases += [NormCase(elements // columns, columns, kind="add + rms norm") for columns in some]
    return cases + [NormCase(13_001, 5_120), NormCase(2**14, 4_096, fp32), NormCase(2**16, 1_024, fp16)]

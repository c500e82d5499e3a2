"""What is looked at in the first minutes on a GPU, and what its pieces of work share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench import correctness
from bench.accounting import AttentionCase, Direction, NormCase
from bench.rows import read_rows, write_row

DIRECTIONS: tuple[Direction, ...] = "forward", "backward"
SECONDS = 0.1  # of samples a row
FLEX, COMPILE = "FlexAttention compiled", "torch.compile"  # providers that compile for seconds

# D = 128 first, the size most models have; then what else decides on a kernel.
MAIN = [AttentionCase(16_384 // length, 16, length, 128, True) for length in (4_096, 1_024, 16_384)]
ATTENTION = [
    *MAIN,
    AttentionCase(4, 16, 4_096, 128),
    AttentionCase(4, 32, 4_096, 64, True),
    AttentionCase(4, 8, 4_096, 256, True),
    AttentionCase(1, 64, 4_096, 128, True, kv_heads=8),
    AttentionCase(8, 16, 2_048, 128, mask="padding"),
    AttentionCase(4, 16, 2_048, 128, mask="bias"),
    AttentionCase(8, 16, 2_048, 128, True, dropout=0.1),
]
FLEX_CASES = ATTENTION[0], ATTENTION[3]  # compiles for seconds a shape
SHORT = [AttentionCase(8_192, 4, n, 32, n in (5, 32)) for n in (9, 16, 32, 64, 5)]
NORMS = [
    NormCase(2**26 // columns, columns, kind=kind, dropout=dropout)  # type: ignore[arg-type]
    for columns in (1_024, 4_096, 256, 8_192)
    for kind, dropout in (("layer norm", 0.0), ("add + layer norm", 0.1), ("rms norm", 0.0))
]

T = TypeVar("T")


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Context(NamedTuple):
    """Where a piece of work writes its rows, on which device it runs, and whether it is only rehearsed."""

    rows: Path
    device: torch.device
    rehearse: bool

    def write(self, kind: str, **fields: Any) -> None:
        write_row(self.rows, kind, **fields)

    def untried(self, work: str, cases: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """The cases that no earlier start of this piece of work has tried: one that crashed it is not tried twice."""
        tried = {row["case"] for row in read_rows(self.rows) if row["kind"] == "trying" and row["work"] == work}
        for case in cases:
            if name(case) not in tried:
                self.write("trying", work=work, case=name(case))
                yield case

    def synchronize(self) -> None:
        """Wait for the GPU, which raises what went wrong on it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def some(self, cases: Sequence[Any]) -> list[Any]:
        """All cases; in a rehearsal up to four that are small."""
        return [rehearsed(case) for case in cases[:: max(1, len(cases) // 3)]] if self.rehearse else list(cases)


def rehearsed(case: Any) -> Any:
    """A case of the same kind on a few numbers."""
    if isinstance(case, AttentionCase):
        length = min(case.length, 128)
        return AttentionCase(8, 4, length, 16, case.is_causal, torch.float32, 0, case.mask, case.dropout)
    if isinstance(case, NormCase):
        return NormCase(16, 64, torch.float32, case.kind, case.dropout)
    return correctness.small(case)

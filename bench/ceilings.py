"""What this machine can do at most: a large copy and a large matrix product on random numbers.

python -m bench.ceilings
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from bench.accounting import NAMES, Work
from bench.timing import measure


class Ceilings(NamedTuple):
    """copy_bytes: a second, read plus written. matrix_flops: a second, of a square product in the dtype asked for."""

    copy_bytes: float
    matrix_flops: float

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at least here."""
        return max(work.flops / self.matrix_flops, work.bytes / self.copy_bytes)

    def bound(self, work: Work) -> str:
        """Which of the two is the larger."""
        return "matrix" if work.flops / self.matrix_flops > work.bytes / self.copy_bytes else "memory"


@functools.cache
def copy_bytes(device: torch.device) -> float:
    """Bytes a second, read plus written, of a copy far larger than any cache.

    By a kernel: what copies memory for PyTorch, cudaMemcpy, took 0.65 of the rate for some sizes on an H200.
    """
    count = 2**30 if device.type == "cuda" else 2**25
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    return 2 * count / measure([lambda: torch.neg(source, out=target)], device).median


@functools.cache
def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product; float32 at `torch.get_float32_matmul_precision()`."""
    size = 1_024 if device.type != "cuda" else 4_096 if dtype.itemsize > 2 else 8_192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / measure([lambda: torch.mm(a, b, out=out)], device).median


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured once a process."""
    return Ceilings(copy_bytes(device), matrix_flops(device, dtype))


def main() -> None:
    from bench.machine import describe, pick_device

    device = pick_device()
    print(describe()["gpu"] or f"CPU, {torch.get_num_threads()} threads")
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else torch.no_grad()
    with stream:
        print(f"copy         {copy_bytes(device) / 1e9:10.1f} GB/s, read plus written")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            print(f"matrix {NAMES[dtype]}  {matrix_flops(device, dtype) / 1e12:10.3f} TFLOP/s")


if __name__ == "__main__":
    main()

"""PyTorch's own samples for scaled_dot_product_attention, those its test suite runs on.

They live in a private module of PyTorch that, when imported, changes global settings and wants a test package
(expecttest) which the samples do not need. So they are made in a process of their own, and read from a file.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any

import torch

NAME = "nn.functional.scaled_dot_product_attention"


@functools.cache
def samples(dtype: torch.dtype) -> list[tuple[list[torch.Tensor], dict[str, Any]]]:
    """(query, key, value) and keyword arguments of each sample, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.pt")
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, str(dtype).removeprefix("torch."), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if done.returncode:
            raise RuntimeError(f"PyTorch's samples cannot be made here: {done.stderr.strip().splitlines()[-1]}")
        return torch.load(path)


def main(dtype: str, path: str) -> None:
    """Write the samples to a file."""
    try:
        import expecttest  # noqa: F401
    except ModuleNotFoundError:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_methods_invocations import op_db

    torch.manual_seed(20_260_101)
    operation = next(entry for entry in op_db if entry.name == NAME)
    found = operation.sample_inputs("cpu", getattr(torch, dtype), requires_grad=False)
    torch.save([([x.input, *x.args], x.kwargs) for x in found], path)


if __name__ == "__main__":
    main(*sys.argv[1:])

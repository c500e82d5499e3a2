"""What every launcher needs to know of the device it launches on."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy
import torch

from kernels.backend import INTERPRETED

LAYOUTS = 4096  # shapes and strides whose launch is remembered, of each kernel
INTERPRETED_MULTIPROCESSORS = 2  # on a CPU: enough for more than one program


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device times ten (an H100 or H200 is 90); 80 for the interpreter on a CPU, and for a
    device that is not there, of fake tensors.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number for the interpreter on a CPU."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Size of a CUDA device's L2 cache; on a CPU that of an H200's."""
    if device.type != "cuda":
        return 50 << 20
    return torch.cuda.get_device_properties(device).L2_cache_size


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv, which compiles too, takes ten times as long."""
    return -(-a // b)


def settle(*kernels: Any) -> None:
    """Work out the keys under which Triton caches kernels, those of the functions they call first.

    Up to 3.7 Triton leaves out of a key the constants of functions that it meets for the first time, so that a kernel's
    key depends on which others ran before, and a kernel in the cache is compiled again (triton-lang/triton, pull
    request 10494).
    """
    seen: set[int] = set()

    def visit(function: Any) -> None:
        if id(function) in seen or getattr(function, "hash", "") is not None:
            return
        seen.add(id(function))
        for name in function.fn.__code__.co_names:
            visit(function.fn.__globals__.get(name))
        function.cache_key  # noqa: B018 - asked for what it leaves behind

    if not INTERPRETED:
        for kernel in kernels:
            visit(kernel)


def launch_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current one while a kernel is launched; Triton launches on the current device.

    On a CPU, in the interpreter: numbers pass float32's limits without a word, as they do on a GPU.
    """
    if device.type == "cpu":
        return numpy.errstate(over="ignore", invalid="ignore")
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)

"""Chips that are not there: `pretending` makes Triton take this machine for one, `compiling` compiles for it."""

from __future__ import annotations

import importlib
import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from kernels import launch as device


class PretendedDriver:
    """As much of a Triton driver as compiling asks for. The chip is the device's number too: a cache for each."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


class Chip(NamedTuple):
    """What launchers ask of a device: compute capability times ten, multiprocessors, bytes of L2."""

    capability: int = 90
    multiprocessors: int = 132
    l2_bytes: int = 50 << 20


@contextmanager
def pretending(chip: Chip, run: Callable[..., Any]) -> Iterator[None]:
    """Within it tensors of any device go to the Triton kernels as on a chip; `run` stands in for JITFunction.run."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    patches: list[tuple[Any, str, Any]] = [(JITFunction, "run", run)]
    patches += [(driver, "_active", PretendedDriver(chip.capability))]
    patches += [(device, name, lambda _, value=value: value) for name, value in chip._asdict().items()]
    modules = (importlib.import_module(f"kernels.{name}") for name in ("backend", "attention.ops", "layer_norm.ops"))
    patches += [(module, "why_not_triton", lambda *_: "") for module in modules]
    with ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        yield


@contextmanager
def compiling(chip: Chip, found: Callable[[str, dict[str, Any], Any], None]) -> Iterator[None]:
    """Within it launchers compile for a chip and launch nothing; public functions take tensors of the meta device.

    Args:
        found: called with a kernel's name, its options, and what was compiled or the error why it was not.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # whatever the compiler raises is the finding
            compiled = error
        found(self.fn.__name__, options, compiled)

    with pretending(chip, compile_only), ExitStack() as stack:
        for kind, name in itertools.product(("attention", "layer_norm"), ("forward", "backward")):
            operation = f"{kind.removeprefix('layer_')}_{name}"
            module = importlib.import_module(f"kernels.{kind}.ops")
            getattr(torch.ops.kernels, operation)  # the namespace finds its operations when they are asked for
            implementation = types.SimpleNamespace(default=getattr(module, f"_{name}"))
            stack.enter_context(mock.patch.object(torch.ops.kernels, operation, implementation))
        yield

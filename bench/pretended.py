"""Chips that are not there: `pretending` makes Triton take this machine for one, `compiling` compiles for it."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import sys
import textwrap
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


def made_from(chip: Chip, run: Callable[[], object]) -> list[str]:
    """What decides on the machine code of the kernels that `run()` launches, none of which is compiled.

    Of each kernel: its code and all it calls, as `described` has it; the types of its arguments, what is known of them,
    constants and options. A kernel that cannot be launched is its error.
    """
    from triton.runtime.jit import JITFunction

    parts: list[str] = []

    def note(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:  # in place of compiling
        asked = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # which has a path
        parts.append(f"{described(self)} {signature} {constants} {asked} {attributes}")

    def found(kernel: str, options: dict[str, Any], result: Any) -> None:
        if isinstance(result, Exception):
            parts.append(f"{kernel}: {result!r}")

    with mock.patch.object(JITFunction, "_do_compile", note), compiling(chip, found):
        run()
    return parts


OWN = "kernels.", "bench.", "__main__", "__mp_main__"  # modules whose code is looked into


@functools.cache
def described(x: Any) -> str:
    """A function or class of ours: its code, less docstrings, comments and layout, and what the names in it stand for.

    That is the code of others of ours, wherever they stand, the values of constants, the names of all else.
    """
    seen: dict[int, str] = {}

    def visit(x: Any) -> None:
        function = getattr(x, "fn", x)  # of a JIT function
        module = getattr(function, "__module__", None) or ""
        if id(x) in seen:
            return
        if isinstance(x, types.ModuleType):
            seen[id(x)] = x.__name__
        elif not isinstance(function, (type, types.FunctionType)):
            seen[id(x)] = repr(sorted(x) if isinstance(x, (set, frozenset)) else x)
        elif not module.startswith(OWN):
            seen[id(x)] = f"{module}.{function.__qualname__}"
        else:
            tree = plain(inspect.getsource(inspect.unwrap(function)))
            seen[id(x)] = ast.unparse(tree)
            names = vars(sys.modules[module])
            for node in ast.walk(tree):
                if isinstance(node, ast.Name) and node.id in names:
                    visit(names[node.id])
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owner = names.get(node.value.id)
                    if isinstance(owner, types.ModuleType) and owner.__name__.startswith(OWN):
                        visit(getattr(owner, node.attr))

    visit(x)
    return "\n".join(seen.values())


def plain(source: str) -> ast.Module:
    """The source of a function or class, less its docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return tree

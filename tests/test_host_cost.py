"""What a call on the way to a kernel does not do again, or not at all: `python -m bench.bench_host` has the times."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402

from bench import bench_host  # noqa: E402
from bench.bench_host import Way  # noqa: E402
from kernels import autograd  # noqa: E402
from kernels.attention import tiles  # noqa: E402
from kernels.layer_norm import forward, ops  # noqa: E402
from kernels.layer_norm import tiles as norm_tiles  # noqa: E402


@pytest.fixture(params=bench_host.ways(), ids=lambda way: way.name)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """A call to each kernel, as far as the launch."""
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", bench_host.do_nothing)
    with bench_host.as_on_a_chip(request.param, bench_host.do_nothing):
        yield request.param


def refuse(what: str) -> Callable[..., None]:
    return lambda *_, **__: pytest.fail(what)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The autograd functions that have run."""
    functions: list[type] = []
    apply = torch.autograd.Function.apply.__func__

    def watched(function: type, *args: object) -> object:
        functions.append(function)
        return apply(function, *args)

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(watched))
    return functions


def test_without_gradients_no_autograd_function_runs(way: Way, applied: list[type]) -> None:
    way.forward_without_gradients()
    way._replace(tensors={name: x.detach() for name, x in way.tensors.items()}).forward()
    assert applied == []


def test_outside_functorch_no_arguments_are_bound(way: Way, applied: list[type]) -> None:
    """PyTorch asks for the signature of a function with setup_context at each call."""
    way.forward_and_backward()
    assert [function.setup_context for function in applied] == [torch.autograd.Function.setup_context]


def test_functorch_gets_setup_context(way: Way, applied: list[type]) -> None:
    grad = torch.func.grad(lambda tensors: way._replace(tensors=tensors).forward().float().sum())
    assert grad(way.tensors).keys() == way.tensors.keys()
    assert applied and all(function.setup_context != torch.autograd.Function.setup_context for function in applied)


def test_sizes_are_worked_out_once(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = [
        tiles.choose_tile,
        tiles.choose_short_tile,
        tiles.column_blocks,
        tiles.whole_columns,
        norm_tiles._choose,
        forward.triton_dtype,
        ops._row_layout,
        autograd.with_context,
    ]
    if way.hopper == "1":
        from kernels.attention.hopper_pieces import shared_layout

        remembered.append(shared_layout)
    way.forward_and_backward()
    before = [function.cache_info() for function in remembered]
    monkeypatch.setattr(triton, "cdiv", refuse("what triton compiles was called"))
    monkeypatch.setattr(triton, "next_power_of_2", refuse("what triton compiles was called"))
    way.forward_and_backward()
    after = [function.cache_info() for function in remembered]
    assert [info.misses for info in after] == [info.misses for info in before]
    assert sum(info.hits for info in after) > sum(info.hits for info in before)


KEYS = """
import importlib, sys
from unittest import mock
from triton.runtime.jit import JITCallable
if sys.argv[1] == "unsettled":
    importlib.import_module("kernels.launch").settle = lambda *_: None
names = "general general_backward hopper_backward hopper_forward mask_gradient short short_backward".split()
modules = [importlib.import_module(f"kernels.attention.{name}") for name in names]
modules += [importlib.import_module(f"kernels.layer_norm.{name}") for name in ("backward", "forward")]
kernels = [x for m in modules for n, x in vars(m).items() if n.endswith("_kernel") and isinstance(x, JITCallable)]
for kernel in kernels[:: int(sys.argv[2])]:
    kernel.cache_key
print(*sorted({(x.__name__, x.cache_key) for x in kernels}))
"""


@pytest.mark.slow
def test_a_kernels_key_in_tritons_cache_does_not_depend_on_which_ran_before() -> None:
    """Up to Triton 3.7 it does where nobody settles it, and what one process has compiled another compiles again."""

    def keys(*words: str) -> str:
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-W", "ignore", "-c", KEYS, *words]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout

    assert keys("settled", "1") == keys("settled", "-1") != ""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        assert keys("unsettled", "1") != keys("unsettled", "-1")

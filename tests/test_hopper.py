"""The Gluon kernel for Hopper chips: which calls it takes, what it compiles to, and on such a chip what it computes.

Gluon has no interpreter. What can be checked without the chip beside this: tests/test_hopper_protocol.py.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from kernels.attention import choice
from kernels.attention.rules import Extras, Rules
from kernels.attention.tiles import choose_consumers
from tests.attention_problem import check, problem
from tests.test_attention_features import call, formula

attention = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on such a chip alone; one that hangs is ended."""
    needs_chip = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
    return pytest.mark.usefixtures("asked_for")(pytest.mark.gpu(pytest.mark.timeout(60)(needs_chip(test))))


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with KERNELS_HOPPER=1; a call that should be the kernel's may not quietly go elsewhere."""
    monkeypatch.setattr(choice, "HOPPER_ASKED_FOR", True)


def shaped(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


# Which calls it takes


def why(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras = Extras(), chip: int = 90, **rules: Any
) -> str:  # fmt: skip
    return choice.why_not_hopper(q, k, v, extras, Rules(1.0, **rules), chip)


@pytest.mark.usefixtures("asked_for")
def test_which_calls_it_takes() -> None:
    q, k = shaped((2, 8, 256, 64)), shaped((2, 2, 300, 64))
    assert why(q, k, k) == ""
    assert why(q, k, k, left=5, right=0, bottom_right=True, softcap=2.0) == ""
    assert why(q, k, k, Extras(key_lengths=torch.zeros(2, dtype=torch.int32))) == ""
    assert "compute capability 9.0, found 10.0" in why(q, k, k, chip=100)
    assert "found float32" in why(q.float(), k.float(), k.float())
    assert "found 96 and 96" in why(*(shaped((2, 2, 256, 96)) for _ in range(3)))
    assert "found 64 and 128" in why(q, k, shaped((2, 2, 300, 128)))
    assert "128 queries or more, found 100" in why(q[:, :, :100], k, k)
    assert "knows no sinks" in why(q, k, k, Extras(sinks=torch.zeros(1, 8)))
    assert "knows no attn_mask" in why(q, k, k, Extras(attn_mask=torch.zeros(1, 1, 1, 1)))
    assert "no dropout" in why(q, k, k, dropout_p=0.5)
    assert "TMA wants" in why(q, k[:1].expand(2, 2, 300, 64), k)
    assert "TMA wants" in why(q.mT.contiguous().mT, k, k)
    assert "found query" in why(torch.empty(2 * 8 * 256 * 64 + 1, dtype=q.dtype)[1:].view(q.shape), k, k)


def test_it_must_be_asked_for_until_a_gpu_has_run_it() -> None:
    assert "KERNELS_HOPPER=1" in why(*(shaped((1, 1, 256, 64)) for _ in range(3)))


# What it compiles to


@pytest.mark.slow
def test_it_compiles_without_spills_and_leaves_a_product_in_flight() -> None:
    command = [sys.executable, "-m", "bench.compile_check", "--arch", "90", "--only", "hopper causal", "--jobs", "1"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "hopper_" in line]
    assert done.returncode == 0 and len(lines) == 5 and "0 do not" in done.stdout, done.stdout + done.stderr
    assert all("wgmma" in line for line in lines)


def test_three_consumers_where_rows_are_narrow_and_tiles_well_filled() -> None:
    lengths = (128, 192, 193, 300, 384, 1024, 2048, 5000)
    assert [choose_consumers(64, n) for n in lengths] == [2, 3, 2, 2, 3, 2, 3, 3]
    assert {choose_consumers(d, n) for d in (128, 256) for n in lengths} == {2}


# What it computes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", [
    (1, 1, 1, 128, 128, 128, 128), (2, 4, 2, 300, 500, 64, 64), (1, 2, 1, 1000, 77, 128, 128),
    (1, 2, 2, 257, 1025, 256, 256), (3, 5, 5, 129, 1, 64, 64), (2, 70, 10, 1024, 1024, 128, 128),
    (1, 2, 1, 192, 1, 64, 64), (2, 70, 10, 1100, 1100, 64, 64),
], ids=lambda s: "B{}-H{}-Hkv{}-L{}-S{}-E{}-Ev{}".format(*s))  # fmt: skip
@on_hopper
def test_output_and_gradients(sizes: tuple[int, ...], is_causal: bool, dtype: torch.dtype) -> None:
    check(problem(sizes, dtype, "cuda", is_causal=is_causal), attention)


FEATURES: dict[str, dict[str, Any]] = {
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"}, "softcap": {"softcap": 1.5},
    "window": {"window": (150, 0)}, "two-sided window": {"window": (37, 90)}, "narrow window": {"window": (0, 0)},
    "lengths": {"key_lengths": torch.tensor([0, 411, 128])},
    "all": {"is_causal": True, "causal_alignment": "bottom_right", "window": (200, 0), "softcap": 3.0,
            "key_lengths": torch.tensor([500, 130, 1])},
}  # fmt: skip


@pytest.mark.parametrize("d", choice.HOPPER_HEAD_SIZES)
@pytest.mark.parametrize("feature", FEATURES)
@on_hopper
def test_each_feature(feature: str, d: int) -> None:
    options = {name: x.cuda() if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()}
    arguments = call((3, 4, 2, 380, 500, d, d), torch.bfloat16, "cuda")
    result = attention(**arguments, **options, enable_gqa=True, return_lse=True)
    output, lse, _ = formula(**{name: x.double() for name, x in arguments.items()}, **options)
    torch.testing.assert_close(result.output.double(), output, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-3, atol=1e-2)


@on_hopper
def test_nan_stays_where_it_may_be_seen() -> None:
    arguments = call((2, 2, 2, 512, 512, 128, 128), torch.bfloat16, "cuda")
    lengths = torch.tensor([512, 300], device="cuda")
    clean = attention(**arguments, is_causal=True, key_lengths=lengths)
    for name in "key", "value":
        arguments[name] = arguments[name].clone()
        arguments[name][1, :, 300:] = math.nan
        arguments[name][0, :, 400] = math.inf
    found = attention(**arguments, is_causal=True, key_lengths=lengths)
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, :, :400], clean[0, :, :400])
    assert found[0, :, 400:].isnan().all()


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("feature", FEATURES)
@on_hopper
def test_gradients_with_each_feature(feature: str, d: int) -> None:
    """Against the kernels for any shape, which are asked for by `deterministic`."""
    options = {name: x.cuda() if torch.is_tensor(x) else x for name, x in FEATURES[feature].items()}
    arguments = call((3, 4, 2, 380, 500, d, d), torch.bfloat16, "cuda")
    found = []
    for deterministic in (False, True):
        leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
        output = attention(**leaves, **options, enable_gqa=True, deterministic=deterministic)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        found.append(torch.autograd.grad(output, list(leaves.values()), upstream))
    for ours, right in zip(*found):
        torch.testing.assert_close(ours, right, rtol=2e-2, atol=2e-2)


@on_hopper
def test_repeated_runs_agree_bit_for_bit() -> None:
    arguments = call((4, 16, 16, 1500, 1500, 128, 128), torch.bfloat16, "cuda")
    first = attention(**arguments, is_causal=True)
    assert all(torch.equal(attention(**arguments, is_causal=True), first) for _ in range(20))

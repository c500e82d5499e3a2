"""The conformance suite against our attention; and against wrong ones, to show that every check of it can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance import (  # noqa: F401  (importing them enters their checks into the list)
    checks_behaviour,
    checks_features,
    checks_masks,
    checks_memory,
    checks_properties,
    checks_shapes,
    errors,
    formula,
    opinfo,
    providers,
    registry,
)
from tests.conformance.judge import Attention, make, solve
from tests.conformance.registry import CHECKS, GPU, OURS, TORCH_KEYWORDS, Check, Outcome, check, keywords, run
from tests.conformance.stand_in import changed, in_python, right, with_gradient, with_output
from tests.conformance.wrong import WRONG, one_by_one

ROOT = Path(__file__).parents[1]
CHECK = {one.run.__name__: one for one in CHECKS}
ON_GPU = pytest.mark.gpu, pytest.mark.timeout(240)  # some compile a hundred kernels
SUBJECTS = [
    pytest.param("ours", "cpu", torch.float32, id="through PyTorch"),
    pytest.param("triton", "cpu", torch.float32, id="interpreted"),
    pytest.param("triton", "cuda", torch.float32, id="gpu-float32", marks=ON_GPU),
    pytest.param("triton", "cuda", torch.bfloat16, id="gpu-bfloat16", marks=ON_GPU),
]
MARKS = {  # of checks, and of attentions that are wrong
    "large": ["check_past_2_to_the_31", "check_offsets_inside_a_head"],  # want a GPU of 100 GiB to themselves
    "slow": [
        "check_compiled",
        "check_wide_heads",
        "check_zero_strides",
        "check_own_samples",
        "check_bands_of_outputs",
        "check_80000_batch_entries",
        "check_65536_heads",
        "check_split_keys",
        "check_padded_keys",
        "an output that depends on the batch",
        "heads past the 65,535th left out",
        "log-sum-exp to the base 2",
    ],
    "long": ["half the output when compiled"],
}
# What backend="triton" refuses, saying so, is not wrong.
REFUSED = {"check_float64": "float16, bfloat16, float32, found float64"}
# What is wrong on some machines, by provider and check, and why.
KNOWN = {("ours", "check_batch_of_one"): "PyTorch's product of one matrix is another routine than that of many"}


def marked(names: Iterable[str]) -> list[Any]:
    """The names as cases of a test, with their marks."""
    return [
        pytest.param(name, marks=[getattr(pytest.mark, mark) for mark, ones in MARKS.items() if name in ones])
        for name in names
    ]


@pytest.fixture(autouse=True)
def other_numbers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """With --seed the checks draw others too."""
    monkeypatch.setattr(registry, "SEED", registry.SEED + request.config.option.seed)


@pytest.mark.parametrize("name", marked(CHECK))
@pytest.mark.parametrize(("provider", "device", "dtype"), SUBJECTS)
def test_ours(name: str, provider: str, device: str, dtype: torch.dtype) -> None:
    attention = providers.PROVIDERS[provider].load(device)
    outcome = run(CHECK[name], attention, device, dtype, interpreted=provider == "triton" and device == "cpu")
    if outcome.kind == "-" and not (provider == "triton" and name == "check_bands_of_outputs"):
        pytest.skip(outcome.message)
    if provider == "triton" and outcome.kind == "raises" and name in REFUSED:
        assert REFUSED[name] in outcome.message
        return
    if (provider, name) in KNOWN and outcome.kind != "pass":
        pytest.xfail(KNOWN[provider, name])
    assert outcome.kind == "pass", outcome.message


def test_the_formula_equals_pytorch_where_pytorch_is_right() -> None:
    call = make((2, 4, 2, 5, 7, 3, 2), torch.float64, "cpu", is_causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(*call.inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(formula.attention(*call.inputs, is_causal=True).output, theirs)


# What the right stand-in cannot have, being plain PyTorch: see its docstring. Whether the bits of PyTorch's products
# depend on the batch is decided by the processor.
NOT_RIGHT = {
    "check_what_is_saved": ("FAIL",),
    "check_bands_of_outputs": ("-",),
    "check_no_silent_fallback": ("-",),
    "check_batch_entries": ("FAIL", "pass"),
    "check_batch_of_one": ("FAIL", "pass"),
}


@pytest.mark.parametrize("name", marked(name for name, one in CHECK.items() if one.where != GPU))
def test_a_right_attention_passes(name: str) -> None:
    outcome = run(CHECK[name], right)
    assert outcome.kind in NOT_RIGHT.get(name, ("pass",)), outcome.message


def full_name(short: str) -> str:
    """The name of a check's function."""
    return short if short.startswith("check_") else f"check_{short}"


@pytest.mark.parametrize("wrong", marked(WRONG))
def test_a_wrong_attention_is_found_out(wrong: str) -> None:
    attention, checks = WRONG[wrong]
    for name in map(full_name, checks):
        outcome = run(CHECK[name], attention)
        expected = "raises" if wrong == "refuses an empty batch" else "FAIL"
        assert outcome.kind == expected, f"{name}: {outcome}"


def test_every_check_can_fail() -> None:
    seen = {full_name(short) for _, checks in WRONG.values() for short in checks}
    assert seen == {name for name, one in CHECK.items() if one.where != GPU and "backend" not in one.needs}


def test_a_backend_that_falls_back_silently_is_found_out() -> None:
    def attention(query: Any, key: Any, value: Any, *, backend: str = "auto") -> torch.Tensor:
        return right(query, key, value)

    assert run(CHECK["check_no_silent_fallback"], attention).kind == "FAIL"


@pytest.mark.slow
def test_batch_entries_one_by_one_are_accepted() -> None:
    for name in ("check_batch_entries", "check_batch_of_one"):
        assert run(CHECK[name], changed(one_by_one)) == Outcome("pass")


def test_memory_between_bands_is_accepted() -> None:
    for name in ("check_bands_of_outputs", "check_inputs_are_left_alone", "check_bands_of_inputs"):
        assert run(CHECK[name], in_python()) == Outcome("pass")


def test_a_triton_kernel_that_writes_past_its_end_is_found_out() -> None:
    triton = pytest.importorskip("triton")
    tl = triton.language

    def body(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # noqa: ANN001, ANN202
        offs = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n, other=1.0)
        tl.store(out_ptr + offs, x, mask=(offs < n) | (MASKED == 0))

    kernel = triton.jit(body)
    x = torch.randn(37)
    for masked in (True, False):
        with checks_memory.guarded() as bands:
            out = torch.empty_like(x)
            kernel[(1,)](x, out, 37, BLOCK=64, MASKED=int(masked))
        assert torch.equal(out, x)
        assert bands.owns(out)
        if masked:
            bands.check()
        else:
            with pytest.raises(AssertionError, match="27 numbers after a buffer of 37"):
                bands.check()


def test_an_error_past_the_tolerance_is_marked() -> None:
    torchs = errors.Error(1.0, 2.0)
    assert errors.cell(torchs, torchs, reference=True) == "1.00 / 2.00 ulp"
    assert errors.cell(errors.Error(1.9, 6.2), torchs, reference=False) == "1.90x / 3.10x!"
    assert errors.cell(None, torchs, reference=False) == "-"
    measured = errors.measure(with_gradient("key", 1.05), "causal", torch.float32, "cpu")
    plain = errors.measure(torch.nn.functional.scaled_dot_product_attention, "causal", torch.float32, "cpu")
    assert errors.ratios(measured, plain)[1] > 1000


@pytest.mark.parametrize("case", errors.CASES)
@pytest.mark.parametrize("dtype", errors.DTYPES, ids=str)
@pytest.mark.parametrize(("provider", "device", "_"), SUBJECTS[:3])
def test_errors_stay_within_the_tolerance(case: str, dtype: torch.dtype, provider: str, device: str, _: object) -> None:
    attention = providers.PROVIDERS[provider].load(device)
    plain = errors.measure(torch.nn.functional.scaled_dot_product_attention, case, dtype, device)
    forward, gradient = errors.ratios(errors.measure(attention, case, dtype, device), plain)
    assert forward <= errors.FORWARD and gradient <= errors.GRADIENT, f"{forward:.2f} x, {gradient:.2f} x PyTorch's"


def test_outcomes_tell_refusals_from_wrong_answers() -> None:
    def answer(x: Exception | None) -> Outcome:
        def one(attention: Attention, device: str, dtype: torch.dtype) -> None:
            if x:
                raise x

        return run(Check("x", "mask", OURS, one), right)

    assert answer(None) == Outcome("pass")
    assert answer(AssertionError("it is\nwrong")) == Outcome("FAIL", "it is")
    assert answer(RuntimeError("no kernel")) == Outcome("raises", "RuntimeError: no kernel")
    needy = Check("x", "mask", OURS, lambda *_: None, needs=("window",))
    assert run(needy, torch.nn.functional.scaled_dot_product_attention) == Outcome("-", "has no argument window")
    assert run(Check("x", "mask", OURS, lambda *_: None, where=GPU), right) == Outcome("-", "needs a GPU")


@pytest.mark.long
def test_one_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "tests.conformance", "--device", "cpu", "--provider", "torch-math", "--markdown"]
    done = subprocess.run([*command, "--only", "bad input: dropout"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "|  | torch math | source |" in lines and "| BAD INPUT | 0 / 1 |  |" in lines
    assert "| dropout outside 0 to 1 is refused | FAIL | contract |" in lines
    assert lines[-1].strip().startswith("dropout_p -0.5: accepted")


def test_names_are_unique_and_sources_are_issues() -> None:
    for one in CHECKS:
        assert one.source == OURS or all("/" in p and p.split("#")[1].isdigit() for p in one.source.split(", ")), one
    with pytest.raises(AssertionError):
        check(CHECKS[0].name, "mask")(lambda *_: None)
    assert keywords(torch.nn.functional.scaled_dot_product_attention) == TORCH_KEYWORDS


def test_pytorch_still_has_its_samples() -> None:
    found = opinfo.samples(torch.float32)
    assert len(found) >= 25
    assert any(a["dropout_p"] for _, a in found) and any("attn_mask" in a for _, a in found)


def test_a_solution_needs_the_right_shape() -> None:
    call = make((1, 2, 2, 5, 7, 8, 8), torch.float32, "cpu")
    with pytest.raises(AssertionError, match="shape"):
        solve(call, with_output(lambda x: x[:, :, :3]))

"""The kernels behind PyTorch's own attention: what is registered, called as PyTorch's autograd calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention as torch_attention

from tests.conformance.judge import compare, judge, make, with_gradients

pytest.importorskip("triton", reason="needs triton")

from kernels.attention.plan import forced  # noqa: E402
from kernels.attention.tiles import Tile  # noqa: E402
from kernels.integrations import pytorch  # noqa: E402

OPERATION = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def registered() -> Iterator[None]:
    """The implementation, for CPU tensors, for which PyTorch has none under this name; in small tiles."""
    registration = pytorch.Registration("CPU")
    with forced(tile=Tile(16, 16, 4, 1)):
        yield
    registration.remove()


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """As PyTorch's C++ calls it, past its conditions. Its causal rule puts the last query beside the last key."""
    options.pop("enable_gqa", None)
    options.pop("causal_alignment", None)
    return OPERATION(query, key, value, **options)[0]


BOTTOM_RIGHT = {"is_causal": True, "causal_alignment": "bottom_right"}
CASES = {
    "plain": ((2, 2, 2, 37, 43, 16, 16), {}),
    "causal, shared heads": ((1, 4, 2, 37, 37, 24, 24), {"is_causal": True}),
    "causal, more keys": ((1, 2, 2, 19, 37, 8, 8), BOTTOM_RIGHT),
    "causal, rows without keys": ((1, 2, 2, 37, 19, 8, 8), BOTTOM_RIGHT),
    "scale": ((1, 2, 2, 5, 7, 16, 16), {"scale": 0.7}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, registered: None) -> None:
    sizes, options = CASES[case]
    for dtype in torch.float32, torch.float16:
        judge(attend, make(sizes, dtype, **options))


def test_a_wrong_causal_rule_is_rejected(registered: None) -> None:
    """The causal rule of PyTorch's function, which differs from that of this operation where L != S."""
    with pytest.raises(AssertionError, match="x PyTorch's by norm"):
        judge(attend, make(CASES["causal, more keys"][0], torch.float32, is_causal=True))


def test_dropout_is_replayed_by_the_backward(registered: None) -> None:
    call = make((1, 2, 2, 37, 19, 19, 19), torch.float32, dropout_p=0.3)

    def seeded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return attend(query, key, value, **options)

    call.kept = seeded(call.query, call.key, torch.eye(19).expand(1, 2, 19, 19), dropout_p=0.3) != 0
    assert 0.6 < call.kept.float().mean() < 0.8
    judge(seeded, call)
    with pytest.raises(AssertionError):  # of another draw
        judge(attend, call)


def transposed(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes[0], sizes[2], sizes[1], sizes[3]).transpose(1, 2)


def from_one_projection(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes[0], sizes[2], 3, sizes[1], sizes[3])[:, :, 0].transpose(1, 2)


def heads_last(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes[0], sizes[2], sizes[3], sizes[1]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("layout", [torch.randn, transposed, from_one_projection, heads_last])
def test_results_are_what_compiled_code_expects(layout: Callable[..., torch.Tensor], registered: None) -> None:
    """Shapes, strides and dtypes of each result are those of PyTorch's own description of the operation."""
    query, key, value = layout(2, 4, 17, 8), layout(2, 2, 17, 8), layout(2, 2, 17, 8)
    grad = layout(2, 4, 17, 8)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    found, expected = [], []
    for results, device in ((found, "cpu"), (expected, "meta")):
        q, k, v, g = (
            x.to(device) if device == "cpu" else torch.empty_strided(x.shape, x.stride(), device=device)
            for x in (query, key, value, grad)
        )
        output, lse, starts_q, starts_k, n, m, seed, offset, mask = OPERATION(q, k, v, 0.1, True)
        assert starts_q is starts_k is None or device == "meta"
        results += [output, lse, seed, offset, mask]
        results += backward(g, q, k, v, output, lse, starts_q, starts_k, n, m, 0.1, True, seed, offset)
        results += [torch.empty(n, m)]
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype), i


def test_the_log_sum_exp_is_natural_and_tells_rows_without_keys(registered: None) -> None:
    query, key = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 3, 8)
    lse = OPERATION(query, key, key, is_causal=True)[1]
    allowed = torch.ones(5, 3, dtype=torch.bool).tril(-2)
    scores = (query @ key.mT / 8**0.5).masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))
    assert lse[0, 0, :2].tolist() == [-torch.inf] * 2


def test_registering_changes_nothing_until_it_is_activated() -> None:
    before = torch_attention.current_flash_attention_impl()
    assert pytorch.register() == pytorch.register() == "calcformer"
    assert "calcformer" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() == before
    for _ in range(2):  # what was activated can be again
        torch_attention.activate_flash_attention_impl("calcformer")
        assert torch_attention.current_flash_attention_impl() == "calcformer"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION.default.name(), "CUDA")
    torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None
    if not torch.backends.cuda.is_built():
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION.default.name(), "CUDA")


def test_what_was_there_is_replaced_and_comes_back(registered: None) -> None:
    if not inspect.signature(torch.library.Library.impl).parameters["allow_override"].default:
        pytest.skip("this PyTorch takes one implementation from Python, and the next when that is removed")
    second = pytorch.Registration("CPU")  # warns of nothing
    second.remove()
    judge(attend, make(CASES["scale"][0], torch.float32))


def test_what_cannot_be_is_said(registered: None) -> None:
    with pytest.raises(ValueError, match="name must not be one of PyTorch's own, found 'FA4'"):
        pytorch.register("FA4")
    x = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="return_debug_mask must be False"):
        OPERATION(x, x, x, 0.5, False, True)


@pytest.mark.gpu
def test_pytorchs_function_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through PyTorch's own choice of a backend; what it refuses never gets here."""
    function, own, calls = torch.nn.functional.scaled_dot_product_attention, pytorch.forward, []
    monkeypatch.setattr(pytorch, "forward", lambda *args, **options: calls.append(1) or own(*args, **options))
    call = make((2, 4, 2, 137, 137, 44, 44), torch.bfloat16, "cuda", is_causal=True)
    arguments, mask = call.tensors(), torch.ones(137, 137, dtype=torch.bool, device="cuda")
    torch_attention.activate_flash_attention_impl(pytorch.register())
    try:
        with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
            found = with_gradients(call, arguments, call.run(function, arguments))
            with pytest.raises(RuntimeError), pytest.warns(UserWarning):
                function(call.query, call.query, call.query, attn_mask=mask)
    finally:
        torch_attention.restore_flash_attention_impl()
    assert len(calls) == 1
    for one in compare(found, call):
        one.judge()

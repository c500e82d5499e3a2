"""The comparison that the kernel tests rest on rejects wrong kernels, in each dtype, and accepts a right one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.conformance.judge import LEARNED, Call, judge, make
from tests.conformance.stand_in import changed, with_gradient
from tests.conformance.stand_in import right as right_with_every_rule
from tests.tolerances import assert_as_exact_as_torch

P_DROP = 0.25


def solve(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ok: torch.Tensor,
    bias: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    scale: float | None = None,
    held: bool = False,
) -> torch.Tensor:
    """Attention at the inputs' dtype in float32 arithmetic: a stand-in for a kernel that can be broken.

    held: gradients are those with the sums of the softmax held fixed, without delta.
    """
    q, k, v = query.float(), key.float(), value.float()
    scores = q @ k.mT * (scale or 1 / math.sqrt(query.shape[-1]))
    scores = scores if bias is None else scores + bias.float()
    weights = torch.softmax(scores.masked_fill(~ok, -math.inf), -1)
    if held:
        weights = weights.detach() * torch.exp(scores - scores.detach())
    if kept is not None:
        weights = weights * kept / (1 - P_DROP)
    return (weights @ v).to(query.dtype)


def allowed(p: Call) -> torch.Tensor:
    """Which key each query may attend to."""
    ok = torch.ones(p.query.shape[-2], p.key.shape[-2], dtype=torch.bool)
    return ok.tril() if p.is_causal else ok


class Scaled(torch.autograd.Function):
    """The identity, whose gradient comes out times a factor."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, factor: float) -> torch.Tensor:
        """Return x."""
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient times the factor."""
        return grad * ctx.factor, None


class ForgetsDropout(torch.autograd.Function):
    """Right output; a backward that does not replay the dropout."""

    @staticmethod
    def forward(ctx: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: Call) -> torch.Tensor:
        """Attention with dropout."""
        ctx.save_for_backward(q, k, v)
        ctx.ok = allowed(p)
        return solve(q, k, v, ctx.ok, kept=p.kept)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple:
        """Gradients of attention without dropout."""
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = solve(*inputs, ctx.ok)
        return (*torch.autograd.grad(output, inputs, grad), None)


def right(p: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Nothing wrong."""
    return solve(q, k, v, allowed(p), mask if mask is not None and mask.is_floating_point() else None, p.kept, p.scale)


def one_off(p: Call) -> torch.Tensor:
    """Causal, and one key too many."""
    return torch.ones(p.query.shape[-2], p.key.shape[-2], dtype=torch.bool).tril(1)


WRONG: dict[str, Callable[..., torch.Tensor]] = {
    "scale sqrt(E) instead of 1/sqrt(E)": lambda p, q, k, v, m: solve(q, k, v, allowed(p), scale=4.0),
    "scale off by 2 %": lambda p, q, k, v, m: solve(q, k, v, allowed(p), scale=1.02 / math.sqrt(q.shape[-1])),
    "uniform softmax": lambda p, q, k, v, m: v.mean(-2, keepdim=True) + 0 * (q + k.sum()),
    "zero output": lambda p, q, k, v, m: 0 * right(p, q, k, v, m),
    "last key left out": lambda p, q, k, v, m: solve(q, k[:, :, :-1], v[:, :, :-1], allowed(p)[..., :-1]),
    "zero gradient": lambda p, q, k, v, m: Scaled.apply(right(p, q, k, v, m), 0.0),
    "gradient off by 2 %": lambda p, q, k, v, m: Scaled.apply(right(p, q, k, v, m), 1.02),
    "zero gradient of the keys alone": lambda p, q, k, v, m: right(p, q, Scaled.apply(k, 0.0), v, m),
    "gradient of the queries not scaled": lambda p, q, k, v, m: right(p, Scaled.apply(q, q.shape[-1] ** 0.5), k, v, m),
    "one NaN": lambda p, q, k, v, m: right(p, q, k, v, m).index_fill(2, torch.tensor([36]), math.nan),
}
WRONG_UNDER_A_MASK: dict[str, Callable[..., torch.Tensor]] = {
    "mask dropped": lambda p, q, k, v, m: solve(q, k, v, torch.ones((), dtype=torch.bool), kept=p.kept),
    "mask inverted": lambda p, q, k, v, m: solve(q, k, v, ~allowed(p), kept=p.kept),
    "mask off by one": lambda p, q, k, v, m: solve(q, k, v, one_off(p), kept=p.kept),
}


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def p(request: pytest.FixtureRequest) -> Call:
    """A problem with neither mask nor dropout."""
    return make((2, 2, 2, 37, 53, 16, 16), request.param, learned=LEARNED)


def run(p: Call, kernel: Callable[..., torch.Tensor]) -> None:
    """Hold the stand-in to the comparison."""
    judge(lambda q, k, v, attn_mask=None, **_: kernel(p, q, k, v, attn_mask), p)


def rejected(p: Call, kernel: Callable[..., torch.Tensor]) -> None:
    """The comparison must fail, and by the numbers."""
    with pytest.raises(AssertionError, match="PyTorch's by norm|NaN in"):
        run(p, kernel)


def test_right_kernels_pass(p: Call) -> None:
    run(p, right)
    run(p.replace(is_causal=True), right)
    run(p.replace(attn_mask=torch.randn(37, 53), learned=LEARNED), right)
    kept = torch.rand(2, 2, 37, 53) >= P_DROP
    run(p.replace(kept=kept, dropout_p=P_DROP), right)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_rejected(p: Call, wrong: str) -> None:
    rejected(p, WRONG[wrong])


@pytest.mark.parametrize("wrong", WRONG_UNDER_A_MASK)
def test_wrong_masks_are_rejected(p: Call, wrong: str) -> None:
    rejected(p.replace(is_causal=True), WRONG_UNDER_A_MASK[wrong])


def test_a_missing_mask_gradient_is_rejected(p: Call) -> None:
    masked = p.replace(attn_mask=torch.randn(1, 2, 37, 53), learned=LEARNED)
    rejected(masked, lambda p, q, k, v, m: right(p, q, k, v, Scaled.apply(m, 0.0)))


def test_a_backward_that_does_not_replay_dropout_is_rejected(p: Call) -> None:
    dropped = p.replace(kept=torch.rand(2, 2, 37, 53) >= P_DROP, dropout_p=P_DROP)
    rejected(dropped, lambda p, q, k, v, m: ForgetsDropout.apply(q, k, v, p))
    rejected(dropped, lambda p, q, k, v, m: solve(q, k, v, allowed(p)))  # no dropout at all
    rejected(dropped, lambda p, q, k, v, m: (1 - P_DROP) * right(p, q, k, v, m))  # weights kept but not enlarged


@pytest.mark.parametrize("n_keys", [1, 2, 53])
def test_a_delta_left_out_or_off_by_5_percent_is_rejected(p: Call, n_keys: int) -> None:
    """Also where it is all there is: to the only key to attend to, the exact gradient is 0."""
    few = p.replace(key=p.key[:, :, :n_keys], value=p.value[:, :, :n_keys])
    run(few, right)
    rejected(few, lambda p, q, k, v, m: solve(q, k, v, allowed(p), held=True))
    rejected(few, lambda p, q, k, v, m: 0.95 * right(p, q, k, v, m) + 0.05 * solve(q, k, v, allowed(p), held=True))


WRONG_BESIDE = {
    "lse off by 1e-3": changed(lambda f, **a: f(**a)._replace(lse=f(**a).lse + 1e-3)),
    "no gradient of the lse": changed(lambda f, **a: f(**a)._replace(lse=f(**a).lse * 0.0 + f(**a).lse.detach())),
    "weights off by 1 %": changed(lambda f, **a: f(**a)._replace(weights=f(**a).weights * 1.01)),
    **{f"gradient of {name} off by 2 %": with_gradient(name, 0.98) for name in LEARNED},
}


@pytest.mark.parametrize("wrong", WRONG_BESIDE)
def test_what_is_wrong_beside_the_output_is_rejected(wrong: str) -> None:
    """In float32."""
    rules = {
        "sinks": torch.randn(2),
        "alibi_slopes": torch.rand(2),
        "softcap": 3.0,
        "attn_mask": torch.randn(2, 37, 53),
    }
    call = make((2, 2, 1, 37, 53, 16, 16), **rules, learned=LEARNED, results=("output", "lse", "weights"))
    judge(right_with_every_rule, call)
    with pytest.raises(AssertionError, match="PyTorch's by norm"):
        judge(WRONG_BESIDE[wrong], call)


@pytest.mark.parametrize(("n", "units"), [(2, 2), (2_000, 1)])
def test_few_numbers_have_more_room(n: int, units: int) -> None:
    """Beside a peer that is exact by luck: 2 (1 + 2 / sqrt(n)) times half a unit in the last place."""
    exact, unit = torch.ones(n), torch.finfo(torch.float32).eps
    assert_as_exact_as_torch(exact + units * unit, exact, exact.double())
    with pytest.raises(AssertionError, match="by norm"):
        assert_as_exact_as_torch(exact + (units + 1) * unit, exact, exact.double())


def test_shape_and_dtype_are_compared() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_exact_as_torch(x[:2], x[:2], x.double())
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_exact_as_torch(x.half(), x, x.double())


def test_one_wrong_entry_among_many_is_rejected() -> None:
    exact = torch.randn(1000, 1000, dtype=torch.float64)
    theirs = exact.float()
    ours = theirs.clone()
    assert_as_exact_as_torch(ours, theirs, exact)
    ours[17, 19] += 1e-5
    with pytest.raises(AssertionError, match="largest entry"):
        assert_as_exact_as_torch(ours, theirs, exact)

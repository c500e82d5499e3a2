"""One call of attention, and whether an answer to it is right: the error against float64, beside PyTorch's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conformance import formula
from tests.tolerances import FORWARD, GRADIENT, Comparison

Attention = Callable[..., Any]
# A backward from log-sum-exps, as PyTorch's fused kernels have it, loses 9 times as much to rounding as the formula on
# PyTorch's own samples, whose scores go to 200; what is lost to a mistake is more.
WRONG = 16.0


@dataclasses.dataclass
class Call:
    """The arguments of one call, and the upstream gradient of its output.

    query (..., Hq, L, E), key (..., Hkv, S, E), value (..., Hkv, S, Ev). `options` are keyword arguments that PyTorch's
    attention does not have. `learned` names the tensors whose gradients are wanted.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    learned: tuple[str, ...] = ("query", "key", "value")
    grad: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Draw the upstream gradient, never all ones, under which many a wrong backward looks right."""
        if self.grad is None:
            lead = torch.broadcast_shapes(self.query.shape[:-2], *([] if self.enable_gqa else [self.key.shape[:-2]]))
            shape = (*lead, self.query.shape[-2], self.value.shape[-1])
            self.grad = torch.randn(shape).to(self.query.dtype).to(self.query.device)

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """All arguments by name; those that are `learned` as fresh leaves, floating-point ones in `dtype` if given."""
        found = {"query": self.query, "key": self.key, "value": self.value, "attn_mask": self.attn_mask, **self.options}
        for name, x in found.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                found[name] = x.detach().to(dtype or x.dtype).requires_grad_(name in self.learned)
        return found

    def run(self, attention: Attention, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """Call `attention` with these arguments; only those that are not the default are passed, as users do."""
        arguments = self.tensors() if arguments is None else arguments
        plain = {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.enable_gqa}
        passed = {k: x for k, x in {**arguments, **plain, **more}.items() if x is not None and x is not False}
        return attention(passed.pop("query"), passed.pop("key"), passed.pop("value"), **passed)

    def replace(self, **changes: Any) -> Call:
        """This call with some arguments changed, under the same upstream gradient."""
        return dataclasses.replace(self, **changes)


def make(sizes: tuple[int, int, int, int, int, int, int], dtype: torch.dtype, device: str, **arguments: Any) -> Call:
    """A call on random inputs of sizes B, Hq, Hkv, L, S, E, Ev: transposed views of (B, T, H, D), as models have them.

    Tensors among `arguments` go to the device too.
    """
    b, hq, hkv, n_queries, n_keys, e, ev = sizes
    shapes = [(b, n_queries, hq, e), (b, n_keys, hkv, e), (b, n_keys, hkv, ev)]
    inputs = [torch.randn(shape).to(dtype).to(device).transpose(1, 2) for shape in shapes]
    options = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in arguments.pop("options", {}).items()}
    if isinstance(arguments.get("attn_mask"), torch.Tensor):
        arguments["attn_mask"] = arguments["attn_mask"].to(device)
    return Call(*inputs, enable_gqa=hq != hkv, options=options, **arguments)


def exact_arguments(call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """What `formula.attention` takes, in `dtype`."""
    return {**call.tensors(dtype), "is_causal": call.is_causal, "scale": call.scale}


def solve(call: Call, attention: Attention) -> dict[str, torch.Tensor]:
    """Output, and the gradients of what is learned, by name."""
    arguments = call.tensors()
    return with_gradients(call, arguments, call.run(attention, arguments), call.grad)


def with_gradients(
    call: Call, arguments: dict[str, Any], output: torch.Tensor, grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output, and its gradients for what is learned."""
    assert output.shape == grad.shape, f"output: shape {tuple(output.shape)}, expected {tuple(grad.shape)}"
    assert output.requires_grad, "output: no gradient flows through it"
    leaves = [arguments[name] for name in call.learned]  # one that is not used has gradient 0, which is judged
    found = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), **{f"gradient of {name}": x for name, x in zip(call.learned, found)}}


def exact(call: Call, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The same through the formula; float64 makes it exact."""
    arguments = exact_arguments(call, dtype)
    return with_gradients(call, arguments, formula.attention(**arguments).output, call.grad.to(dtype))


def pytorch(call: Call, backends: tuple[SDPBackend, ...] = ()) -> dict[str, torch.Tensor]:
    """The same through PyTorch's own attention; empty where it has no such argument or refuses the call.

    Args:
        backends: which of its backends it may take; none: as it chooses.
    """
    if call.options:
        return {}
    arguments, mask, is_causal = call.tensors(), call.attn_mask, call.is_causal
    if mask is not None and is_causal:  # some backends refuse both
        causal = torch.ones(call.query.shape[-2], call.key.shape[-2], dtype=torch.bool, device=mask.device).tril()
        whole = arguments["attn_mask"]
        mask = whole & causal if mask.dtype == torch.bool else whole.masked_fill(~causal, -torch.inf)
        is_causal = False
    elif mask is not None:
        mask = arguments["attn_mask"]
    chosen = sdpa_kernel(list(backends)) if backends else contextlib.nullcontext()
    try:
        with chosen:
            output = call.replace(is_causal=is_causal).run(
                torch.nn.functional.scaled_dot_product_attention, {**arguments, "attn_mask": mask}
            )
            return with_gradients(call, arguments, output, call.grad)
    except (RuntimeError, IndexError, AssertionError):
        return {}


def magnitudes(call: Call, right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the rounding of each tensor of the exact answer is relative to, in units of its dtype: float64, same shape.

    To the tensor itself; to what is rounded to the dtype of the call on the way: the output, of which delta is made,
    and the gradients of the scores; and in float32 to the size of every term that is added up, since terms cancel: all
    of them for a query with one key, whose gradient is 0. A weight exp(score - lse) is off by (|score| + |lse|) units
    of float32, and its terms count as much more. Rows of finfo.min are left out: their scores all round to one number.
    """
    arguments = exact_arguments(call, torch.float64)
    answer = formula.attention(**arguments)
    query, key, value = (arguments[name].detach() for name in ("query", "key", "value"))
    output, lse, weights = answer.output.detach(), answer.lse.detach().unsqueeze(-1), answer.weights.detach()
    shared_value, shared_key = (formula.repeat_heads(x, query) for x in (value, key))
    narrow = torch.finfo(call.query.dtype).eps
    wide = min(narrow, torch.finfo(torch.float32).eps)

    grad = call.grad.double()
    off_delta = (grad * (output.to(call.query.dtype).double() - output)).sum(-1, keepdim=True).abs()
    grad_scores = weights * (grad @ shared_value.mT - (grad * output).sum(-1, keepdim=True))
    exponents = torch.where((weights > 0) & (lse > -1e30), (lse + weights.log()).abs() + lse.abs(), 0.0)
    sizes = weights * (1 + exponents) * wide
    terms = grad.abs() @ shared_value.abs().mT
    delta_terms = (weights * terms).sum(-1, keepdim=True)
    off_scores = narrow * grad_scores.abs() + weights * off_delta + sizes * (terms + delta_terms)  # (..., Hq, L, S)

    scale = abs(query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    off = {
        "output": sizes @ shared_value.abs(),
        "gradient of query": reduce_to(scale * off_scores @ shared_key.abs(), query),
        "gradient of key": reduce_to(scale * off_scores.mT @ query.abs(), key),
        "gradient of value": reduce_to(sizes.mT @ grad.abs(), value),
    }
    if "attn_mask" in call.learned:
        off["gradient of attn_mask"] = reduce_to(off_scores, call.attn_mask)
    if "sinks" in call.learned:
        spare = 1 - weights.sum(-1, keepdim=True)
        off["gradient of sinks"] = (spare * (off_delta + wide * delta_terms)).sum((0, 2, 3))
    tensors = {"output": call.query, **{f"gradient of {name}": x for name, x in call.tensors().items()}}
    return {name: x.abs() + off.get(name, 0.0) / torch.finfo(tensors[name].dtype).eps for name, x in right.items()}


def reduce_to(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sum x (..., Hq, M, N) over what was broadcast, shared heads included, to the shape of `like`."""
    if like.ndim >= 3 and x.ndim >= 3 and like.shape[-3] not in (1, x.shape[-3]):
        x = x.unflatten(-3, (like.shape[-3], -1)).sum(-3)
    return x.sum_to_size(like.shape)


def yardstick(
    call: Call, answer: dict[str, torch.Tensor], found: dict[str, torch.Tensor], sizes: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whose error the tolerance is relative to: PyTorch's own, or where it has none, or is wrong, the formula's.

    PyTorch's own is the farther from the exact answer of its two ways, fused and one operation after the other, since
    either may be luckily near. The formula is computed at the dtype of the call. PyTorch counts as wrong when it is
    more than WRONG times as far as the nearest of the three, and as rounding of its `sizes` explains.
    """
    plain = exact(call, call.query.dtype)
    theirs = [pytorch(call), pytorch(call, (SDPBackend.MATH,))]
    chosen = {}
    for name, right in answer.items():
        ways = [way[name] for way in (*theirs, plain) if name in way]
        errors = [torch.linalg.vector_norm(x.double() - right).nan_to_num(torch.inf).item() for x in ways]
        tiny = torch.linalg.vector_norm(sizes[name]).item() * torch.finfo(found[name].dtype).eps
        limit = WRONG * max(min(errors), tiny)
        own = [(error, i) for i, error in enumerate(errors[:-1]) if error <= limit]
        chosen[name] = ways[max(own)[1] if own else -1].to(found[name].dtype)
    return chosen


def compare(attention: Attention, call: Call, exact_call: Call | None = None) -> Iterator[Comparison]:
    """Output and gradients beside what they are held to.

    Args:
        exact_call: the call as the formula is to see it, where that is told more, such as which weights dropout keeps.
    """
    found, exact_call = solve(call, attention), exact_call or call
    assert found["output"].dtype == call.query.dtype, f"output is {found['output'].dtype}, query {call.query.dtype}"
    answer = exact(exact_call)
    sizes = magnitudes(exact_call, answer)
    rulers = yardstick(exact_call, answer, found, sizes)
    for name, right in answer.items():
        factor = FORWARD if name == "output" else GRADIENT
        yield Comparison(name, found[name], rulers[name], right, factor, sizes[name])


def judge(attention: Attention, call: Call, what: str = "") -> None:
    """Hold output and gradients to the tolerance: 2 times the yardstick's error forward, 3 times for gradients.

    Args:
        what: the case, for the message of a failure.
    """
    for one in compare(attention, call):
        one.judge(what)


def agree(a: torch.Tensor, b: torch.Tensor, what: str, slack: float = 16.0) -> None:
    """Two ways to the same number differ by rounding alone: by norm at most `slack` units in the last place.

    A unit is relative to the norm of b: rows that were rounded in another order differ by one or two.
    """
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN in one and not in the other"
    both = ~a.isnan() & ~(a == b)  # equal infinities are no difference
    apart = torch.linalg.vector_norm((a.double() - b.double())[both]).item()
    allowed = slack * torch.finfo(a.dtype).eps * torch.linalg.vector_norm(b[b.isfinite()].double()).item()
    assert apart <= allowed, f"{what}: they differ by {apart:.3g}, rounding explains {allowed:.3g}"


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    """Every tensor is the same, bit for bit (NaN equals itself)."""
    for name, x in a.items():
        differs = (x != b[name]) & ~(x.isnan() & b[name].isnan())
        assert not differs.any(), f"{what}: {name} differs in {int(differs.sum())} of {x.numel()} numbers"

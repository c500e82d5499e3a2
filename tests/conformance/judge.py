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
LEARNED = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")
# A backward from log-sum-exps, as PyTorch's fused kernels have it, loses 9 times as much to rounding as the formula on
# PyTorch's own samples, whose scores go to 200; what is lost to a mistake is more.
WRONG = 16.0


@dataclasses.dataclass
class Call:
    """The arguments of one call, what of its results is judged, and their upstream gradients.

    query (..., Hq, L, E), key (..., Hkv, S, E), value (..., Hkv, S, Ev). `options` are keyword arguments that PyTorch's
    attention does not have. `learned` names the tensors whose gradients are wanted, those of LEARNED that there are
    and that hold floating-point numbers. `results`: "output", and "lse" and "weights" where they are asked for, too.
    `kept` (..., Hq, L, S) bool: the weights that dropout keeps, which the formula is told.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    dropout_p: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    learned: tuple[str, ...] = ("query", "key", "value")
    results: tuple[str, ...] = ("output",)
    kept: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    grad_lse: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Draw the upstream gradients, never all ones, under which many a wrong backward looks right."""
        if self.grad is None:
            lead = torch.broadcast_shapes(self.query.shape[:-2], *([] if self.enable_gqa else [self.key.shape[:-2]]))
            shape = (*lead, self.query.shape[-2], self.value.shape[-1])
            self.grad = torch.randn(shape).to(self.query.dtype).to(self.query.device)
        if self.grad_lse is None and "lse" in self.results:
            self.grad_lse = torch.randn(self.grad.shape[:-1]).to(self.query.device)
        numbers = {k for k, x in self.given().items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        self.learned = tuple(name for name in self.learned if name in numbers)

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def given(self) -> dict[str, Any]:
        """The tensors, and the options, by name."""
        return {"query": self.query, "key": self.key, "value": self.value, "attn_mask": self.attn_mask, **self.options}

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """All of `given`; those that are `learned` as fresh leaves, floating-point ones in `dtype` if given."""
        found = self.given()
        for name, x in found.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                found[name] = x.detach().to(dtype or x.dtype).requires_grad_(name in self.learned)
        return found

    def run(self, attention: Attention, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """Call `attention` with these arguments; only those that are not the default are passed, as users do."""
        arguments = self.tensors() if arguments is None else arguments
        plain = {name: getattr(self, name) for name in ("is_causal", "scale", "enable_gqa", "dropout_p")}
        given = {**arguments, **plain, **more}
        passed = {k: x for k, x in given.items() if x is not None and x is not False and (k != "dropout_p" or x)}
        return attention(passed.pop("query"), passed.pop("key"), passed.pop("value"), **passed)

    def replace(self, **changes: Any) -> Call:
        """This call with some arguments changed, under the same upstream gradient."""
        return dataclasses.replace(self, **changes)


def make(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", **arguments: Any) -> Call:
    """A call on random inputs of sizes B, Hq, Hkv, L, S, E, Ev: transposed views of (B, T, H, D), as models have them.

    Args:
        arguments: fields of `Call` and options, mixed. A function among them is called, so that it draws anew each
            time. Tensors go to the device too.
    """
    b, hq, hkv, n_queries, n_keys, e, ev = sizes
    shapes = [(b, n_queries, hq, e), (b, n_keys, hkv, e), (b, n_keys, hkv, ev)]
    inputs = [torch.randn(shape).to(dtype).to(device).transpose(1, 2) for shape in shapes]
    drawn = {name: x() if callable(x) else x for name, x in arguments.items()}
    drawn = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in drawn.items()}
    fields = {field.name: drawn.pop(field.name) for field in dataclasses.fields(Call) if field.name in drawn}
    return Call(*inputs, enable_gqa=hq != hkv, options=drawn, **fields)


def exact_arguments(call: Call, dtype: torch.dtype | None) -> dict[str, Any]:
    """What `formula.attention` takes, in `dtype`; None: in the dtypes of the call."""
    plain = {name: getattr(call, name) for name in ("is_causal", "scale", "kept", "dropout_p")}
    return {**call.tensors(dtype), **plain}


def solve(call: Call, attention: Attention) -> dict[str, torch.Tensor]:
    """The results that are judged, and the gradients of what is learned, by name.

    On a GPU it waits for them, so that a fault of these kernels shows here, before any other kernel runs.
    """
    arguments = call.tensors()
    more = {"return_lse": "lse" in call.results, "need_weights": "weights" in call.results}
    found = with_gradients(call, arguments, call.run(attention, arguments, **more))
    if call.query.is_cuda:
        torch.cuda.synchronize(call.query.device)
    return found


def with_gradients(call: Call, arguments: dict[str, Any], answer: Any) -> dict[str, torch.Tensor]:
    """The results by name, of an output alone or an answer of several, and their gradients for what is learned."""
    many = not isinstance(answer, torch.Tensor)
    results = {name: getattr(answer, name) if many else answer for name in call.results}
    output, grad = results["output"], call.grad
    assert output.shape == grad.shape, f"output: shape {tuple(output.shape)}, expected {tuple(grad.shape)}"
    found = {name: x.detach() for name, x in results.items()}
    if not call.learned:
        return found
    leaves = [arguments[name] for name in call.learned]  # one that is not used has gradient 0, which is judged
    sent = {name: x for name, x in (("output", grad), ("lse", call.grad_lse)) if name in results}
    for name in sent:
        assert results[name].requires_grad, f"{name}: no gradient flows through it"
    upstream = [x.to(results[name].dtype) for name, x in sent.items()]
    pulled = [results[name] for name in sent]
    grads = torch.autograd.grad(pulled, leaves, upstream, allow_unused=True, materialize_grads=True)
    return {**found, **{f"gradient of {name}": x for name, x in zip(call.learned, grads)}}


def exact(call: Call, dtype: torch.dtype | None = torch.float64) -> dict[str, torch.Tensor]:
    """The same through the formula; float64 makes it exact. None: in the dtypes of the call."""
    arguments = exact_arguments(call, dtype)
    return with_gradients(call, arguments, formula.attention(**arguments))


def pytorch(call: Call, backends: tuple[SDPBackend, ...] = ()) -> dict[str, torch.Tensor]:
    """The same through PyTorch's own attention; empty where it has no such argument or refuses the call.

    Args:
        backends: which of its backends it may take; none: as it chooses.

    On a GPU it gets contiguous copies, since its memory-efficient kernel faults on storage offsets that are no multiple
    of 16 bytes (pytorch/pytorch#183484), and after a fault nothing runs in this process any more.
    """
    if call.options or call.dropout_p or "lse" in call.results:
        return {}
    if call.query.is_cuda:
        tensors = {name: getattr(call, name) for name in ("query", "key", "value", "attn_mask", "grad")}
        call = call.replace(**{name: x if x is None else aligned(x) for name, x in tensors.items()})
    arguments, is_causal, n_keys = call.tensors(), call.is_causal, call.key.shape[-2]
    mask = arguments["attn_mask"]
    if mask is not None:  # some backends refuse a mask of one axis, or beside is_causal
        mask = mask.expand(*call.grad.shape[:-1], n_keys)
        mask = mask.contiguous() if mask.is_cuda else mask
        if is_causal:
            causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
            mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)
            is_causal = False
    chosen = sdpa_kernel(list(backends)) if backends else contextlib.nullcontext()
    plain = call.replace(is_causal=is_causal, results=("output",))
    try:
        with chosen:
            output = plain.run(torch.nn.functional.scaled_dot_product_attention, {**arguments, "attn_mask": mask})
            return with_gradients(plain, arguments, output)
    except (RuntimeError, IndexError, AssertionError):
        return {}


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy at the beginning of memory of its own, which allocators align."""
    return x.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def magnitudes(call: Call, right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the rounding of each tensor of the exact answer is relative to, in units of its dtype: float64, same shape.

    To the tensor itself, and to what is rounded on the way. To the dtype of the call: the gradients of the scores, and
    the output, of which the delta of a row is made. To float32: a weight exp(score - lse), off by |score| + |lse|
    units, and the terms of dP and delta, which may cancel: of a query with one key, rounding is all that is left. What
    is rounded by itself adds up by its squares; delta is the same for all keys of a row. Rows of finfo.min are left
    out: their scores all round to one number.
    """
    arguments = exact_arguments(call, torch.float64)
    answer = formula.attention(**arguments)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    output, lse, weights = answer.output, answer.lse.unsqueeze(-1), answer.weights
    shared_value, shared_key = (formula.repeat_heads(x, query) for x in (value, key))
    narrow = torch.finfo(call.query.dtype).eps
    wide = min(narrow, torch.finfo(torch.float32).eps)
    keep = 1.0 if call.kept is None else call.kept * formula.enlarged(call.dropout_p)
    grad = call.grad.double()
    grad_lse = torch.zeros_like(lse) if call.grad_lse is None else call.grad_lse.double().unsqueeze(-1)

    delta = (grad * output).sum(-1, keepdim=True) - grad_lse
    scores = weights * (keep * (grad @ shared_value.mT) - delta)  # their gradient
    terms = weights * keep * (grad.abs() @ shared_value.abs().mT)
    # From here on squares of errors.
    exponents = torch.where((weights > 0) & (lse > -1e30), (lse + weights.log()).square() + lse.square(), 0.0)
    off_weights = (weights * wide).square() * (1 + exponents)
    off_scores = scores.square() * (narrow**2 + exponents * wide**2) + (terms * wide).square()
    off_delta = (grad * output * narrow).square().sum(-1, keepdim=True)
    off_delta += (terms.square().sum(-1, keepdim=True) + grad_lse.square()) * wide**2
    squared_scale = (query.shape[-1] ** -0.5 if call.scale is None else call.scale) ** 2
    kept_weights = off_weights * keep**2
    of_query = off_scores @ shared_key.square() + off_delta * (weights @ shared_key).square()
    of_key = (off_scores + weights.square() * off_delta).mT @ query.square()
    off = {
        "output": kept_weights @ shared_value.square(),
        "lse": off_weights.sum(-1) + wide**2,
        "weights": off_weights,
        "gradient of query": squared_scale * reduce_to(of_query, query),
        "gradient of key": squared_scale * reduce_to(of_key, key),
        "gradient of value": reduce_to(kept_weights.mT @ grad.square(), value),
    }
    if "attn_mask" in call.learned:
        mask = call.attn_mask
        by_key = weights.sum(-1, keepdim=True) if mask.shape[-1:] in ((), (1,)) else weights
        off["gradient of attn_mask"] = reduce_to(off_scores, mask) + reduce_to(by_key.square() * off_delta, mask)
    if "alibi_slopes" in call.learned:
        slopes, options = call.options["alibi_slopes"], call.options
        lengths, alignment = options.get("key_lengths"), options.get("causal_alignment", "top_left")
        far = formula.distances(query, key, lengths, alignment).abs().double()
        of_row = (off_scores * far.square()).sum(-1) + off_delta.squeeze(-1) * (weights * far).sum(-1).square()
        off["gradient of alibi_slopes"] = of_row.sum(-1).sum_to_size(slopes.shape)
    if "sinks" in call.learned:
        of_row = off_delta + (delta * (1 + lse.abs()) * wide).square()
        off["gradient of sinks"] = ((1 - weights.sum(-1, keepdim=True)).square() * of_row).sum((0, 2, 3))
    units = {name: torch.finfo(dtype_of(call, name)).eps for name in right}
    return {name: (x.square() + off.get(name, 0.0) / units[name] ** 2).sqrt() for name, x in right.items()}


def dtype_of(call: Call, name: str) -> torch.dtype:
    """Of a tensor of the answer: the log-sum-exp has at least float32, a gradient what its tensor has."""
    if name == "lse":
        return torch.promote_types(call.query.dtype, torch.float32)
    return call.given().get(name.removeprefix("gradient of "), call.query).dtype


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
    plain = without_empty_rows(exact(call, None))
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


def without_empty_rows(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with 0 for the log-sum-exp -inf of rows that may attend to nothing, which has no distance to another."""
    return {name: x.masked_fill(x == -torch.inf, 0.0) if name == "lse" else x for name, x in found.items()}


def compare(found: dict[str, torch.Tensor], call: Call) -> Iterator[Comparison]:
    """Results and gradients, as `solve` gives them, beside what they are held to."""
    answer = exact(call)
    assert found["output"].dtype == call.query.dtype, f"output is {found['output'].dtype}, query {call.query.dtype}"
    if "lse" in found:
        empty = answer["lse"] == -torch.inf
        assert found["lse"].dtype in (torch.float32, torch.float64), f"lse is {found['lse'].dtype}"
        assert torch.equal(found["lse"] == -torch.inf, empty), "lse: not -inf in exactly the rows with no allowed key"
    found, answer = without_empty_rows(found), without_empty_rows(answer)
    sizes = magnitudes(call, answer)
    rulers = yardstick(call, answer, found, sizes)
    for name, right in answer.items():
        factor = GRADIENT if name.startswith("gradient") else FORWARD
        yield Comparison(name, found[name], rulers[name], right, factor, sizes[name])


def judge(attention: Attention, call: Call, what: str = "") -> None:
    """Hold results and gradients to the tolerance: 2 times the yardstick's error forward, 3 times for gradients.

    Args:
        what: the case, for the message of a failure.
    """
    __tracebackhide__ = True  # in what pytest prints
    for one in compare(solve(call, attention), call):
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

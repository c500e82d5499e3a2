"""What `python -m kernels` finds out: versions, which kernels run here, whether they are right, and their times.

Each kernel is held to the formula of `kernels.reference` in float64, output and gradients: its error may be ALLOWED
times PyTorch's own in the same dtype.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

import kernels
from kernels.attention.api import choose_backend, prepare
from kernels.attention.explanation import NAMES, explain
from kernels.attention.plan import KERNELS, plan
from kernels.backend import HAS_TRITON, INTERPRETED, choose
from kernels.reference import layer_norm_no_loop, rms_norm_no_loop, scaled_dot_product_no_loop_batch

__all__ = ["ALLOWED", "Check", "availability", "checks", "device_to_check", "machine", "timings"]

ALLOWED = 3.0  # an error may be as many times PyTorch's own
EPS = 1e-5
# B, Hq, Hkv, L, S, E and Ev of calls that suit each of the Triton kernels, and no faster one.
SUITED: dict[str, list[tuple[int, ...]]] = {
    "short": [(3, 4, 2, 13, 17, 16, 16)],
    "hopper": [(1, 2, 1, 256, 384, 64, 64), (1, 2, 1, 256, 384, 128, 128)],
    "general": [(1, 2, 1, 71, 83, 24, 40)],
}
# What is asked of each: options of kernels.scaled_dot_product_attention. "bias": a float mask that learns.
ASKED: dict[str, list[dict[str, Any]]] = {
    "short": [{}, {"is_causal": True}],
    "hopper": [{}, {"is_causal": True}],
    "general": [{"is_causal": True}, {"window": (30, 5), "causal_alignment": "bottom_right"}, {"bias": True}],
}
NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
ROWS = ((31, 300), (2, 9001))  # rows and columns: of rows that a norm holds at once, and that it walks through
# Calls to time, on a GPU and on a CPU: B, H, L, E, causal; rows and columns of a norm.
TIMED = {
    "cuda": ([(4, 16, 2048, 64, True), (2, 16, 4096, 128, False), (1024, 8, 32, 32, False)], (16384, 1024)),
    "cpu": ([(2, 8, 256, 64, True), (256, 4, 10, 16, False)], (2048, 512)),
}
SECONDS = 0.4  # of timing a call


class Check(NamedTuple):
    """One comparison with float64. error: relative to PyTorch's own. what_failed: empty where it is right."""

    name: str
    kernel: str
    error: float | None
    what_failed: str


Tensors = dict[str, torch.Tensor]


def solved(call: Callable[[Tensors], torch.Tensor], inputs: Tensors, dtype: torch.dtype, device: str) -> Tensors:
    """The output of a call on the inputs, in this dtype, and their gradients, by name, in float64 on the CPU."""
    leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in inputs.items()}
    output = call(leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), upstream.to(device, dtype))
    found = {"output": output, **{f"gradient of {name}": x for name, x in zip(leaves, grads)}}
    return {name: x.detach().cpu().double() for name, x in found.items()}


def check(
    name: str,
    kernel: str,
    calls: tuple[Callable[[Tensors], torch.Tensor], ...],
    inputs: Tensors,
    dtype: torch.dtype,
    device: str,
) -> Check:
    """Compare one call with its formula in float64, relative to the error that PyTorch makes in the dtype of the call.

    Args:
        calls: ours, PyTorch's, and the formula.
    """
    ours, theirs, formula = calls
    inputs = {what: x.to(dtype).double() for what, x in inputs.items()}  # what all of them are given
    name = f"{name}, {str(dtype).removeprefix('torch.')}"
    exact = solved(formula, inputs, torch.float64, "cpu")
    try:
        # PyTorch's function may be luckily exact: the formula in the same dtype counts too, and a fraction of a unit.
        rivals = [solved(call, inputs, dtype, device) for call in (theirs, formula)]
        found = solved(ours, inputs, dtype, device)
    except Exception as error:
        return Check(name, kernel, None, f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    unit = torch.finfo(dtype).eps * (0.5 if dtype == torch.float32 else 0.25)
    errors, what_failed = [], ""
    for what, right in exact.items():
        size = torch.linalg.vector_norm(right).item()
        theirs_off = max(torch.linalg.vector_norm(x[what] - right).item() for x in rivals)
        off = torch.linalg.vector_norm(found[what] - right).item() / max(theirs_off, unit * size)
        errors.append(off)
        if not off <= ALLOWED and not what_failed:  # NaN too
            what_failed = f"{what}: {off:.3g} times PyTorch's error, allowed {ALLOWED:g}"
    return Check(name, kernel, max(errors) if all(map(math.isfinite, errors)) else None, what_failed)


def attention_inputs(sizes: tuple[int, ...], has_bias: bool = False) -> Tensors:
    """Random query (B, Hq, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev) and bias (Hq, L, S), float64."""
    b, hq, hkv, n_queries, n_keys, e, ev = sizes
    shapes: dict[str, tuple[int, ...]] = {
        "query": (b, hq, n_queries, e),
        "key": (b, hkv, n_keys, e),
        "value": (b, hkv, n_keys, ev),
    }
    if has_bias:
        shapes["bias"] = hq, n_queries, n_keys
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def blocked_pairs(n_queries: int, n_keys: int, options: dict[str, Any]) -> torch.Tensor:
    """(L, S) bool: True where a query may not see a key, by the rules of `is_causal` and `window`."""
    shift = n_keys - n_queries if options.get("causal_alignment") == "bottom_right" else 0
    ahead = torch.arange(n_keys) - torch.arange(n_queries)[:, None] - shift  # (L, S), places from a query to a key
    left, right = options.get("window", (n_keys, n_keys))
    return (ahead > (0 if options.get("is_causal") else right)) | (-ahead > left)


def attention_check(sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, device: str) -> Check:
    """One call of attention."""
    options = dict(options)
    words = ", ".join(name.removeprefix("is_").replace("_", " ") for name in options if name != "causal_alignment")
    inputs = attention_inputs(sizes, options.pop("bias", False))
    blocked = blocked_pairs(sizes[3], sizes[4], options)

    def ours(x: Tensors) -> Any:
        return kernels.scaled_dot_product_attention(
            x["query"], x["key"], x["value"], x.get("bias"), enable_gqa=True, **options
        )

    def theirs(x: Tensors) -> torch.Tensor:
        mask = x.get("bias", ~blocked.to(device))
        return functional.scaled_dot_product_attention(x["query"], x["key"], x["value"], mask, enable_gqa=True)

    def formula(x: Tensors) -> torch.Tensor:
        query, group = x["query"], x["query"].shape[1] // x["key"].shape[1]
        key, value = (x[name].repeat_interleave(group, 1) for name in ("key", "value"))
        if "bias" in x:  # the reference knows no float mask: it becomes columns of the query, one a key
            root = (1 + key.shape[2] / key.shape[3]) ** 0.5  # what the columns change in the scale
            ones = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
            bias = x["bias"] * (key.shape[2] + key.shape[3]) ** 0.5
            query = torch.cat([query * root, bias.expand(*query.shape[:3], -1)], -1)
            key = torch.cat([key, ones.expand(*key.shape[:3], -1)], -1)
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))  # (B * Hq, ...)
        output, _ = scaled_dot_product_no_loop_batch(query, key, value, blocked.to(query.device))
        return output.unflatten(0, x["query"].shape[:2])

    x = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    kernel = explain(x["query"], x["key"], x["value"], x.get("bias"), enable_gqa=True, **options).kernel
    name = f"attention of {sizes[3]} queries and {sizes[4]} keys, heads of {sizes[5]}{', ' if words else ''}{words}"
    return check(name, kernel, (ours, theirs, formula), inputs, dtype, device)


def norm_check(name: str, rows: int, width: int, dtype: torch.dtype, device: str) -> Check:
    """One call of a norm, `name` one of NORMS."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"input": (rows, width), "residual": (rows, width), "weight": (width,), "bias": (width,)}
    inputs = {what: torch.randn(shape, generator=generator, dtype=torch.float64) for what, shape in shapes.items()}
    has_residual, centres = name.startswith("add_"), name.endswith("layer_norm")
    for what, is_there in (("residual", has_residual), ("bias", centres)):
        if not is_there:
            del inputs[what]

    def ours(x: Tensors) -> Any:
        shape = () if has_residual else ((width,),)
        tensors = (x[what] for what in ("weight", "bias") if what in x)
        given = (x["input"], x["residual"]) if has_residual else (x["input"],)
        return getattr(kernels, name)(*given, *shape, *tensors, eps=EPS)

    def theirs(x: Tensors) -> torch.Tensor:
        total = x["input"] + x["residual"] if has_residual else x["input"]
        if centres:
            return functional.layer_norm(total, (width,), x["weight"], x["bias"], EPS)
        return functional.rms_norm(total, (width,), x["weight"], EPS)

    def formula(x: Tensors) -> torch.Tensor:
        total = x["input"] + x["residual"] if has_residual else x["input"]
        if centres:
            return layer_norm_no_loop(total, x["weight"], x["bias"], EPS)
        return rms_norm_no_loop(total, x["weight"], EPS)

    choice = choose("auto", torch.device(device), dtype)
    kernel = "the Triton kernels for norms" if choice.backend == "triton" else "PyTorch's operations"
    return check(f"{name} of {width} columns", kernel, (ours, theirs, formula), inputs, dtype, device)


def dtypes(device: str) -> list[torch.dtype]:
    """Those to check. Triton's interpreter cuts float32 to bfloat16 instead of rounding, which is not our error."""
    if INTERPRETED:
        return [torch.float32, torch.float16]
    return [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])


def checks(device: str) -> Iterator[Check]:
    """Every comparison with float64."""
    for dtype in dtypes(device):
        for kernel, suited in SUITED.items():
            for sizes in suited:
                if kernel == "hopper" and (dtype == torch.float32 or why_not(kernel, sizes, device)):
                    continue  # another kernel would run it
                for options in ASKED[kernel]:
                    yield attention_check(sizes, options, dtype, device)
        for name in NORMS:
            for rows, width in ROWS[:1] if INTERPRETED else ROWS:  # one loop over many columns takes it seconds
                yield norm_check(name, rows, width, dtype, device)


def why_not(kernel: str, sizes: tuple[int, ...], device: str) -> str:
    """Why one of the Triton kernels of attention cannot run a call here that suits it; empty where it can."""
    query, key, value = (x.to(device, torch.float16) for x in attention_inputs(sizes).values())
    choice = choose_backend(query, value, "auto")
    if choice.backend != "triton":
        return choice.reason
    _, q, k, v, call = prepare(query, key, value, None, 0.0, False, None, True)
    return plan(q, k, v, call).why_not.get(kernel, "")


def availability(device: str) -> dict[str, str]:
    """Of each kernel the reason why it cannot run on this machine; empty where it can."""
    found = {}
    for kernel in KERNELS:
        reasons = [why_not(kernel, sizes, device) for sizes in SUITED[kernel]]
        found[NAMES[kernel]] = "" if "" in reasons else reasons[0]
    found["the Triton kernels for norms"] = choose("auto", torch.device(device), torch.float16).reason
    return found


def timings(device: str) -> Iterator[dict[str, Any]]:
    """Milliseconds of forward and backward, ours beside PyTorch's: the least of rounds in turn."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    calls, (rows, columns) = TIMED[device]
    for b, h, n, e, causal in calls:
        drawn = (torch.randn(b, n, h, e, device=device, dtype=dtype) for _ in range(3))
        leaves = [x.transpose(1, 2).requires_grad_() for x in drawn]

        def attend(function: Callable[..., Any], leaves: Any = leaves, causal: bool = causal) -> torch.Tensor:
            return function(*leaves, is_causal=causal)

        name = f"attention, batch {b}, {h} heads of {e}, length {n}{', causal' if causal else ''}"
        yield timed(name, attend, leaves, kernels.scaled_dot_product_attention, functional.scaled_dot_product_attention)
    drawn = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, columns), (columns,)))
    leaves = [x.requires_grad_() for x in drawn]
    for name, theirs in (("layer_norm", functional.layer_norm), ("rms_norm", functional.rms_norm)):

        def normalise(function: Callable[..., Any], leaves: Any = leaves) -> torch.Tensor:
            return function(leaves[0], (columns,), leaves[1], eps=EPS)

        yield timed(f"{name}, {rows} rows of {columns}", normalise, leaves, getattr(kernels, name), theirs)


def timed(
    name: str,
    call: Callable[[Any], torch.Tensor],
    leaves: list[torch.Tensor],
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
) -> dict[str, Any]:
    """One of `timings`."""
    upstream = torch.randn_like(call(theirs))
    spent: dict[Any, list[float]] = {ours: [], theirs: []}
    started = time.perf_counter()
    while len(spent[ours]) < 5 or time.perf_counter() - started < SECONDS:
        for function, found in spent.items():
            before = now(leaves[0])
            torch.autograd.grad(call(function), leaves, upstream)
            found.append(now(leaves[0]) - before)
    milliseconds = [1000 * min(found) for found in spent.values()]
    return {
        "name": f"{name}, {str(upstream.dtype).removeprefix('torch.')}",
        "ours_ms": round(milliseconds[0], 4),
        "pytorch_ms": round(milliseconds[1], 4),
        "times_as_fast": round(milliseconds[1] / milliseconds[0], 3),
    }


def now(x: torch.Tensor) -> float:
    """Seconds, once the device of x has done what it was asked."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str) -> dict[str, str]:
    """Versions, and what runs the calls."""
    found = {
        "kernels": kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if HAS_TRITON else "none",
        "system": platform.platform(),
        "folder": os.path.dirname(kernels.__file__),
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    else:
        found["gpu"] = "not used, since TRITON_INTERPRET is set" if torch.cuda.is_available() else "none"
        found["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found.update({name: os.environ[name] for name in ("TRITON_INTERPRET", "KERNELS_HOPPER") if name in os.environ})
    return found


def device_to_check() -> str:
    """Where the kernels run: a GPU, unless there is none or Triton's interpreter is on."""
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

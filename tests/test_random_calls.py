"""Random calls of attention, with none to all of its options, held to one formula in float64.

`python -m tests.test_random_calls --minutes 10` makes as many calls as fit, and prints those that fail, each made as
simple as it can be while it fails in the same way; `--call` repeats one that was printed.

PyTorch's error is that of the formula in the dtype of the inputs (with the softmax in float32 for 16 bits), or what
becomes of the formula in float64 when each score is off by a rounding of its terms in float32, whichever is larger: of
a few numbers the former may be small by luck.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import math
import os
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # where conftest.py has not decided: `python -m`

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import kernels  # noqa: E402
from kernels.attention.plan import forced  # noqa: E402
from kernels.attention.tiles import Tile  # noqa: E402
from tests import interpreter  # noqa: E402
from tests.tolerances import FORWARD, GRADIENT, assert_as_exact_as_torch, size_of_terms  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TRANSFORMS = ("vmap", "vmap grad", "jacrev", "double backward", "jvp")
LAYOUTS = (
    "contiguous",
    "heads last",
    "columns first",
    "sliced",
    "padded",
    "contiguous",
    "heads last",
    "expanded",
    "equal rows",
    "overlapping",
)
HARMLESS = (  # warnings, and why
    ("`torch.jit.script", "PyTorch's own, at the first use of jvp"),
    ("All-NaN slice encountered", "NumPy's, at a maximum in the interpreter: such a tile is then done again with care"),
)
LEARNED = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")
Tensors = dict[str, torch.Tensor]


# What is drawn


class Choices(dict):
    """The options of a call by name. An option that is asked for is drawn, or what the call was given for it."""

    def __init__(self, draw: Callable[[str, tuple], Any], given_values: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.draw, self.given, self.simplest = draw, given_values or {}, {}

    def some(self, name: str, *values: Any) -> Any:
        """One of the values, of which the first is the simplest."""
        self.simplest[name] = values[0]
        is_given = name in self.given and self.given[name] in values
        self[name] = self.given[name] if is_given else self.draw(name, values)
        return self[name]


def drawn_by(seed: int) -> Callable[[str, tuple], Any]:
    """Each option by itself, so that the others stay when one is made simpler."""
    return lambda name, values: random.Random(f"{seed} {name}").choice(values)


class Call:
    """One call: its tensors, its other arguments, and how it is run."""

    def __init__(self, choices: Choices) -> None:
        some = choices.some
        self.path = some("path", "torch", "triton")
        on_triton = self.path == "triton"
        self.kernel = some("kernel", "general", "short") if on_triton else ""
        self.block_k = some("block_k", 16, 32) if on_triton else 0
        self.dtype = DTYPES[some("dtype", *list(DTYPES)[: 3 if on_triton else 4])]
        self.work = torch.promote_types(self.dtype, torch.float32)
        self.transform = some("transform", *("",) * 15, *TRANSFORMS)
        torch.manual_seed(some("seed", *range(100)))
        simplest = some("options", 2, 20, 2, 0)  # how often an option is left at its simplest

        def option(name: str, *values: Any) -> Any:
            return some(name, *values[:1] * len(values) * simplest, *values)

        n_dims = self._draw_sizes(some, on_triton)
        self.options: dict[str, Any] = {
            "dropout_p": 0.0 if self.transform else option("dropout_p", *(0.0,) * 9, 1.0),
            "is_causal": option("is_causal", False, True),
            "scale": option("scale", *(None,) * 5, 0.5, -0.7, 3.0, 0.0, 1e-6, 1e-30),
            "enable_gqa": self.group > 1,
            "causal_alignment": option("causal_alignment", "top_left", "bottom_right"),
            "window": option(
                "window",
                None,
                None,
                None,
                (None, None),
                (3, None),
                (None, 2),
                (20, 11),
                (0, 0),
                (sys.maxsize, 0),
                (sys.maxsize, sys.maxsize),
                (2**31, 5),
            ),
            "softcap": option("softcap", None, None, 0.7, 30.0),
            "return_lse": option("return_lse", False, True),
            "need_weights": option("need_weights", False, False, True),
            "backend": "triton" if on_triton else "auto",
        }
        self.tensors: Tensors = {}
        for name, n_rows, columns in (
            ("query", self.n_queries, self.e),
            ("key", self.n_keys, self.e),
            ("value", self.n_keys, self.ev),
        ):
            shape = (*self.leads[name], n_rows, columns)
            self.tensors[name] = lay_out(torch.randn(shape).to(self.dtype), some(f"{name} layout", *LAYOUTS))
        self._draw_mask(some, option("mask", None, None, "bool", "float", "-inf", "least", "-1e4", "-1e9", "1e4"))
        slopes = option("slopes", None, None, "a head", "a batch entry and head", "a head, with all axes")
        self._draw_slopes(some, slopes)
        self._draw_sinks(some, option("sinks", None, None, "numbers", "some -inf", "all -inf", "large"))
        self._draw_lengths(some, option("lengths", None, None, "whole", "0-d", "ones", "column", "expanded"))
        self._spoil_hidden_keys(option("hidden keys", "numbers", "numbers", "inf", "nan"))
        learns = some("learns", *("everything",) * 4, "nothing", *LEARNED)
        self.learned = [
            name
            for name in LEARNED
            if name in self.tensors and learns in ("everything", name) and self.tensors[name].is_floating_point()
        ]
        upstream = some("upstream", *LAYOUTS)
        lead = self.lead[: n_dims - 2]
        self.upstream = tuple(
            lay_out(torch.randn(*lead, *shape).to(dtype), upstream)
            for shape, dtype in (
                ((self.n_queries, self.ev), self.dtype),
                ((self.n_queries,), self.work),
                ((self.n_queries, self.n_keys), self.dtype),
            )
        )
        if self.dtype != self.work:  # weights have a backward of their own, whose rounding adds to that of the output
            self.upstream = *self.upstream[:2], torch.zeros_like(self.upstream[2])

    def _draw_sizes(self, some: Callable, on_triton: bool) -> int:
        """Lengths and head sizes; the leading dimensions of query, key and value, and of the result, at least (1,)."""
        n_dims = some("dimensions", 4, 4, 3, 2, 5)
        few = (1, 2) if on_triton else (1, 2, 3)  # the interpreter takes milliseconds a program
        lengths = 5, 1, 2, 7, 9, 13, 15, 16, 17, 0, 31, 33
        self.n_queries, self.n_keys = some("L", *lengths), some("S", *lengths)
        widths = 8, 1, 3, 16, 17, 5
        self.e, self.ev = some("E", *widths), some("Ev", *widths)
        heads = some("heads", *few) if n_dims > 2 else 1
        self.group = some("group", *few) if n_dims > 2 else 1
        batch = () if n_dims < 4 else (some("batch", 1, 2, 2, 2, 0) if on_triton else some("batch", 1, 2, 2, 3, 0, 64),)
        batch = batch if n_dims < 5 else (some("batch 2", 1, 2), *batch)
        self.leads = {}
        for name in ("query", "key", "value"):
            own = heads * self.group if name == "query" else heads
            kinds = ("full", "full", "one", "left out", *(("one head",) if self.group == 1 else ()))
            kind = some(f"{name} leads", *kinds)
            own = 1 if kind == "one head" else own
            own_batch = {"one": (1,) * len(batch), "left out": ()}.get(kind, batch)
            self.leads[name] = (*own_batch, own) if n_dims > 2 else ()
        batches = torch.broadcast_shapes(*(lead[:-1] for lead in self.leads.values()))
        most = self.leads["query"][-1:]
        if self.group == 1:
            most = torch.broadcast_shapes(*(lead[-1:] for lead in self.leads.values()))
        self.batch, self.n_heads = batches, math.prod(most)
        self.lead = (*batches, self.n_heads)
        return n_dims

    def _draw_mask(self, some: Callable, kind: str | None) -> None:
        """A mask broadcast anyhow; kind: what is in some of its rows or places beside normal numbers."""
        if kind is None:
            return
        full = (*self.lead, self.n_queries, self.n_keys) if self.leads["query"] else (self.n_queries, self.n_keys)
        axes = some("mask axes", *range(len(full), -1, -1))
        shape = [some(f"mask axis {i}", full[-i], 1) for i in range(axes, 0, -1)]
        where = some("mask where", "rows", "places", "rows", "places", "everywhere")
        chosen = torch.rand(shape) < 0.4 if where == "places" else torch.ones(shape, dtype=torch.bool)
        if where == "rows":
            chosen = (torch.rand([*shape[:-1], *([1] if shape else [])]) < 0.5).expand(shape)
        if kind == "bool":
            self.tensors["attn_mask"] = lay_out(~chosen, some("mask layout", *LAYOUTS))
            return
        dtype = torch.float32 if some("mask dtype", "float32", "the query's") == "float32" else self.dtype
        numbers = {"float": 0.5, "least": torch.finfo(dtype).min}
        mask = torch.randn(shape, dtype=torch.float64).masked_fill(chosen, numbers.get(kind) or float(kind)).to(dtype)
        self.tensors["attn_mask"] = lay_out(mask, some("mask layout", *LAYOUTS))

    def _draw_slopes(self, some: Callable, kind: str | None) -> None:
        """Of both signs; kind: which axes they have."""
        if kind is not None:
            lead = self.batch if "batch" in kind else (1,) * len(self.batch) if "axes" in kind else ()
            slopes = torch.randn(*lead, self.n_heads).to(DTYPES[some("slopes dtype", *DTYPES)])
            self.tensors["alibi_slopes"] = lay_out(slopes, some("slopes layout", "contiguous", "expanded"))

    def _draw_sinks(self, some: Callable, kind: str | None) -> None:
        """One a head."""
        if kind is not None:
            chosen = torch.rand(self.n_heads) < (0.5 if kind == "some -inf" else 1.0)
            sinks = torch.randn(self.n_heads)
            sinks = sinks + 6.0 if kind == "large" else sinks.masked_fill(chosen & (kind != "numbers"), -math.inf)
            self.tensors["sinks"] = sinks.to(DTYPES[some("sinks dtype", *DTYPES)])

    def _draw_lengths(self, some: Callable, kind: str | None) -> None:
        """From 0 to S; kind: their axes, or strides."""
        if kind is None:
            return
        shape = {"0-d": (), "ones": (1,) * len(self.batch)}.get(kind, self.batch)
        dtype = getattr(torch, some("lengths dtype", "int32", "int64"))
        lengths = torch.randint(-self.n_keys // 2, self.n_keys + 1, shape, dtype=dtype).abs()
        if kind == "column":
            lengths = torch.stack((lengths, lengths * 0 - 7), -1)[..., 0]
        if kind == "expanded" and lengths.numel():
            lengths = lengths.flatten()[0].expand(shape)
        self.tensors["key_lengths"] = lengths

    def _spoil_hidden_keys(self, junk: str) -> None:
        """NaN or Inf where no query may attend to a key."""
        if junk == "numbers":
            return
        seen = self.allowed(self.tensors).any(-2)  # (*lead, S)
        for name in ("key", "value"):
            x, lead = self.tensors[name], self.leads[name]
            if not lead or 0 in x.stride() or x.stride(-2) < x.shape[-1] and x.stride(-1) < x.shape[-2]:
                continue  # some of its numbers are shared
            own = seen.unflatten(-2, (-1, self.group)).any(-2) if self.group > 1 else seen
            own = own.int().sum_to_size(*lead, self.n_keys) if own.numel() else own.new_zeros(*lead, self.n_keys)
            x[own == 0] = float(junk)

    def used(self) -> torch.Tensor:
        """How many keys are in use, (*batch or 1s, 1, 1, 1)."""
        lengths = self.tensors.get("key_lengths", torch.tensor(self.n_keys))
        return lengths.expand(self.batch)[..., None, None, None]

    def distances(self) -> torch.Tensor:
        """From the place of each query to each key: (*batch, 1, L, S)."""
        place = torch.arange(self.n_queries)[:, None]
        if self.options["causal_alignment"] == "bottom_right":
            place = place + self.used() - self.n_queries
        return torch.arange(self.n_keys) - place

    def allowed(self, tensors: Tensors) -> torch.Tensor:
        """Who may attend to what, (*lead, L, S)."""
        far = self.distances()
        ok = (torch.arange(self.n_keys) < self.used()).expand(*self.lead, self.n_queries, self.n_keys)
        left, right = self.options["window"] or (None, None)
        if self.options["is_causal"]:
            ok = ok & (far <= 0)
        if right is not None:
            ok = ok & (far <= right)
        if left is not None:
            ok = ok & (-far <= left)
        if "attn_mask" in tensors:
            mask = tensors["attn_mask"]
            ok = ok & (mask if mask.dtype == torch.bool else mask != -math.inf)
        return ok

    def wide(self) -> Tensors:
        """The tensors in float64, each number once for every pair of query and key, or row, in which it is used."""
        n, s = self.n_queries, self.n_keys
        rows = {"query": (n, self.e), "key": (s, self.e), "value": (s, self.ev), "sinks": (n, 1)}
        wide = {}
        for name, x in self.tensors.items():
            if name == "key_lengths":
                continue
            x = x.detach().double() if x.is_floating_point() else x
            if name in ("key", "value") and self.group > 1:
                x = x.repeat_interleave(self.group, -3)
            if name in ("alibi_slopes", "sinks"):
                x = x[..., None, None]
            wide[name] = x.expand(*self.lead, *rows.get(name, (n, s))).clone()
        return wide

    def narrow(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The sum of the gradients of a wide tensor that belong to one number."""
        shape = self.tensors[name].shape
        if name in ("alibi_slopes", "sinks"):
            x = x.sum((-2, -1))
        if name in ("key", "value") and self.group > 1:
            x = x.unflatten(-3, (-1, self.group)).sum(-3)
        return x.sum_to_size(shape) if x.numel() else x.new_zeros(shape)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers at other strides; "expanded", "equal rows" and "overlapping" repeat some of them."""
    if x.ndim == 0 or x.numel() == 0:
        return x
    if layout == "heads last" and x.ndim > 2:
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "columns first" and x.ndim > 1:
        return x.mT.contiguous().mT
    if layout == "sliced":
        return x.repeat_interleave(2, 0).repeat_interleave(2, -1)[::2][..., ::2]
    if layout == "padded":
        return torch.nn.functional.pad(x, (3, 2) * x.ndim)[(slice(3, -2),) * x.ndim]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "equal rows" and x.ndim > 1:
        return x[..., :1, :].expand(x.shape)
    if layout == "overlapping" and x.ndim > 1 and x.is_floating_point():
        return torch.cat((x[..., 0], x[..., 0, :]), -1).unfold(-1, x.shape[-1], 1)[..., : x.shape[-2], :]
    return x


# What is right


class RoundedGradient(torch.autograd.Function):
    """The identity. Its gradient is rounded to a dtype, as 16-bit kernels round that of the scores."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        """Keep the dtype."""
        ctx.dtype = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, rounded."""
        return grad.to(ctx.dtype).to(grad.dtype), None

    @staticmethod
    def jvp(ctx: Any, x: torch.Tensor, _: None) -> torch.Tensor:
        """The same."""
        return x.clone()


def formula(
    call: Call, tensors: Tensors, held: bool = False, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp and weights, in the dtype of the query; the softmax at least in float32.

    Args:
        tensors: those of the call, or wide ones.
        held: gradients are those with the sums of the softmax held fixed.
        noise: of each score, how much of the size of its terms it is off.
    """
    dtype = tensors["query"].dtype
    work = torch.promote_types(dtype, torch.float32)
    q, k, v = (tensors[name].to(work) for name in ("query", "key", "value"))
    k, v = (torch.where(x.isfinite(), x, 0.0) for x in (k, v))  # what is not finite nobody sees
    if k.ndim > 2 and k.shape[-3] * call.group == call.n_heads:
        k, v = (x.repeat_interleave(call.group, -3) for x in (k, v))
    slopes, sinks = (
        x if x is None or x.ndim > len(call.lead) else x[..., None, None]
        for x in (tensors.get("alibi_slopes"), tensors.get("sinks"))
    )
    scale = 1 / math.sqrt(call.e) if call.options["scale"] is None else call.options["scale"]
    scores, size = scale * (q @ k.mT), abs(scale) * (q.detach().abs() @ k.detach().abs().mT)
    cap = call.options["softcap"]
    if cap is not None:
        size = size + cap
        scores = cap * torch.tanh((scores if noise is None else scores + noise * size) / cap)
    if slopes is not None:
        far = slopes.to(work) * call.distances().abs()
        scores, size = scores - far, size + far.detach().abs()
    mask = tensors.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        added = torch.where(mask == -math.inf, 0.0, mask).to(work)
        scores = scores + added
        size = size + torch.where(added.abs() < 1e30, added.abs(), 0.0).detach()  # beside more, float64 is as blind
    if sinks is not None:
        sinks = sinks.to(work)
        size = size + torch.where(sinks == -math.inf, 0.0, sinks).detach().abs()
    if noise is not None:
        scores = scores + noise * size
    if work != dtype:
        scores = RoundedGradient.apply(scores, dtype)
    ok = call.allowed(tensors)
    scores = torch.where(ok, scores, -math.inf)
    top = torch.full(scores.shape[:-1], -math.inf, dtype=work)[..., None]
    if call.n_keys:
        top = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.where(ok, torch.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total)).squeeze(-1)
    weights = (weights / (total.detach() if held else total)).to(dtype)
    output = ((1.0 - call.options["dropout_p"]) * weights) @ v.to(dtype)  # all are dropped, or none
    found = output, lse, weights
    return found if call.leads["query"] else tuple(x.squeeze(0) for x in found)


# What is found


@contextlib.contextmanager
def running_as(call: Call) -> Iterator[None]:
    """The Triton kernels with small tiles, or PyTorch as users on a CPU have it."""
    if call.path == "torch":
        with mock.patch("kernels.backend.INTERPRETED", False):
            yield
    else:
        with forced("general" if call.kernel == "general" else None, Tile(16, call.block_k, 4, 1), capability=90):
            yield


Solve = Callable[[Tensors], tuple[torch.Tensor, ...]]  # gives output, log-sum-exp and weights, those asked for


def kernel(call: Call, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """What is under test."""
    found = kernels.scaled_dot_product_attention(**tensors, **call.options)
    return (found,) if isinstance(found, torch.Tensor) else tuple(x for x in found if x is not None)


def asked_for(call: Call, three: tuple) -> tuple:
    """Of output, log-sum-exp and weights what the call asks for."""
    wanted = True, call.options["return_lse"], call.options["need_weights"]
    return tuple(x for x, want in zip(three, wanted) if want)


def number(call: Call, results: tuple[torch.Tensor, ...], power: int = 1) -> torch.Tensor:
    """One number that depends on all results."""
    pairs = zip(results, asked_for(call, call.upstream))
    return sum((torch.where(x == -math.inf, 0.0, x) * grad.to(x.dtype) ** power).sum() for x, grad in pairs)


def outcome(call: Call, solve: Solve, tensors: Tensors) -> list[torch.Tensor]:
    """Results and gradients, or what the call's transform makes of them."""
    others = {name: x.detach() for name, x in tensors.items() if name not in call.learned}
    leaves = [tensors[name].detach() for name in call.learned]

    def run(*learned: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return solve({**others, **dict(zip(call.learned, learned))})

    def gradients(*learned: torch.Tensor) -> Any:
        return torch.func.grad(lambda *x: number(call, run(*x)), tuple(range(len(leaves))))(*learned)

    if not leaves:
        return list(run())
    if call.transform.startswith("vmap"):
        two_calls = torch.vmap(gradients if "grad" in call.transform else run)
        return list(two_calls(*(torch.stack((x, x / 2)) for x in leaves)))
    if call.transform == "jacrev":
        both = torch.func.jacrev(
            lambda *x: torch.stack([number(call, run(*x), power) for power in (1, 2)]), tuple(range(len(leaves)))
        )
        return list(both(*leaves))
    if call.transform == "jvp":
        generator = torch.Generator().manual_seed(0)
        directions = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in leaves)
        return list(torch.func.jvp(run, tuple(x.contiguous() for x in leaves), tuple(directions))[1])
    leaves = [x.requires_grad_() for x in leaves]
    results = run(*leaves)
    upstream = [grad.to(x.dtype) for x, grad in zip(results, asked_for(call, call.upstream))]
    twice = call.transform == "double backward"
    grads = derivative(results, leaves, upstream, twice)
    if twice:
        return grads + derivative([sum(grad.square().sum() for grad in grads)], leaves, [None])
    return [*results, *grads]


def derivative(
    results: Any, leaves: list[torch.Tensor], upstream: list, create_graph: bool = False
) -> list[torch.Tensor]:
    """The gradients of the leaves, zero where a result does not depend on one."""
    pairs = [(x, grad) for x, grad in zip(results, upstream) if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in leaves]
    results, upstream = zip(*pairs)
    grads = torch.autograd.grad(results, leaves, upstream, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves)]


def check(call: Call) -> None:
    """Hold a call to the formula."""
    with running_as(call):
        found = outcome(call, functools.partial(kernel, call), call.tensors)

    def by_formula(tensors: Tensors, **options: Any) -> list[torch.Tensor]:
        return outcome(call, lambda x: asked_for(call, formula(call, x, **options)), tensors)

    generator = torch.Generator().manual_seed(1)
    eps = torch.finfo(call.work).eps
    pairs = (*call.lead, call.n_queries, call.n_keys)
    noises = [(torch.rand(pairs, generator=generator, dtype=torch.float64) * 2 - 1) * eps for _ in range(2)]
    theirs = by_formula(call.tensors)
    wide = call.transform == ""
    double = {name: x.double() if x.is_floating_point() else x for name, x in call.tensors.items()}
    double = call.wide() if wide else double
    exact, held = by_formula(double), by_formula(double, held=True)
    noisy = [by_formula(double, noise=noise) for noise in noises]
    names = [*asked_for(call, ("output", "lse", "weights"))]
    n_results = len(names)
    names += [f"grad of {name}" for name in call.learned]
    names = names if wide else [f"{call.transform} {i}" for i in range(len(found))]
    for i, (name, mine, peer, right, fixed, *others) in enumerate(zip(names, found, theirs, exact, held, *noisy)):
        factor = FORWARD if wide and i < n_results else GRADIENT
        right, fixed = (x.masked_fill(x == -math.inf, 0.0) for x in (right, fixed))
        # What the softmax takes off a gradient comes from the output, as rounded as that is, in 16 bits too.
        magnitude = size_of_terms(right, fixed, torch.float32)
        if wide and i >= n_results:
            learned = call.learned[i - n_results]
            right, magnitude, *others = (call.narrow(learned, x) for x in (right, magnitude, *others))
        if name == "output":  # of values that may cancel
            magnitude = formula(call, {**double, "value": double["value"].abs()})[0]
        if name == "lse":
            magnitude += 1.0
        if factor == GRADIENT:  # no gradient is more exact than query, key and value are
            magnitude *= max(1.0, torch.finfo(call.dtype).eps / torch.finfo(mine.dtype).eps)
        hold(name, mine, peer, right, others, magnitude, factor)


def hold(
    name: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    noisy: list[torch.Tensor],
    magnitude: torch.Tensor,
    factor: float,
) -> None:
    """Judge one tensor."""
    assert ours.dtype == theirs.dtype and ours.shape == exact.shape == theirs.shape, (
        f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(exact.shape)}"
    )
    assert torch.equal(ours == -math.inf, theirs == -math.inf), f"{name}: -inf at other places"
    ours, theirs, *noisy = (x.masked_fill(x == -math.inf, 0.0) for x in (ours, theirs, *noisy))
    off = torch.stack([(x.double() - exact).abs() for x in (theirs, *noisy)]).amax(0)
    n, distinct = max(exact.numel(), 1), max(exact.float().unique().numel(), 1)
    factor *= (1 + 2 / distinct**0.5) / (1 + 2 / n**0.5)  # equal rows have equal errors, and count once
    assert_as_exact_as_torch(ours, (exact + off).to(ours.dtype), exact, factor, name, magnitude)


@pytest.mark.filterwarnings(*(f"ignore:{message}" for message, _ in HARMLESS))
@pytest.mark.parametrize(("path", "count"), [("torch", 120), ("triton", 20)])
def test_any_call_is_what_the_formula_says(path: str, count: int) -> None:
    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def judge(data: st.DataObject) -> None:
        check(Call(Choices(lambda name, values: data.draw(st.sampled_from(values), name), {"path": path})))

    judge()


# For as long as there is time


def failure(seed: int, options: dict[str, Any]) -> tuple[str, str, Choices]:
    """Of a call: what kind of error it ends in, "" for none, its message, and the options drawn."""
    choices = Choices(drawn_by(seed), options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message, _ in HARMLESS:
                warnings.filterwarnings("ignore", message)
            check(Call(choices))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return re.sub(r"[-\d.]+", "#", message)[:80], message, choices
    return "", "", choices


def simplified(seed: int, kind: str, choices: Choices) -> Choices:
    """The same failure with as many options as possible at their simplest."""
    is_simpler = True
    while is_simpler:
        is_simpler = False
        for name in list(choices):
            if choices[name] == choices.simplest[name]:
                continue
            found, _, other = failure(seed, {**choices, name: choices.simplest[name]})
            if found == kind:
                choices, is_simpler = other, True
                break
    return choices


def main() -> int:
    """Draw calls until the time is over; 1 if some failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next one has the next number")
    parser.add_argument("--call", type=ast.literal_eval, help="one call: seed and options, as they are printed")
    given_arguments = parser.parse_args()
    torch.set_num_threads(1)
    interpreter.prepare()
    if given_arguments.call:
        seed, options = given_arguments.call
        print(failure(seed, options)[1] or "right")
        return 0
    end, seed = time.monotonic() + 60 * given_arguments.minutes, given_arguments.seed
    seeds: dict[str, list[int]] = {}  # of the calls that fail, by kind
    while time.monotonic() < end:
        kind, message, choices = failure(seed, {})
        if kind:
            seeds.setdefault(kind, []).append(seed)
            if len(seeds[kind]) == 1:
                simple = simplified(seed, kind, choices)
                print(f'{message}\n  --call "({seed}, {dict(simple)})"', flush=True)
                print("  " + ", ".join(f"{n}={x!r}" for n, x in simple.items() if x != simple.simplest[n]), flush=True)
        seed += 1
    print(f"{seed - given_arguments.seed} calls, {sum(map(len, seeds.values()))} failed; by kind, their seeds: {seeds}")
    return 1 if seeds else 0


if __name__ == "__main__":
    sys.exit(main())

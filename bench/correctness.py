"""Telling cases of every kernel: right or wrong, against float64, beside PyTorch's own error.

What is compared, and how near is near enough, is the tests' (tests/tolerances.py). Here are few cases, one for each way
through the kernels, so that all can be tried within seconds of the first contact with a GPU. Sizes are no multiples of
a tile's sides.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

import kernels
from kernels.attention import plan
from tests import norm_problem
from tests.conformance.judge import Attention, Call, agree, compare, exact, make, solve
from tests.tolerances import Comparison, error_ratios

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Sizes = tuple[int, int, int, int, int, int, int]  # B, Hq, Hkv, L, S, E, Ev


def tensors(sizes: Sizes, dtype: torch.dtype) -> dict[str, Callable[[], dict[str, Any]]]:
    """What a feature adds to a call."""
    b, heads, _, n_queries, n_keys, _, _ = sizes

    def bias(*shape: int) -> dict[str, Any]:
        return {"attn_mask": torch.randn(shape).to(dtype), "learned": ("query", "key", "value", "attn_mask")}

    def some(*shape: int) -> dict[str, Any]:  # query 2 may attend to nothing
        allowed = torch.rand(shape) < 0.6
        allowed[..., min(2, n_queries - 1), :] = False
        return {"attn_mask": allowed}

    used = torch.arange(b) % 2 * (n_keys // 3) + n_keys // 2
    return {
        "causal": lambda: {"is_causal": True},
        "padding": lambda: {"attn_mask": torch.arange(n_keys) < used[:, None, None, None]},
        "mask": lambda: some(b, heads, n_queries, n_keys),
        "bias": lambda: bias(1, heads, n_queries, n_keys),
        "key-bias": lambda: bias(b, 1, 1, n_keys),
        "scale": lambda: {"scale": 0.3},
        "window": lambda: {"window": (n_keys // 5, 7)},
        "bottom-right": lambda: {"causal_alignment": "bottom_right"},
        "softcap": lambda: {"softcap": 3.0},
        "slopes": lambda: {"alibi_slopes": torch.rand(heads)},
        "sinks": lambda: {"sinks": torch.randn(heads), "learned": ("query", "key", "value", "sinks")},
        "lengths": lambda: {"key_lengths": used.int()},
        "dropout": lambda: {"dropout_p": 0.1},
        "packed": dict,
        "spread": dict,
        "tf32": dict,
    }


class AttentionProblem(NamedTuple):
    """A call of attention.

    Args:
        features: names in `tensors`; "dropout" drops a tenth; "packed" lays the batch entries end to end; "spread" has
            numbers of a row apart in memory; "tf32" lets float32 products round to it.
        hopper: directions and head sizes of the Gluon kernels that must run it; none: the others.
    """

    sizes: Sizes
    features: tuple[str, ...] = ()
    dtype: torch.dtype = BF16
    hopper: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        names = "B", "H", "Hkv", "L", "S", "E", "Ev"
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([*self.features, *(f"{name}{n}" for name, n in zip(names, self.sizes)), dtype])

    def small(self) -> AttentionProblem:
        """The same on a few numbers, for Triton's interpreter."""
        _, heads, kv_heads, n_queries, n_keys, e, ev = self.sizes
        n_keys = n_keys if "dropout" in self.features else min(n_keys, 41)
        return self._replace(sizes=(1, heads // kv_heads, 1, min(n_queries, 33), n_keys, e, ev))

    def call(self, device: str) -> Call:
        torch.manual_seed(sum(self.sizes))
        arguments: dict[str, Any] = {}
        for feature in self.features:
            arguments |= tensors(self.sizes, self.dtype)[feature]()
        call = make(self.sizes, self.dtype, device, **arguments)
        if "spread" in self.features:
            call = call.replace(**{name: getattr(call, name).mT.contiguous().mT for name in ("query", "key", "value")})
        return call

    def attention(self) -> Attention:
        attend = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
        if "packed" in self.features:
            return pack
        if "dropout" in self.features:
            return seeded(attend)
        return attend

    @contextmanager
    def settings(self) -> Iterator[None]:
        """The Gluon kernels that are asked for, and the precision of float32 products."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if "tf32" in self.features else "highest")
        try:
            asked = " ".join(f"{direction}{size}" for direction, size in self.hopper) or "0"
            with mock.patch.dict(os.environ, KERNELS_HOPPER=asked):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def run(self, device: str) -> None:
        """Our kernels alone, forward and backward."""
        with self.settings():
            solve(self.call(device), self.attention())

    def compare(self, device: str) -> Iterator[Comparison]:
        with self.settings():
            call, attention = self.call(device), self.attention()
            if "dropout" in self.features:  # values of one number each give the weights, in which 0 is a dropped one
                eye = torch.eye(self.sizes[4], dtype=self.dtype, device=device).expand(*call.value.shape)
                call = call.replace(kept=call.replace(value=eye).run(attention) != 0)
            with must_run(self.hopper):
                found = list(compare(solve(call, attention), call))
            yield from map(coarsen(call), found) if "tf32" in self.features else found
            if self.hopper:
                first = solve(call, attention)
                for _ in range(4):  # what changes from run to run by more than rounding is a race
                    for name, x in solve(call, attention).items():
                        agree(x, first[name], f"run again: {name}", slack=4.0)


def coarsen(call: Call) -> Callable[[Comparison], Comparison]:
    """Hold a call in TF32 to the error of inputs cut to it, twice as loosely: products inside are cut, too.

    PyTorch is no yardstick: by shape and version its products round to TF32, cut to it, or stay in float32.
    """

    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)  # 10 of 23 bits of the fraction are kept

    assert call.grad is not None
    query, key, value = map(cut, (call.query, call.key, call.value))
    rulers = exact(call.replace(query=query, key=key, value=value, grad=cut(call.grad)))
    return lambda one: one._replace(theirs=rulers[one.name].float(), factor=2 * one.factor)


def seeded(attention: Attention) -> Attention:
    """Every call under the same seed, so that it drops the same weights."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        torch.manual_seed(5)
        return attention(*arguments, **keywords)

    return run


def pack(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """`varlen_attention` of batch entries laid end to end."""
    batch, n_queries, n_keys = query.shape[0], query.shape[2], key.shape[2]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    first, second = (torch.arange(batch + 1, dtype=torch.int32, device=query.device) * n for n in (n_queries, n_keys))
    output = kernels.varlen_attention(
        rows[0], rows[1], rows[2], first, second, n_queries, n_keys, backend="triton", **keywords
    )
    return output.unflatten(0, (batch, n_queries)).transpose(1, 2)


@contextmanager
def must_run(hopper: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Fail where a Gluon kernel that is asked for does not run within it."""
    if not hopper:
        yield
        return
    from kernels.attention import hopper_backward, hopper_forward

    modules = {"forward": hopper_forward, "backward": hopper_backward}
    with ExitStack() as stack:
        launchers = {}
        for name, module in modules.items():
            launcher = getattr(module, f"launch_hopper_{name}")
            patch = mock.patch.object(module, f"launch_hopper_{name}", wraps=launcher)
            launchers[name] = stack.enter_context(patch)
        yield
    for name, _ in hopper:
        assert launchers[name].called, f"the Hopper kernel did not run {name}"


class NormProblem(NamedTuple):
    """Layer norm, or without `centre` RMS norm, of rows; dtypes of input, residual (None: none) and weight."""

    shape: tuple[int, int]
    centre: bool = True
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype] = (BF16, None, BF16)
    dropout: float = 0.0
    save_output: bool = False

    def __str__(self) -> str:
        words = ["layer norm" if self.centre else "rms norm"]
        words += ["from the output"] if self.save_output else []
        words += [f"dropout {self.dropout}"] if self.dropout else []
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes if dtype)
        return " ".join([*words, f"M{self.shape[0]} N{self.shape[1]}", dtypes])

    def small(self) -> NormProblem:
        """The same on a few numbers, for Triton's interpreter."""
        return self._replace(shape=(3, min(self.shape[1], 1_001)))

    def parts(self, device: str) -> tuple[Callable[..., Any], list[torch.Tensor | None], list[torch.Tensor]]:
        """Our function, its tensors and the upstream gradients."""
        torch.manual_seed(sum(self.shape))
        input_dtype, residual, parameters = self.dtypes
        dtypes = (input_dtype, residual or input_dtype, parameters)
        drawn, upstreams = norm_problem.sample(
            lambda *shape, dtype: torch.randn(shape).to(dtype).to(device), self.centre, self.shape, dtypes
        )
        options = {}
        if self.save_output:  # weights far from 0, by which the output is divided
            options, drawn[2] = {"save_output": True}, drawn[2].sign() + 0.3 * drawn[2]
        if residual is None:
            drawn[1], upstreams = None, upstreams[:1]
            return norm_problem.ours(self.centre, **options), drawn, upstreams
        ours = norm_problem.ours(self.centre, dropout_p=self.dropout, prenorm=True, **options)
        return ours, drawn, upstreams

    def run(self, device: str) -> None:
        """Our kernels alone, forward and backward, and what `kept` asks of them."""
        norm_problem.results(*self.parts(device))
        if self.dropout:
            norm_problem.kept(self.shape, self.dropout, device, centre=self.centre)

    def compare(self, device: str) -> Iterator[Comparison]:
        ours, drawn, upstreams = self.parts(device)
        keep = norm_problem.kept(self.shape, self.dropout, device, centre=self.centre)[0] if self.dropout else None
        keep = None if keep is None else keep.cpu()
        peer = norm_problem.torchs(self.centre, prenorm=drawn[1] is not None, keep=keep, dropout_p=self.dropout)
        slack = 3.0 if self.save_output else 1.0  # taking the bias off again costs a digit
        yield from norm_problem.compare(ours, peer, drawn, upstreams, slack)


Problem = AttentionProblem | NormProblem


def general() -> list[Problem]:
    """The kernel for any shape, by feature, head size, dtype, lengths and strides."""
    plain: Sizes = (2, 4, 4, 331, 331, 128, 128)
    small: Sizes = (2, 4, 2, 203, 267, 64, 64)
    few: Sizes = (2, 8, 2, 1, 523, 128, 128)
    return [
        AttentionProblem(plain, ("causal",)),
        AttentionProblem(plain),
        AttentionProblem(small, ("causal",)),
        AttentionProblem((2, 2, 2, 203, 203, 256, 256), ("causal",)),
        AttentionProblem(plain, ("padding",)),
        AttentionProblem(plain, ("bias",)),
        AttentionProblem(small, ("key-bias",)),
        AttentionProblem(small, ("mask",)),
        AttentionProblem((2, 3, 3, 131, 128, 128, 128), ("dropout", "causal")),
        AttentionProblem((2, 3, 3, 131, 64, 64, 64), ("dropout",)),
        AttentionProblem(small, ("bias", "causal")),
        AttentionProblem(few),
        AttentionProblem(few, ("padding",)),
        AttentionProblem(small, ("causal",), F16),
        AttentionProblem(small, ("causal",), F32),
        AttentionProblem(small, ("causal", "tf32"), F32),
        AttentionProblem((2, 4, 2, 131, 83, 80, 40), ("causal",)),
        AttentionProblem(small, ("window",)),
        AttentionProblem(small, ("softcap",)),
        AttentionProblem(small, ("slopes", "causal")),
        AttentionProblem(small, ("sinks", "causal")),
        AttentionProblem(small, ("lengths", "bottom-right", "causal")),
        AttentionProblem(small, ("mask", "window", "softcap", "slopes", "sinks", "lengths", "bottom-right")),
        AttentionProblem(small, ("packed",)),
        AttentionProblem(small, ("spread",)),
        AttentionProblem((1, 2, 2, 131, 67, 320, 320), ("causal",)),
    ]


def short() -> list[Problem]:
    """The kernels for short sequences."""
    shapes = [
        (5, 16, True),
        (9, 16, False),
        (9, 32, False),
        (16, 32, False),
        (17, 64, True),
        (32, 32, True),
        (33, 64, False),
        (64, 64, False),
        (64, 128, True),
    ]
    cases = [AttentionProblem((7, 4, 4, n, n, size, size), ("causal",) if causal else ()) for n, size, causal in shapes]
    odd: Sizes = (5, 6, 2, 9, 13, 24, 16)
    nine: Sizes = (7, 4, 4, 9, 9, 16, 16)
    return [
        *cases,
        AttentionProblem(nine, ("padding",)),
        AttentionProblem(nine, ("mask",)),
        AttentionProblem((3, 4, 4, 47, 47, 32, 32), ("padding",)),
        AttentionProblem((7, 4, 4, 16, 16, 16, 16), ("dropout",)),
        AttentionProblem((3, 4, 4, 64, 64, 64, 64), ("dropout", "causal")),
        AttentionProblem(nine, (), F32),
        AttentionProblem(nine, ("padding",), F32),
        AttentionProblem(nine, (), F16),
        AttentionProblem((7, 4, 4, 31, 31, 16, 16), ("causal",), F32),
        AttentionProblem(odd),
        AttentionProblem(odd, ("causal", "bottom-right")),
        AttentionProblem(odd, ("window", "softcap")),
        AttentionProblem(odd, ("slopes", "lengths")),
        AttentionProblem(odd, ("spread",)),
        AttentionProblem((7, 16, 4, 16, 16, 64, 64), ("causal",)),
        AttentionProblem((1, 1, 1, 1, 1, 16, 16)),
    ]


def norms() -> list[Problem]:
    """Both norms at widths that fit a tile and those that are walked, with and without a residual."""
    whole, mixed = (BF16, BF16, BF16), (BF16, F32, F32)
    widths = (64, 256, 1_000, 1_001, 1_024, 4_096, 8_192, 16_384, 65_536)
    return [
        *(NormProblem((37, n)) for n in widths),
        *(NormProblem((37, n), False) for n in (256, 1_001, 4_096, 8_192)),
        *(NormProblem((37, n), True, whole, 0.1) for n in (256, 1_001, 4_096, 8_192)),
        *(NormProblem((37, n), False, whole) for n in (1_001, 8_192)),
        NormProblem((37, 1_024), True, mixed, 0.1),
        NormProblem((37, 1_024), True, mixed),
        NormProblem((4_099, 256), True, (BF16, None, F32)),
        NormProblem((37, 1_024), True, (F32, None, F32)),
        NormProblem((37, 1_024), True, (F16, None, F16)),
        NormProblem((37, 1_024), save_output=True),
        NormProblem((37, 4_096), False, whole, 0.1, save_output=True),
        NormProblem((1, 1_024)),
    ]


def hopper(direction: str, size: int) -> list[Problem]:
    """A Gluon kernel in one direction; the other direction is the general kernel's."""
    asked = ((direction, size),)
    d, tall = (size, size), 203 if size == 256 else 331
    sizes: list[tuple[Sizes, tuple[str, ...]]] = [
        ((1, 2, 2, 128, 128, *d), ()),
        ((2, 4, 4, tall, tall, *d), ()),
        ((2, 4, 4, tall, tall, *d), ("causal",)),
        ((2, 4, 2, 1_000, 700, *d), ("causal",)),
        ((2, 4, 4, 192, 331, *d), ("window",)),
        ((2, 4, 2, tall, tall, *d), ("lengths", "causal", "bottom-right")),
        ((2, 4, 4, tall, tall, *d), ("softcap",)),
        ((2, 4, 4, 384, 384, *d), ("causal", "scale")),
        ((1, 33, 11, 515, 515, *d), ("causal",)),
    ]
    problems = [AttentionProblem(shape, features, BF16, asked) for shape, features in sizes]
    return [*problems, AttentionProblem((2, 4, 4, tall, tall, *d), ("causal",), F16, asked)]


PROBLEMS: dict[str, Callable[[], list[Problem]]] = {
    "general": general,
    "short": short,
    "norms": norms,
    **{
        f"{direction}{size}": functools.partial(hopper, direction, size)
        for direction, sizes in plan.HOPPER_HEAD_SIZES.items()
        for size in sizes
    },
}


class Finding(NamedTuple):
    """One tensor of a problem: its distance from the exact one and PyTorch's, as shares of the exact one's norm; our
    error over PyTorch's, at least over rounding's; why it is not right, empty where it is."""

    tensor: str
    error: float
    torch_error: float
    ratio: float
    problem: str = ""


def find(problem: Problem, device: str) -> Iterator[Finding]:
    """Compare a problem's tensors."""
    for one in problem.compare(device):
        exact = one.exact.detach().double().cpu()
        ours, theirs = one.ours.detach().cpu(), one.theirs.detach().cpu()
        magnitude = exact if one.magnitude is None else one.magnitude.cpu()
        norm = max(torch.linalg.vector_norm(exact).item(), torch.finfo(torch.float64).tiny)
        error, torch_error = (torch.linalg.vector_norm(x.double() - exact).item() / norm for x in (ours, theirs))
        wrong = ""
        try:
            one.judge()
        except AssertionError as failure:
            wrong = str(failure).splitlines()[0]
        yield Finding(one.name, error, torch_error, error_ratios(ours, theirs, exact, magnitude)[0], wrong)

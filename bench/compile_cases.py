"""What to compile to know that every kernel fits every GPU: the launchers' own launches, on tensors without memory.

A case calls a launcher with tensors of the meta device and a driver that claims to be a GPU, so what is compiled is
what a user's call would compile: the launcher's tile, and Triton's own specialisation to strides and alignment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from kernels.attention.call import Call
from kernels.attention.plan import Plan, why_not_short

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_SIZES = (16, 32, 64, 128, 256)
WIDTHS = (64, 256, 768, 1000, 1001, 1024, 2048, 4096, 5120, 8192, 16384, 65536)  # of rows to normalise
FEW_WIDTHS, QUICK_WIDTHS = (1001, 1024, 8192), (64, 1024, 16384)
LENGTH = 4096
ROWS = 4096


class Case(NamedTuple):
    """One call of a launcher; picklable."""

    arch: int
    dtype: str
    size: int  # E and Ev, or the width of a row
    feature: str  # of FEATURES or NORMS

    @property
    def is_norm(self) -> bool:
        return self.feature in NORMS

    @property
    def label(self) -> str:
        return f"{self.dtype} {'N' if self.is_norm else 'D'}{self.size} {self.feature}"


class Feature(NamedTuple):
    """A kind of attention call: which optional tensors it has, by name, its rules, and what it is compiled for.

    Each tile is compiled for every size of element and of heads by the features that choose it; for the others, two
    head sizes of bfloat16 stand for all. length: queries; keys too for short sequences. kernel: "general", "short" or
    "hopper".
    """

    tensors: tuple[str, ...] = ()
    rules: dict[str, Any] = {}
    length: int = LENGTH
    dtypes: tuple[str, ...] = ("bf16",)
    sizes: tuple[int, ...] = (64, 128)
    kernel: str = "general"


TABLE_SIZES = (64, 128, 256)  # of heads in docs/compiled.md
EVERY: dict[str, Any] = {"dtypes": ("bf16", "fp32"), "sizes": HEAD_SIZES}  # float16 takes bfloat16's tiles
EVERY_RULE = {"softcap": 30.0, "left": 512, "right": 64, "bottom_right": True}
FEATURES = {
    "plain": Feature(dtypes=tuple(DTYPES), sizes=HEAD_SIZES),
    "causal": Feature((), {"right": 0}, **EVERY),
    "mask": Feature(("mask",), {"right": 0}, sizes=TABLE_SIZES),
    "bool mask": Feature(("bool mask",), sizes=TABLE_SIZES),
    "window": Feature((), {"left": 512, "right": 0}, sizes=TABLE_SIZES),
    "softcap": Feature((), {"right": 0, "softcap": 30.0}, sizes=TABLE_SIZES),
    "slopes": Feature(("slopes",), {"right": 0}, sizes=TABLE_SIZES),
    "rules": Feature(("lengths", "slopes", "sinks"), EVERY_RULE),
    "packed": Feature(("starts",), {"right": 0, "max_queries": LENGTH, "max_keys": LENGTH}),
    "dropout": Feature(("seed",), {"right": 0, "dropout_p": 0.1}, sizes=TABLE_SIZES),
    "all": Feature(("seed", "mask", "lengths", "slopes", "sinks"), {**EVERY_RULE, "dropout_p": 0.1}, **EVERY),
    "few": Feature(("seed", "mask"), {"right": 0, "dropout_p": 0.1}, length=1, **EVERY),
    "tf32": Feature((), {"right": 0}, dtypes=("fp32",), sizes=HEAD_SIZES),
}
SHORT_LENGTHS = (5, 12, 32, 64)  # sharing tiles, and alone in tiles of 16, 32 and 64
SHORT: dict[str, Any] = {"dtypes": ("bf16", "fp32"), "sizes": (16, 32, 64, 128), "kernel": "short"}
SHORT_RULES = {"softcap": 30.0, "left": 5, "right": 2, "bottom_right": True, "dropout_p": 0.1}
FEATURES |= {f"short {n}": Feature((), {"right": 0}, n, **SHORT) for n in SHORT_LENGTHS}
FEATURES |= {
    f"short {n} all": Feature(("seed", "mask", "lengths", "slopes"), SHORT_RULES, n, **SHORT) for n in SHORT_LENGTHS
}
HOPPER: dict[str, Any] = {"sizes": (64, 128, 256), "kernel": "hopper"}
FEATURES |= {
    "hopper": Feature((), {}, dtypes=("bf16", "fp16"), **HOPPER),
    "hopper causal": Feature((), {"right": 0}, **HOPPER),
    "hopper 300": Feature((), {"right": 0}, 300, sizes=(64,), kernel="hopper"),  # too few rows for three consumers
    "hopper lengths": Feature(("lengths",), {}, **HOPPER),
    "hopper all": Feature(("lengths",), EVERY_RULE, **HOPPER),
}


class Norm(NamedTuple):
    """A kind of norm call, and what it is compiled for.

    Args:
        centre: layer norm, with a bias; False for RMS norm.
        residual: "" for none, "same" for one of the input's dtype, or a dtype, then of weight and bias too.
        dropout: of the input before it is added, so that input and residual have gradients of their own.
        has_sum: the sum is asked for, and has a gradient.
        from_output: the backward starts from the output.
        every: compiled at every width and for each chip; the others at a few widths in bfloat16.
    """

    centre: bool = True
    residual: str = ""
    dropout: bool = False
    has_sum: bool = False
    from_output: bool = False
    every: bool = False


NORMS = {
    "norm": Norm(every=True),
    "rms norm": Norm(centre=False),
    "add norm": Norm(residual="same", has_sum=True),
    "output norm": Norm(from_output=True),
    "all norm": Norm(True, "same", True, True, every=True),
    "all output norm": Norm(True, "same", True, True, True, every=True),
    "all wide norm": Norm(True, "fp32", True, True),
}
QUICK_FEATURES = ("plain", "causal", "all", "short 5", "short 32", "hopper causal")
TABLE_FEATURES = (
    "plain",
    "causal",
    "window",
    "mask",
    "bool mask",
    "softcap",
    "slopes",
    "dropout",
    "all",
    "hopper",
    "hopper causal",
)
# Between them, every tile that can be chosen.
TILE_FEATURES = ("plain", "causal", "mask", "dropout", "all", "few", *(f"short {n}" for n in SHORT_LENGTHS))


def all_cases(archs: list[int], quick: bool, tiles: bool = False) -> Iterator[Case]:
    """The cases of these chips; `tiles`: fewer features, an element size once; `quick`: few features, sizes, widths."""
    dtypes = ["bf16"] if quick else ["bf16", "fp32"] if tiles else list(DTYPES)
    for arch, dtype in itertools.product(archs, dtypes):
        for feature, size in itertools.product(FEATURES, HEAD_SIZES):
            if (quick or arch == 120) and (feature not in QUICK_FEATURES or size not in (64, 128)):
                continue  # 120 takes the tiles of 80
            if FEATURES[feature].kernel == "hopper" and arch != 90:
                continue
            if FEATURES[feature].kernel == "short" and not may_be_short(arch, dtype, size, FEATURES[feature].length):
                continue
            if tiles and (feature not in TILE_FEATURES or (size < 64 and feature == "causal")):
                continue  # narrower heads take the tiles of 64
            if dtype in FEATURES[feature].dtypes and size in FEATURES[feature].sizes:
                yield Case(arch, dtype, size, feature)
        yield Case(arch, dtype, 1024, "all")  # heads wider than a tile
        for feature, norm in NORMS.items():
            if dtype == "fp16" and feature != "norm":
                continue  # a tile goes by the bytes of an element
            if not norm.every and (quick or tiles or arch == 120 or dtype != "bf16"):
                continue
            for size in (QUICK_WIDTHS if quick else WIDTHS) if norm.every else FEW_WIDTHS:
                yield Case(arch, dtype, size, feature)


def table_cases(archs: list[int]) -> Iterator[Case]:
    """The cases of docs/compiled.md."""
    for arch, size, feature in itertools.product(archs, TABLE_SIZES, TABLE_FEATURES):
        if FEATURES[feature].kernel != "hopper" or arch == 90:
            yield Case(arch, "bf16", size, feature)


def may_be_short(arch: int, dtype: str, size: int, length: int) -> bool:
    """Whether the kernels for short sequences take such calls."""
    q = empty(1, 1, length, size, dtype=DTYPES[dtype])
    return not why_not_short(q, q, q, Call(), "", arch)


def launch(case: Case) -> None:
    """Call the launchers of a case, which must have been patched to compile only."""
    (launch_norm if case.is_norm else launch_attention)(case)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_attention(case: Case) -> None:
    """Forward and backward of four heads in two batch entries."""
    torch.set_float32_matmul_precision("high" if case.feature == "tf32" else "highest")
    feature, dtype = FEATURES[case.feature], DTYPES[case.dtype]
    packed = "starts" in feature.tensors
    q = empty(1 if packed else 2, feature.length, 4, case.size, dtype=dtype).transpose(1, 2)
    n_keys = feature.length if feature.kernel == "short" else LENGTH
    k, v = (empty(1 if packed else 2, n_keys, 4, case.size, dtype=dtype).transpose(1, 2) for _ in range(2))
    some = {
        "attn_mask": {
            "mask": empty(1, 4, feature.length, n_keys, dtype=dtype),
            "bool mask": empty(2, 1, 1, n_keys, dtype=torch.bool),
        },
        "key_lengths": {"lengths": empty(2, dtype=torch.int32)},
        "alibi_slopes": {"slopes": empty(1, 4)},
        "sinks": {"sinks": empty(1, 4)},
        "query_starts": {"starts": empty(9, dtype=torch.int32)},
        "key_starts": {"starts": empty(9, dtype=torch.int32)},
        "seed": {"seed": empty(1, dtype=torch.int64)},
    }
    given = {
        field: tensor for field, kinds in some.items() for kind, tensor in kinds.items() if kind in feature.tensors
    }
    call = Call(scale=0.125, **given, **feature.rules)  # type: ignore[arg-type]
    output, row_max = torch.empty_like(q), empty(*q.shape[:3])
    plan = Plan(feature.kernel, {}, q, v, call, n_keys, case.arch)
    if feature.kernel == "short":
        from kernels.attention.short import launch_short_forward
        from kernels.attention.short_backward import launch_short_backward

        launch_short_forward(q, k, v, call, plan.tile("forward"), output)
        launch_short_backward(output, q, k, v, call, plan.tile("backward"), q, k, v)
        return
    if feature.kernel == "hopper":
        from kernels.attention.hopper_forward import launch_hopper_forward

        launch_hopper_forward(q, k, v, call, output, row_max, row_max)
        if case.size <= 128:
            from kernels.attention.hopper_backward import launch_hopper_backward

            launch_hopper_backward(output, q, k, v, call, empty(3, *row_max.shape), empty(*q.shape), q, k, v)
        return
    from kernels.attention.general import launch_forward
    from kernels.attention.general_backward import launch_backward, launch_delta

    launch_forward(q, k, v, call, plan.tile("forward"), output, row_max, row_max)
    statistics = launch_delta(output, output, row_max, row_max, None, None, call)
    dmask = call.attn_mask if call.has_float_mask else None
    launch_backward(output, q, k, v, call, plan, statistics, q, k, v, dmask)


def launch_norm(case: Case) -> None:
    """Forward and backward of rows with a weight, and for layer norm a bias."""
    from kernels.layer_norm.backward import launch_backward
    from kernels.layer_norm.forward import launch_forward

    norm, dtype = NORMS[case.feature], DTYPES[case.dtype]
    wide = DTYPES.get(norm.residual, dtype)  # of residual and sum, and of weight and bias
    output, total = empty(ROWS, 1, 1, case.size, dtype=dtype), empty(ROWS, 1, 1, case.size, dtype=wide)
    weight, row = empty(case.size, dtype=wide), empty(ROWS)
    residual = total if norm.residual else None
    seed = empty(1, dtype=torch.int64) if norm.dropout else None
    asked = total if norm.has_sum else None
    bias, mean = (weight, row) if norm.centre else (None, None)
    dropout_p = 0.1 if norm.dropout else 0.0
    x = output if norm.from_output or not norm.residual else total
    keeps_sum = total if norm.residual and not norm.from_output else asked  # for the backward
    separate = norm.dropout or not norm.residual  # else input and residual share a gradient
    launch_forward(output, residual, seed, weight, bias, output, keeps_sum, mean, row, 1e-5, dropout_p, wide)
    launch_backward(
        output,
        asked,
        x,
        seed,
        weight,
        bias,
        mean,
        row,
        output if separate else None,
        residual,
        weight,
        bias,
        dropout_p,
        norm.centre,
        norm.from_output,
    )

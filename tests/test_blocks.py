"""The layers against the references they are made of, as the expression report checks its own."""

import copy
import json
import math
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

import kernels.nn
from calcformer.model.layers import DecoderLayer, EncoderLayer, Memory, ScaledDotProductAttention
from calcformer.model.positions import Positions
from calcformer.model.rows import Rows
from tests.model_problem import attend_by_loops, compose_layer

COURSE = json.loads((pathlib.Path(__file__).parent / "golden" / "course_checks.json").read_text())
ACCEPTED = 1e-5  # the report's bound for its error in float32
BATCH, SOURCE, TARGET, WIDTH, HEADS, HIDDEN = 2, 5, 3, 8, 2, 11

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The report's error: max |x - y| / max(|x| + |y|, 1e-8)."""
    return ((found - expected).abs().max() / (found.abs() + expected.abs()).clamp_min(1e-8).max()).item()


def spaced(shape: tuple[int, ...], ends: tuple[float, float] = (-0.4, 0.6)) -> torch.Tensor:
    """The report's inputs: equally spaced numbers, row-major."""
    return torch.linspace(*ends, steps=math.prod(shape)).reshape(shape)


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """The module with parameters as the report fills them: each from -1.4 to 1.3."""
    for parameter in module.parameters():
        parameter.copy_(spaced(tuple(parameter.shape), (-1.4, 1.3)))
    return module


@torch.no_grad()
def drawn(module: nn.Module) -> nn.Module:
    """The module with random parameters: with the report's, all keys fit a query alike, and much goes unseen."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return module


def run(layer: EncoderLayer | DecoderLayer) -> torch.Tensor:
    """The layer on spaced inputs without padding: (B, T, D)."""
    rows, memory_rows = (Rows(torch.zeros(BATCH, length), None) for length in (TARGET, SOURCE))
    x, memory = inputs(torch.float32)
    if isinstance(layer, EncoderLayer):
        return layer(x.flatten(0, 1), rows, Positions()).view_as(x)
    read = layer.cross_attention.read(Memory(memory.flatten(0, 1), memory_rows))
    return layer(x.flatten(0, 1), rows, Positions(), read).view_as(x)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, T, D) and memory (B, S, D)."""
    return spaced((BATCH, TARGET, WIDTH)).to(dtype), spaced((BATCH, SOURCE, WIDTH), (-0.8, 0.5)).to(dtype)


def composed(layer: EncoderLayer | DecoderLayer, norm_first: bool) -> torch.Tensor:
    """The layer on the same inputs, composed of loops in float64."""
    layer = copy.deepcopy(layer).double()
    x, memory = inputs(torch.float64)
    blocked = torch.zeros(BATCH, TARGET, TARGET, dtype=torch.bool)
    if isinstance(layer, EncoderLayer):
        return compose_layer(layer, x, blocked, attend=attend_by_loops, norm_first=norm_first)[0]
    later = torch.tensor(COURSE["subsequent_mask"]["expected"])
    all_seen = torch.zeros(BATCH, TARGET, SOURCE, dtype=torch.bool)
    return compose_layer(layer, x, blocked | later, memory, all_seen, attend=attend_by_loops, norm_first=norm_first)[0]


@pytest.mark.parametrize("fill", [filled, drawn])
@pytest.mark.parametrize("norm", ["post", "pre", "course"])
@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
@torch.no_grad()
def test_layers_are_what_their_loops_are(
    kind: type[EncoderLayer | DecoderLayer], norm: str, fill: Callable[[nn.Module], nn.Module]
) -> None:
    layer = kind(WIDTH, HEADS, HIDDEN, norm=norm)
    fill(layer)
    assert error(run(layer), composed(layer, norm_first=norm == "pre")) < ACCEPTED
    assert error(run(layer), composed(layer, norm_first=norm != "pre")) > 0.01  # the check tells the orders apart


@pytest.mark.parametrize("fault", ["no scale", "no residual", "keys and values exchanged", "sees later tokens"])
@torch.no_grad()
def test_the_check_rejects_wrong_layers(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DecoderLayer(WIDTH, HEADS, HIDDEN)
    drawn(layer)
    expected = composed(layer, norm_first=False)
    right, norm = kernels.scaled_dot_product_attention, kernels.nn.LayerNorm.forward
    wrong = {
        "no scale": lambda q, k, v, **options: right(q, k, v, **options, scale=1.0),
        "keys and values exchanged": lambda q, k, v, **options: right(q, v, k, **options),
        "sees later tokens": lambda q, k, v, **options: right(q, k, v, **{**options, "is_causal": False}),
    }
    if fault == "no residual":
        monkeypatch.setattr(kernels.nn.LayerNorm, "forward", lambda self, x, residual, **options: norm(self, x))
    else:
        monkeypatch.setattr(kernels, "scaled_dot_product_attention", wrong[fault])
    assert error(run(layer), expected) > 100 * ACCEPTED


@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
def test_the_course_drops_what_is_normalised(kind: type[EncoderLayer | DecoderLayer]) -> None:
    kept = [run(kind(WIDTH, HEADS, HIDDEN, 0.5, norm).train()) != 0 for norm in ("post", "course")]
    assert kept[0].all() and 0.3 < kept[1].float().mean() < 0.7


def test_attention_has_the_courses_values() -> None:
    case = COURSE["self_attention"]
    maps = [filled(nn.Linear(4, 4)) for _ in range(3)]
    heads = (
        linear(spaced(tuple(case["shape"]), case[part])).unsqueeze(1)
        for linear, part in zip(maps, ("query", "key", "value"))
    )
    found = ScaledDotProductAttention()(*heads, None, False).squeeze(1)
    assert error(found, torch.tensor(case["expected"])) < ACCEPTED


def test_layer_norm_has_the_courses_values() -> None:
    case = COURSE["layer_normalization"]
    found = kernels.nn.LayerNorm(4, eps=1e-10)(spaced(tuple(case["shape"]), case["input"]))
    assert error(found, torch.tensor(case["expected"])) < ACCEPTED

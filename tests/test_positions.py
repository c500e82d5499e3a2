"""Position encodings: by hand, against their formulas in float64, and what they promise of a model."""

import math

import pytest
import torch

from calcformer.config import ModelConfig
from calcformer.errors import InputError
from calcformer.model.layers import CrossAttention, Memory, SelfAttention
from calcformer.model.positions import (
    LearnedPositions,
    Positions,
    RelativePositions,
    RotaryPositions,
    build_positions,
    course,
    simple,
    sinusoid,
)
from calcformer.model.rows import Rows
from tests.model_problem import NORMS, PAD, POSITIONS, make, padded_problems, problems

LENGTHLESS = [kind for kind in POSITIONS if kind != "learned"]  # take sequences longer than they were built for

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


def places(length: int, start: int = 0, batch: int = 1) -> Rows:
    """Rows of `length` tokens that come after `start` others."""
    return Rows(torch.zeros(batch, length), None, start)


# By hand


def test_sinusoid_by_hand() -> None:
    expected = [[0.0, 1.0, 0.0, 1.0], [0.841471, 0.540302, 0.01, 0.99995], [0.909297, -0.416147, 0.019999, 0.9998]]
    torch.testing.assert_close(sinusoid(3, 4), torch.tensor(expected), rtol=0, atol=1e-6)
    assert sinusoid(4, 7).shape == (4, 7)


def test_simple_positions_have_the_courses_values() -> None:
    torch.testing.assert_close(simple(4, 4, whole=4), torch.tensor([[0.0], [0.25], [0.5], [0.75]]).expand(4, 4))
    torch.testing.assert_close(simple(5, 3, whole=5), torch.tensor([[0.0], [0.2], [0.4], [0.6], [0.8]]).expand(5, 3))


def test_course_positions_have_the_courses_values() -> None:
    expected = [
        [0.0, 1.0, 0.0, 1.0],
        [0.84147, 0.5403, 0.84147, 0.5403],
        [0.9093, -0.41615, 0.9093, -0.41615],
        [0.14112, -0.98999, 0.14112, -0.98999],
    ]
    torch.testing.assert_close(course(4, 4), torch.tensor(expected), rtol=0, atol=5e-6)
    assert torch.equal(course(4, 3), course(4, 4)[:, :3])


def test_relative_bias_by_hand() -> None:
    positions = RelativePositions(heads=2, before=1, after=2)
    with torch.no_grad():
        positions.table.copy_(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]))
    expected = torch.tensor([[2.0, 3, 4, 4], [1, 2, 3, 4], [1, 1, 2, 3], [1, 1, 1, 2]])
    found = positions.bias(places(4))
    assert torch.equal(found, torch.stack((expected, 10 * expected))[None])
    assert torch.equal(positions.bias(places(1, start=2)), found[:, :, 2:3, :3])


@pytest.mark.parametrize(("is_causal", "rows"), [(False, 13), (True, 7)])
def test_relative_tables_reach_as_far_as_sequences(is_causal: bool, rows: int) -> None:
    assert build_positions("relative", 7, 8, 2, is_causal).table.shape == (rows, 2)
    assert build_positions("relative", 500, 8, 2, is_causal=True).table.shape == (33, 2)


def test_rotation_by_hand() -> None:
    positions = RotaryPositions(4, 4)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 1, 3, 4)
    expected = [[1.0, 0.0, 0.0, 2.0], [0.540302, 0.841471, -0.02, 1.9999], [-0.416147, 0.909297, -0.039997, 1.9996]]
    torch.testing.assert_close(positions.turn(x, places(3))[0, 0], torch.tensor(expected), rtol=0, atol=1e-6)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    positions = RotaryPositions(3, 6).double()
    query, key = torch.randn(2, 1, 31, 1, 6, dtype=torch.float64)

    def product(query_place: int, key_place: int) -> torch.Tensor:
        turned = positions.turn(query, places(1, query_place)), positions.turn(key, places(1, key_place))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(product(11, 8), product(3, 0), rtol=0, atol=1e-5)  # the sinusoid is float32
    torch.testing.assert_close(product(11, 11), (query * key).sum(-1), rtol=0, atol=2e-6)
    assert (product(11, 8) - product(8, 11)).abs().max() > 0.01


# Self attention by its formula, (B, T, D) float64


def formula(attention: SelfAttention, positions: Positions, x: torch.Tensor, blocked: torch.Tensor) -> torch.Tensor:
    """One pair of places at a time: rotation matrices and a number for each distance, as the papers write them."""
    batch, length, width = x.shape
    size = width // attention.heads
    query, key, value = attention.query_key_value(x).view(batch, length, 3, attention.heads, size).unbind(2)
    scores = torch.empty(batch, attention.heads, length, length, dtype=torch.float64)
    for m in range(length):
        for n in range(length):
            if isinstance(positions, RotaryPositions):
                turns = [
                    torch.block_diag(*(turn(place * 10_000 ** (-2 * i / size)) for i in range(size // 2)))
                    for place in (m, n)
                ]
                pairs = (query[:, m] @ turns[0].T) * (key[:, n] @ turns[1].T)
                scores[:, :, m, n] = pairs.sum(-1) / math.sqrt(size)
            else:
                assert isinstance(positions, RelativePositions)
                distance = min(max(n - m, -positions.before), positions.after)
                scores[:, :, m, n] = (query[:, m] * key[:, n]).sum(-1) / math.sqrt(size) + positions.table[
                    positions.before + distance
                ]
    weights = scores.masked_fill(blocked, -math.inf).softmax(-1)
    return attention.output(torch.einsum("bhmn,bnhe->bmhe", weights, value).flatten(2))


def turn(angle: float) -> torch.Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


@pytest.mark.parametrize("is_causal", [False, True], ids=["padded", "causal"])
@pytest.mark.parametrize("kind", ["relative", "rotary"])
def test_self_attention_and_its_gradients_equal_the_formula(kind: str, is_causal: bool) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, PAD, PAD], [4, PAD, PAD, PAD, PAD]])
    real = ids != PAD
    attention = SelfAttention(12, 3, is_causal=is_causal).double()
    positions = build_positions(kind, 4, 12, 3, is_causal).double()
    if isinstance(positions, RelativePositions):
        torch.nn.init.normal_(positions.table)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(int(real.sum()), 12, dtype=torch.float64)
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1) if is_causal else ~real[:, None, None]
    packed = torch.cat((x[real], x[1, 3:4]))  # one row stands for all padding
    found = attention(packed, Rows(ids, PAD), positions)[:-1]
    expected = formula(attention, positions, x, blocked)[real]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the sinusoid of a rotation is float32
    inputs = [*attention.parameters(), *positions.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (found, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# What a model with positions promises. More in test_model.py.


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_order_counts_only_with_positions(positions: str) -> None:
    model = make(positions=positions)
    source, target = problems()
    for order in torch.arange(7).flip(0), torch.randperm(7):
        difference = (model(source[:, order], target) - model(source, target)).abs().max()
        assert difference < 1e-5 if positions == "none" else difference > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_the_decoder_sees_order_only_with_positions(positions: str) -> None:
    model = make(positions=positions, decoder_layers=1)  # a second layer would learn order from the causal mask
    source, target = problems()
    order = torch.tensor([2, 0, 1, 3, 4])
    difference = (model(source, target[:, order]) - model(source, target))[:, 3:].abs().max()
    assert difference < 1e-5 if positions == "none" else difference > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_cross_attention_knows_no_positions(positions: str) -> None:
    model = make(positions=positions)
    source, target = problems(1)
    memory, order = model.encode(source), torch.randperm(7)
    mixed = Memory(memory.states[order], memory.rows)
    torch.testing.assert_close(model.decode(target, mixed), model.decode(target, memory), rtol=1e-5, atol=1e-5)
    assert "positions" not in CrossAttention.forward.__annotations__


@pytest.mark.parametrize("positions", LENGTHLESS)
@torch.no_grad()
def test_longer_sequences_than_built_for(positions: str) -> None:
    model, larger = make(positions=positions), make(positions=positions)
    larger.load_state_dict(model.state_dict())
    if positions not in ("simple", "relative"):  # whose meaning depends on the length they are built for
        larger.source_positions = build_positions(positions, 19, 20, 5)
        larger.target_positions = build_positions(positions, 11, 20, 5, is_causal=True)
    source, target = torch.randint(0, PAD, (2, 19)), torch.randint(0, PAD, (2, 11))
    found = model(source, target)
    torch.testing.assert_close(found, larger(source, target))
    assert found.isfinite().all()
    for side in 0, 1:  # the last token's place still tells
        longer = [source, target]
        longer[side] = torch.cat((longer[side][:, :-2], longer[side][:, -2:].flip(1)), dim=1)
        changed = (model(*longer)[:, -1] - found[:, -1]).abs().max()
        assert changed < 1e-5 if (positions, side) == ("none", 0) else changed > 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_trains_under_autocast(positions: str, norm: str) -> None:
    model = make(positions=positions, norm=norm, dropout=0.1).train()
    source, target = padded_problems()
    exact = model.eval()(source, target)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(source, target)
        close = model.eval()(source, target)
    torch.testing.assert_close(close.float(), exact, rtol=0.1, atol=0.2)
    scores.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_wrong_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="reach 5 tokens, got a sequence of 6"):
        LearnedPositions(5, 8)(torch.zeros(6, 8), places(6))
    with pytest.raises(ValueError, match="reach 5 tokens, got a sequence of 6"):
        LearnedPositions(5, 8)(torch.zeros(1, 8), places(1, start=5))
    with pytest.raises(ValueError, match="head size must be even, got 5"):
        build_positions("rotary", 7, 20, 4)
    with pytest.raises(ValueError, match="rotary or none, got 'sine'"):
        make(positions="sine")
    with pytest.raises(InputError, match="even head size, got 5"):
        ModelConfig(width=20, heads=4, positions="rotary")

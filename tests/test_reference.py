"""The references against hand numbers, the published values of the course, each other, and float64 derivatives."""

import json
import math
import pathlib

import pytest
import torch

from kernels.reference import (
    layer_norm_no_loop,
    layer_norm_two_loop,
    scaled_dot_product_no_loop_batch,
    scaled_dot_product_two_loop_batch,
    scaled_dot_product_two_loop_single,
)

COURSE = json.loads((pathlib.Path(__file__).parent / "golden" / "course_checks.json").read_text())
ACCEPTED = 1e-5  # the course's own bound for its error in float32
ATTENTIONS = {
    "single": scaled_dot_product_two_loop_single,
    "batch": scaled_dot_product_two_loop_batch,
    "no_loop": lambda query, key, value: scaled_dot_product_no_loop_batch(query, key, value)[0],
}


def course_error(found, expected):
    """The course's error: max |x - y| / max(|x| + |y|, 1e-8)."""
    return ((found - expected).abs().max() / (found.abs() + expected.abs()).clamp_min(1e-8).max()).item()


def course_input(ends, shape):
    """The course's inputs: equally spaced from ends[0] to ends[1], row-major."""
    return torch.linspace(*ends, steps=math.prod(shape)).reshape(shape)


def course_case(name):
    """query, key, value and expected output of one of the attention cases."""
    case = COURSE[name]
    inputs = [course_input(case[part], case["shape"]) for part in ("query", "key", "value")]
    return *inputs, torch.tensor(case["expected"])


def random(*shape, seed=0):
    """Standard normal float64 numbers that require grad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def test_single_has_the_courses_values():
    query, key, value, expected = course_case("scaled_dot_product_two_loop_single")
    assert course_error(scaled_dot_product_two_loop_single(query, key, value), expected) < ACCEPTED


@pytest.mark.parametrize("form", ["batch", "no_loop"])
def test_batch_has_the_courses_values(form):
    query, key, value, expected = course_case("scaled_dot_product_batch")
    assert course_error(ATTENTIONS[form](query, key, value), expected) < ACCEPTED


@pytest.mark.parametrize("form", ["batch", "no_loop"])
def test_self_attention_has_the_courses_values(form):
    """Three linear maps whose parameters the course fills with linspace(-1.4, 1.3), then attention."""
    *inputs, expected = course_case("self_attention")
    width = expected.shape[-1]
    weight = course_input((-1.4, 1.3), (width, width))
    bias = course_input((-1.4, 1.3), (width,))
    query, key, value = (torch.nn.functional.linear(x, weight, bias) for x in inputs)
    assert course_error(ATTENTIONS[form](query, key, value), expected) < ACCEPTED


@pytest.mark.parametrize("function", [layer_norm_two_loop, layer_norm_no_loop])
def test_layer_norm_has_the_courses_values(function):
    case = COURSE["layer_normalization"]
    width = case["shape"][-1]
    found = function(course_input(case["input"], case["shape"]), torch.ones(width), torch.zeros(width), 1e-10)
    assert course_error(found, torch.tensor(case["expected"])) < ACCEPTED


def test_mask_has_the_courses_sense():
    """The course's subsequent mask, True = blocked: weights are 0 exactly where it is True."""
    mask = torch.tensor(COURSE["subsequent_mask"]["expected"])
    assert torch.equal(mask, torch.ones(3, 3, dtype=torch.bool).triu(diagonal=1))
    _, weights = scaled_dot_product_no_loop_batch(random(2, 3, 5), random(2, 3, 5, seed=1), random(2, 3, 5), mask)
    assert torch.equal(weights == 0, mask.expand(2, 3, 3))


def test_the_courses_check_rejects_a_missing_scale():
    """Without 1 / sqrt(M) the error is far above the accepted one: the published values do tell."""
    query, key, value, expected = course_case("scaled_dot_product_batch")
    wrong = torch.softmax(query @ key.transpose(-2, -1), dim=-1) @ value
    assert course_error(wrong, expected) > 100 * ACCEPTED


@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_by_hand(form):
    """Scores ln 3 / sqrt(4) * 2 = ln 3 and 0 give the weights 3/4 and 1/4."""
    query = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([[math.log(3), 5.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]], dtype=torch.float64)
    value = torch.tensor([[4.0, 0.0, 8.0, 1.0], [0.0, 4.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, 1.0, 6.0, 1.0], [2.0, 2.0, 4.0, 1.0]], dtype=torch.float64)
    inputs = (query, key, value) if form == "single" else (x.unsqueeze(0) for x in (query, key, value))
    torch.testing.assert_close(ATTENTIONS[form](*inputs).reshape(2, 4), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("function", [layer_norm_two_loop, layer_norm_no_loop])
def test_layer_norm_by_hand(function):
    """The row 1, 5 has mean 3 and biased variance 4; with eps 5 it is divided by 3. A constant row gives the bias."""
    rows = torch.tensor([[1.0, 5.0], [7.0, 7.0]], dtype=torch.float64)
    weight, bias = torch.tensor([3.0, 6.0], dtype=torch.float64), torch.tensor([10.0, 20.0], dtype=torch.float64)
    expected = torch.tensor([[8.0, 24.0], [10.0, 20.0]], dtype=torch.float64)
    torch.testing.assert_close(function(rows, weight, bias, 5.0), expected, rtol=1e-15, atol=0)


def test_attention_loops_equal_no_loop():
    query, key, value = random(3, 7, 5), random(3, 7, 5, seed=1), random(3, 7, 5, seed=2)
    no_loop, weights = scaled_dot_product_no_loop_batch(query, key, value)
    batch = scaled_dot_product_two_loop_batch(query, key, value)
    single = torch.stack([scaled_dot_product_two_loop_single(*one) for one in zip(query, key, value)])
    for found in (batch, single, weights @ value):
        torch.testing.assert_close(found, no_loop, rtol=1e-13, atol=1e-14)


def test_layer_norm_loops_equal_no_loop():
    rows, weight, bias = random(5, 11), random(11, seed=1), random(11, seed=2)
    found, expected = (function(rows, weight, bias, 1e-5) for function in (layer_norm_two_loop, layer_norm_no_loop))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def test_references_equal_pytorch():
    query, key, value = random(3, 7, 5), random(3, 7, 5, seed=1), random(3, 7, 5, seed=2)
    blocked = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    blocked[:, :, 0] = False
    found, _ = scaled_dot_product_no_loop_batch(query, key, value, blocked)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, ~blocked)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    weight, bias = random(5, seed=4), random(5, seed=5)
    expected = torch.nn.functional.layer_norm(query, (5,), weight, bias, 1e-3)
    torch.testing.assert_close(layer_norm_no_loop(query, weight, bias, 1e-3), expected, rtol=1e-13, atol=1e-14)


def test_weights_sum_to_one_or_to_zero():
    """A row with every key blocked has weights 0, output 0 and gradients 0; the others sum to 1."""
    query, key, value = random(2, 3, 5), random(2, 3, 5, seed=1), random(2, 3, 5, seed=2)
    blocked = torch.zeros(2, 3, 3, dtype=torch.bool)
    blocked[1, 2] = True
    output, weights = scaled_dot_product_no_loop_batch(query, key, value, blocked)
    expected = torch.ones(2, 3, dtype=torch.float64)
    expected[1, 2] = 0
    torch.testing.assert_close(weights.sum(dim=-1), expected)
    assert torch.equal(output[1, 2], torch.zeros(5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(output, query, random(2, 3, 5, seed=3).detach())
    assert torch.equal(gradient[1, 2], torch.zeros(5, dtype=torch.float64))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_gradients(form):
    shape = (3, 2) if form == "single" else (2, 3, 2)
    assert torch.autograd.gradcheck(ATTENTIONS[form], [random(*shape, seed=seed) for seed in range(3)])


def test_masked_attention_gradients():
    mask = torch.tensor([[False, True, False], [False, False, True], [True, True, True]])
    inputs = [random(2, 3, 2, seed=seed) for seed in range(3)]
    assert torch.autograd.gradcheck(lambda *parts: scaled_dot_product_no_loop_batch(*parts, mask), inputs)


@pytest.mark.parametrize("function", [layer_norm_two_loop, layer_norm_no_loop])
def test_layer_norm_gradients(function):
    inputs = random(3, 5), random(5, seed=1), random(5, seed=2)
    assert torch.autograd.gradcheck(lambda *parts: function(*parts, 1e-5), inputs)

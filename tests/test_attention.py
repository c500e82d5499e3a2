"""The Triton attention kernels against the formula in float64, and PyTorch's error at the same dtype."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import numpy
import pytest
import torch

import kernels
from kernels.attention import plan
from kernels.attention.call import Call
from kernels.attention.plan import forced
from kernels.attention.tiles import Tile
from tests.conformance.formula import attention as formula
from tests.conformance.judge import LEARNED, judge, make, same_bits, solve

triton_attention = functools.partial(kernels.scaled_dot_product_attention, backend="triton")
problem = functools.partial(make, learned=LEARNED)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True, params=["general", "short"])
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    """The kernel for any shape alone, or that for short sequences; a test that is not for the latter is skipped.

    The former in the interpreter with tiles so small that short sequences cross several; on a GPU with the real ones.
    """
    real = device == "cuda" or request.node.get_closest_marker("real_tiles")
    tile = None if real else Tile(block_q=32, block_k=32, num_warps=4, num_stages=1)
    chip = 90 if device == "cpu" and request.param == "short" else None
    if request.param == "short":
        why_not_short = plan.why_not_short

        def skip_or_take(*call: object) -> str:
            reason = why_not_short(*call)
            return pytest.skip(f"not for the kernel for short sequences: {reason}") if reason else ""

        monkeypatch.setattr(plan, "why_not_short", skip_or_take)
    with forced(kernel="general" if request.param == "general" else None, tile=tile, capability=chip):
        yield


def bool_mask(*shape: int) -> torch.Tensor:
    """A mask of this shape, half of it allowed."""
    return torch.rand(shape) < 0.5


def float_mask(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A mask of this shape, a fifth of it -inf."""
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -math.inf).to(dtype)


SIZES = [
    (2, 2, 2, 37, 53, 24, 19),
    (1, 2, 2, 67, 31, 16, 16),
    (1, 1, 1, 1, 41, 7, 5),
    (1, 1, 1, 43, 1, 1, 1),
    (1, 2, 1, 32, 32, 64, 64),
    (1, 1, 1, 33, 33, 65, 33),
    (2, 1, 1, 31, 31, 128, 8),
    (1, 4, 2, 47, 29, 20, 12),
]


@pytest.mark.parametrize(
    ("sizes", "dtype", "is_causal"),  # every two of them together
    [(sizes, dtype, (i + j) % 2 == 1) for i, sizes in enumerate(SIZES) for j, dtype in enumerate(DTYPES)],
    ids=lambda x: "B{}-H{}-Hkv{}-L{}-S{}-E{}-Ev{}".format(*x) if isinstance(x, tuple) else str(x),
)
def test_forward_and_gradients(sizes: tuple, is_causal: bool, dtype: torch.dtype, device: str) -> None:
    judge(triton_attention, problem(sizes, dtype, device, is_causal=is_causal))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_tiles_stay_in_float32(dtype: torch.dtype, device: str) -> None:
    """One that is rounded to 16 bits at each tile shows only after many of them."""
    judge(triton_attention, problem((1, 1, 1, 16, 1000, 8, 8), dtype, device))


@pytest.mark.real_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_tiles_of_the_launcher(is_causal: bool, dtype: torch.dtype, device: str) -> None:
    judge(triton_attention, problem((1, 2, 1, 131, 137, 40, 24), dtype, device, is_causal=is_causal))


MASKS = [
    (37, 41),
    (1, 41),
    (37, 1),
    (41,),
    (),
    (2, 37, 41),
    (2, 1, 41),
    (1, 37, 1),
    (2, 2, 37, 41),
    (2, 1, 37, 41),
    (1, 2, 37, 41),
    (2, 2, 1, 41),
    (2, 1, 1, 41),
    (2, 2, 37, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
]


@pytest.mark.parametrize("is_causal", [False, True], ids=["mask", "mask+causal"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_float_mask_and_its_gradient_for_every_broadcast(shape: tuple, is_causal: bool, device: str) -> None:
    p = problem((2, 2, 1, 37, 41, 16, 16), device=device, attn_mask=float_mask(*shape), is_causal=is_causal)
    judge(triton_attention, p)


@pytest.mark.parametrize(("shape", "is_causal"), list(zip(MASKS, itertools.cycle([False, True, True]))), ids=str)
def test_bool_mask_for_every_broadcast(shape: tuple, is_causal: bool, device: str) -> None:
    p = problem((2, 2, 1, 37, 41, 16, 16), device=device, attn_mask=bool_mask(*shape), is_causal=is_causal)
    judge(triton_attention, p)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float16], ids=str)
def test_float_mask_with_float16_inputs(mask_dtype: torch.dtype, device: str) -> None:
    p = problem((2, 2, 2, 37, 53, 16, 16), torch.float16, device, attn_mask=float_mask(2, 1, 37, 53, dtype=mask_dtype))
    judge(triton_attention, p)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.7])
def test_scale(scale: float, device: str) -> None:
    judge(triton_attention, problem((1, 2, 2, 37, 53, 16, 16), device=device, scale=scale))


def test_large_logits(device: str) -> None:
    """In whole numbers: rounding must not decide which of two scores in the thousands is larger."""
    p = problem((1, 2, 2, 37, 53, 16, 16), device=device, scale=300.0)
    judge(triton_attention, p.replace(query=p.query.round(), key=p.key.round()))


def test_a_mask_of_the_least_number_means_least_of_all_and_not_never(device: str) -> None:
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(37, 53).masked_fill(torch.rand(37, 53) < 0.5, least)
    mask[5] = least  # every key equally unwelcome: the mean of the values
    p = problem((1, 2, 2, 37, 53, 16, 16), device=device, attn_mask=mask)
    output = triton_attention(p.query, p.key, p.value, p.attn_mask)
    torch.testing.assert_close(output[:, :, 5], p.value.mean(2))
    judge(triton_attention, p)


@pytest.mark.parametrize("kind", ["bool", "float", "no key at all"])
def test_a_query_that_may_attend_to_nothing_gives_zero_and_gets_zero(kind: str, device: str) -> None:
    mask = None
    if kind == "no key at all":
        p = problem((2, 2, 2, 37, 0, 16, 8), device=device)
        rows = slice(None)
    else:
        rows = 3
        mask = torch.rand(2, 1, 37, 53) < 0.5
        mask[:, :, rows] = False
        if kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        p = problem((2, 2, 2, 37, 53, 16, 8), device=device, attn_mask=mask)
        judge(triton_attention, p)
    found = solve(p.replace(learned=("query", "key", "value")), triton_attention)
    for name in ("output", "gradient of query"):
        assert torch.equal(found[name][:, :, rows], torch.zeros_like(found[name][:, :, rows]))
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_and_inf_never_leave_keys_that_are_masked_out(bad: float, backend: str, device: str) -> None:
    attention = functools.partial(kernels.scaled_dot_product_attention, backend=backend)
    mask = torch.rand(2, 1, 37, 53, device=device) < 0.5
    mask[..., [0, 17, 52]] = False
    p = problem((2, 2, 2, 37, 53, 16, 16), device=device, attn_mask=mask)
    key, value = p.key.clone(), p.value.clone()
    for x in (key, value):
        x[:, :, [0, 17, 52]] = bad
    expected, found = (solve(call, attention) for call in (p, p.replace(key=key, value=value)))
    assert torch.equal(found["output"], expected["output"])
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_in_a_later_value_never_reaches_earlier_queries(backend: str, device: str) -> None:
    p = problem((1, 2, 2, 53, 53, 16, 16), device=device, is_causal=True)
    expected = p.run(kernels.scaled_dot_product_attention, backend=backend)
    dirty = p.value.clone()
    dirty[:, :, 20] = math.nan
    found = p.replace(value=dirty).run(kernels.scaled_dot_product_attention, backend=backend)
    torch.testing.assert_close(found[:, :, :20], expected[:, :, :20])
    assert torch.isnan(found[:, :, 20:]).all(), "a query that may see NaN must say so"


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "every second", "last axis strided"])
def test_layouts_are_read_without_a_copy(layout: str, device: str) -> None:
    def lay_out(x: torch.Tensor) -> torch.Tensor:
        b, h, n, e = x.shape
        if layout == "contiguous":
            return x.contiguous()
        if layout == "transposed":
            return x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
        if layout == "expanded":
            return x[:1, :1].expand(b, h, n, e)
        if layout == "every second":
            return x.repeat_interleave(2, 2)[:, :, ::2]
        return x.mT.contiguous().mT

    p = problem((2, 3, 3, 37, 53, 16, 16), device=device)
    judge(
        triton_attention, p.replace(**{name: lay_out(getattr(p, name)) for name in ("query", "key", "value", "grad")})
    )


def test_output_and_gradients_take_the_order_of_the_inputs_in_memory(device: str) -> None:
    for x in solve(problem((2, 3, 3, 37, 53, 16, 16), device=device), triton_attention).values():
        assert x.transpose(1, 2).is_contiguous(), x.stride()


@pytest.mark.parametrize(
    ("query", "key", "value", "mask", "gqa"),
    [
        ((37, 16), (53, 16), (53, 8), (37, 53), False),
        ((3, 37, 16), (3, 53, 16), (3, 53, 8), (3, 1, 53), False),
        ((4, 37, 16), (2, 53, 16), (2, 53, 8), (4, 37, 53), True),
        ((2, 3, 4, 37, 16), (2, 3, 4, 53, 16), (2, 3, 4, 53, 8), (2, 1, 1, 37, 53), False),
        ((2, 1, 4, 37, 16), (1, 3, 4, 53, 16), (2, 3, 1, 53, 8), (37, 53), False),
        ((2, 3, 4, 37, 16), (1, 3, 1, 53, 16), (2, 1, 1, 53, 8), None, False),
        ((0, 3, 37, 16), (0, 3, 53, 16), (0, 3, 53, 8), None, False),
        ((2, 3, 0, 16), (2, 3, 53, 16), (2, 3, 53, 8), None, False),
    ],
    ids=str,
)
def test_any_number_of_leading_dimensions(
    query: tuple, key: tuple, value: tuple, mask: tuple | None, gqa: bool, device: str
) -> None:
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in (query, key, value))
    m = torch.rand(mask, device=device) < 0.5 if mask else None
    ours = triton_attention(q, k, v, m, enable_gqa=gqa)
    theirs = kernels.scaled_dot_product_attention(q, k, v, m, enable_gqa=gqa, backend="torch")
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("p_drop", "masked", "is_causal"), [(0.1, False, True), (0.1, True, False), (0.5, True, True), (0.5, False, False)]
)
def test_dropout_is_replayed_in_the_backward(p_drop: float, masked: bool, is_causal: bool, device: str) -> None:
    mask = float_mask(1, 4, 37, 53) if masked else None
    p = problem((1, 4, 2, 37, 53, 16, 16), device=device, attn_mask=mask, is_causal=is_causal, dropout_p=p_drop)
    # Which weights are kept, read off by equal weights (zero queries) over the unit vectors.
    zeros = torch.zeros_like(p.query)
    unit = torch.eye(53, device=device).expand(1, 2, 53, 53)
    torch.manual_seed(5)
    p.kept = triton_attention(zeros, p.key, unit, dropout_p=p_drop, enable_gqa=True) != 0

    def seeded_attention(*inputs: torch.Tensor, **arguments: object) -> torch.Tensor:
        torch.manual_seed(5)
        return triton_attention(*inputs, **arguments)

    judge(seeded_attention, p)
    share = p.kept.float().mean().item()
    assert abs(share - (1 - p_drop)) < 4 * math.sqrt(p_drop * (1 - p_drop) / p.kept.numel())
    heads = p.kept.flatten(0, 1)
    assert not any(torch.equal(heads[0], other) for other in heads[1:]), "every head draws its own mask"


def philox(counter: numpy.ndarray, key: numpy.ndarray, rounds: int = 7) -> list[numpy.ndarray]:
    """Four random words for each counter (4, ...) and key (2,), uint64 that hold 32 bits (Salmon et al. 2011)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(rounds):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ low, second & 0xFFFFFFFF, (first >> 32) ^ d ^ high, first & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_philox_by_a_known_answer() -> None:
    """The known answers of Salmon's Random123 for philox4x32 of 7 rounds."""
    zeros = philox(numpy.zeros((4, 1), numpy.uint64), numpy.zeros(2, numpy.uint64))
    assert [int(x[0]) for x in zeros] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(("n_queries", "n_keys"), [(37, 53), (7, 5), (16, 16)])
@pytest.mark.parametrize("p_drop", [0.3, 1e-3, 0.999])
def test_which_weights_drop_is_philox_of_their_place(p_drop: float, n_queries: int, n_keys: int, device: str) -> None:
    """So whatever the tiles are: the same word for (i, j) as its place in {i, i + 8} x {j, j + 8} says."""
    query = torch.zeros(2, 3, n_queries, 16, device=device)
    key, unit = torch.zeros(2, 3, n_keys, 16, device=device), torch.eye(n_keys, device=device).expand(2, 3, -1, -1)
    torch.manual_seed(11)
    kept = triton_attention(query, key, unit, dropout_p=p_drop) != 0
    torch.manual_seed(11)
    seed = int(torch.randint(2**63 - 1, (1,), device=device))
    head, i, j = numpy.indices((6, n_queries, n_keys)).astype(numpy.uint64)
    words = philox(
        numpy.stack([j & ~numpy.uint64(8), i & ~numpy.uint64(8), head, 0 * head]),
        numpy.array([seed & 0xFFFFFFFF, seed >> 32], numpy.uint64),
    )
    word = numpy.choose((2 * (i >> 3 & 1) + (j >> 3 & 1)).astype(int), words).astype(numpy.uint32).view(numpy.int32)
    expected = word >= round(p_drop * 2**32) - 2**31
    assert numpy.array_equal(kept.flatten(0, 1).cpu().numpy(), expected)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_scales_that_are_not_above_zero(scale: float, mask: str | None, device: str) -> None:
    masks = {None: None, "bool": bool_mask(37, 53), "float": float_mask(37, 53)}
    is_causal = mask is not None  # PyTorch's own result is NaN where it is causal by itself
    p = problem((1, 2, 1, 37, 53, 16, 16), device=device, attn_mask=masks[mask], is_causal=is_causal, scale=scale)
    judge(triton_attention, p)


@pytest.mark.parametrize("scale", [1e4, 1e7, 1e30], ids=str)
def test_values_get_their_gradient_where_scores_are_huge(scale: float, device: str) -> None:
    """Each query then takes the one key of its largest score, and no rounding of that score may show.

    On a GPU half a unit of it may: there the score may be rounded in one kernel, and in the next be part of a fused
    multiply-add, which does not round it.
    """
    if device == "cuda" and scale > 1e4:
        pytest.skip("half a unit of such scores is 4 and more")
    q, k, v, grad = (torch.randn(1, 1, 24, 16, device=device) for _ in range(4))
    v.requires_grad_()
    found = torch.autograd.grad(triton_attention(q, k, v, scale=scale), v, grad)[0]
    first, second = (q.double() @ k.double().mT).topk(2, -1)[0].unbind(-1)
    assert ((first - second) * scale > 30).all()
    chosen = torch.nn.functional.one_hot((q.double() @ k.double().mT).argmax(-1), 24).to(grad)
    off = chosen.mT @ grad.abs() * (math.expm1((first * scale).max() * 2**-24) if device == "cuda" else 0.0)
    expected = chosen.mT @ grad
    assert ((found - expected).abs() <= off + 1e-5 + 1e-6 * expected.abs()).all()


def test_dropout_follows_the_generator_of_torch(device: str) -> None:
    p = problem((1, 2, 2, 37, 53, 16, 16), device=device)
    draw = functools.partial(triton_attention, p.query, p.key, p.value, dropout_p=0.3)
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    assert torch.equal(triton_attention(p.query, p.key, p.value, dropout_p=1.0), torch.zeros_like(first))


def test_checkpointing_replays_dropout(device: str) -> None:
    p = problem((1, 2, 2, 37, 53, 16, 16), device=device)
    wrapped = functools.partial(torch.utils.checkpoint.checkpoint, triton_attention, use_reentrant=False)
    results = []
    for attention in (triton_attention, wrapped):
        torch.manual_seed(3)
        results.append(solve(p.replace(dropout_p=0.3), attention))
    same_bits(*results, "with a checkpoint and without")


def test_repeated_runs_agree_bit_for_bit(device: str) -> None:
    p = problem((2, 4, 2, 37, 53, 16, 16), device=device, attn_mask=float_mask(1, 1, 37, 53))
    same_bits(solve(p, triton_attention), solve(p, triton_attention), "two runs")


@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask"])
def test_one_gradient_alone(wanted: str, device: str) -> None:
    p = problem((2, 2, 2, 37, 53, 16, 16), device=device, attn_mask=float_mask(37, 53))
    expected, found = (solve(call, triton_attention) for call in (p, p.replace(learned=(wanted,))))
    assert len(found) == 2
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])  # a mask that learns may take another kernel


def test_float32_products_follow_the_matmul_precision(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention.arguments import dot_precision

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert (dot_precision(torch.float32), dot_precision(torch.float16)) == ("tf32", "ieee")
    monkeypatch.undo()
    assert dot_precision(torch.float32) == "ieee"


def test_rows_far_apart_take_the_wide_offsets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.attention.general.is_wide", lambda *_: True)
    monkeypatch.setattr("kernels.attention.general_backward.is_wide", lambda *_: True)
    judge(triton_attention, problem((2, 4, 2, 37, 53, 16, 16), device=device, attn_mask=float_mask(2, 1, 37, 53)))


def test_wide_is_decided_by_the_largest_stride() -> None:
    from kernels.attention.layout import is_wide

    def strided(*strides: int) -> torch.Tensor:
        return torch.empty(1).as_strided((1, 1, 1, 1), (1, 1, *strides))

    assert not is_wide(strided(0, 1), None, strided(1, (1 << 22) - 1))
    assert is_wide(strided(0, 1), strided(1 << 22, 0))
    assert (128 + 256) * ((1 << 22) - 1) < 1 << 31  # the largest offset inside a tile that is not wide


@pytest.mark.parametrize("heads", [65_537, 80_000])
def test_more_heads_than_a_second_grid_axis_holds(heads: int) -> None:
    """Batch times heads goes along the first grid axis, which holds 2^31 - 1 programs; the second would hold 65,535."""
    from kernels.attention import general

    launched = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(grid)
            return lambda *_, **__: None

    q = torch.empty(1, 1, 16, 8).expand(heads, 1, 16, 8)
    out, stats = torch.empty(1), torch.empty(1).expand(heads, 1, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "forward_kernel", Recorder())
        tile = Tile(16, 16, 4, 1)
        general.launch_forward(q, q, q, Call(), tile, out.expand(heads, 1, 16, 8), stats, stats)
    assert launched == [(heads,)]


@pytest.mark.gpu
@pytest.mark.real_tiles
@pytest.mark.parametrize("heads", [65_537, 80_000])
def test_many_heads_on_a_gpu(heads: int) -> None:
    judge(triton_attention, problem((heads, 1, 1, 16, 16, 16, 16), torch.float16, "cuda"))


def test_double_backward(device: str) -> None:
    p = problem((1, 4, 2, 7, 11, 5, 3), device=device, attn_mask=float_mask(7, 11), is_causal=True)
    results = []
    for backend in ("triton", "torch"):
        arguments = p.tensors()
        output = p.run(kernels.scaled_dot_product_attention, arguments, backend=backend)
        leaves = [arguments[name] for name in p.learned]
        grads = torch.autograd.grad(output, leaves, p.grad, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for a, b in zip(*results):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_double_backward_through_dropout_is_refused(device: str) -> None:
    p = problem((1, 2, 2, 7, 11, 5, 3), device=device)
    inputs = [x.requires_grad_() for x in p.inputs]
    output = triton_attention(*inputs, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match="double backward through attention dropout"):
        torch.autograd.grad(output, inputs, p.grad, create_graph=True)


def test_forward_mode_without_functorch_has_the_formulas_tangent(device: str) -> None:
    p = problem((1, 2, 2, 7, 11, 5, 3), device=device)
    found = []
    for attention, dtype in ((triton_attention, torch.float32), (lambda *x: formula(*x).output, torch.float64)):
        query, key, value = (x.to(dtype) for x in p.inputs)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
            found.append(torch.autograd.forward_ad.unpack_dual(attention(dual, key, value)).tangent)
    torch.testing.assert_close(found[0], found[1].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_query_that_is_not_finite_sends_nothing_to_values_it_may_not_see(bad: float, device: str) -> None:
    p = problem((1, 2, 2, 37, 41, 16, 16), device=device, is_causal=True)
    p.query[0, 0, 20] = bad
    _, *grads = solve(p, triton_attention).values()
    for grad in grads[1:]:
        assert grad[0, 0, :21].isnan().any() and grad[0, 1].isfinite().all()
    assert grads[2][0, 0, 21:].isfinite().all()  # of dK all in a tile are NaN: docs/tried.md says why


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_rows_that_see_a_bad_key_send_nothing_to_keys_they_may_not_see(bad: float, device: str) -> None:
    p = problem((1, 2, 2, 37, 41, 16, 16), device=device, is_causal=True)
    p.key[0, 0, 5] = bad
    _, *grads = solve(p, triton_attention).values()
    for grad in grads[1:]:  # keys from 37 on are seen by no query
        assert grad[0, 0, :37].isnan().any() and grad[0, 1].isfinite().all()
        assert torch.equal(grad[0, 0, 37:], torch.zeros_like(grad[0, 0, 37:]))

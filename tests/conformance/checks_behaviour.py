"""Dropout, determinism, higher derivatives, graphs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.conformance import formula
from tests.conformance.judge import Attention, Call, agree, exact_arguments, judge, make, same_bits, solve
from tests.conformance.registry import GPU, NotApplicable, check
from tests.tolerances import GRADIENT, assert_as_exact_as_torch

SIZES = (2, 2, 2, 17, 19, 8, 8)


def seeded(attention: Attention) -> Attention:
    """The attention, which drops the same weights every time."""

    def call(*inputs: torch.Tensor, **arguments: object) -> torch.Tensor:
        torch.manual_seed(5)
        return attention(*inputs, **arguments)

    return call


@check("dropout repeats with torch.manual_seed, and only with it", "dropout", "facebookresearch/xformers#173")
def check_dropout_follows_the_seed(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device)
    torch.manual_seed(1)
    first, second = (call.run(attention, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(call.run(attention, dropout_p=0.3), first), "the same seed gave another output"
    assert not torch.equal(first, second), "two calls in a row gave the same output"


def dropped(attention: Attention, device: str, is_causal: bool, dropout_p: float) -> tuple[Call, torch.Tensor]:
    """A float32 call whose values are the unit vectors, so that its output is its weights; and that output."""
    call = make((2, 2, 2, 70, 80, 8, 80), torch.float32, device, is_causal=is_causal, dropout_p=dropout_p)
    call = call.replace(value=torch.eye(80, device=device).expand(2, 2, 80, 80).clone())
    return call, call.run(seeded(attention))


@check("dropout drops the share asked for and enlarges the rest by 1 / (1 - p)", "dropout")
def check_dropout_keeps_the_mean(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for dropout_p in (0.1, 0.5):
        call, output = dropped(attention, device, False, dropout_p)
        kept = output != 0
        weights = formula.attention(**exact_arguments(call, torch.float64)).weights
        agree(output[kept], (weights / (1 - dropout_p))[kept].float(), "the weights that are kept")
        share, deviation = kept.double().mean().item(), math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
        assert abs(share - (1 - dropout_p)) < 5 * deviation, f"p = {dropout_p}: kept {share:.4f} of the weights"


@check("heads, batch entries and rows draw their own dropout", "dropout")
def check_dropout_is_independent(attention: Attention, device: str, dtype: torch.dtype) -> None:
    signs = (dropped(attention, device, False, 0.5)[1] != 0).flatten(0, 1).double() * 2 - 1  # (4, 70, 80)
    between = torch.einsum("aij,bij->ab", signs, signs).fill_diagonal_(0) / math.sqrt(70 * 80)
    assert between.abs().max() < 5, "heads or batch entries share draws"
    for shift, axis in ((1, 1), (1, 2), (16, 1), (16, 2), (32, 2), (64, 1)):
        together = (signs * signs.roll(shift, axis)).mean() * math.sqrt(signs.numel())
        assert together.abs() < 5, f"rows or keys {shift} apart share draws"


@check(
    "the backward drops the same weights as the forward, past the 64th key and when causal",
    "dropout",
    "facebookresearch/xformers#755, pytorch/pytorch#102038",
)
def check_dropout_is_replayed(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for is_causal in (False, True):
        call, output = dropped(attention, device, is_causal, 0.3)
        judge(seeded(attention), call.replace(kept=output != 0), f"causal {is_causal}")


@check("dropping everything gives 0, forward and backward", "dropout")
def check_dropping_everything(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for name, x in solve(make(SIZES, dtype, device, dropout_p=1.0), attention).items():
        assert torch.equal(x, torch.zeros_like(x)), f"{name} is not 0"


@check("checkpointing replays dropout", "dropout", "allenai/OLMo-core#828")
def check_checkpoint(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device, dropout_p=0.3)

    def checkpointed(*inputs: torch.Tensor, **arguments: object) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(attention, *inputs, **arguments, use_reentrant=False)

    same_bits(solve(call, seeded(attention)), solve(call, seeded(checkpointed)), "with a checkpoint and without")


@check(
    "repeated runs agree bit for bit, forward and backward",
    "determinism",
    "Dao-AILab/flash-attention#414, Dao-AILab/flash-attention#429, Dao-AILab/flash-attention#2244",
)
def check_repeated_runs(attention: Attention, device: str, dtype: torch.dtype) -> None:
    long = 1000 if device == "cuda" else 67  # on a GPU, enough tiles to race for one gradient
    call = make((2, 2, 1, long, long + 1, 16, 16), dtype, device)
    first = solve(call, attention)
    for _ in range(9 if device == "cuda" else 2):
        same_bits(first, solve(call, attention), "two runs")


@check("a batch entry alone has the bits it has among others", "determinism", "Dao-AILab/flash-attention#47")
def check_batch_of_one(attention: Attention, device: str, dtype: torch.dtype) -> None:
    """Sizes at which matrix products of one batch entry and of many are computed by different routines."""
    for sizes in ((9, 1, 1, 15, 33, 1, 17), (9, 1, 1, 17, 33, 17, 1), (9, 2, 1, 7, 11, 8, 8)):
        among = make(sizes, dtype, device)
        first = {name: getattr(among, name)[:1] for name in ("query", "key", "value", "grad")}
        found = {name: x[:1] for name, x in solve(among, attention).items()}
        same_bits(solve(among.replace(**first), attention), found, f"query {tuple(among.query.shape)}")


@check("the gradient of a mask that is broadcast agrees bit for bit", "determinism", "pytorch/pytorch#137452")
def check_repeated_mask_gradients(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.randn(1, 1, 1, 67).to(dtype)
    call = make((2, 2, 2, 33, 67, 16, 16), dtype, device, attn_mask=mask, learned=("query", "attn_mask"))
    first = solve(call, attention)
    same_bits(first, solve(call, attention), "two runs")


@check("deterministic=True repeats bit for bit", "determinism", needs=("deterministic",))
def check_deterministic_argument(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((1, 2, 1, 33, 67, 16, 16), dtype, device, deterministic=True)
    same_bits(solve(call, attention), solve(call, attention), "two runs")


@check(
    "the gradient of a gradient is right",
    "higher order",
    "pytorch/pytorch#116350, pytorch/pytorch#181177, SHI-Labs/NATTEN#191",
)
def check_double_backward(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.randn(7, 11).masked_fill(torch.rand(7, 11) < 0.2, -math.inf)
    mask[:, 0] = 0.0
    call = make((1, 4, 2, 7, 11, 5, 3), dtype, device, attn_mask=mask.to(dtype))
    results = []
    for each, solve_it in ((dtype, None), (torch.float64, formula), (dtype, formula)):
        arguments = call.tensors(each)
        if solve_it is None:
            output = call.run(attention, arguments)
        else:
            output = formula.attention(**arguments).output
        leaves = [arguments[name] for name in call.learned]
        grads = torch.autograd.grad(output, leaves, call.grad.to(each), create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in grads), leaves))
    for name, ours, right, plain in zip(call.learned, *results):
        assert right.abs().max() > 0
        assert_as_exact_as_torch(ours, plain, right, 2 * GRADIENT, f"second gradient of {name}")


@check(
    "forward mode is right or refused, never a silent 0",
    "higher order",
    "pytorch/pytorch#98164, pytorch/pytorch#128971, facebookresearch/xformers#552",
)
def check_forward_mode(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((1, 2, 2, 7, 11, 8, 8), dtype, device)
    inputs = (call.query, call.key, call.value)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    try:
        _, found = torch.func.jvp(lambda *x: attention(*x), inputs, tangents)
    except (RuntimeError, NotImplementedError):
        return
    right, plain = (
        torch.func.jvp(
            lambda *x: formula.attention(*x).output, tuple(x.to(d) for x in inputs), tuple(x.to(d) for x in tangents)
        )[1]
        for d in (torch.float64, dtype)
    )
    assert_as_exact_as_torch(found, plain, right, GRADIENT, "tangent")


@check("vmap over a batch equals the batch", "higher order", "pytorch/pytorch#102457, pytorch/pytorch#161310")
def check_vmap(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((3, 2, 2, 7, 11, 8, 8), dtype, device)
    inputs = (call.query, call.key, call.value)
    agree(torch.vmap(lambda *x: attention(*x))(*inputs), attention(*inputs), "over all three")
    shared = torch.vmap(lambda *x: attention(*x), in_dims=(0, None, None))(call.query, call.key[0], call.value[0])
    expanded = (x[:1].expand(x.shape) for x in inputs[1:])
    agree(shared, attention(call.query, *expanded), "over the queries, keys shared")


@check("vmap over gradients equals the gradients", "higher order", "pytorch/pytorch#176265, pytorch/pytorch#191085")
def check_vmap_of_gradients(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((3, 2, 2, 7, 11, 8, 8), dtype, device)
    grad = torch.func.grad(lambda q, k, v, g: (attention(q, k, v) * g).sum(), argnums=(0, 1, 2))
    each = torch.vmap(grad)(call.query, call.key, call.value, call.grad)
    for (name, x), y in zip(list(solve(call, attention).items())[1:], each):
        agree(y, x, name)


@check(
    "torch.compile(fullgraph=True) gives what eager gives, at other lengths too",
    "graph",
    "pytorch/pytorch#144021, pytorch/pytorch#148545, pytorch/pytorch#141710",
)
def check_compiled(attention: Attention, device: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, m: attention(q, k, v, attn_mask=m) + attention(q, k, v, is_causal=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager" if device == "cpu" else "inductor",
    )
    for batch, length in ((3, 5), (4, 11)):
        mask = torch.rand(batch, 1, length, length) < 0.8
        call = make((batch, 2, 2, length, length, 8, 8), dtype, device, attn_mask=mask)

        def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, attn_mask=attn_mask) + attention(q, k, v, is_causal=True)

        found = solve(call, lambda q, k, v, attn_mask: compiled(q, k, v, attn_mask))
        for name, x in solve(call, eager).items():
            agree(found[name], x, f"batch {batch}, length {length}: {name}")


@check("autocast: 32-bit inputs and mask give 16-bit output", "graph", "pytorch/pytorch#99012, pytorch/pytorch#111276")
def check_autocast(attention: Attention, device: str, dtype: torch.dtype) -> None:
    mask = torch.randn(17, 19).masked_fill(torch.rand(17, 19) < 0.2, -math.inf)
    mask[:, 0] = 0.0
    call = make(SIZES, torch.float32, device, attn_mask=mask)
    with torch.autocast(device, torch.bfloat16):
        output = call.run(attention)
    assert output.dtype == torch.bfloat16, f"output is {output.dtype}"
    arguments = exact_arguments(call, torch.bfloat16)
    plain = formula.attention(**{**arguments, "attn_mask": call.attn_mask}).output
    right = formula.attention(**exact_arguments(call, torch.float64)).output
    assert_as_exact_as_torch(output, plain, right, what="output")


@check(
    "a CUDA graph draws new dropout at each replay, and replays the rest",
    "graph",
    "Dao-AILab/flash-attention#165, pytorch/pytorch#100196",
    where=GPU,
)
def check_cuda_graph(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make((2, 2, 2, 64, 64, 64, 64), torch.float16, device)
    inputs = [x.clone().requires_grad_() for x in (call.query, call.key, call.value)]

    def step() -> tuple[torch.Tensor, ...]:
        plain = attention(*inputs, is_causal=True)
        return (attention(*inputs, dropout_p=0.5), plain, *torch.autograd.grad(plain, inputs, call.grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([x.clone() for x in captured])
    assert not torch.equal(replays[0][0], replays[1][0]), "two replays drew the same dropout"
    for x, y in zip(replays[1][1:], expected[1:]):
        agree(x, y, "a replay without dropout")


def refuses(run: Callable[[], object], what: str) -> None:
    """It raises an error that says something; a result is a failure."""
    try:
        result = run()
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        assert str(error).strip(), f"{what}: refused without a word"
        return
    shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
    raise AssertionError(f"{what}: accepted, gave {shape}")


@check("keys and values of different lengths are refused", "bad input", "pytorch/pytorch#193728")
def check_lengths_differ(attention: Attention, device: str, dtype: torch.dtype) -> None:
    query = torch.randn(1, 1, 3, 8).to(dtype).to(device)
    rows = torch.randn(1, 1, 6, 8).to(dtype).to(device)  # a row more than the keys have, so that nothing else is read
    refuses(lambda: attention(query, rows[:, :, :5], rows), "5 keys, 6 values")
    refuses(lambda: attention(query, rows, rows[:, :, :5]), "6 keys, 5 values")


@check("head sizes and numbers of heads that do not fit are refused", "bad input", "pytorch/pytorch#139769")
def check_heads_differ(attention: Attention, device: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, n, 5, 8).to(dtype).to(device) for n in (6, 4, 4))
    refuses(lambda: attention(q, k, v), "6 query heads, 4 key heads, without enable_gqa")
    refuses(lambda: attention(q, k, v, enable_gqa=True), "6 query heads, 4 key heads, with enable_gqa")
    refuses(lambda: attention(k, k[..., :7], v), "E of 8 and of 7")
    refuses(lambda: attention(k, k.double() if dtype != torch.float64 else k.float(), v), "two dtypes")


@check("masks that do not fit are refused", "bad input")
def check_masks_that_do_not_fit(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device)
    for shape in ((17, 18), (3, 1, 17, 19), (16, 19)):
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        refuses(lambda: call.run(attention, attn_mask=mask), f"mask {shape} for 17 queries and 19 keys")
    refuses(lambda: call.run(attention, attn_mask=torch.ones(17, 19, dtype=torch.int64, device=device)), "integers")


@check("dropout outside 0 to 1 is refused", "bad input")
def check_dropout_out_of_range(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device)
    for dropout_p in (1.5, -0.5, math.nan):
        refuses(lambda: call.run(attention, dropout_p=dropout_p), f"dropout_p {dropout_p}")


@check("a backend that cannot run says so", "bad input", needs=("backend",))
def check_no_silent_fallback(attention: Attention, device: str, dtype: torch.dtype) -> None:
    if getattr(attention, "keywords", {}).get("backend") == "torch":
        raise NotApplicable("asked for PyTorch")
    call = make(SIZES, torch.float64, device)
    refuses(lambda: attention(call.query, call.key, call.value, backend="triton"), "float64 on Triton")


@check("the rules of the arguments PyTorch does not have are enforced", "bad input", needs=("window", "key_lengths"))
def check_bad_options(attention: Attention, device: str, dtype: torch.dtype) -> None:
    call = make(SIZES, dtype, device)
    cases: list[tuple[str, object]] = [
        ("causal_alignment", "left"),
        ("window", (-1, 2)),
        ("window", 3),
        ("softcap", -1.0),
        ("softcap", math.nan),
        ("alibi_slopes", torch.zeros(3)),
        ("sinks", torch.zeros(3)),
        ("sinks", 1.0),
        ("key_lengths", torch.tensor([1, 2, 3])),
        ("key_lengths", torch.tensor([1.0, 2.0])),
    ]
    for name, x in cases:
        given = x.to(device) if isinstance(x, torch.Tensor) else x
        refuses(lambda: call.run(attention, **{name: given}), f"{name} {given}")
    judge(attention, call)

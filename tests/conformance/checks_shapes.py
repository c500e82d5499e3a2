"""Shapes, strides and dtypes: lengths that do not fill a tile, shared heads, odd layouts, sizes past 2^16 and 2^31."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.conformance import opinfo
from tests.conformance.judge import Attention, Call, agree, exact, judge, make, solve
from tests.conformance.registry import GPU, NOT_INTERPRETED, NotApplicable, check

GIB = 2**30


def own_samples(dtype: torch.dtype, device: str, wanted: Callable[[list[torch.Tensor], dict], bool]) -> list[Call]:
    """Those of PyTorch's own samples that are wanted, as calls without dropout."""
    found = []
    for tensors, arguments in opinfo.samples(dtype):
        if wanted(tensors, arguments):
            inputs = [x.to(device) for x in tensors]
            mask = arguments.get("attn_mask")
            mask = mask.detach().to(device) if mask is not None else None
            found.append(Call(*inputs, attn_mask=mask, is_causal=arguments.get("is_causal", False)))
    assert found, "PyTorch has no such samples any more: look at tests/conformance/opinfo.py"
    return found


@check("PyTorch's own samples: query, key and value of one rank", "shapes")
def check_own_samples(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for call in own_samples(dtype, device, lambda x, a: x[0].ndim == x[1].ndim and not a["dropout_p"]):
        judge(attention, call, f"query {tuple(call.query.shape)}, causal {call.is_causal}")


@check("PyTorch's own samples: a query with fewer dimensions than the keys", "shapes")
def check_own_samples_of_two_ranks(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for call in own_samples(dtype, device, lambda x, a: x[0].ndim != x[1].ndim and not a["dropout_p"]):
        judge(attention, call, f"query {tuple(call.query.shape)}, key {tuple(call.key.shape)}")


@check("PyTorch's own samples: with dropout, repeated by the seed", "dropout")
def check_own_samples_with_dropout(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for call in own_samples(dtype, device, lambda x, a: x[0].ndim == x[1].ndim and bool(a["dropout_p"])):
        outputs = []
        for _ in range(2):
            torch.manual_seed(7)
            outputs.append(call.run(attention, dropout_p=0.5))
        assert outputs[0].shape == call.grad.shape, f"shape {tuple(outputs[0].shape)}"
        assert torch.equal(*outputs), "the same seed gave two outputs"


@check("heads are shared as enable_gqa says, forward and backward", "shapes", "pytorch/pytorch#139769")
def check_shared_heads(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for hq, hkv in ((6, 2), (3, 1)):
        judge(attention, make((2, hq, hkv, 11, 13, 8, 8), dtype, device), f"{hq} query heads, {hkv} key heads")


@check("values are as wide as they like (Ev != E)", "shapes", "pytorch/pytorch#143331, Dao-AILab/flash-attention#914")
def check_value_width(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for e, ev in ((24, 7), (5, 40)):
        judge(attention, make((1, 2, 2, 11, 13, e, ev), dtype, device), f"E {e}, Ev {ev}")


@check("shared heads and Ev != E at once", "shapes")
def check_shared_heads_and_value_width(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge(attention, make((1, 4, 2, 11, 13, 16, 5), dtype, device, is_causal=True))


@check("heads of size 1, 3 and 65", "shapes", "triton-lang/triton#621")
def check_head_sizes(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for e in (1, 3, 65):
        judge(attention, make((1, 2, 2, 5, 7, e, e), dtype, device), f"E {e}")


@check("heads of size 300 and 2048", "shapes", "pytorch/pytorch#100326")
def check_wide_heads(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for e in (300, 2048):
        judge(attention, make((1, 1, 1, 3, 5, e, e), dtype, device), f"E {e}")


@check(
    "lengths with L % 128 of 1, 64 and 127",
    "shapes",
    "ROCm/triton#666, pytorch/pytorch#153799, jax-ml/jax#27224, NVIDIA/cudnn-frontend#160",
)
def check_lengths_beside_a_tile(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for n_queries, n_keys in ((129, 64), (64, 129), (127, 127)):
        for is_causal in (False, True):
            call = make((1, 1, 1, n_queries, n_keys, 8, 8), dtype, device, is_causal=is_causal)
            judge(attention, call, f"L {n_queries}, S {n_keys}, causal {is_causal}")


@check("a single query", "shapes", "pytorch/pytorch#138529, NVIDIA/TransformerEngine#1070")
def check_single_query(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for is_causal in (False, True):
        judge(attention, make((2, 2, 2, 1, 41, 16, 16), dtype, device, is_causal=is_causal), f"causal {is_causal}")


@check("a single key", "shapes", "Dao-AILab/flash-attention#1537")
def check_single_key(attention: Attention, device: str, dtype: torch.dtype) -> None:
    judge(attention, make((2, 2, 2, 17, 1, 16, 16), dtype, device))
    judge(attention, make((1, 1, 1, 1, 1, 16, 16), dtype, device))


@check(
    "no keys give output 0, no queries gradient 0",
    "shapes",
    "facebookresearch/xformers#1042, Dao-AILab/flash-attention#2776",
)
def check_no_keys_and_no_queries(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for n_queries, n_keys in ((5, 0), (0, 7), (0, 0)):
        call = make((2, 2, 2, n_queries, n_keys, 8, 4), dtype, device)
        for name, x in solve(call, attention).items():
            assert torch.equal(x, torch.zeros_like(x)), f"L {n_queries}, S {n_keys}: {name} is not 0"


@check("no batch entries", "shapes", "Dao-AILab/flash-attention#2776")
def check_empty_batch(attention: Attention, device: str, dtype: torch.dtype) -> None:
    solve(make((0, 2, 2, 5, 7, 8, 8), dtype, device), attention)


@check("two, three and five dimensions, leading ones broadcast", "shapes", "pytorch/pytorch#187266")
def check_ranks(attention: Attention, device: str, dtype: torch.dtype) -> None:
    shapes = [
        [(11, 8), (13, 8), (13, 5)],
        [(3, 11, 8), (3, 13, 8), (3, 13, 5)],
        [(2, 3, 2, 11, 8), (2, 3, 2, 13, 8), (2, 3, 2, 13, 5)],
        [(2, 3, 11, 8), (1, 3, 13, 8), (2, 1, 13, 5)],
    ]
    for case in shapes:
        inputs = [torch.randn(shape).to(dtype).to(device) for shape in case]
        judge(attention, Call(*inputs), f"query {case[0]}, key {case[1]}")


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "heads last": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "every second row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "last axis strided": lambda x: x.mT.contiguous().mT,
    "a slice of wider rows": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3 : 3 + x.shape[-1]],
    "one head expanded": lambda x: x[:, :1].expand(x.shape),
    "one batch entry expanded": lambda x: x[:1].expand(x.shape),
    "one row expanded": lambda x: x[:, :, :1].expand(x.shape),
}


@check(
    "any strides of the inputs, each by itself",
    "strides",
    "pytorch/pytorch#187506, ROCm/pytorch#3230, flagos-ai/FlagAttention#45",
)
def check_strides(attention: Attention, device: str, dtype: torch.dtype) -> None:
    plain = make((1, 2, 2, 17, 19, 8, 8), dtype, device)
    for layout, lay_out in LAYOUTS.items():
        if "expanded" not in layout:
            for name in ("query", "key", "value"):
                call = plain.replace(**{name: lay_out(getattr(plain, name))})
                judge(attention, call, f"{name}: {layout}")


@check("strides of 0 in all inputs", "strides", "pytorch/pytorch#191937, pytorch/pytorch#175764")
def check_zero_strides(attention: Attention, device: str, dtype: torch.dtype) -> None:
    plain = make((2, 2, 2, 5, 19, 8, 8), dtype, device, attn_mask=torch.rand(2, 1, 5, 19) < 0.7)
    for layout, lay_out in LAYOUTS.items():
        if "expanded" in layout:
            judge(attention, plain.replace(key=lay_out(plain.key), value=lay_out(plain.value)), f"keys: {layout}")
            judge(attention, plain.replace(query=lay_out(plain.query)), f"query: {layout}")


@check(
    "an upstream gradient that is transposed, strided or expanded",
    "strides",
    "Dao-AILab/flash-attention#355, pytorch/pytorch#133671, pytorch/pytorch#138529, facebookresearch/xformers#282",
)
def check_upstream_gradient_strides(attention: Attention, device: str, dtype: torch.dtype) -> None:
    plain = make((2, 2, 2, 17, 19, 8, 8), dtype, device)
    for layout, lay_out in LAYOUTS.items():
        judge(attention, plain.replace(grad=lay_out(plain.grad)), layout)
    everywhere = torch.ones((), dtype=dtype, device=device).expand(plain.grad.shape)
    judge(attention, plain.replace(grad=everywhere), "of sum()")


@check("the output has the strides of the query", "strides", "pytorch/pytorch#138340")
def check_output_strides(attention: Attention, device: str, dtype: torch.dtype) -> None:
    output = make((2, 3, 3, 5, 7, 8, 8), dtype, device).run(attention)
    assert output.transpose(1, 2).is_contiguous(), f"strides {output.stride()}: going back to (B, L, H * E) copies"


MANY = "pytorch/pytorch#142228, pytorch/pytorch#146704, facebookresearch/xformers#845, Dao-AILab/flash-attention#1786"


def check_many(attention: Attention, device: str, dtype: torch.dtype, batch: int, heads: int) -> None:
    """Judge the first, the last and the 65,536th of many heads, forward and backward."""
    call = make((batch, heads, heads, 16, 16, 8, 8), dtype, device)
    found = solve(call, attention)
    places = torch.tensor([0, 1, 65_534, 65_535, batch * heads - 2, batch * heads - 1], device=device)
    few = {name: x.flatten(0, 1)[places].unsqueeze(0) for name, x in found.items()}
    some = [x.flatten(0, 1)[places].unsqueeze(0) for x in (call.query, call.key, call.value, call.grad)]
    judge(replay(few), Call(*some[:3], grad=some[3]))


def replay(found: dict[str, torch.Tensor]) -> Attention:
    """An attention that gives a result computed before."""

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *_: torch.Tensor) -> torch.Tensor:
            return found["output"].clone()

        @staticmethod
        def backward(ctx: object, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(found[f"gradient of {name}"] for name in ("query", "key", "value"))

    return lambda query, key, value: Replay.apply(query, key, value)


@check("65,536 heads of 16 positions", "shapes", MANY, where=NOT_INTERPRETED)
def check_65536_heads(attention: Attention, device: str, dtype: torch.dtype) -> None:
    check_many(attention, device, dtype, batch=1, heads=65_536)


@check("80,000 batch entries of 16 positions", "shapes", MANY, where=NOT_INTERPRETED)
def check_80000_batch_entries(attention: Attention, device: str, dtype: torch.dtype) -> None:
    check_many(attention, device, dtype, batch=80_000, heads=1)


def check_last_batch_entry(attention: Attention, device: str, dtype: torch.dtype, by_position: bool) -> None:
    """Judge the first and last batch entries of a call whose keys and values take more than 2^31 numbers each."""
    if torch.cuda.get_device_properties(device).total_memory < 100 * GIB:
        raise NotApplicable("needs a GPU of 100 GiB")
    n_keys, width = (24_000, 128) if by_position else (128, 128)
    batch = 2**31 // (n_keys * width) + 3
    torch.manual_seed(3)
    inputs = [torch.randn((batch, 1, 1, width), device=device, dtype=dtype)]
    for _ in range(2):
        if by_position:  # rows of one batch entry lie batch * width apart: offsets inside a head pass 2^31
            inputs.append(torch.randn((n_keys, batch, width), device=device, dtype=dtype).permute(1, 0, 2)[:, None])
        else:
            inputs.append(torch.randn((batch, 1, n_keys, width), device=device, dtype=dtype))
    call = Call(*inputs)
    found = solve(call, attention)
    places = torch.tensor([0, batch - 2, batch - 1], device=device)
    few = {name: x[places] for name, x in found.items()}
    some = [x[places] for x in (*inputs, call.grad)]
    judge(replay(few), Call(*some[:3], grad=some[3]))


LARGE = (
    "pytorch/pytorch#150054, pytorch/pytorch#190857, fla-org/flash-linear-attention#1080, "
    "Dao-AILab/flash-attention#1500, PriorLabs/TabPFN#1184"
)


@check("keys and values of more than 2^31 numbers", "shapes", LARGE, where=GPU)
def check_past_2_to_the_31(attention: Attention, device: str, dtype: torch.dtype) -> None:
    check_last_batch_entry(attention, device, dtype, by_position=False)


@check("offsets of more than 2^31 inside one head", "strides", LARGE, where=GPU)
def check_offsets_inside_a_head(attention: Attention, device: str, dtype: torch.dtype) -> None:
    check_last_batch_entry(attention, device, dtype, by_position=True)


@check("float16, bfloat16 and float32", "dtypes")
def check_dtypes(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for each in (torch.float16, torch.bfloat16, torch.float32):
        judge(attention, make((1, 2, 2, 37, 41, 16, 16), each, device, is_causal=True), str(each))


@check("float64", "dtypes", "SHI-Labs/NATTEN#191")
def check_float64(attention: Attention, device: str, dtype: torch.dtype) -> None:
    """Exact to float64's own rounding: there is nothing wider to compare with, but the formula."""
    call = make((1, 2, 2, 37, 41, 16, 16), torch.float64, device, is_causal=True)
    right = exact(call)
    for name, x in solve(call, attention).items():
        agree(x, right[name], name, slack=32.0)


@check("scores in the thousands, in 16 bits", "dtypes", "pytorch/pytorch#121558")
def check_large_scores(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for each in (torch.float16, torch.bfloat16):
        call = make((1, 2, 2, 17, 31, 16, 16), each, device, is_causal=True)
        whole = {name: getattr(call, name).round() * 16 for name in ("query", "key")}  # ties stay ties when rounded
        judge(attention, call.replace(**whole), str(each))


@check(
    "rows whose scores are all far below -88, and below -50,000",
    "dtypes",
    "flashinfer-ai/flashinfer#4267, NVIDIA/TransformerEngine#716",
)
def check_very_negative_scores(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for size in (-100.0, -60_000.0):
        call = make((1, 2, 2, 17, 31, 16, 16), dtype, device)
        call.query[..., 0], call.key[..., 0] = 64.0, size / 16  # adds `size` to every score
        judge(attention, call, f"scores near {size:,.0f}")


@check("a negative scale, and one of 0", "dtypes", "pytorch/pytorch#105202, NVIDIA/cudnn-frontend#804")
def check_scales(attention: Attention, device: str, dtype: torch.dtype) -> None:
    for scale in (-0.7, 0.0):
        call = make((1, 2, 2, 17, 19, 8, 8), dtype, device, is_causal=True, scale=scale)
        judge(attention, call, f"scale {scale}")

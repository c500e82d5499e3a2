"""The decoder-only model: against the same written with torch.nn, against GPT-2, and what a language model promises."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernels
from calcformer.model.decoder_only import DecoderOnly
from calcformer.model.positions import sinusoid
from tests.model_problem import POSITIONS

CONTEXT, SIZE = 7, 13  # tokens, and words
SIZES = {"width": 20, "heads": 4, "layers": 3, "hidden": 23}
# Heads of one size; keys and values shared by two heads each; sizes of their own, as of the model of S2; rows of an odd
# number of columns.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"head_size": 6},
    "grouped": {"head_size": 6, "key_heads": 2},
    "sizes": {"head_size": 10, "value_size": 3},
    "odd": {"head_size": 6, "value_size": 3, "key_heads": 1},
}

as_on_a_cpu = pytest.mark.usefixtures("as_on_a_cpu")


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> DecoderOnly:
    """A small model in evaluation mode; weights are made large and biases random, or they would hide mistakes."""
    model = DecoderOnly(SIZE, CONTEXT, **{**SIZES, **settings}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def words(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(SIZE, (rows, length))


class Plain(nn.Module):
    """The same model as one writes it with torch.nn and PyTorch's attention, with the weights of ours."""

    def __init__(self, ours: DecoderOnly, positions: str, norm: str, activation: str, is_causal: bool = True) -> None:
        super().__init__()
        self.kinds = positions, activation
        self.is_causal = is_causal
        self.ours = ours  # whose parameters are used by name

        def plain_norm(theirs: nn.Module) -> nn.Module:
            width = SIZES["width"]
            made = nn.LayerNorm(width, eps=1e-5) if norm == "layer" else nn.RMSNorm(width, eps=1e-5)
            for name, parameter in theirs.named_parameters():
                setattr(made, name, parameter)
            return made

        self.norms = [(plain_norm(layer.attention_norm), plain_norm(layer.feed_forward_norm)) for layer in ours.layers]
        self.last_norm = plain_norm(ours.norm)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, T, E) in pairs of columns, by sines and cosines."""
        if self.kinds[0] != "rotary":
            return x
        sine, cosine = sinusoid(*x.shape[2:]).to(x).unflatten(1, (-1, 2)).unbind(2)  # of float32, as ours
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=4).flatten(3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions, activation = self.kinds
        x = F.embedding(ids, self.ours.embedding.weight)
        if positions == "learned":
            x = x + self.ours.positions.table[: ids.shape[1]]
        if positions == "sinusoid":
            x = 50 * x + sinusoid(ids.shape[1], x.shape[2]).to(x)
        for layer, (first, second) in zip(self.ours.layers, self.norms):
            attention, expand = layer.attention, layer.feed_forward.expand
            joint = F.linear(first(x), attention.query_key_value.weight, attention.query_key_value.bias)
            heads = attention.heads, attention.key_heads, attention.key_heads
            query, key, value = (
                part.unflatten(2, (count, -1)).transpose(1, 2)
                for part, count in zip(joint.split(attention.sizes, dim=2), heads)
            )
            key, value = (y.repeat_interleave(heads[0] // heads[1], dim=1) for y in (key, value))
            mixed = F.scaled_dot_product_attention(
                self.rotate(query), self.rotate(key), value, is_causal=self.is_causal
            )
            x = x + attention.output(mixed.transpose(1, 2).flatten(2))
            y = F.linear(second(x), expand.weight, expand.bias)
            if activation == "swiglu":
                y = F.silu(y[..., : SIZES["hidden"]]) * y[..., SIZES["hidden"] :]
            else:
                approximate = "tanh" if activation == "gelu-tanh" else "none"
                y = F.relu(y) if activation == "relu" else F.gelu(y, approximate=approximate)
            x = x + layer.feed_forward.contract(y)
        return self.last_norm(x) @ self.ours.prediction.weight.T


def gradients(model: nn.Module, ours: DecoderOnly, ids: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The scores, and the gradient of each parameter."""
    scores = model(ids)
    return [scores, *torch.autograd.grad(scores, list(ours.parameters()), upstream)]


@as_on_a_cpu
@pytest.mark.parametrize(
    ("positions", "norm", "activation", "heads"),
    [  # every two choices together somewhere
        ("learned", "layer", "gelu", "plain"),
        ("learned", "rms", "relu", "grouped"),
        ("learned", "layer", "gelu-tanh", "sizes"),
        ("learned", "rms", "swiglu", "plain"),
        ("sinusoid", "rms", "gelu", "grouped"),
        ("sinusoid", "layer", "relu", "sizes"),
        ("sinusoid", "rms", "gelu-tanh", "plain"),
        ("sinusoid", "layer", "swiglu", "grouped"),
        ("rotary", "layer", "gelu", "sizes"),
        ("rotary", "rms", "relu", "plain"),
        ("rotary", "layer", "gelu-tanh", "grouped"),
        ("rotary", "rms", "swiglu", "sizes"),
        ("none", "rms", "gelu", "sizes"),
        ("none", "layer", "relu", "plain"),
        ("none", "rms", "gelu-tanh", "grouped"),
        ("none", "layer", "swiglu", "plain"),
    ],
)
def test_scores_and_gradients_are_those_of_plain_pytorch(
    positions: str, norm: str, activation: str, heads: str
) -> None:
    ours = make(positions=positions, norm=norm, activation=activation, tied=heads != "sizes", **HEADS[heads])
    ids, upstream = words(), torch.randn(3, CONTEXT, SIZE, dtype=torch.float64)
    expected = gradients(Plain(ours, positions, norm, activation), ours, ids, upstream)
    for found, known in zip(gradients(ours, ours, ids, upstream), expected):
        torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10)


@as_on_a_cpu
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("norm", {"norm": "rms"}), ("positions", {"positions": "rotary"}), ("mask", {"is_causal": False})],
)
def test_another_model_or_mask_is_rejected(kind: str, changes: dict[str, Any]) -> None:
    """What the comparison above is worth: a model of another kind is far from ours."""
    ours = make(positions="none", **HEADS["plain"])
    other = Plain(ours, **{"positions": "none", "norm": "layer", "activation": "gelu", **changes})
    if kind == "norm":
        other.last_norm.bias = None
    assert (ours(ids := words()) - other(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_through_the_triton_kernels(norm: str) -> None:
    ours = make(torch.float32, positions="rotary", norm=norm, **HEADS["grouped"])
    ids, upstream = words(), torch.randn(3, CONTEXT, SIZE)
    assert "Triton" in kernels.explain(*[torch.empty(3, 4, CONTEXT, 6)] * 3, is_causal=True).kernel
    found = gradients(ours, ours, ids, upstream)
    expected = gradients(Plain(ours.double(), "rotary", norm, "gelu"), ours, ids, upstream.double())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4 * b.detach().abs().max().item())


def test_parameters_are_as_many_as_by_hand() -> None:
    """GPT-2 small has 124,439,808; here the same sum for a small model, and one with all that differs from GPT-2."""

    def count(**settings: Any) -> int:
        with torch.device("meta"):
            return sum(x.numel() for x in DecoderOnly(**settings).parameters())

    gpt2 = {"vocabulary_size": 50_257, "context": 1024, "width": 768, "heads": 12, "layers": 12, "hidden": 3072}
    assert count(**gpt2) == 124_439_808
    by_layer = (20 * 3 * 24 + 3 * 24) + (24 * 20 + 20) + (20 * 23 + 23) + (23 * 20 + 20) + 4 * 20
    assert count(vocabulary_size=13, context=7, **SIZES, head_size=6) == 13 * 20 + 7 * 20 + 3 * by_layer + 2 * 20
    # S2's: 8 heads of 64 in a model 64 wide. Untied, without learned positions.
    by_layer = (64 * 3 * 512 + 3 * 512) + (512 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 4 * 64
    s2 = {"width": 64, "heads": 8, "layers": 1, "hidden": 256, "head_size": 64}
    assert count(vocabulary_size=11, context=16, **s2, tied=False, positions="sinusoid") == 2 * 11 * 64 + by_layer + 128
    # 4 heads of queries (6 wide) that share 2 of keys (6) and values (5), SwiGLU, RMS norm.
    by_layer = (20 * 46 + 46) + (20 * 20 + 20) + (20 * 46 + 46) + (23 * 20 + 20) + 2 * 20
    other = {"head_size": 6, "key_heads": 2, "value_size": 5, "activation": "swiglu", "norm": "rms"}
    assert count(vocabulary_size=13, context=7, **SIZES, **other, positions="rotary") == 13 * 20 + 3 * by_layer + 20


@as_on_a_cpu
def test_initial_values_are_those_of_gpt_2() -> None:
    model = DecoderOnly(211, 97, width=96, heads=4, layers=8, hidden=389)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("output.weight", "contract.weight")) else 0.02
            assert abs(parameter.std() / std - 1) < 5 / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean()) < 5 * std / math.sqrt(parameter.numel()), name
    assert model.prediction.weight is model.embedding.weight
    with torch.no_grad():  # every word is about as likely as any other
        loss = F.cross_entropy(model(torch.randint(211, (5, 97))).flatten(0, 1), torch.randint(211, (5 * 97,)))
    assert abs(loss - math.log(211)) < 0.1


@as_on_a_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_in_16_bits_it_says_nearly_the_same(positions: str, dtype: torch.dtype) -> None:
    model, ids = make(positions=positions, **HEADS["odd"]), words()
    scores, limit = model(ids), 0.1 * float(model(ids).abs().max())
    found = model.to(dtype)(ids)
    assert found.dtype == dtype and (found.double() - scores).abs().max() < limit
    cache, _ = model.start(ids[:, :2], CONTEXT)
    assert (model.next(ids[:, 2], cache).double() - scores[:, 2]).abs().max() < limit
    assert (found.double() - scores.roll(1, 2)).abs().max() > limit  # the comparison tells words apart


@as_on_a_cpu
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_later_tokens_change_nothing_before_them(positions: str, heads: str) -> None:
    model, ids = make(positions=positions, **HEADS[heads]), words()
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % SIZE
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-12)
    assert (after[:, 4:] - before[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-3
    torch.testing.assert_close(model(ids[:, :4]), before[:, :4], rtol=1e-12, atol=1e-12)


@as_on_a_cpu
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_token_at_a_time_gives_what_all_at_once_do(positions: str, norm: str, heads: str) -> None:
    model, ids = make(positions=positions, norm=norm, **HEADS[heads]), words(4)

    def check(found: torch.Tensor, ids: torch.Tensor) -> None:
        torch.testing.assert_close(found, model(ids)[:, -1], rtol=1e-11, atol=1e-11)

    for read in (1, 3):  # tokens that the cache begins with
        cache, scores = model.start(ids[:, :read], CONTEXT)
        check(scores, ids[:, :read])
        for place in range(read, 5):
            check(model.next(ids[:, place], cache), ids[:, : place + 1])
        index = torch.tensor([3, 0, 0, 2, 1])
        check(model.next(ids[index, 5], cache.select(index)), ids[index, :6])
        check(model.next(ids[:2, 6], cache.select(torch.tensor([1, 4]))), torch.cat((ids[[0, 1], :6], ids[:2, 6:]), 1))
        assert cache.length == CONTEXT
        with pytest.raises(ValueError, match="made for 7 tokens and is full|learned positions reach 7 tokens"):
            model.next(ids[:2, 6], cache)


def test_no_graph_is_kept() -> None:
    model = make(torch.float32)
    cache, scores = model.start(words(3, 2), CONTEXT)
    assert not scores.requires_grad and not model.next(scores.argmax(dim=1), cache).requires_grad


@as_on_a_cpu
def test_dropout_is_for_training_alone() -> None:
    model, ids = make(torch.float32, dropout=0.4), words()
    still = model(ids)
    assert torch.equal(model(ids), still)
    model.train()
    torch.manual_seed(5)
    dropped = model(ids)
    assert not torch.allclose(dropped, still) and not torch.allclose(model(ids), dropped)
    torch.manual_seed(5)
    assert torch.equal(model(ids), dropped)
    model.dropout.p = 0.0  # what is left is dropped by the layers: weights of attention, and what is added
    assert not torch.allclose(model(ids), still)
    for layer in model.layers:
        layer.dropout.p = 0.0
    assert not torch.allclose(model(ids), still)
    for layer in model.layers:
        layer.attention.scaled_dot_product.dropout = 0.0
    torch.testing.assert_close(model(ids)[:, -1], still[:, -1], rtol=1e-4, atol=1e-3)  # but for the last sum
    model.layers[-1].dropout.p = 0.4
    assert not torch.allclose(model(ids), still, rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "width must be a multiple of heads, got width 20 and 3 heads"),
        ({"key_heads": 3}, "heads must be a multiple of key heads, got 4 heads and 3 of keys"),
        ({"positions": "rotary"}, "the head size must be even, got 5"),
        ({"norm": "batch"}, "norm must be layer or rms, got 'batch'"),
        ({"activation": "sine"}, "activation must be relu, gelu, gelu-tanh, swiglu, got 'sine'"),
        ({"positions": "nowhere"}, "positions must be .*, got 'nowhere'"),
    ],
)
def test_wrong_settings_are_told_in_a_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DecoderOnly(SIZE, CONTEXT, **{**SIZES, **settings})
    assert "\n" not in str(caught.value)


def test_learned_positions_end_with_the_context() -> None:
    with pytest.raises(ValueError, match="learned positions reach 7 tokens, got a sequence of 8"):
        make(torch.float32)(words(1, CONTEXT + 1))


@as_on_a_cpu
@torch.no_grad()
def test_gpt_2_with_the_same_weights() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=SIZE, n_positions=CONTEXT, n_embd=20, n_layer=3, n_head=4, n_inner=23, attn_implementation="eager"
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    ours = DecoderOnly(SIZE, CONTEXT, **SIZES, activation="gelu-tanh").double().eval()
    names = {
        "attention_norm": "ln_1",
        "feed_forward_norm": "ln_2",
        "attention.query_key_value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward.expand": "mlp.c_fc",
        "feed_forward.contract": "mlp.c_proj",
    }
    known = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        if name.startswith("layers"):
            _, layer, *inner, kind = name.split(".")
            other = f"transformer.h.{layer}.{names['.'.join(inner)]}.{kind}"
        else:
            other = {"embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"}[
                name.split(".")[0]
            ] + (".bias" if name.endswith("bias") else ".weight")
        value = known[other]
        is_product = name.startswith("layers") and "norm" not in name and value.dim() == 2
        parameter.copy_(value.T if is_product else value)
    ids = words()
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-10, atol=1e-10)

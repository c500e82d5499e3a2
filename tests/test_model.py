"""The transformer: against torch.nn.Transformer with the same weights, and the properties a right model has.

Those of its position encodings are in test_positions.py.
"""

import pytest
import torch
from torch import nn

import kernels.nn
from calcformer.model.dropout import Dropout
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import ACTIVATIONS, CrossAttention, SelfAttention
from calcformer.model.positions import sinusoid
from calcformer.model.rows import Rows
from tests.model_problem import NORMS, PAD, POSITIONS, SIZES, make, padded_problems, problems

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


def copy_attention(ours: SelfAttention | CrossAttention, theirs: nn.MultiheadAttention) -> None:
    parts = [ours.query_key_value] if isinstance(ours, SelfAttention) else [ours.query, ours.key_value]
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def torch_transformer(model: EncoderDecoder, norm: str, activation: str) -> nn.Transformer:
    """torch.nn.Transformer with the weights of `model`."""
    options = {"dropout": 0.0, "activation": ACTIVATIONS[activation], "batch_first": True, "norm_first": norm == "pre"}
    width, heads, hidden = SIZES["width"], SIZES["heads"], SIZES["hidden"]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, heads, hidden, **options),  # type: ignore
        SIZES["encoder_layers"],
        nn.LayerNorm(width),
        enable_nested_tensor=False,
    )
    theirs = nn.Transformer(
        width,
        heads,
        num_decoder_layers=SIZES["decoder_layers"],
        dim_feedforward=hidden,
        custom_encoder=encoder,
        **options,
    )  # type: ignore[arg-type]
    for side in "encoder", "decoder":
        for ours, layer in zip(getattr(model, side), getattr(theirs, side).layers):
            copy_attention(ours.attention, layer.self_attn)
            pairs = [
                (ours.attention_norm, layer.norm1),
                (ours.feed_forward.expand, layer.linear1),
                (ours.feed_forward.contract, layer.linear2),
            ]
            if side == "decoder":
                copy_attention(ours.cross_attention, layer.multihead_attn)
                pairs += [(ours.cross_attention_norm, layer.norm2), (ours.feed_forward_norm, layer.norm3)]
            else:
                pairs += [(ours.feed_forward_norm, layer.norm2)]
            for source, copy in pairs:
                copy.load_state_dict(source.state_dict())
        getattr(theirs, side).norm.load_state_dict(getattr(model, f"{side}_norm").state_dict())
    return theirs.eval()


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_equals_torch_transformer_with_the_same_weights(norm: str, activation: str) -> None:
    model = make(norm=norm, activation=activation)
    theirs = torch_transformer(model, norm, activation)
    source, target = problems()
    source[1, 4:] = PAD
    source[2, 6:] = PAD
    mask = source == PAD
    embedded = [model.source_embedding(source) + sinusoid(7, 20), model.target_embedding(target) + sinusoid(5, 20)]
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = theirs(*embedded, tgt_mask=causal, src_key_padding_mask=mask, memory_key_padding_mask=mask)
    torch.testing.assert_close(model(source, target), model.prediction(expected))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_extra_padding_changes_nothing(positions: str, norm: str) -> None:
    longer_source, longer_target = problems()
    source, target = longer_source[:, :4], longer_target[:, :3]
    longer_source[:, 4:], longer_target[:, 3:] = PAD, PAD
    model = make(norm=norm, positions=positions)
    torch.testing.assert_close(model(longer_source, longer_target)[:, :3], model(source, target))
    blind = make(pad_id=None, norm=norm)  # a model without the mask must fail this, or the test shows nothing
    assert (blind(longer_source, longer_target)[:, :3] - blind(source, target)).abs().max() > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_later_target_tokens_do_not_change_earlier_outputs(positions: str) -> None:
    model = make(positions=positions)
    source, target = problems()
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % PAD
    before, after = model(source, target), model(source, changed)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-6)
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize(("embeddings", "matrices"), [("separate", 3), ("shared", 2), ("tied", 1)])
def test_embeddings_are_shared_as_asked(embeddings: str, matrices: int) -> None:
    model = make(embeddings=embeddings)
    named = (model.source_embedding.weight, model.target_embedding.weight, model.prediction.weight)
    assert len({id(weight) for weight in named}) == matrices
    assert model(*problems()).shape == (3, 5, 13)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_every_parameter_gets_a_gradient(positions: str, norm: str) -> None:
    model = make(positions=positions, norm=norm, dropout=0.05).train()
    logits = model(*problems())
    logits.backward(torch.randn_like(logits))
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_initial_weights_have_the_spread_of_torch() -> None:
    attention, cross = SelfAttention(64, 4), CrossAttention(64, 4)
    theirs = nn.MultiheadAttention(64, 4)
    for weight in attention.query_key_value.weight, cross.query.weight, cross.key_value.weight:
        assert weight.std().item() == pytest.approx(theirs.in_proj_weight.std().item(), rel=0.05)
    assert attention.query_key_value.bias.abs().max() == 0


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="width 20 and 3 heads"):
        make(heads=3)


def test_an_empty_batch_has_empty_scores() -> None:
    for pad_id in PAD, None:
        source, target = problems(0)
        assert make(pad_id)(source, target).shape == (0, 5, 13)


# Rows


IDS = torch.tensor([[5, 6, 7, PAD], [8, PAD, PAD, PAD], [1, 2, 3, 4], [9, 9, PAD, PAD]])


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Rows as they are where the padding is computed."""
    patch.setattr("torch.compiler.is_compiling", lambda: True)


def test_rows_hold_each_token_once_and_padding_once() -> None:
    rows = Rows(IDS, PAD)
    assert rows.ids.tolist() == [5, 6, 7, 8, 1, 2, 3, 4, 9, 9, PAD]
    places = rows.add_by_place(torch.zeros(11, 1), torch.arange(4.0)[:, None])
    assert places.squeeze(1).tolist()[:10] == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]
    assert rows.mask is not None and torch.equal(rows.mask[:, 0, 0], IDS != PAD)
    assert Rows(IDS[2:3], PAD).mask is None and Rows(IDS, None).ids.shape == (16,)
    assert Rows(IDS[:0], PAD).ids.shape == (0,)
    scores = torch.randn(11, 3)
    spread = rows.spread(scores)
    torch.testing.assert_close(spread[IDS != PAD], scores[:10])
    assert spread[IDS == PAD].abs().max() == 0
    upstream = torch.randn(4, 4, 3, dtype=torch.float64)
    scores = scores.double().requires_grad_()
    (grad,) = torch.autograd.grad(rows.spread(scores), scores, upstream)
    assert torch.equal(grad[:10], upstream[IDS != PAD]) and grad[10].abs().max() == 0
    assert torch.autograd.gradgradcheck(rows.spread, scores)


@pytest.mark.parametrize("pad_id", [PAD, None])
@pytest.mark.parametrize("parts", [1, 3])
def test_heads_are_split_and_joined_as_by_views(
    pad_id: int | None, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(IDS, pad_id)
    with monkeypatch.context() as patch:
        as_on_a_gpu(patch)
        whole = Rows(IDS, pad_id)
    x = torch.randn(4, 4, parts * 2 * 5)
    real = torch.ones(4, 4, dtype=torch.bool) if pad_id is None else IDS != pad_id
    packed = x[real] if pad_id is None else torch.cat((x[real], x[0, 3:]))
    packed.requires_grad_()
    x = x.flatten(0, 1).requires_grad_()
    upstream = torch.randn(parts, 4, 2, 4, 5) * real[:, None, :, None]  # as the loss gives it: zero at padding
    split, expected = rows.split(packed, parts, 2), whole.split(x, parts, 2)
    for mine, theirs in zip(split, expected):
        torch.testing.assert_close(mine * real[:, None, :, None], theirs * real[:, None, :, None])
    grads = torch.autograd.grad(split, packed, list(upstream))[0], torch.autograd.grad(expected, x, list(upstream))[0]
    torch.testing.assert_close(grads[0][: real.sum()], grads[1].view(4, 4, -1)[real])
    heads = torch.randn(4, 2, 4, 5, requires_grad=True)
    joined, expected_rows = rows.join(heads), whole.join(heads)
    torch.testing.assert_close(joined[: real.sum()], expected_rows.view(4, 4, -1)[real])
    up = torch.randn(4, 4, 10) * real[..., None]
    packed_up = up[real] if pad_id is None else torch.cat((up[real], torch.zeros(1, 10)))
    mine, theirs = (
        torch.autograd.grad(out, heads, grad)[0]
        for out, grad in ((joined, packed_up), (expected_rows, up.flatten(0, 1)))
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("norm", "positions"), [*((norm, "sinusoid") for norm in NORMS), ("post", "relative"), ("post", "rotary")]
)
def test_leaving_padding_out_changes_no_score_and_no_gradient(
    norm: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(norm=norm, positions=positions)
    source, target = padded_problems()
    real = target != PAD
    upstream = torch.randn(int(real.sum()), 13)
    results = []
    for gpu in False, True:
        with monkeypatch.context() as patch:
            if gpu:
                as_on_a_gpu(patch)
            scores = model(source, target)[real]
            results.append((scores, *torch.autograd.grad(scores, list(model.parameters()), upstream)))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_fused_residual_norms_give_the_same_seeded_loss(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfused(
        self: kernels.nn.LayerNorm,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        prenorm: bool = False,
    ) -> object:
        total = input if residual is None else Dropout(dropout_p).add(residual, input)
        output = nn.LayerNorm.forward(self, total)
        return (output, total) if prenorm else output

    model = make(norm=norm, dropout=0.1).train()
    source, target = problems(4)
    results = []
    for fused in True, False:
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(kernels.nn.LayerNorm, "forward", unfused)
            torch.manual_seed(5)
            loss = nn.functional.cross_entropy(model(source, target).flatten(0, 1), target.flatten())
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))


@pytest.mark.parametrize("p", [0.03, 0.4], ids=["sparse", "dense"])
def test_dropout_scales_what_it_keeps_and_is_off_in_evaluation(p: float) -> None:
    layer = Dropout(p)
    x = torch.randn(997, 101).t().requires_grad_()  # not contiguous
    out = layer(x)
    kept = out != 0
    assert 1 - kept.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(out, torch.where(kept, x / (1 - p), 0))
    upstream = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(out, x, upstream)[0], torch.where(kept, upstream / (1 - p), 0))
    assert layer.eval()(x) is x


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_residual_in_one(training: bool) -> None:
    layer = Dropout(0.2).train(training)
    residual, x = torch.randn(2, 83, 89, requires_grad=True).unbind()
    torch.manual_seed(3)
    expected = residual + layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(layer.add(residual, x), expected)

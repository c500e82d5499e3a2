"""The attention weights of a model against its layers composed of the references."""

import pytest
import torch

from calcformer.model.decoder_only import DecoderOnly
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.next_word import RecurrentNextWord
from calcformer.model.positions import sinusoid
from calcformer.model.weights import AttentionWeights, attention_weights
from tests.model_problem import NORMS, PAD, POSITIONS, compose_layer, make, padded_problems

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


@torch.no_grad()
def composed_weights(model: EncoderDecoder, source: torch.Tensor, target: torch.Tensor) -> AttentionWeights:
    """The weights of a float64 model with sinusoids, layer by layer without this package's kernels."""
    x = model.source_embedding(source) + sinusoid(source.shape[1], 20)
    y = model.target_embedding(target) + sinusoid(target.shape[1], 20)
    n_source, n_target = source.shape[1], target.shape[1]
    padding = (source == PAD)[:, None]
    norm_first = model.encoder[0].norm == "pre"
    encoder, decoder = [], []
    for encoder_layer in model.encoder:
        x, seen = compose_layer(encoder_layer, x, padding.expand(-1, n_source, -1), norm_first=norm_first)
        encoder += seen
    x = torch.nn.functional.layer_norm(x, (20,), model.encoder_norm.weight, model.encoder_norm.bias)
    later = torch.ones(n_target, n_target, dtype=torch.bool).triu(1).expand(len(target), -1, -1)
    for layer in model.decoder:
        y, seen = compose_layer(layer, y, later, x, padding.expand(-1, n_target, -1), norm_first=norm_first)
        decoder += seen
    return AttentionWeights(encoder, decoder[::2], decoder[1::2])


@pytest.mark.parametrize("norm", NORMS)
def test_weights_equal_those_of_the_references(norm: str) -> None:
    model = make(norm=norm)
    source, target = padded_problems()
    found = attention_weights(model, source, target)
    expected = composed_weights(model.double(), source, target)
    for kind, layers, ids in ("encoder", 2, source), ("decoder", 3, target), ("cross", 3, target):
        pairs = list(zip(getattr(found, kind), getattr(expected, kind), strict=True))
        assert len(pairs) == layers
        for mine, theirs in pairs:
            assert mine.dtype == torch.float32 and mine.shape == theirs.shape
            mine, theirs = (weights.transpose(1, 2)[ids != PAD] for weights in (mine, theirs))
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_sum_to_one_and_what_is_hidden_has_no_weight(positions: str, norm: str) -> None:
    model = make(positions=positions, norm=norm, dropout=0.1)
    source, target = padded_problems()
    found = attention_weights(model, source, target)
    for weights in (*found.encoder, *found.decoder, *found.cross):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    for weights in (*found.encoder, *found.cross):
        assert torch.equal(weights == 0, (source == PAD)[:, None, None].expand_as(weights))
    for weights in found.decoder:
        assert torch.equal(weights == 0, torch.ones(5, 5, dtype=torch.bool).triu(1).expand_as(weights))


def test_shared_heads_of_a_decoder_alone_have_the_weights_of_their_output() -> None:
    """Values that are 1 for one key and 0 for the others give as output the weight of that key."""
    torch.manual_seed(0)
    model = DecoderOnly(
        11, 6, width=8, heads=4, key_heads=2, head_size=6, layers=2, hidden=8, positions="rotary"
    ).eval()
    for layer in model.layers:
        layer.attention.query_key_value.weight.data *= 50  # weights that differ
    ids = torch.randint(11, (3, 6))
    found = attention_weights(model, ids)
    assert found.encoder == found.cross == [] and [x.shape for x in found.decoder] == [(3, 4, 6, 6)] * 2
    inputs: list[tuple[torch.Tensor, ...]] = []
    hook = model.layers[1].attention.scaled_dot_product.register_forward_pre_hook(lambda _, given: inputs.append(given))
    model(ids)
    hook.remove()
    query, key, value, *rest = inputs[0]
    for place in range(6):
        one = torch.zeros_like(value)
        one[:, :, place] = 1
        mixed = model.layers[1].attention.scaled_dot_product(query, key, one, *rest)
        torch.testing.assert_close(mixed[..., 0], found.decoder[1][..., place])
    assert found.decoder[1].std() > 0.1
    assert attention_weights(RecurrentNextWord(11), ids) == ([], [], [])


def test_model_is_left_as_it_was() -> None:
    model = make()
    source, target = padded_problems()
    before = model(source, target)
    with pytest.raises(IndexError):
        attention_weights(model, source + 13, target)
    assert not any(weights.requires_grad for weights in attention_weights(model, source, target).cross)
    assert torch.equal(model(source, target), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_attention_gives_what_its_weights_mix() -> None:
    """The weights of the last layer, applied to its values, are its output."""
    model = make(positions="relative")
    source, target = padded_problems()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention = model.decoder[-1].attention.scaled_dot_product
    with attention.register_forward_hook(lambda _, inputs, output: seen.append((inputs[2], output))):
        weights = attention_weights(model, source, target).decoder[-1]
    torch.testing.assert_close(weights @ seen[0][0], seen[0][1])

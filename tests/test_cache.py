"""The decoder's cache: a token at a time gives what all at once do."""

import pytest
import torch

from calcformer.model.cache import Cache
from calcformer.model.encoder_decoder import EncoderDecoder
from tests.model_problem import NORMS, PAD, POSITIONS, make, padded_problems

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


def start(model: EncoderDecoder, length: int = 5) -> tuple[Cache, torch.Tensor]:
    """A cache for four sources, some with padding, and the sources."""
    source, _ = padded_problems()
    with torch.no_grad():
        return model.start(model.encode(source), length), source


def check(model: EncoderDecoder, cache: Cache, source: torch.Tensor, said: torch.Tensor, steps: int) -> torch.Tensor:
    """Feed as many random tokens to rows that have said (B, T); each time, scores must be those of decode."""
    tolerance = 1e-13 if model.prediction.weight.dtype == torch.float64 else 3e-5
    for _ in range(steps):
        token = torch.randint(0, PAD, (len(source),))
        said = torch.cat((said, token[:, None]), dim=1)
        with torch.no_grad():
            expected = model.decode(said, model.encode(source))[:, -1]
        torch.testing.assert_close(model.next(token, cache), expected, rtol=tolerance, atol=tolerance)
        assert cache.length == said.shape[1]
    return said


@pytest.mark.parametrize(
    ("norm", "dtype"), [*((norm, torch.float32) for norm in NORMS), ("pre", torch.float64)], ids=[*NORMS, "float64"]
)
@pytest.mark.parametrize("positions", POSITIONS)
def test_scores_are_those_of_decode(positions: str, norm: str, dtype: torch.dtype) -> None:
    model = make(positions=positions, norm=norm).to(dtype)
    cache, source = start(model)
    said = check(model, cache, source, torch.empty(4, 0, dtype=torch.long), 2)
    index = torch.tensor([3, 0, 0, 2, 1, 3])  # repeated, in another order
    said = check(model, cache.select(index), source := source[index], said[index], 2)
    index = torch.tensor([4, 1])  # dropped
    check(model, cache.select(index), source[index], said[index], 1)


@pytest.mark.parametrize("pad_id", [PAD, None], ids=["padding", "no padding"])
@pytest.mark.parametrize("embeddings", ["shared", "tied"])
def test_with_every_embedding(embeddings: str, pad_id: int | None) -> None:
    model = make(pad_id, embeddings=embeddings)
    cache, source = start(model)
    check(model, cache, source, torch.empty(4, 0, dtype=torch.long), 3)


def test_beams_of_one_source_change_places() -> None:
    """Rows that stay with their source need no other memory; those that come from elsewhere do."""
    model = make()
    cache, source = start(model)
    beams = torch.arange(4).repeat_interleave(2)
    cache.select(beams)
    memory = cache.layers[0].memory
    said = check(model, cache, source := source[beams], torch.empty(8, 0, dtype=torch.long), 1)
    index = torch.tensor([1, 0, 2, 2, 5, 5, 6, 7])
    said = check(model, cache.select(index), source, said[index], 1)
    assert cache.layers[0].memory is memory
    index = torch.tensor([2, 0, 2, 2, 5, 5, 6, 7])
    said = check(model, cache.select(index), source := source[index], said[index], 1)
    index = torch.tensor([0, 1, 3, 2, 4, 5, 7, 6])
    check(model, cache.select(index), source, said[index], 2)


def test_rows_before_the_first_token_and_no_rows_at_all() -> None:
    model = make()
    cache, source = start(model)
    index = torch.tensor([2, 2, 0])
    check(model, cache.select(index), source[index], torch.empty(3, 0, dtype=torch.long), 2)
    cache.select(torch.empty(0, dtype=torch.long))
    assert model.next(torch.empty(0, dtype=torch.long), cache).shape == (0, 13) and cache.length == 3


def test_a_memory_serves_many_caches() -> None:
    model = make()
    source, target = padded_problems()
    with torch.no_grad():
        memory = model.encode(source)
    caches = [model.start(memory, 2) for _ in range(2)]
    caches[0].select(torch.tensor([1, 1])).select(torch.tensor([0]))
    model.next(target[:1, 0], caches[0])
    check(model, caches[1], source, torch.empty(4, 0, dtype=torch.long), 2)


def test_keys_of_the_memory_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    cache, source = start(model)
    with monkeypatch.context() as patch:
        for layer in model.decoder:
            patch.setattr(layer.cross_attention, "read", None)
        for place in range(5):
            assert model.next(source[:, place], cache).shape == (4, 13)
    with pytest.raises(ValueError, match="made for 5 tokens and is full"):
        model.next(source[:, 0], cache)


def test_no_graph_is_kept() -> None:
    model = make()
    cache, source = start(model)
    assert not model.next(source[:, 0], cache).requires_grad

"""The small next-word models: as written out by hand, and that they learn S2's line."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from calcformer.model.next_word import FeedForwardNextWord, RecurrentNextWord

LINE = "If you win , you live ! If you lose , you die ! If you don't fight , you can't win !".split()


@torch.no_grad()
def test_the_feed_forward_model_is_its_formula() -> None:
    model, ids = FeedForwardNextWord(11, 3, width=5, hidden=7), torch.randint(11, (4, 3))
    beside = torch.cat([model.embedding.weight[ids[:, place]] for place in range(3)], dim=1)
    hidden = torch.tanh(beside @ model.expand.weight.T + model.expand.bias)
    torch.testing.assert_close(model(ids), hidden @ model.prediction.weight.T + model.prediction.bias)
    assert sum(x.numel() for x in model.parameters()) == 11 * 5 + (15 * 7 + 7) + (7 * 11 + 11)
    with pytest.raises(ValueError, match="the model sees 3 words, got 2; give the last 3"):
        model(ids[:, 1:])


@torch.no_grad()
def test_the_recurrent_model_is_its_formula() -> None:
    model, ids = RecurrentNextWord(11, "rnn", 1, width=5, hidden=7), torch.randint(11, (4, 3))
    inner = model.recurrent
    state = torch.zeros(4, 7)
    for place in range(3):
        x = model.embedding.weight[ids[:, place]]
        read = F.linear(x, inner.weight_ih_l0, inner.bias_ih_l0)
        state = torch.tanh(read + F.linear(state, inner.weight_hh_l0, inner.bias_hh_l0))
    torch.testing.assert_close(model(ids), model.prediction(state))


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_recurrent_model(cell: str, gates: int, layers: int) -> None:
    model = RecurrentNextWord(11, cell, layers, width=5, hidden=7, dropout=0.1)
    by_layer = [gates * 7 * (size + 7 + 2) for size in (5, 7)]
    assert sum(x.numel() for x in model.parameters()) == 11 * 5 + sum(by_layer[:layers]) + 7 * 11 + 11
    for length in (1, 2, 3):
        assert model(torch.randint(11, (4, length))).shape == (4, 11)


def test_another_cell_is_told_in_a_line() -> None:
    with pytest.raises(ValueError, match="cell must be rnn, lstm, gru, got 'qrnn'"):
        RecurrentNextWord(11, "qrnn")


@pytest.mark.parametrize("kind", ["feed-forward", "rnn"])
def test_they_learn_a_line_as_far_as_their_context_allows(kind: str) -> None:
    known = sorted(set(LINE))
    ids = torch.tensor([known.index(word) for word in LINE])
    contexts, following = ids.unfold(0, 3, 1)[:-1], ids[3:]
    model: nn.Module = FeedForwardNextWord(len(known), 3) if kind == "feed-forward" else RecurrentNextWord(len(known))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = F.cross_entropy(model(contexts), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seen: dict[tuple[int, ...], list[int]] = {}
    for context, word in zip(contexts.tolist(), following.tolist()):
        seen.setdefault(tuple(context), []).append(word)
    best = sum(max(words.count(word) for word in set(words)) for words in seen.values())
    assert losses[0] > 2.0 and int((model(contexts).argmax(dim=1) == following).sum()) == best

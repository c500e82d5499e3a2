"""Generated text: top-k and top-p by brute force, samples by their frequencies, and greedy text by recomputing."""

import math
from typing import Any

import pytest
import torch

from calcformer.errors import InputError
from calcformer.model.decoder_only import DecoderOnly
from calcformer.sampling import draw, generate, probabilities
from tests.model_problem import POSITIONS
from tests.test_decoder_only import CONTEXT, HEADS, SIZE, make

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5]]


def talkative(**settings: Any) -> DecoderOnly:
    """A model whose likeliest word depends most on the word before."""
    model = make(tied=False, **settings)
    with torch.no_grad():
        model.embedding.weight.mul_(5)
        model.norm.bias.zero_()
    return model


def brute_force(chances: list[float], top_k: int, top_p: float) -> list[float]:
    """The cut as it is defined: walk from the likeliest token down, of equal ones the lower first."""
    order = sorted(range(len(chances)), key=lambda token: (-chances[token], token))
    kept = order[:top_k] if top_k else order
    whole, taken, last = sum(chances[token] for token in kept), 0.0, []
    for token in kept:
        if last and taken >= top_p:
            break
        last.append(token)
        taken += chances[token] / whole
    whole = sum(chances[token] for token in last)
    return [chances[token] / whole if token in last else 0.0 for token in range(len(chances))]


@pytest.mark.parametrize("top_p", [0.0, 0.24, 0.25, 0.3, 0.5, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 7, 20])
def test_top_k_and_top_p_are_those_of_brute_force(top_k: int, top_p: float) -> None:
    """Numbers with few bits, so that sums are exact and a limit may fall on one."""
    chances = [[0.25, 0.25, 0.125, 0.25, 0.125], [0.5, 0.0, 0.125, 0.25, 0.125], [0.0, 0.0, 0.0, 1.0, 0.0], [0.2] * 5]
    chances += torch.rand(3, 5, dtype=torch.float64).softmax(dim=1).tolist()
    found = probabilities(torch.tensor(chances, dtype=torch.float64).log(), 1.0, top_k, top_p)
    if top_p in (0.24, 0.3, 0.99, 1.0, 0.0):  # at others a sum may meet the limit but for rounding
        expected = torch.tensor([brute_force(row, top_k, top_p) for row in chances], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(7, dtype=torch.float64))
    if top_k:
        assert int((found > 0).sum(dim=1).max()) <= top_k
    for row, cut in zip(chances, found.tolist()):  # what is kept is enough, and without its last one it is not
        kept = sorted((p for p, after in zip(row, cut) if after), reverse=True)
        whole = sum(sorted(row, reverse=True)[: top_k or 5])
        assert sum(kept) / whole > top_p - 1e-9 and (len(kept) == 1 or sum(kept[:-1]) / whole < top_p + 1e-9)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_divides_the_scores(temperature: float) -> None:
    scores = torch.randn(3, 11)
    weights = [[math.exp(score / temperature) for score in row] for row in scores.double().tolist()]
    expected = torch.tensor([[x / sum(row) for x in row] for row in weights], dtype=torch.float64)
    torch.testing.assert_close(probabilities(scores, temperature), expected)
    cold = probabilities(scores, 1e-320)  # a denormal number: the scores divided by it are infinite
    assert torch.equal(cold.argmax(dim=1), scores.argmax(dim=1)) and cold.amax(dim=1).eq(1).all()


def test_frequencies_are_the_probabilities() -> None:
    """Chi-squared, 12 degrees of freedom: above 32.9 once in a thousand seeds. A wrong distribution is far above."""
    chance = probabilities(torch.randn(1, SIZE), 0.8)
    count = 20_000
    uniform = torch.rand(count, dtype=torch.float64)
    found = torch.bincount(draw(chance.expand(count, -1), uniform), minlength=SIZE)

    def distance(chance: torch.Tensor) -> float:
        expected = count * chance.squeeze(0)
        return float(((found - expected) ** 2 / expected).sum())

    assert distance(chance) < 32.9
    assert distance(0.9 * chance + 0.1 / SIZE) > 100  # as if one sample in ten were drawn from all alike


def test_what_has_no_probability_is_never_drawn() -> None:
    chance = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.29, 0.31, 1 - 2.0**-53], dtype=torch.float64)  # the last is the largest there is
    assert draw(chance.expand(4, -1), uniform).tolist() == [1, 1, 3, 3]
    thirds = torch.full((1, 3), 1 / 3, dtype=torch.float64) * torch.tensor([1, 1, 0])
    assert draw(thirds, uniform[3:]).tolist() == [1]


@torch.no_grad()
def recomputed(model: DecoderOnly, prompt: list[int], length: int) -> list[int]:
    """The likeliest token each time, from all tokens so far, or as many as the context holds."""
    text = list(prompt)
    for _ in range(length):
        text.append(int(model(torch.tensor([text[-model.context :]]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_greedy_text_is_the_argmax_of_the_whole_sequence(positions: str, heads: str) -> None:
    """Prompts of all lengths together, with the context and far beyond it."""
    model = talkative(positions=positions, **HEADS[heads])
    prompts = [*PROMPTS, list(range(CONTEXT)), list(range(CONTEXT + 3))]
    said = generate(model, prompts, 12, temperature=0)
    assert said == [recomputed(model, prompt, 12) for prompt in prompts]
    assert len(set(map(tuple, said))) > 1
    assert generate(model, prompts[-1:], 5, temperature=0) == [said[-1][:5]]
    assert generate(model, torch.tensor([prompts[0]]), 1, temperature=0) == [said[0][:1]]
    another = talkative(positions=positions, **HEADS[heads])  # the comparison tells models apart
    assert said != [recomputed(another, prompt, 12) for prompt in prompts]


def test_each_token_is_fed_once_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = talkative()
    fed: list[int] = []
    read = model._read
    monkeypatch.setattr(model, "_read", lambda rows, cache=None: (fed.append(len(rows.ids)), read(rows, cache))[1])
    generate(model, PROMPTS[:2], 4, temperature=0)
    assert fed == [2, 2, 2, 2, 1, 1]  # both to their ends: the prompt of one token has said all after four


def test_a_text_ends_with_the_end_token() -> None:
    model = talkative()
    free = generate(model, PROMPTS, 12, seed=4)
    for end in range(SIZE):
        cut = [said[: said.index(end) + 1] if end in said else said for said in free]
        assert generate(model, PROMPTS, 12, seed=4, end_id=end) == cut


def test_the_seed_repeats_a_text_whatever_stands_beside_it() -> None:
    model = talkative()
    said = generate(model, PROMPTS, 9, seed=7, temperature=2.0, top_k=5, top_p=0.9)
    torch.manual_seed(1)
    assert generate(model, PROMPTS, 9, seed=7, temperature=2.0, top_k=5, top_p=0.9) == said
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 9, seed=7 + row, temperature=2.0, top_k=5, top_p=0.9) == [said[row]]
    same = generate(model, [[1]] * 8, 9, seed=7)
    assert len(set(map(tuple, same))) == 8  # rows differ, though their prompts do not
    assert generate(model, PROMPTS, 9, seed=-1) != generate(model, PROMPTS, 9, seed=2**64)
    torch.manual_seed(1)
    drawn = generate(model, PROMPTS, 9)
    assert generate(model, PROMPTS, 9) != drawn
    torch.manual_seed(1)
    assert generate(model, PROMPTS, 9) == drawn


def test_samples_follow_the_model() -> None:
    """The second token too, whose probabilities come by way of the cache. Chi-squared as above, 168 degrees: 231."""
    model = talkative()
    with torch.no_grad():
        first = model(torch.tensor([[2]]))[:, -1].softmax(dim=1).squeeze(0)
        pairs = torch.stack((torch.full((SIZE,), 2), torch.arange(SIZE)), dim=1)
        both = first[:, None] * model(pairs)[:, -1].softmax(dim=1)
    count = 20_000
    said = torch.tensor(generate(model, [[2]] * count, 2))
    found = torch.bincount(said[:, 0] * SIZE + said[:, 1], minlength=SIZE**2)
    expected = count * both.flatten()
    large = expected > 5
    distance = float(((found - expected) ** 2 / expected)[large].sum())
    assert int(large.sum()) > 20 and distance < 231
    uneven = expected.roll(1)
    assert float(((found - uneven) ** 2 / uneven)[large & (uneven > 5)].sum()) > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length must be a whole number of tokens, 1 or more, got 0"),
        ({"length": 2.5}, "length must be a whole number of tokens, 1 or more, got 2.5"),
        ({"temperature": -0.1}, "temperature must be 0, for the likeliest token, or more, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0, for the likeliest token, or more, got nan"),
        ({"top_k": -1}, "top_k must be a whole number of tokens, or 0 for all, got -1"),
        ({"top_p": 1.1}, "top_p must be 0 to 1, got 1.1"),
        ({"top_p": -0.1}, "top_p must be 0 to 1, got -0.1"),
        ({"prompts": [[1], []]}, "a prompt must have at least one token, got an empty one"),
        ({"prompts": [[1, SIZE]]}, "a token of a prompt must be 0 to 12, got 13"),
        ({"prompts": [1, 2]}, "prompts must be lists of token ids, one a text, got 1; put it in a list"),
        ({"prompts": [[-1]]}, "a token of a prompt must be 0 to 12, got -1"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        generate(talkative(), **{"prompts": [[1]], "length": 3, **changes})
    assert "\n" not in str(caught.value)


def test_no_prompts_have_no_text() -> None:
    assert generate(talkative(), [], 3) == []


def test_a_model_that_was_lost_says_so() -> None:
    model = talkative()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    for temperature in 0, 1:
        with pytest.raises(InputError, match="the model's scores are infinite or NaN"):
            generate(model, [[1]], 3, temperature=temperature)

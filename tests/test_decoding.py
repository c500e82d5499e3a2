"""Greedy decoding and beam search against models whose answers are known, and against teacher forcing."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from calcformer.data import Examples, Vocabulary
from calcformer.decoding import BLOCK, MANY, beam_search, best_token, decode, greedy_decode, log_probability
from calcformer.errors import InputError
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.tasks.arithmetic.expressions import EXPRESSION
from calcformer.tasks.arithmetic.formula_tensors import FORMULA, FormulaForm, generate_formulas
from calcformer.tasks.arithmetic.formulas import FormulaTask
from calcformer.training import measure_answers

LETTERS = Vocabulary(("a", "b", "<bos>", "<eos>"), "<bos>", "<eos>")
A, B, END = 0, 1, 3
Chances = Callable[[int, tuple[int, ...]], list[float]]

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


class Told:
    """The cache of a `Script`: the problem of each row and the tokens it was fed."""

    def __init__(self, problems: torch.Tensor) -> None:
        self.problems = problems
        self.tokens = torch.empty(len(problems), 0, dtype=torch.long)

    def select(self, index: torch.Tensor) -> None:
        self.problems, self.tokens = self.problems[index], self.tokens[index]


class Script(torch.nn.Module):
    """A model that is told its probabilities: `chances(r, said)` for a source whose first token is r. Counts rows."""

    def __init__(self, chances: Chances) -> None:
        super().__init__()
        self.chances = chances
        self.encoded = 0
        self.fed: list[int] = []

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        return source[:, 0]

    def start(self, memory: torch.Tensor, length: int) -> Told:
        return Told(memory)

    def next(self, token: torch.Tensor, cache: Told) -> torch.Tensor:
        self.fed.append(len(token))
        cache.tokens = torch.cat((cache.tokens, token[:, None]), dim=1)
        return torch.tensor(
            [
                self.chances(problem, tuple(said[1:]))
                for problem, said in zip(cache.problems.tolist(), cache.tokens.tolist())
            ]
        ).log()


def script(chances: Chances) -> Any:
    return Script(chances)


def saying(answers: list[list[int]]) -> Any:
    """Says answer r to source r."""
    return script(lambda problem, said: [float(token == answers[problem][len(said)]) for token in range(16)])


def noise(problem: int, said: tuple[int, ...]) -> list[float]:
    """Probabilities of a, b, <bos> and <eos> that differ for every problem and prefix."""
    generator = torch.Generator().manual_seed(hash((problem, *said)) % 2**40)
    return torch.randn(4, generator=generator, dtype=torch.float64).softmax(dim=0).tolist()


@pytest.fixture
def model() -> EncoderDecoder:
    """A real model in float64, where rounding is no excuse; its random weights make answers of different lengths."""
    torch.manual_seed(7)
    model = EncoderDecoder(16, 11, 7, width=16, heads=2, hidden=16, pad_id=FORMULA.pad_id).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 1.0 if "embedding" in name else 0.5 if "cross_attention.output" in name else 0.1
            torch.nn.init.normal_(parameter, std=std)
    torch.nn.init.constant_(model.prediction.bias[FORMULA.eos_id], 0.2)
    return model


def formulas(count: int) -> Examples:
    return generate_formulas(FormulaForm(), count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("vocabulary", "eos", "fill"), [(FORMULA, 13, 14), (EXPRESSION, 15, 15)], ids=["formula", "expression"]
)
def test_rows_stop_at_their_end_token(vocabulary: Vocabulary, eos: int, fill: int) -> None:
    model = saying([[3, eos, 7, 7, 7], [4, 5, 6, eos, 7], [eos, 1, 1, 1, 1]])
    said = greedy_decode(model, torch.tensor([[1], [0], [2]]), 5, vocabulary)
    assert said.tolist() == [[4, 5, 6, eos, fill], [3, eos, fill, fill, fill], [eos, fill, fill, fill, fill]]
    assert model.encoded == 1
    assert model.fed == [3, 2, 1, 1]  # finished rows are left out; nothing more is said after the longest answer


def test_a_few_finished_rows_stay_in_the_work() -> None:
    model = saying([[13, 1, 2, 13, 5], [3, 4, 5, 6, 13]])  # what is said behind the end token is forgotten
    said = greedy_decode(model, torch.tensor([[0]] + [[1]] * 9), 5, FORMULA)
    assert said.tolist() == [[13, 14, 14, 14, 14]] + [[3, 4, 5, 6, 13]] * 9
    assert model.fed == [10] * 5


@pytest.mark.parametrize("width", [1, 2])
def test_a_row_that_never_ends_is_cut_at_the_length(width: int) -> None:
    model = saying([[3, 4, 5, 6, 7]])
    assert decode(model, torch.tensor([[0]]), 3, FORMULA, width).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("width", [1, 2])
def test_padding_is_never_said(width: int) -> None:
    model = script(
        lambda problem, said: [0.3 if token == 4 else 0.5 if token == 14 else 0.2 / 14 for token in range(16)]
    )
    assert decode(model, torch.tensor([[0]]), 3, FORMULA, width).tolist() == [[4, 4, 4]]


@torch.no_grad()
def test_decoding_agrees_with_the_full_forward_pass_and_ignores_padding(model: EncoderDecoder) -> None:
    source = formulas(31).source
    said = greedy_decode(model, source, 6, FORMULA)
    target = torch.cat((torch.full((31, 1), FORMULA.bos_id), said), dim=1)
    scores = model(source, target[:, :-1])
    scores[:, :, 14] = -torch.inf
    real = said.ne(14)
    assert torch.equal(scores.argmax(dim=-1)[real], said[real])
    assert len(said.unique(dim=0)) > 5 and len(real.sum(dim=1).unique()) > 3
    padded = torch.cat((source, torch.full((31, 3), 14)), dim=1)
    assert torch.equal(greedy_decode(model, padded, 6, FORMULA), said)


def test_a_beam_of_two_finds_what_greedy_decoding_misses() -> None:
    # a is likelier than b, but nothing likely follows it: ab .6 * .4, b .4 * .9.
    table = {
        (): [0.6, 0.4, 0.0, 0.0],
        (A,): [0.3, 0.4, 0.0, 0.3],
        (A, B): [0.0, 0.0, 0.0, 1.0],
        (A, A): [0.0, 0.0, 0.0, 1.0],
        (B,): [0.1, 0.0, 0.0, 0.9],
    }
    model = script(lambda problem, said: table[said])
    source = torch.tensor([[0]])
    assert greedy_decode(model, source, 3, LETTERS).tolist() == [[A, B, END]]
    tokens, scores = beam_search(model, source, 3, LETTERS, 2)
    assert tokens.tolist() == [[[B, END, END], [A, B, END]]]
    assert scores.exp().tolist() == [pytest.approx([0.36, 0.24])]
    assert decode(model, source, 3, LETTERS, beam=2).tolist() == [[B, END, END]]


def test_the_length_penalty_by_hand() -> None:
    # b ends at once; a goes on to aab, which is less probable and has four tokens instead of two.
    table = {
        (): [0.5, 0.5, 0.0, 0.0],
        (A,): [0.9, 0.0, 0.0, 0.1],
        (A, A): [0.0, 0.9, 0.0, 0.1],
        (B,): [0.0, 0.0, 0.0, 1.0],
        (A, A, B): [0.0, 0.0, 0.0, 1.0],
    }
    model = script(lambda problem, said: table[said])
    short, long = [B, END, END, END], [A, A, B, END]
    plain = beam_search(model, torch.tensor([[0]]), 4, LETTERS, 2)
    assert plain[0].tolist() == [[short, long]] and plain[1].exp().tolist() == [pytest.approx([0.5, 0.405])]
    # log .5 / (7 / 6) = -.594, log .405 / (9 / 6) = -.603; with alpha 2 they are -.509 and -.402.
    tokens, scores = beam_search(model, torch.tensor([[0]]), 4, LETTERS, 2, length_penalty=1.0)
    assert tokens.tolist() == [[short, long]]
    assert scores.tolist() == [pytest.approx([math.log(0.5) * 6 / 7, math.log(0.405) * 6 / 9])]
    tokens, scores = beam_search(model, torch.tensor([[0]]), 4, LETTERS, 2, length_penalty=2.0)
    assert tokens.tolist() == [[long, short]]
    assert scores.tolist() == [pytest.approx([math.log(0.405) * 36 / 81, math.log(0.5) * 36 / 49])]


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_a_wide_beam_finds_every_answer(alpha: float) -> None:
    model, source, length = script(noise), torch.tensor([[5], [0], [11]]), 4
    ended = [(*body, END) for count in range(length) for body in itertools.product((A, B, 2), repeat=count)]
    every = ended + list(itertools.product((A, B, 2), repeat=length))  # those that were cut
    tokens, scores = beam_search(model, source, length, LETTERS, len(every) + 3, alpha)
    for row, problem in enumerate(source[:, 0].tolist()):
        exact = {
            answer: sum(math.log(noise(problem, answer[:place])[token]) for place, token in enumerate(answer))
            / ((5 + len(answer)) / 6) ** alpha
            for answer in every
        }
        best = sorted(exact, key=exact.__getitem__, reverse=True)
        assert [tuple(said) for said in tokens[row, : len(every)].tolist()] == [
            answer + (END,) * (length - len(answer)) for answer in best
        ]
        assert scores[row, : len(every)].tolist() == pytest.approx([exact[answer] for answer in best], abs=1e-6)
    assert scores[:, len(every) :].eq(-torch.inf).all() and tokens[:, len(every) :].eq(END).all()


@pytest.mark.parametrize(("alpha", "calls"), [(0.0, 2), (1.0, 5)])
def test_a_beam_stops_when_nothing_better_can_come(alpha: float, calls: int) -> None:
    # After two tokens <eos> (.98) and a<eos> (.005) are finished, and aa (.01 * .25) runs on. Of plain probability it
    # can only lose. With the penalty a<eos> has log(.005) / (7 / 6) = -4.54; aa could still come to
    # log(.0025) / (13 / 6) = -2.77, aaaaa only to log(.01 * .25^4) / (13 / 6) = -4.69.
    model = script(lambda problem, said: [0.01, 0.01, 0.0, 0.98] if not said else [0.25, 0.25, 0.0, 0.5])
    tokens, scores = beam_search(model, torch.tensor([[0]]), 8, LETTERS, 2, alpha)
    assert len(model.fed) == calls
    every, exact = beam_search(model, torch.tensor([[0]]), 8, LETTERS, 512, alpha)
    assert torch.equal(tokens, every[:, :2]) and torch.equal(scores, exact[:, :2])


def test_equal_answers_come_in_the_order_of_their_tokens() -> None:
    model = script(lambda problem, said: [0.25] * 4)
    tokens, scores = beam_search(model, torch.zeros(2, 1, dtype=torch.long), 2, LETTERS, 4)
    assert tokens.tolist() == [[[END, END], [A, A], [A, B], [A, 2]]] * 2
    assert scores.exp().tolist() == [pytest.approx([0.25, 0.0625, 0.0625, 0.0625])] * 2


@torch.no_grad()
def test_beam_search_of_a_real_model(model: EncoderDecoder) -> None:
    source = formulas(31).source
    greedy = greedy_decode(model, source, 6, FORMULA)
    tokens, scores = beam_search(model, source, 6, FORMULA, 1)
    assert torch.equal(tokens[:, 0], greedy)
    tokens, scores = beam_search(model, source, 6, FORMULA, 4)
    assert scores.diff(dim=1).le(0).all() and not torch.equal(tokens[:, 0], greedy)
    assert (scores[:, 0] > log_probability(model, source, greedy, FORMULA) - 1e-12).all()
    begin = torch.full((31, 1), FORMULA.bos_id)
    for place in range(4):  # what the model gives to those tokens when they are fed to it all at once
        said, its_scores = tokens[:, place], scores[:, place]
        log_p = model(source, torch.cat((begin, said[:, :-1]), dim=1)).log_softmax(dim=-1)
        expected = log_p.gather(2, said[..., None]).squeeze(2).where(said != FORMULA.pad_id, 0.0).sum(dim=1)
        assert torch.allclose(its_scores, expected, rtol=0, atol=1e-12)
        assert torch.allclose(log_probability(model, source, said, FORMULA), expected, rtol=0, atol=1e-12)
    for row in range(31):
        one, its_scores = beam_search(model, source[row : row + 1], 6, FORMULA, 4)
        assert torch.equal(one[0], tokens[row]) and torch.allclose(its_scores[0], scores[row], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 3])
def test_any_number_of_problems_comes_back_in_order(model: EncoderDecoder, beam: int) -> None:
    source = formulas(31).source
    whole = decode(model, source, 6, FORMULA, beam)
    lengths: list[int] = []
    parts = decode(model, source, 6, FORMULA, beam, batch_size=10, advance=lengths.append)
    assert torch.equal(parts, whole) and lengths == ([10, 10, 10, 1] if beam == 1 else [3] * 10 + [1])
    for row in range(31):
        said = (
            greedy_decode(model, source[row : row + 1], 6, FORMULA)[0]
            if beam == 1
            else beam_search(model, source[row : row + 1], 6, FORMULA, beam)[0][0, 0]
        )
        assert torch.equal(whole[row], said)
    assert decode(model, source[:0], 6, FORMULA, beam).shape == (0, 6)


@pytest.mark.parametrize(
    ("width", "alpha", "match"),
    [(0, 0.0, "beam width must be 1 to 100000, got 0"), (2, -0.5, "length_penalty must be 0 or more, got -0.5")],
)
def test_wrong_beams_are_refused(width: int, alpha: float, match: str) -> None:
    with pytest.raises(InputError, match=match):
        beam_search(script(noise), torch.tensor([[0]]), 3, LETTERS, width, alpha)


def test_exact_match_counts_whole_answers() -> None:
    task = FormulaTask()
    examples = formulas(4)
    examples.source[:, 0] = torch.arange(4)
    answers = examples.labels.tolist()
    answers[1][0] = 3 if answers[1][0] != 3 else 4  # one wrong token
    answers[2][-2:] = [13, 13]  # an end token at another place, or twice
    answers[2][0] = 13
    answers = [[13 if token == 14 else token for token in answer] for answer in answers]
    model = saying(answers)
    assert measure_answers(model, examples, task)["exact_match"] == 0.5
    assert measure_answers(model, examples, task, batch_size=3)["exact_match"] == 0.5


@pytest.mark.parametrize("size", [7, MANY, MANY + 1, MANY + BLOCK - 1, 1009])
def test_the_best_token_is_the_first_of_the_highest(size: int) -> None:
    scores = torch.randn(3, 211, size).mul_(4).round_()  # of which many are equal
    scores[0, :5, size - 1] = 1e9
    scores[0, 5, torch.randperm(size)[:3]] = math.nan
    scores[0, 6, size - 1] = math.nan
    scores[0, 7] = -math.inf
    assert torch.equal(best_token(scores), scores.argmax(dim=-1))
    assert torch.equal(best_token(scores[:, ::2]), scores[:, ::2].argmax(dim=-1))
    assert best_token(scores[:, :0]).shape == (3, 0)

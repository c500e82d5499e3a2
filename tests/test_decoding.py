"""Greedy decoding against a model whose answers are known."""

import pytest
import torch

from calcformer.data import EXPRESSION, FORMULA, FormulaForm, FormulaTask, Vocabulary, generate_formulas
from calcformer.decoding import greedy_decode
from calcformer.model import EncoderDecoder
from calcformer.model.layers import Memory
from calcformer.model.rows import Rows
from calcformer.training import exact_match


@pytest.fixture(autouse=True)
def as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as users on a CPU have them, not in Triton's interpreter: they have tests of their own."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)


class Script(EncoderDecoder):
    """Says fixed tokens: row r of `answers` to a source whose first token is r. Counts its calls."""

    def __init__(self, answers: list[list[int]], pad_id: int | None) -> None:
        super().__init__(16, 9, 9, width=4, heads=1, encoder_layers=0, decoder_layers=1, hidden=4, pad_id=pad_id)
        self.answers = torch.tensor(answers)
        self.encoded = self.decoded = 0

    def encode(self, source: torch.Tensor) -> Memory:
        self.encoded += 1
        return Memory(self.answers[source[:, 0]], Rows(source, None))

    def decode(self, target: torch.Tensor, memory: Memory) -> torch.Tensor:
        self.decoded += 1
        length, answers = target.shape[1], memory.states
        assert torch.equal(target[:, 1:], torch.where(self.ended(answers, length - 1), target[:, 1:],
                                                      answers[:, :length - 1]))
        return torch.nn.functional.one_hot(answers[:, :length], 16).float()

    @staticmethod
    def ended(answers: torch.Tensor, length: int) -> torch.Tensor:
        ends = (answers[:, :length] == 13) | (answers[:, :length] == 15)
        return (ends.cumsum(dim=1) - ends.long()) > 0


@pytest.mark.parametrize(("vocabulary", "eos", "fill"), [(FORMULA, 13, 14), (EXPRESSION, 15, 15)],
                         ids=["formula", "expression"])
def test_rows_stop_at_their_end_token(vocabulary: Vocabulary, eos: int, fill: int) -> None:
    model = Script([[3, eos, 7, 7, 7], [4, 5, 6, eos, 7], [eos, 1, 1, 1, 1]], vocabulary.pad_id)
    said = greedy_decode(model, torch.tensor([[1], [0], [2]]), 5, vocabulary)
    assert said.tolist() == [[4, 5, 6, eos, fill], [3, eos, fill, fill, fill], [eos, fill, fill, fill, fill]]
    assert (model.encoded, model.decoded) == (1, 4)  # encoded once; nothing more is said after the longest answer


def test_a_row_that_never_ends_is_cut_at_the_length() -> None:
    model = Script([[3, 4, 5, 6, 7]], FORMULA.pad_id)
    assert greedy_decode(model, torch.tensor([[0]]), 3, FORMULA).tolist() == [[3, 4, 5]]


@torch.no_grad()
def test_decoding_agrees_with_the_full_forward_pass_and_ignores_padding() -> None:
    torch.manual_seed(1)
    model = EncoderDecoder(16, 11, 7, width=16, heads=2, hidden=16, pad_id=FORMULA.pad_id).eval()
    source = generate_formulas(FormulaForm(), 31, torch.Generator().manual_seed(0)).source
    said = greedy_decode(model, source, 6, FORMULA)
    target = torch.cat((torch.full((31, 1), FORMULA.bos_id), said), dim=1)
    best = model(source, target[:, :-1]).argmax(dim=-1)
    real = said.ne(14)
    assert torch.equal(best[real], said[real]) and len(said[real]) > 31
    padded = torch.cat((source, torch.full((31, 3), 14)), dim=1)
    assert torch.equal(greedy_decode(model, padded, 6, FORMULA), said)


def test_exact_match_counts_whole_answers() -> None:
    task = FormulaTask()
    examples = generate_formulas(FormulaForm(), 4, torch.Generator().manual_seed(0))
    examples.source[:, 0] = torch.arange(4)
    answers = examples.labels.tolist()
    answers[1][0] = 3 if answers[1][0] != 3 else 4  # one wrong token
    answers[2][-2:] = [13, 13]  # an end token at another place, or twice
    answers[2][0] = 13
    model = Script(answers, FORMULA.pad_id)
    assert exact_match(model, examples, task) == 0.5
    assert exact_match(model, examples, task, batch_size=3) == 0.5

"""Expressions: all of them, written right, split without overlap."""

import pytest
import torch

from calcformer.tasks.arithmetic.expressions import (
    EXPRESSION,
    EXPRESSIONS,
    ExpressionTask,
    encode_expressions,
    expression_text,
    generate_expressions,
    operands,
    tokenize,
)


def rows(ids: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


def test_expression_text_is_that_of_the_report() -> None:
    assert expression_text(-30, -34, "subtract") == ("BOS NEGATIVE 30 subtract NEGATIVE 34 EOS", "BOS POSITIVE 04 EOS")
    assert expression_text(4, -11, "add") == ("BOS POSITIVE 04 add NEGATIVE 11 EOS", "BOS NEGATIVE 07 EOS")
    assert expression_text(5, 5, "subtract")[1] == "BOS POSITIVE 00 EOS"


def test_tensors_agree_with_text_for_every_expression() -> None:
    index = torch.arange(EXPRESSIONS)
    examples = encode_expressions(index)
    assert (examples.source.shape, examples.target.shape) == ((19_602, 9), (19_602, 5))
    a, b, add = operands(index)
    for place in range(0, EXPRESSIONS, 7):
        question, answer = expression_text(int(a[place]), int(b[place]), "add" if add[place] else "subtract")
        assert EXPRESSION.encode(tokenize(question)) == examples.source[place].tolist()
        assert EXPRESSION.encode(tokenize(answer)) == examples.target[place].tolist()
    assert len(set(rows(examples.source))) == EXPRESSIONS
    assert (int(a.min()), int(a.max()), int(b.min()), int(b.max())) == (-49, 49, -49, 49)


def test_default_split_holds_every_expression_once() -> None:
    train, valid = ExpressionTask().split()
    assert (len(train), len(valid)) == (4_602, 15_000)
    assert len(set(rows(train.source)) | set(rows(valid.source))) == EXPRESSIONS
    other, _ = ExpressionTask(seed=1).split()
    assert set(rows(other.source)) != set(rows(train.source))


def test_leaky_split_leaks_about_as_much_as_the_report_found() -> None:
    leaks = []
    for seed in range(5):
        train, valid = ExpressionTask(4_000, 1_000, seed, leaky_split=True).split()
        assert (len(train), len(valid)) == (4_000, 1_000)
        known = set(rows(train.source))
        leaks.append(sum(row in known for row in rows(valid.source)) / len(valid))
    # 1 - (1 - 1/19602)^4000 = 0.185; the reported 21 % stand for about 4,600 of 5,000 in training.
    assert sum(leaks) / 5 == pytest.approx(0.185, abs=0.02)


def test_too_large_split_is_refused() -> None:
    with pytest.raises(ValueError, match="19602 expressions.* 1 too many"):
        ExpressionTask(train_size=4_603).split()


def test_generated_sides_never_meet() -> None:
    def draw(held_out: bool, seed: int) -> set[tuple[int, ...]]:
        return set(rows(generate_expressions(60_000, torch.Generator().manual_seed(seed), held_out, 0.25).source))

    train, held_out = draw(False, 0), draw(True, 1)
    assert not train & held_out
    assert len(held_out) / (len(train) + len(held_out)) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("text", ["NEGATIVE 30 subtract NEGATIVE 34", "BOS NEGATIVE 30 subtract NEGATIVE 34 EOS"])
def test_questions_with_and_without_marks(text: str) -> None:
    assert ExpressionTask().read_question(text) == (-30, -34, False)
    examples = ExpressionTask().write(torch.tensor([-30]), torch.tensor([-34]), torch.tensor([False]))
    assert examples.source.tolist() == [[14, 11, 3, 0, 13, 11, 3, 4, 15]]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("649+864", "is not a word this run knows"),
        ("POSITIVE 4 add POSITIVE 11", "not of the form"),
        ("POSITIVE 50 add POSITIVE 11", "50 is larger"),
        ("NEGATIVE 00 add POSITIVE 11", "zero is written POSITIVE 00"),
        ("", "not of the form"),
        ("POSITIVE 04 add", "not of the form"),
        ("\0", "is not a word"),
        ("NEGATIVE " * 5_000, r"expression 'NEGATIVE NEG[A-Z ]*'... .44999 characters. is not of the form"),
        ("9" * 100_000, r"'9{60}'... .100000 characters. is not of the form"),
    ],
)
def test_questions_that_cannot_be_asked(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        ExpressionTask().read_question(text)
    assert "\n" not in str(caught.value)


def test_answers_read_as_words() -> None:
    assert ExpressionTask().decode_answer([11, 0, 7, 15]) == "NEGATIVE 07"
    assert ExpressionTask().decode_answer([15, 15, 15, 15]) == ""

"""The vocabularies."""

import pytest

from calcformer.data import Vocabulary
from calcformer.tasks.arithmetic.expressions import EXPRESSION, tokenize
from calcformer.tasks.arithmetic.formula_tensors import FORMULA


def test_formula_vocabulary_encodes_the_seed_example() -> None:
    assert len(FORMULA) == 16
    assert FORMULA.encode("649+864") + [FORMULA.eos_id] == [8, 6, 11, 0, 10, 8, 6, 13]
    assert (FORMULA.bos_id, FORMULA.eos_id, FORMULA.pad_id) == (12, 13, 14)


def test_expression_vocabulary_encodes_the_course_example() -> None:
    tokens = tokenize("BOS POSITIVE 0333 add POSITIVE 0696 EOS")
    assert EXPRESSION.encode(tokens) == [14, 10, 0, 3, 3, 3, 12, 10, 0, 6, 9, 6, 15]
    assert len(EXPRESSION) == 16
    assert EXPRESSION.pad_id is None


@pytest.mark.parametrize("vocabulary", [FORMULA, EXPRESSION], ids=["formula", "expression"])
def test_decode_reverses_encode(vocabulary: Vocabulary) -> None:
    assert vocabulary.decode(vocabulary.encode(vocabulary.tokens)) == list(vocabulary.tokens)


def test_decode_until_eos_drops_what_is_not_answer() -> None:
    assert FORMULA.decode_until_eos([12, 3, 7, 13, 14, 5]) == ["1", "5"]


def test_unknown_token_and_id_are_refused() -> None:
    with pytest.raises(ValueError, match="'x' is not a token"):
        FORMULA.encode("1x")
    with pytest.raises(ValueError, match=r"must be in 0\.\.15, got 16"):
        FORMULA.decode([16])


def test_repeated_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="must differ"):
        Vocabulary(("a", "b", "a"), "a", "b")

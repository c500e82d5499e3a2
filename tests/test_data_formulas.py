"""Formulas: the seed's stream, its flaws, the disjoint split, and text against tensors."""

import random

import pytest
import torch

from calcformer.data import Examples
from calcformer.data.examples import held_out_side
from calcformer.tasks.arithmetic.formula_tensors import FORMULA, FormulaForm, draw_operands, generate_formulas
from calcformer.tasks.arithmetic.formulas import FormulaTask, random_formula


def rows(ids: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


def texts(examples: Examples) -> list[tuple[str, str]]:
    """Read questions and answers back from tensors, one by one."""
    return [
        ("".join(FORMULA.decode_until_eos(source)), "".join(FORMULA.decode_until_eos(target)))
        for source, target in zip(examples.source.tolist(), examples.target.tolist())
    ]


def stream(seed: int, count: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [random_formula(rng) for _ in range(count)]


def test_stream_begins_as_the_seed_reports() -> None:
    assert stream(123_456, 5) == [
        ("649+864", "1513"),
        ("-940-819", "-1759"),
        ("954-2", "952"),
        ("-896-274", "-1170"),
        ("-762-954", "-1716"),
    ]


def test_seed_flaws_are_those_reported() -> None:
    train, valid = stream(123_456, 10_000), stream(123_457, 5_000)
    assert sum(len(answer) + 1 > 5 for _, answer in train) / 10_000 == pytest.approx(0.129, abs=5e-4)
    assert sum(len(question) + 1 > 9 for question, _ in train) / 10_000 == pytest.approx(0.0009)
    known = set(train)
    assert sum(formula in known for formula in valid) / 5_000 == pytest.approx(0.0026)


def test_default_split_is_the_stream_uncut_and_disjoint() -> None:
    train, valid = FormulaTask().split()
    assert (train.source.shape, train.target.shape) == ((10_000, 11), (10_000, 7))
    assert texts(train) == stream(123_456, 10_000)
    known = set(texts(train))
    assert len(valid) == 5_000
    assert not known & set(texts(valid))
    assert texts(valid) == [formula for formula in stream(123_457, 5_100) if formula not in known][:5_000]


def test_every_sequence_ends_and_then_is_padding() -> None:
    for ids in (part for examples in FormulaTask().split() for part in (examples.source, examples.target)):
        ends = ids == FORMULA.eos_id
        assert (ends.sum(dim=1) == 1).all()
        after = ends.cumsum(dim=1) - ends.long() > 0
        assert torch.equal(ids.eq(14), after)


def test_leaky_truncated_split_has_the_seed_flaws() -> None:
    train, valid = FormulaTask(FormulaForm(truncate=True), leaky_split=True).split()
    assert (train.source.shape[1], train.target.shape[1]) == (9, 6)
    assert 1 - (train.target == FORMULA.eos_id).any(dim=1).double().mean().item() == pytest.approx(0.1291)
    assert texts(FormulaTask(leaky_split=True).split()[1]) == stream(123_457, 5_000)


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (FormulaTask(FormulaForm(1)), "cannot be held out"),
        (FormulaTask(FormulaForm(0), train_size=1, valid_size=12), "12 formulas, 1 of them in training: 12 cannot"),
    ],
)
def test_too_large_split_is_refused(task: FormulaTask, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        task.split()


def test_smallest_split_that_is_possible() -> None:
    train, valid = FormulaTask(FormulaForm(0), train_size=1, valid_size=11).split()
    assert len(valid) == 11
    assert not set(rows(train.source)) & set(rows(valid.source))


@pytest.mark.parametrize("complexity", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_tensors_agree_with_text(complexity: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(complexity)
    examples = generate_formulas(FormulaForm(complexity, signed), 307, generator)
    task = FormulaTask(FormulaForm(complexity, signed))
    assert (examples.source.shape[1], examples.target.shape[1]) == (task.source_length, task.target_length)
    limit = 10**complexity
    for question, answer in texts(examples):
        split = max(question.rfind("+"), question.rfind("-"))
        a, b = int(question[:split]), int(question[split + 1 :])
        assert answer == str(a + b if question[split] == "+" else a - b)
        assert question == f"{a}{question[split]}{b}"
        assert (-limit if signed else 0) <= a <= limit and 0 <= b <= limit


def test_longest_formula_is_not_cut() -> None:
    examples = FormulaForm().encode(torch.tensor([-1000]), torch.tensor([1000]), torch.tensor([False]))
    assert texts(examples) == [("-1000-1000", "-2000")]
    assert FORMULA.eos_id in examples.source[0] and FORMULA.eos_id in examples.target[0]


def test_generated_sides_never_meet_and_have_their_share() -> None:
    def draw(held_out: bool | None, seed: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return rows(generate_formulas(FormulaForm(1), 4_001, generator, "uniform", held_out, 0.3).source)

    train, held_out = set(draw(False, 0)), set(draw(True, 1))
    assert not train & held_out
    assert train | held_out == set(draw(None, 2) + draw(None, 3)) and len(train | held_out) == 21 * 11 * 2
    assert len(held_out) / 462 == pytest.approx(0.3, abs=0.06)


def test_generation_repeats_with_its_seed_and_counts_exactly() -> None:
    first, second = (
        generate_formulas(FormulaForm(), 997, torch.Generator().manual_seed(5), held_out=False) for _ in range(2)
    )
    assert torch.equal(first.source, second.source) and len(first) == 997
    assert len(generate_formulas(FormulaForm(), 0, torch.Generator())) == 0


@pytest.mark.parametrize(
    ("text", "problem", "ids"),
    [
        ("649+864", (649, 864, True), [8, 6, 11, 0, 10, 8, 6, 13]),
        (" 007 - 1 ", (7, 1, False), [9, 1, 3, 13]),
        ("-1000-1000", (-1000, 1000, False), [1, 3, 2, 2, 2, 1, 3, 2, 2, 2, 13]),
        ("0" * 5_000 + "7-1", (7, 1, False), [9, 1, 3, 13]),
        ("- 7\t+ 1", (-7, 1, True), [1, 9, 0, 3, 13]),
        ("-0+5", (0, 5, True), [2, 0, 7, 13]),
    ],
)
def test_questions_that_can_be_asked(text: str, problem: tuple[int, int, bool], ids: list[int]) -> None:
    assert FormulaTask().read_question(text) == problem
    a, b, plus = torch.tensor([problem]).unbind(1)
    assert FormulaTask().write(a, b, plus.bool()).trim(FORMULA.pad_id).source.tolist() == [ids]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("12+x7", "'x' at place 4"),
        ("12", "not of the form"),
        ("", "not of the form"),
        ("1+-2", "not of the form"),
        ("1+1001", "'1001' is more than 1000, the largest number this run was trained for"),
        ("٣+1", "not a digit"),
        ("1+2+3", "not of the form"),
        ("1 0 + 2", "'1 0 [+] 2' is not of the form"),
        ("--5+3", "not of the form"),
        ("1+\0", r"'\\x00' at place 3 is not a digit"),
        ("9" * 100_000 + "+1", "'9{60}'... .100000 characters. is more than 1000"),
    ],
)
def test_questions_that_cannot_be_asked(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        FormulaTask().read_question(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_unsigned_run_refuses_a_negative_number() -> None:
    with pytest.raises(ValueError, match="without negative numbers"):
        FormulaTask(FormulaForm(signed=False)).read_question("-3+4")
    assert FormulaTask(FormulaForm(signed=False)).read_question("-0+4") == (0, 4, True)


def test_trim_cuts_only_padding() -> None:
    examples = FormulaForm().encode(torch.tensor([7, -52]), torch.tensor([8, 3]), torch.tensor([True, True]))
    trimmed = examples.trim(FORMULA.pad_id)
    assert (trimmed.source.shape, trimmed.target.shape) == ((2, 6), (2, 5))
    assert texts(trimmed) == texts(examples) == [("7+8", "15"), ("-52+3", "-49")]


@pytest.mark.parametrize(
    ("form", "question", "answer"),
    [
        (FormulaForm(zero_pad=True), "-0052+0003", "-0049"),
        (FormulaForm(zero_pad=True, reverse_answer=True), "-0052+0003", "-9400"),
        (FormulaForm(reverse_answer=True), "-52+3", "-94"),
        (FormulaForm(1, signed=False, zero_pad=True), "07-10", "-03"),
        (FormulaForm(1, signed=False, reverse_answer=True), "7-10", "-3"),
        (FormulaForm(0, zero_pad=True), "-1-1", "-2"),
        (FormulaForm(zero_pad=True, reverse_answer=True), "+1000-1000", "+0000"),
        (FormulaForm(10, zero_pad=True, reverse_answer=True), "-10000000000-10000000000", "-00000000002"),
    ],
)
def test_forms_written_by_hand(form: FormulaForm, question: str, answer: str) -> None:
    split = max(question.rfind("+"), question.rfind("-"))
    examples = form.encode(
        torch.tensor([int(question[:split])]),
        torch.tensor([int(question[split + 1 :])]),
        torch.tensor([question[split] == "+"]),
    )
    assert texts(examples) == [(question, answer)]
    assert (examples.source.shape[1], examples.target.shape[1]) == (form.source_length, form.target_length)


@pytest.mark.parametrize(
    "form",
    [
        FormulaForm(2, signed, zero_pad=zero_pad, reverse_answer=reverse)
        for signed in (True, False)
        for zero_pad in (True, False)
        for reverse in (True, False)
    ],
    ids=str,
)
def test_answers_of_every_form_read_as_numbers_and_questions_encode_as_drawn(form: FormulaForm) -> None:
    task = FormulaTask(form)
    index = torch.randint(form.size, (211,), generator=torch.Generator().manual_seed(0))
    examples = task.encode(index)
    for a, b, plus, source, target in zip(
        *(x.tolist() for x in (*task.operands(index), examples.source, examples.target))
    ):
        assert task.decode_answer(target) == str(a + b if plus else a - b)
        assert task.read_question(task.question((a, b, plus))) == (a, b, plus)
        assert task.right_answer((a, b, plus)) == task.decode_answer(target)
        assert source == task.write(*(torch.tensor([x]) for x in (a, b, plus))).source[0].tolist()


@pytest.mark.parametrize(
    ("form", "text", "shown"),
    [
        (FormulaForm(zero_pad=True), "+", "+"),
        (FormulaForm(zero_pad=True), "-0000", "-0"),
        (FormulaForm(zero_pad=True, reverse_answer=True), "-100+", "-100+"),
        (FormulaForm(), "007", "007"),
    ],
)
def test_wrong_answers_stay_wrong(form: FormulaForm, text: str, shown: str) -> None:
    assert form.read_answer(FORMULA.encode(text) + [FORMULA.eos_id]) == shown


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_formula_has_its_number(signed: bool) -> None:
    form = FormulaForm(1, signed)
    every = torch.arange(form.size)
    assert form.size == (21 if signed else 11) * 11 * 2
    operands = form.operands(every)
    assert torch.equal(form.index(*operands), every)
    assert len(set(zip(*(x.tolist() for x in operands)))) == form.size


def test_trained_on_is_what_training_holds() -> None:
    task = FormulaTask(FormulaForm(1), train_size=71, valid_size=31)
    every = torch.arange(task.size)
    train, valid = (set(rows(examples.source)) for examples in task.split())
    trained = task.trained_on(every)
    assert set(rows(task.encode(every[trained]).source)) == train
    assert valid <= set(rows(task.encode(every[~trained]).source))


def test_fresh_problems_come_from_their_side_and_differ_by_epoch() -> None:
    task = FormulaTask(FormulaForm(1), train_size=997, valid_size=499, fresh=True, held_out=0.4)
    every = torch.arange(task.size)
    trained = task.trained_on(every)
    sides = [set(rows(task.encode(every[side]).source)) for side in (trained, ~trained)]
    train, valid = task.split()
    first, second = (task.draw(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert set(rows(train.source)) | set(rows(first.source)) <= sides[0] and set(rows(valid.source)) <= sides[1]
    assert not torch.equal(first.source, second.source)


@pytest.mark.parametrize(
    ("form", "split"), [(FormulaForm(3), 0), (FormulaForm(2, signed=False), 1), (FormulaForm(10), 123_456)], ids=str
)
def test_corners_are_trained_on_in_every_split(split: int, form: FormulaForm) -> None:
    limit = form.limit
    corners = [
        (a, b, plus)
        for a in ([-limit, 0, limit] if form.signed else [0, limit])
        for b in (0, limit)
        for plus in (False, True)
    ]
    task = FormulaTask(form, train_size=20_000, valid_size=5_000, seed=split, fresh=True, sampling="hard")
    a, b, plus = torch.tensor(corners).unbind(1)
    assert task.trained_on(form.index(a, b, plus)).all()
    assert not held_out_side(form.index(a, b, plus), 0.5, split).logical_not().all()  # the hash alone held some out
    wanted = set(rows(form.encode(a, b, plus.bool()).source))
    train, valid = (set(rows(examples.source)) for examples in task.split())
    assert not wanted & valid and wanted <= train


def test_what_looks_like_a_corner_is_held_out_as_ever() -> None:
    form = FormulaForm(3)
    every = torch.arange(form.size)
    kept = held_out_side(every, 0.5, 0) & ~form.held_out(every, 0.5, 0)
    assert not (form.held_out(every, 0.5, 0) & ~held_out_side(every, 0.5, 0)).any()
    assert {(abs(a), b) for a, b, _ in zip(*(x.tolist() for x in form.operands(every[kept])))} <= {
        (0, 0),
        (0, 1000),
        (1000, 0),
        (1000, 1000),
    }


@pytest.mark.parametrize("held_out", [True, False])
def test_a_side_that_is_empty_or_rare_is_refused(held_out: bool) -> None:
    if held_out:  # of so few formulas all are corners
        with pytest.raises(ValueError, match="leaves too few to hold out: 7 are not found"):
            generate_formulas(FormulaForm(0), 7, torch.Generator(), held_out=True, fraction=0.5)
    with pytest.raises(ValueError, match="200,000 are not found in 100,000,000 draws; change --held-out"):
        generate_formulas(
            FormulaForm(4), 200_000, torch.Generator(), held_out=held_out, fraction=0.001 if held_out else 0.999
        )


def test_the_split_of_numbers_past_64_bits_is_a_function_of_the_formula() -> None:
    form = FormulaForm(12)
    operands = draw_operands(form, 4_001, torch.Generator().manual_seed(0), "digits")
    side = held_out_side(form.index(*operands), 0.25, 7)
    assert torch.equal(side, held_out_side(form.index(*operands), 0.25, 7))
    assert side.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_sampling_by_digits_has_all_lengths_alike() -> None:
    a, b, plus = draw_operands(FormulaForm(10), 20_000, torch.Generator().manual_seed(0), "digits")
    for magnitude in (a.abs(), b):
        lengths = torch.tensor([len(str(value)) for value in magnitude.tolist()])
        shares = torch.bincount(lengths, minlength=12)[1:11] / len(lengths)
        # A length is a tenth of the draws, less those that came out shorter, plus those from longer ones.
        assert (shares > 0.08).all() and (shares < 0.13).all()
    assert (a < 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert plus.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert max(a.abs().max().item(), b.max().item()) <= 10**10


def longest_run(a: int, b: int, places: int, kind: str) -> int:
    """Most neighbouring places whose digits add up to 9 ("carry") or are equal ("borrow")."""
    best = run = 0
    for x, y in zip(f"{a:0{places}}", f"{b:0{places}}"):
        run = run + 1 if (int(x) + int(y) == 9 if kind == "carry" else x == y) else 0
        best = max(best, run)
    return best


@pytest.mark.parametrize("kind", ["carry", "borrow"])
def test_hard_sampling_has_long_runs(kind: str) -> None:
    def share(sampling: str) -> float:
        a, b, _ = draw_operands(FormulaForm(8), 4_001, torch.Generator().manual_seed(0), sampling)
        pairs = [pair for pair in zip(a.abs().tolist(), b.tolist()) if min(pair) >= 10**6]
        return sum(longest_run(*pair, 9, kind) >= 5 for pair in pairs) / len(pairs)

    assert share("hard") > 0.05 > 0.005 > share("digits")

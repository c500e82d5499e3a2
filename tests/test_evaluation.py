"""What `calcformer evaluate` measures, against counts made by hand and by plain loops over text."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calcformer import evaluation, exhaustive
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.data import Vocabulary
from calcformer.data import task as tasks
from calcformer.errors import InputError
from calcformer.evaluation import Tally, wilson_interval
from calcformer.exhaustive import MISTAKES, evaluate_all
from calcformer.pool import run_jobs
from calcformer.solver import Solver
from calcformer.tasks.arithmetic.expressions import ExpressionTask
from calcformer.tasks.arithmetic.formula_tensors import FormulaForm
from calcformer.tasks.arithmetic.formulas import FormulaTask
from calcformer.tasks.arithmetic.hard_problems import hard_problems
from calcformer.training import train

TINY = {
    "complexity": 1,
    "train_size": 50,
    "valid_size": 40,
    "width": 8,
    "heads": 2,
    "hidden": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "epochs": 1,
    "batch_size": 25,
    "device": "cpu",
    "processes": 1,
}
SPACE = [(a, b, plus) for a in range(-10, 11) for b in range(11) for plus in (False, True)]  # all of complexity 1

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A barely trained run on formulas."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        train(PRESETS["formula"].with_settings(TINY), folder, bar=False)
    return folder


def text(a: int, b: int, plus: bool) -> str:
    return f"{a}{'+' if plus else '-'}{b}"


def result(a: int, b: int, plus: bool) -> int:
    return a + b if plus else a - b


@pytest.fixture
def minus_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that calculates right, but for "-0" and for sums of one digit, which it says twice."""

    def decode(model: object, source: torch.Tensor, length: int, vocabulary: Vocabulary, *rest: object) -> torch.Tensor:
        rows = []
        for ids in source.tolist():
            question = "".join(vocabulary.decode_until_eos(ids))
            said = str(eval(question))
            if said == "0":
                said = "-0"
            elif "+" in question and len(said) == 1:
                said *= 2
            ids = [*vocabulary.encode(said), vocabulary.eos_id]
            rows.append(ids + [vocabulary.pad_id] * (length - len(ids)))
        return torch.tensor(rows)

    monkeypatch.setattr(tasks, "decode", decode)


def is_wrong(a: int, b: int, plus: bool) -> bool:
    """Whether the model of `minus_zero` gets a problem wrong."""
    return result(a, b, plus) == 0 or (plus and 0 < result(a, b, plus) < 10)


@pytest.mark.parametrize(
    ("right", "n", "interval"),
    [
        (8, 10, (0.4902, 0.9433)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5_000, 5_000, (0.99923, 1.0)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilson_interval_by_hand(right: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(right, n) == pytest.approx(interval, abs=5e-5)
    low, high = wilson_interval(right, n)
    assert 0 <= low <= high <= 1


def test_groups_by_hand() -> None:
    problems = [(0, 0, False), (-9, 9, True), (-10, 3, True), (7, 100, False), (999, 1, True), (-1000, 0, False)]
    task = FormulaTask()
    groups = task.groups(task.ask(problems))
    found = {group: [members[code] for code in codes.tolist()] for group, (members, codes) in groups.items()}
    assert found == {
        "digits": ["1", "1", "2", "3", "3", "4"],
        "result": ["zero", "zero", "negative", "negative", "positive", "negative"],
        "operation": ["subtraction", "addition", "addition", "subtraction", "addition", "subtraction"],
    }
    tally, other = Tally(), Tally()
    tally.add(task.groups(task.ask(problems[:4])), torch.tensor([True, False, True, True]))
    other.add(task.groups(task.ask(problems[4:])), torch.tensor([False, True]))
    tally.merge(other)
    assert (tally.n, tally.right) == (6, 4)
    assert {member: (entry["n"], entry["wrong"]) for member, entry in tally.groups()["digits"].items()} == {
        "1": (2, 1),
        "2": (1, 0),
        "3": (2, 1),
        "4": (1, 0),
    }
    addition = tally.groups(tally)["operation"]["addition"]
    assert addition == {
        "n": 3,
        "wrong": 2,
        "exact_match": 1 / 3,
        "distinct": 3,
        "interval": list(wilson_interval(1, 3)),
    }


@pytest.mark.parametrize(
    "task",
    [
        FormulaTask(FormulaForm(2), 31, 97),
        FormulaTask(FormulaForm(2, signed=False), 31, 97),
        FormulaTask(FormulaForm(3, truncate=True), 31, 97),
        FormulaTask(FormulaForm(4, zero_pad=True, reverse_answer=True), 31, 97, fresh=True, sampling="hard"),
    ],
    ids=["plain", "unsigned", "truncated", "padded, reversed and fresh"],
)
def test_held_out_formulas_know_their_problems(task: FormulaTask) -> None:
    examples = task.split()[1]
    again = task.ask(examples.problem.tolist())
    assert torch.equal(examples.source, again.source) and torch.equal(examples.target, again.target)
    assert [task.read_question(text) for text in task.questions(examples)] == [
        tuple(x) for x in examples.problem.tolist()
    ]


def test_held_out_expressions_know_their_problems() -> None:
    task = ExpressionTask(31, 97)
    examples = task.split()[1]
    again = task.ask(examples.problem.tolist())
    assert torch.equal(examples.source, again.source) and (examples.problem[:, 1] < 0).any()


def test_hard_problems_by_hand() -> None:
    hard = hard_problems(3, True)
    assert {(999, 1, True), (1, 999, True), (99, 9, True), (-999, 1, False)} <= set(hard["carry chain"])
    assert {(1000, 1, False), (1, 1000, False), (100, 9, False), (-1000, 1, True)} <= set(hard["borrow chain"])
    assert {(555, 555, True), (-123, 123, False), (1000, 1000, True)} <= set(hard["equal operands"])
    assert hard["zero"] == [(a, a, False) for a in (0, 1, 5, 9, 10, 12, 55, 99, 100, 123, 555, 999, 1000)]
    assert hard["zero from a negative"] == [(-a, a, True) for a, _, _ in hard["zero"][1:]]
    assert {(123, 124, False), (124, 123, False), (-123, 124, True), (-124, 123, True)} <= set(hard["one apart"])
    assert {(1000, 5, True), (9, 123, False), (-555, 1, True)} <= set(hard["unequal lengths"])
    assert {(-1000, 1000, False), (1000, 1000, True), (0, 0, True), (999, 0, False)} <= set(hard["extremes"])
    assert all(abs(result(*problem)) == 1 for problem in hard["one apart"])
    assert all(result(*problem) == 0 for name in ("zero", "zero from a negative") for problem in hard[name])
    assert 300 < sum(map(len, hard.values())) < 600


@pytest.mark.parametrize("complexity", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_hard_problems_are_within_reach_of_their_run(complexity: int, signed: bool) -> None:
    limit = 10**complexity
    for problems in hard_problems(complexity, signed).values():
        assert len(set(problems)) == len(problems) > 0
        assert all((-limit if signed else 0) <= a <= limit and 0 <= b <= limit for a, b, _ in problems)


@pytest.mark.usefixtures("minus_zero")
def test_held_out_problems_are_counted_right(run: Path) -> None:
    solver = Solver(run, "cpu")
    found = evaluation.evaluate_run(solver)
    problems = [tuple(problem) for problem in solver.task.split()[1].problem.tolist()]
    wrong = [problem for problem in problems if is_wrong(*problem)]
    assert 0 < len(wrong) < len(problems) == found["n"] == 40
    assert (found["wrong"], found["exact_match"]) == (len(wrong), (40 - len(wrong)) / 40)
    distinct = len(set(problems))
    assert found["distinct"] == distinct < 40
    assert found["interval"] == list(wilson_interval((40 - len(wrong)) / 40 * distinct, distinct))
    sizes = Counter("addition" if plus else "subtraction" for _, _, plus in problems)
    errors = Counter("addition" if plus else "subtraction" for _, _, plus in wrong)
    assert {member: (entry["n"], entry["wrong"]) for member, entry in found["groups"]["operation"].items()} == {
        member: (sizes[member], errors[member]) for member in sizes
    }
    sizes = Counter(str(max(len(str(abs(a))), len(str(b)))) for a, b, _ in problems)
    assert {member: entry["n"] for member, entry in found["groups"]["digits"].items()} == sizes
    for name, formulas in hard_problems(1, True).items():
        assert (found["hard"][name]["n"], found["hard"][name]["wrong"]) == (
            len(formulas),
            sum(is_wrong(*formula) for formula in formulas),
        ), name
    assert found["hard"]["zero"]["exact_match"] == 0.0 < found["hard"]["borrow chain"]["exact_match"]


@pytest.mark.usefixtures("minus_zero")
def test_the_worst_mistakes_come_first(run: Path) -> None:
    mistakes = evaluation.evaluate_run(Solver(run, "cpu"))["mistakes"]
    chances = [mistake["probability"] for mistake in mistakes]
    assert len({mistake["problem"] for mistake in mistakes}) == len(mistakes) <= 10
    assert chances == sorted(chances, reverse=True) and 0 < chances[-1] <= chances[0] < 1
    for mistake in mistakes:
        right = str(eval(mistake["problem"]))
        assert mistake["right"] == right and mistake["said"] == ("-0" if right == "0" else 2 * right)


@pytest.mark.usefixtures("minus_zero")
@pytest.mark.parametrize("chunk", [1 << 14, 97])
def test_all_problems_but_those_trained_on(chunk: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "CHUNK", chunk)
    solver = Solver(run, "cpu")
    trained = {"".join(solver.task.vocabulary.decode_until_eos(ids)) for ids in solver.task.split()[0].source.tolist()}
    left = [problem for problem in SPACE if text(*problem) not in trained]
    wrong = [problem for problem in left if is_wrong(*problem)]
    found = evaluate_all(solver)
    assert (found["n"], found["wrong"]) == (len(left), len(wrong)) and 400 < len(left) < 462
    assert found["exact_match"] == (len(left) - len(wrong)) / len(left) and "interval" not in found
    zeros = [problem for problem in left if result(*problem) == 0]
    assert found["groups"]["result"]["zero"] == {"n": len(zeros), "wrong": len(zeros), "exact_match": 0.0}
    lines = (run / MISTAKES).read_text().splitlines()
    assert [line.split(" = ")[0] for line in lines] == [text(*problem) for problem in wrong]
    assert all(f"{text(*problem)} = {result(*problem)}, said " in line for problem, line in zip(wrong, lines))


@pytest.mark.usefixtures("minus_zero")
def test_too_many_mistakes_are_counted_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "MOST_LISTED", 3)
    found = evaluate_all(Solver(run, "cpu"))
    assert (run / MISTAKES).read_text() == f"{found['wrong']} of {found['n']} answers are wrong, too many to list\n"


@pytest.mark.slow
def test_processes_agree_with_one_another(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhaustive, "CHUNK", 97)
    solver = Solver(run, "cpu")
    alone = evaluate_all(solver)
    lines = (run / MISTAKES).read_text()
    (run / MISTAKES).unlink()
    # As if the last were finished first: the order of the mistakes stays that of the problems.
    monkeypatch.setattr(exhaustive, "run_jobs", lambda *arguments: (job for job in reversed([*run_jobs(*arguments)])))
    assert evaluate_all(solver, processes=2) == alone and (run / MISTAKES).read_text() == lines


def test_the_command_with_all_it_can_measure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--exhaustive", "--beam", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {
        "exact_match",
        "token_accuracy",
        "loss",
        "n",
        "epoch",
        "preset",
        "checkpoint",
        "groups",
        "hard",
        "mistakes",
        "exhaustive",
    }
    assert (found["beam"], found["n"], found["preset"]) == (2, 40, "formula") and Path(found["checkpoint"]).is_file()
    assert main(["evaluate", str(run), "--exhaustive"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run}, epoch 1, 40 held-out formulas: exact match 0.")
    labels = {
        "held out",
        "  digits of an operand: 2",
        "  zero result",
        "  addition",
        "all not trained on",
        "hard formulas",
        "  carry chain",
    }
    assert {label for label in labels if any(line.startswith(f"{label:<28}".rstrip()) for line in lines)} == labels


def test_more_or_fewer_problems_than_in_validation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for problems in 7, 90:
        assert main(["evaluate", str(run), "--problems", str(problems), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["n"] == problems
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--problems", "900"])
    assert "900 cannot be held out" in capsys.readouterr().err


def test_expressions_have_no_hard_sets(capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {**TINY, "norm": "pre", "fresh": True, "held_out": 0.01}
    del settings["complexity"]
    train(PRESETS["expression"].with_settings(settings), "words", bar=False)
    assert main(["evaluate", "words", "--exhaustive", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hard"] == {} and found["groups"]["digits"].keys() <= {"1", "2"}
    assert all(mistake["problem"].split()[0] in ("POSITIVE", "NEGATIVE") for mistake in found["mistakes"])
    task = Solver("words", "cpu").task
    assert found["exhaustive"]["n"] == int((~task.trained_on(torch.arange(19_602))).sum()) < 300


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (FormulaTask(FormulaForm(4)), "up to 100,000,000 problems, this run has 400,060,002"),
        (FormulaTask(FormulaForm(0), 1_000, 1, leaky_split=True), "trained on every problem there is"),
    ],
)
def test_what_cannot_be_exhausted_is_refused(task: FormulaTask, match: str) -> None:
    solver: Any = SimpleNamespace(task=task, device=torch.device("cpu"), config=PRESETS["formula"])
    with pytest.raises(InputError, match=match):
        evaluate_all(solver, processes=1)


def test_no_more_processes_than_cores_answer_all_problems(run: Path) -> None:
    with pytest.raises(InputError, match="would keep 1000 CPU cores busy and there are [0-9]+; lower --processes"):
        evaluate_all(Solver(run, "cpu"), processes=1000)

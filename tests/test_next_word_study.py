"""The next word of S2's line: its examples and floors by hand, what each kind of model reaches, and the study."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import calcformer
from calcformer.cli import main
from calcformer.comparison import add_convergence, draw
from calcformer.config import PRESETS
from calcformer.data import Labelled
from calcformer.errors import InputError
from calcformer.interrupt import Stopped
from calcformer.runs.run_log import RunLog
from calcformer.solver import Solver
from calcformer.studies import SWEEP, Sweep
from calcformer.sweep import RESULTS
from calcformer.tasks.next_word import LINE, NextWords
from calcformer.training import resume, train
from calcformer.training.trainer import Trainer
from tests.pictures import is_picture

# By context: the examples, how many of them can be right, and the floor of the loss. After "you" come six words once
# each, after "If you" three.
REPORT = {1: (15, 10, 6 * math.log(6) / 15), 2: (14, 12, 3 * math.log(3) / 14), 3: (13, 13, 0.0)}

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(calcformer.__file__).parents[1]))


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail; returns its one line."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


# The examples


@pytest.mark.parametrize("context", REPORT)
def test_the_reports_examples_and_what_can_be_reached(context: int) -> None:
    count, right, floor = REPORT[context]
    data = NextWords(context=context, skip_last=True)
    train_examples, measured = data.build().split()
    assert len(train_examples) == data.train_size == count and measured is train_examples
    assert data.best_possible == pytest.approx({"valid_token_accuracy": right / count, "valid_loss": floor})
    assert len(data.build().vocabulary) == 10 and len(NextWords(context=context).build().split()[0]) == count + 1


def test_examples_are_the_words_in_their_order() -> None:
    data = NextWords(line=" a b\ta  c ", context=2)
    examples, _ = data.build().split()
    assert isinstance(examples, Labelled) and data.build().vocabulary.tokens == ("a", "b", "c")
    assert (examples.ids.tolist(), examples.label.tolist()) == ([[0, 1], [1, 0]], [0, 2])
    assert data.following() == {("a", "b"): {"a": 1}, ("b", "a"): {"c": 1}}
    assert NextWords(line="a b a c a b").following() == {("a",): {"b": 2, "c": 1}, ("b",): {"a": 1}, ("c",): {"a": 1}}


def test_the_floor_is_what_counting_reaches_and_nothing_less() -> None:
    """A table of scores, trained by itself for long: it comes to the floor and the best accuracy, and stays above."""
    data = NextWords(line="a b a b a c b b c a a b")
    examples, _ = data.build().split()
    table = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    losses = []
    for _ in range(1000):
        loss = torch.nn.functional.cross_entropy(table[examples.inputs[0][:, 0]], examples.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = data.best_possible
    assert min(losses) == pytest.approx(best["valid_loss"], abs=1e-4) and min(losses) > best["valid_loss"] - 1e-9
    right = table[examples.inputs[0][:, 0]].argmax(dim=1) == examples.labels
    assert right.float().mean().item() == pytest.approx(best["valid_token_accuracy"])


# Models


@pytest.mark.parametrize("context", REPORT)
@pytest.mark.parametrize(
    "model",
    [
        {"model": "feed-forward"},
        {"model": "recurrent"},
        {"model": "recurrent", "layers": 2},
        {"model": "recurrent", "cell": "lstm"},
        {"model": "recurrent", "cell": "gru"},
        {"model": "transformer"},
    ],
    ids=lambda model: " ".join(map(str, model.values())),
)
def test_every_model_reaches_the_best_possible_and_no_more(model: dict[str, Any], context: int) -> None:
    settings = {"context": context, "skip_last": True, "epochs": 100, "learning_rate": 0.01, "device": "cpu"}
    config = PRESETS["next-word"].with_settings({**model, **settings})
    last, best = train(config, Path("run"), bar=False), config.data.best_possible
    assert last["valid_token_accuracy"] == pytest.approx(best["valid_token_accuracy"])
    assert best["valid_loss"] - 1e-5 < last["valid_loss"] < best["valid_loss"] + 0.05
    assert 2.1 < RunLog(Path("run/metrics.jsonl")).read()[0]["loss"] < 2.6


def test_a_kill_between_checkpoints_costs_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["next-word"].with_settings({"epochs": 60, "device": "cpu"})
    last = train(config, Path("whole"), bar=False)

    def stop(trainer: Any, number: int) -> dict[str, Any]:
        if number == 57:
            raise KeyboardInterrupt
        return epoch(trainer, number)

    epoch = Trainer.epoch
    with monkeypatch.context() as patched, pytest.raises(Stopped) as stopped:
        patched.setattr(Trainer, "epoch", stop)
        train(config, Path("run"), bar=False)
    assert stopped.value.finished == 50
    again = resume(Path("run"), bar=False)
    assert {name: again[name] for name in ("loss", "valid_loss")} == {
        name: last[name] for name in ("loss", "valid_loss")
    }
    assert len(RunLog(Path("run/metrics.jsonl")).read()) == 60


# Commands


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> str:
    """A run that knows the line of the report, with two words before the next."""
    words = ["--context", "2", "--epochs", "60", "--learning-rate", "0.01", "--device", "cpu"]
    assert main(["train", "next-word", "--out", "run", *words]) == 0
    said = capsys.readouterr()
    assert "(best possible: accuracy 0.8667, loss 0.2197) on the examples trained on" in said.out
    assert "15 examples an epoch, none held out" in said.err
    return "run"


def test_a_run_is_asked_and_measured(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "--run", run, "you win,", "If  you", "fight, If"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("you win, -> you  (probability 0.9") and lines[0].endswith(
        "right; by counting you 1 of 1)"
    )
    assert (
        lines[1].startswith("If you -> ") and "right; by counting win, 1 of 3, lose, 1 of 3, don't 1 of 3" in lines[1]
    )
    assert lines[2].endswith("the line does not have these words so)")
    assert main(["solve", "--run", run, "--json", "If you"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["follows"] == {"win,": 1, "lose,": 1, "don't": 1} and answer["right"] is True
    assert main(["evaluate", run]) == 0
    assert "15 examples trained on: accuracy 0.8667, loss 0.2" in capsys.readouterr().out
    assert "leave out --problems" in fails(capsys, "evaluate", run, "--problems", "3")
    for command in ["evaluate", run], ["solve", "--run", run, "If you"]:
        assert "leave out --beam" in fails(capsys, *command, "--beam", "3")


def test_a_wrong_answer_is_told(run: str) -> None:
    solver = Solver(run)
    with torch.no_grad():
        solver.model.prediction.bias[solver.task.vocabulary.id("die!")] = 100.0
    (answer,) = solver.answers(["If you"])
    assert not answer.is_right and answer.verdict.startswith("wrong; by counting win, 1 of 3")


def test_wrong_questions_are_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for question, found in {
        "you sing": "'you sing': 'sing' is no word of this run's line; it has \"If you win, live!",
        "you": "'you' has 1 words, and this run says the next one after 2; give as many",
        "": "'' has 0 words",
    }.items():
        assert found in fails(capsys, "solve", "--run", run, question)


def test_wrong_lines_are_one_line_and_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words, found in {
        ("--line", ""): "line must have 2 to 10000 words where 1 stand before the next one, got 0",
        ("--line", "a b c", "--context", "3"): "line must have 4 to 10000 words where 3 stand",
        ("--line", "a b", "--skip-last"): "line must have 3 to 10000 words where 1 stand before the next one and",
        ("--context", "0"): "context must be 1 to 1000, got 0",
        ("--train-size", "3"): "train_size is a setting of",
        ("--model", "transformer", "--width", "6"): "width must be a multiple of heads, got width 6 and 4 heads",
        ("--cell", "lstm", "--model", "feed-forward"): "cell is a setting of recurrent, not of feed-forward",
    }.items():
        assert found in fails(capsys, "train", "next-word", "--out", "run", *words)
    assert not Path("run").exists()


# The study


def test_convergence_is_the_first_epoch_at_its_best() -> None:
    data = NextWords(skip_last=True)
    accuracies = [0.2, 0.6, 0.66666, 0.6666667, 0.6, 0.6666667]
    entries = [
        {"epoch": epoch, "loss": 2.3, "valid_token_accuracy": accuracy, "valid_loss": 1.0}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    figures: dict[str, Any] = {}
    add_convergence(figures, entries[:3], data)
    assert "convergence" not in figures and figures["start"] == 2.3  # near is not there
    add_convergence(figures, entries, data)
    assert figures["convergence"] == 4


def test_the_study_makes_a_table_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--vary model=recurrent,transformer --vary context=2,3 --vary layers=2 --seeds 2 --epochs 8 --jobs 1"
    words += " --learning-rate 0.02 --device cpu"
    assert main(["sweep", "--study", "s2-next-word", "--out", "study", *words.split()]) == 0
    tables = capsys.readouterr().out.split("\n\n")[:-1]
    heads = [[cell.strip() for cell in table.splitlines()[0].split("|")[1:-1]] for table in tables]
    assert all(head[:3] == ["model", "layers", "context"] for head in heads)
    assert [cell for head in heads for cell in head[3:]] == (
        "loss in epoch 1,loss after 5,loss,floor,accuracy,best possible,convergence,earliest,runs,seconds"
    ).split(",")
    assert ["earliest", "runs"] in [head[4:6] for head in heads]  # beside what they tell of
    results = json.loads(Path("study", RESULTS).read_text())
    assert [tuple(row["values"].values()) for row in results["rows"]] == [
        ("recurrent", 2, 2),
        ("recurrent", 2, 3),
        ("transformer", 2),
        ("transformer", 3),
    ]
    for row in results["rows"]:
        count, right, floor = REPORT[row["values"]["context"]]
        assert row["best"] == pytest.approx({"valid_token_accuracy": right / count, "valid_loss": floor})
        assert len(row["runs"]) == 2 and 2.1 < row["mean"]["start"] < 2.6
        assert row["mean"]["valid_loss"] < row["mean"]["valid_loss@5"] < row["mean"]["start"]
        converged = [run["figures"]["convergence"] for run in row["runs"] if "convergence" in run["figures"]]
        assert row["earliest"] == min(converged, default=None)
    assert any(row["earliest"] for row in results["rows"]) and (Path("study") / SWEEP).exists()
    seeds = {run["run"].partition("seed=")[2] for row in results["rows"] for run in row["runs"]}
    assert seeds == {"1", "2"}
    pytest.importorskip("matplotlib")
    assert is_picture(Path("study/sweep.png"))
    assert draw(results, Path("study"), Path("again.png"))


def test_runs_of_other_kinds_leave_out_what_they_do_not_have() -> None:
    vary = {"model": ["transformer", "recurrent"], "cell": ["rnn", "gru"], "heads": [2, 4]}
    with pytest.raises(InputError, match="'heads' cannot be varied"):
        Sweep.of({}, vary, 1, "next-word")  # of the preset's own kind, which has no heads
    members = Sweep.of({}, {name: vary[name] for name in ("model", "cell")}, 1, "next-word").members()
    assert [member.name for member in members] == [
        "model=transformer",
        "model=recurrent,cell=rnn",
        "model=recurrent,cell=gru",
    ]
    assert replace(NextWords(), line=LINE) == NextWords()

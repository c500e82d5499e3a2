"""Tasks: one file and one line each, whatever is learned; and what the commands say of tasks and runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import calcformer
import kernels
from calcformer import listing
from calcformer.cli import main
from calcformer.config import PRESETS, RunConfig
from calcformer.data import Examples, Labelled, Pairs, Task, Texts, Vocabulary
from calcformer.errors import InputError
from calcformer.model.settings import MODELS
from calcformer.runs.newest import newest_run
from calcformer.settings import ModelSettings, Preset, TaskSettings, TrainingConfig, setting
from calcformer.solver import Solver
from calcformer.tasks import TASKS
from calcformer.training import train

PACKAGE = Path(calcformer.__file__).parent
ALONE = "--processes", "1"
TINY = *"--train-size 40 --valid-size 20 --epochs 1 --width 8 --hidden 8".split(), *ALONE

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail; returns its one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


# A task of one's own, as the page has it

TRY_IT = """
import json, sys
from calcformer.cli import main

for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    print("exit code", code, flush=True)
"""


@pytest.mark.long
def test_a_task_is_a_file_and_a_line(tmp_path: Path) -> None:
    """That of calcformer's README learns its rule, and every command knows it."""
    (toy,) = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
    assert len(toy.splitlines()) < 40
    shutil.copytree(PACKAGE, tmp_path / "calcformer", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "calcformer" / "tasks" / "reversal.py").write_text(toy)
    registry = tmp_path / "calcformer" / "tasks" / "__init__.py"
    text = registry.read_text().replace("\n\n__all__", "\nfrom calcformer.tasks.reversal import Reversal\n\n__all__")
    registry.write_text(re.sub(r"\)(\s*\})", r", Reversal)\1", text))
    commands = [
        ["train", "reversal", "--out", "run"],
        ["evaluate", "run", "--json"],
        ["solve", "--run", "run", "--json", "abc", "hg"],
        ["solve", "--run", "run", "xyz"],
        ["train", "--resume", "run"],
        ["attention", "abc", "--run", "run"],
        ["sweep", "reversal", "--vary", "longest=2,3", "--epochs", "1", "--train-size", "9", "--valid-size", "5"],
        ["train", "reversal", "--complexity", "2"],
        ["runs", ".", "--json"],
        ["tasks"],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(Path(kernels.__file__).parents[1])))}
    done = subprocess.run(
        [sys.executable, "-c", TRY_IT, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    parts = [part.split("exit code ") for part in re.split(r"^\$ .*\n", done.stdout, flags=re.MULTILINE)[1:]]
    assert [int(code) for _, code in parts] == [0, 0, 0, 2, 0, 0, 0, 2, 0, 0], done.stdout + done.stderr
    said = [text for text, _ in parts]
    assert json.loads(said[1])["exact_match"] >= 0.97
    assert [(answer["said"], answer["right"]) for answer in json.loads(said[2])["answers"]] == [
        ("cba", True),
        ("gh", True),
    ]
    assert "calcformer: error: 'xyz': 'x' is nothing this run knows; leave it out\n" in done.stderr
    assert said[4] == said[0] and "run: exact match " in said[0]
    assert "abc = cba" in said[5] and "longest | training loss" in said[6]
    assert "complexity is a setting of formula, not of reversal; leave it out" in done.stderr
    assert {row["task"] for row in json.loads(said[8])} == {"reversal"} and len(json.loads(said[8])) == 3
    assert "reversal" in said[9]


def test_nothing_else_knows_the_name_of_a_task() -> None:
    classes = {name for x in TASKS.values() for name in (x.__name__, x.build.__annotations__["return"])}
    names = {*TASKS, *PRESETS} - {"translate"}  # which is a command, too
    known: list[tuple[str, Any]] = []
    for path in PACKAGE.rglob("*.py"):
        if not {"tasks", "by_hand"} & set(path.relative_to(PACKAGE).parts):  # by hand a step has a formula
            for node in ast.walk(ast.parse(path.read_text())):
                words = (getattr(node, name, None) for name in ("id", "name"))
                known += [(path.name, word) for word in words if word in classes]
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
                    known.append((path.name, node.value))
    assert not known and len(names) > 8 and len(classes) == 2 * len(TASKS)


# Other examples and another kind of model: a language model that reads one token, a classifier that reads no order


@dataclass(frozen=True)
class BagSettings(ModelSettings):
    """The mean of embeddings, or each by itself, and a linear map."""

    kind: ClassVar[str] = "bag"
    size: int = setting(16, "numbers of a token", 1, 100)

    def build(self, task: Task) -> nn.Module:
        return Bag(len(task.vocabulary), self.size, getattr(task, "classes", None))

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        return source * (self.size + vocabulary)

    @property
    def layers(self) -> int:
        return 1


class Bag(nn.Module):
    def __init__(self, vocabulary: int, size: int, classes: Sequence[str] | None) -> None:
        super().__init__()
        self.embedding, self.classes = nn.Embedding(vocabulary, size), classes
        self.prediction = nn.Linear(size, vocabulary if classes is None else len(classes))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.prediction(x if self.classes is None else x.mean(dim=1))


@dataclass(frozen=True)
class Cycles(TaskSettings):
    """Texts such as cdefab, whose letters follow each other; where it ends nobody can know."""

    task, about, models = "cycle", "letters in their order", ("bag",)
    figures = {"valid_loss": "loss", "perplexity": "perplexity"}

    def build(self) -> Task:
        return CycleTask(self)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        training = TrainingConfig(epochs=12, batch_size=10, learning_rate=0.1, device="cpu")
        return {"cycle": Preset("", cls(train_size=100, valid_size=30), BagSettings(), training, {"perplexity": 1.5})}


class CycleTask(Task):
    vocabulary = Vocabulary((*"abcdef", "<bos>", "<eos>", "<pad>"), "<bos>", "<eos>", "<pad>")
    has_answers = False

    def __init__(self, data: Cycles) -> None:
        self.data, self.source_length, self.target_length = data, 9, 9

    def split(self) -> tuple[Examples, Examples]:
        generator = torch.Generator().manual_seed(self.data.data_seed)
        count = self.data.train_size + self.data.valid_size
        ids = (torch.randint(6, (count, 1), generator=generator) + torch.arange(10)) % 6
        ids = ids.where(
            torch.arange(10) < torch.randint(5, 11, (count, 1), generator=generator), self.vocabulary.pad_id
        )
        texts = Texts(ids[:, :-1], ids[:, 1:])
        order = torch.arange(len(ids))
        return texts.select(order[: self.data.train_size]), texts.select(order[self.data.train_size :])


@dataclass(frozen=True)
class Moods(TaskSettings):
    """Words of a and b: which letter stands there more often?"""

    task, about, models = "mood", "the more frequent letter", ("bag",)
    figures = {"valid_token_accuracy": "accuracy", "valid_loss": "loss"}

    def build(self) -> Task:
        return MoodTask(self)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        training = TrainingConfig(epochs=12, batch_size=10, learning_rate=0.1, device="cpu")
        return {"mood": Preset("", cls(train_size=100, valid_size=30), BagSettings(), training)}


class MoodTask(Task):
    vocabulary = Vocabulary((*"ab", "<bos>", "<eos>", "<pad>"), "<bos>", "<eos>", "<pad>")
    classes = "cold", "warm"
    ignored_label = None
    group_labels = {"class": "{} words"}

    def __init__(self, data: Moods) -> None:
        self.data, self.source_length, self.target_length = data, 8, 2

    def split(self) -> tuple[Examples, Examples]:
        generator = torch.Generator().manual_seed(self.data.data_seed)
        ids = torch.randint(2, (self.data.train_size + self.data.valid_size, 7), generator=generator)
        train, valid = ids.split((self.data.train_size, self.data.valid_size))
        return tuple(Labelled(ids, (ids.sum(dim=1) > 3).long()) for ids in (train, valid))

    def groups(self, examples: Examples) -> dict[str, tuple[Sequence[str], torch.Tensor]]:
        return {"class": (self.classes, examples.labels)}

    def ask(self, problems: Sequence[str]) -> Labelled:
        return Labelled(torch.tensor([self.vocabulary.encode(x) for x in problems]), torch.zeros(len(problems)).long())

    def decode_answer(self, ids: Any) -> str:
        return self.classes[ids]

    def answer(self, model: Any, examples: Examples, *rest: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(*examples.inputs).argmax(dim=-1)

    def log_probability(self, model: Any, examples: Examples, said: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(*examples.inputs).double().log_softmax(dim=-1).gather(1, said[:, None]).squeeze(1)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "bag", BagSettings)
    for task in Cycles, Moods:
        monkeypatch.setitem(TASKS, task.task, task)
        for name, preset in task.presets().items():
            monkeypatch.setitem(PRESETS, name, RunConfig(name, preset.data, preset.model, preset.training))


@pytest.mark.usefixtures("registered")
def test_a_language_model_is_learned_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cycle", "--out", "run", *ALONE]) == 0
    said = capsys.readouterr()
    assert re.search(
        r"run: loss 0\.0\d{3}, perplexity 1\.0\d{3} \(the report: perplexity 1\.5000\) on held-out", said.out
    )
    assert "100 examples an epoch, 30 held out" in said.err
    written = json.loads(Path("run/config.json").read_text())
    assert (written["data"]["task"], written["model"]) == ("cycle", {"kind": "bag", "size": 16})
    assert main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item()) and "wrong" not in found
    assert main(["evaluate", "run"]) == 0
    assert capsys.readouterr().out.startswith("run, epoch 12, 30 held-out examples: loss 0.0")
    log = Path("run/metrics.jsonl").read_text().splitlines()
    assert main(["train", "--resume", "run"]) == 0 and Path("run/metrics.jsonl").read_text().splitlines() == log
    assert main(["runs", "."]) == 0
    assert re.search(r"^run +cycle +cycle +12/12 +loss 0\.0\d{3}", capsys.readouterr().out, re.MULTILINE)
    assert "a bag model has no attention; give a run of another" in fails(capsys, "attention", "abc", "--run", "run")
    assert "which examples are not; leave it out" in fails(capsys, "evaluate", "run", "--exhaustive")


@pytest.mark.usefixtures("registered")
def test_a_classifier_is_learned_measured_and_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mood", "--out", "run", *ALONE]) == 0
    assert "run: accuracy 1.0000, loss 0." in capsys.readouterr().out
    assert main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["token_accuracy"], found["wrong"], found["n"]) == (1.0, 0, 30)
    assert found["groups"]["class"]["cold"]["n"] + found["groups"]["class"]["warm"]["n"] == 30
    assert main(["evaluate", "run"]) == 0
    assert "  warm words " in capsys.readouterr().out
    assert main(["solve", "--run", "run", "aaababa", "bbbbbaa"]) == 0
    assert re.findall(r"= (\w+)  \(probability [01]\.\d+\)", capsys.readouterr().out) == ["cold", "warm"]


@pytest.mark.usefixtures("registered")
def test_a_task_is_learned_by_its_own_kinds_of_model_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="cycle is learned by a model of kind bag, got 'encoder-decoder'"):
        RunConfig("", Cycles())
    assert "encoder_layers is a setting of encoder-decoder, not of bag; leave it out" in fails(
        capsys, "train", "cycle", "--encoder-layers", 8
    )
    assert "invalid choice: 'encoder-decoder'" in fails(capsys, "train", "cycle", "--model", "encoder-decoder")
    assert main(["train", "mood", "--model", "bag", "--size", "3", "--epochs", "1", *ALONE, "--out", "run"]) == 0


def test_examples_of_every_form_are_cut_and_divided_alike() -> None:
    ids, label = torch.tensor([[1, 2, 9, 9], [3, 9, 9, 9], [4, 5, 6, 9]]), torch.tensor([0, 9, 1])
    pairs = Pairs(ids, ids[:, :3], problem=torch.full((3, 2), 9))
    assert [x.tolist() for x in vars(pairs.trim(9)).values()] == [
        [[9, 9]] * 3,
        ids[:, :3].tolist(),
        ids[:, :3].tolist(),
    ]
    assert torch.equal(pairs.inputs[1], pairs.target[:, :-1]) and torch.equal(pairs.labels, pairs.target[:, 1:])
    texts = Texts(ids[:, :-1], ids[:, 1:]).select(torch.tensor([1, 0])).trim(9)
    assert texts.inputs[0].tolist() == [[3, 9], [1, 2]] and texts.labels.tolist() == [[9, 9], [2, 9]]
    labelled = Labelled(ids, label)
    assert labelled.trim(9).ids.shape == (3, 3) and labelled.trim(9).labels.tolist() == [0, 9, 1]
    assert [part.labels.tolist() for part in labelled.batches(2)] == [[0, 9], [1]] and len(labelled.part(1, 2)) == 2
    assert labelled.problem is None and labelled.to("cpu").inputs[0] is not None


# Flags and presets


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The help of a command."""
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_has_the_flags_of_the_task_chosen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in [], ["formula"], ["--preset", "formula"], ["--preset=ten-digits"]:
        assert "--complexity" in shown(capsys, command, *words), words
    for words in ["expression"], ["--preset", "expression-report"]:
        text = shown(capsys, command, *words)
        assert "--complexity" not in text and "--leaky-split" in text and "--norm" in text
    assert "--sampling" not in shown(capsys, "sweep", "--study", "s0-overfit")


def test_a_task_by_itself_takes_its_first_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for words, preset in ([], "formula-best"), (["formula"], "formula-best"), (["expression"], "expression"):
        assert main(["train", *words, *TINY, "--out", preset + str(len(words))]) == 0
        written = RunConfig.from_json(Path(preset + str(len(words)), "config.json").read_text())
        assert written.preset == preset
    assert main(["train", "formula", "--preset", "formula-report", *TINY]) == 0
    said = capsys.readouterr()
    assert re.search("runs/formula-report-1: .* .the report: token accuracy 0.9630, loss 0.1170. on held-out", said.out)
    assert re.search(r"  123\+123 = .* \(probability 0\.\d+, wrong, 246 is right\)", said.err)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["train", "song"], "there is no task 'song'; give formula or expression or "),
        (["train", "formula", "--preset", "expression"], "expression is a preset of expression, not of formula"),
        (
            ["sweep", "expression", "--study", "s1-positions"],
            "formula-report is a preset of formula, not of expression",
        ),
        (["train", "expression", "--sampling", "hard"], "sampling is a setting of formula, not of expression"),
        (["train", "expression", "--no-signed"], "signed is a setting of formula, not of expression; leave it out"),
        (["train", "expression", "--complexity", "many"], "must be a whole number, got 'many'"),
        (["train", "--epochs", "2", "expression"], "unrecognized arguments: expression"),
        (["train", "--wings", "2"], "unrecognized arguments: --wings 2"),
        (["train", ""], "there is no task ''"),
        (["train", "formula", "--resume", "run"], "--resume goes on with what was begun; leave out formula"),
        (["train", "--model", "recurrent"], "invalid choice: 'recurrent'"),
        (["sweep", "expression", "--vary", "complexity=1,2"], "expression has no setting 'complexity' to vary"),
        (["sweep", "--vary", "model=bag,cat"], "model must be one of encoder-decoder, got 'bag'"),
        (["tasks", "formula"], "unrecognized arguments: formula; leave it out"),
        (["explain", "you", "win"], "lists what there is), and put what is one text in quotes"),
        (["runs", "nowhere"], "there is no folder 'nowhere'; give one that has runs in it"),
        (["runs", "file"], "there is no folder 'file'"),
        (["runs", ""], "must be the name of a file or folder, got ''"),
        (["info"], "required: RUN"),
        (["info", "nowhere"], "there is no run folder nowhere"),
        (["info", "."], ". is not a run folder: it has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert match in fails(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# config.json of older versions


WRITTEN = json.loads((Path(__file__).parent / "golden" / "presets.json").read_text())


@pytest.mark.parametrize("name", WRITTEN)
def test_presets_as_the_first_version_wrote_them_are_these(name: str) -> None:
    """tests/golden/presets.json: config.json of every preset there was when all tasks had the settings of formulas."""
    assert RunConfig.from_json(json.dumps(WRITTEN[name])) == PRESETS[name]
    ours = json.loads(PRESETS[name].to_json())
    for section, values in ours.items():  # which that version reads: its keys, and those it does not find are defaults
        assert values == WRITTEN[name][section] or values.items() <= WRITTEN[name][section].items()


@pytest.mark.parametrize(("key", "value"), [("complexity", 2), ("sampling", "hard"), ("colour", "red")])
def test_a_former_setting_that_meant_something_is_not_dropped(key: str, value: Any) -> None:
    content = json.loads(PRESETS["expression"].to_json())
    content["data"][key] = value
    with pytest.raises(InputError, match=f"there is no setting 'data.{key}' in this version"):
        RunConfig.from_json(json.dumps(content))


def test_every_preset_says_what_it_is_and_can_be_learned() -> None:
    for name, task in TASKS.items():
        assert task.task == name and task.about and task.presets()
        assert task.build.__annotations__ and set(task.models) <= MODELS.keys()
        for preset in task.presets().values():
            assert preset.about and type(preset.data) is task and preset.reported.keys() <= task.figures.keys()


# Tasks, runs and one run, told without torch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two barely trained runs, one of them in a folder of its own, and broken ones."""
    folder = tmp_path_factory.mktemp("of") / "runs"
    tiny = {"train_size": 40, "valid_size": 20, "epochs": 1, "width": 8, "hidden": 8, "processes": 1, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        train(PRESETS["formula"].with_settings(tiny), folder / "one", bar=False)
        train(PRESETS["expression"].with_settings(tiny), folder / "sweep-1" / "seed=3", bar=False)
    for name in "damaged", "cut", "other":
        shutil.copytree(folder / "one", folder / name)
    (folder / "damaged" / "config.json").write_text("{")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (folder / "other" / "config.json").unlink()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("no run")
    return folder


def test_runs_are_listed_and_broken_ones_say_why(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--json"]) == 0
    found = {Path(run["run"]).name: run for run in json.loads(capsys.readouterr().out)}
    assert list(found) == ["cut", "damaged", "one", "other", "seed=3"]
    assert "model.safetensors is damaged; restore it with: calcformer train --resume" in found["cut"]["error"]
    assert "config.json cannot be used (not JSON" in found["damaged"]["error"]
    assert "it has no config.json" in found["other"]["error"]
    one = found["one"]
    assert (one["task"], one["preset"], one["epoch"], one["epochs"]) == ("formula", "formula", 1, 1)
    last = json.loads((runs / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    assert list(one["figures"].items())[0] == ("exact match", last["exact_match"])
    assert one["figures"]["loss"] == last["valid_loss"] and 0 <= one["age"] < 600
    assert main(["runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "task", "preset", "epochs", "best", "figure", "age"]
    assert lines[2].split()[:4] == [str(runs / "sweep-1" / "seed=3"), "expression", "expression", "1/1"]
    assert len(lines) == 6 and all(
        str(runs / name) in line for name, line in zip(("cut", "damaged", "other"), lines[3:])
    )


@pytest.mark.parametrize(
    "figures, best",
    [({"exact_match": "exact match"}, {"exact match": 0.9}), ({"valid_loss": "loss"}, {"loss": 0.3})],
    ids=["higher", "lower"],
)
def test_the_best_figure_of_a_run_is_of_any_epoch(
    figures: dict[str, str], best: dict[str, float], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "one", tmp_path / "one")
    log = [{"valid_loss": 0.5}, {"exact_match": 0.9, "valid_loss": 0.3}, {"exact_match": 0.7, "valid_loss": 0.4}]
    lines = [json.dumps({"epoch": epoch, "loss": 1.0, **entry}) for epoch, entry in enumerate(log, 1)]
    (tmp_path / "one" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(TASKS["formula"], "figures", figures)
    run = listing.describe_run(tmp_path / "one")
    assert run["best"] == best and run["figures"] != best
    (label, value), *_ = best.items()
    for text in listing.run_text(run), listing.runs_text(tmp_path, [run]):
        assert f"{label} {value:.4f}" in text


def test_a_run_whose_task_cannot_be_built_is_not_asked(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert newest_run(["1+1"], runs) == runs / "one"

    def build(data: TaskSettings) -> Task:
        raise InputError("its file is gone")

    shutil.copytree(runs / "sweep-1" / "seed=3", runs / "words")
    monkeypatch.setattr(TASKS["formula"], "build", build)
    assert newest_run(["NEGATIVE 30 subtract NEGATIVE 34"], runs) == runs / "words"
    shutil.rmtree(runs / "words")


def test_a_folder_without_runs_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "there is no run in runs; make one with: calcformer train\n"
    assert main(["runs", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []


def test_one_run_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(runs / "one"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Neither the processes, which are as many as there were cores, nor a warm-up cut to the length of the run.
    tiny = {"train_size": 40, "valid_size": 20, "epochs": 1, "width": 8, "hidden": 8, "device": "cpu"}
    assert found["changed"] == tiny
    model = Solver(runs / "one", "cpu").model
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["bytes"] == sum(path.stat().st_size for path in (runs / "one").iterdir())
    assert found["reported"] == {"loss": 0.117, "token accuracy": 0.963}
    assert main(["info", str(runs / "one")]) == 0
    text = capsys.readouterr().out
    assert "formula, preset formula, encoder-decoder" in text and "--width 8" in text and "learning" not in text
    assert "token accuracy 0.9630" in text and f"{found['parameters']:,} parameters" in text
    config = json.loads((runs / "one" / "config.json").read_text())
    copy = runs / "one" / ".." / "renamed"
    shutil.copytree(runs / "one", copy)
    (copy / "config.json").write_text(json.dumps({**config, "preset": "of another version"}))
    assert "learning_rate" in listing.describe_run(copy)["changed"]
    shutil.rmtree(copy)
    assert "cannot be used (not JSON" in fails(capsys, "info", runs / "damaged")
    assert "model.safetensors is damaged" in fails(capsys, "info", runs / "cut")


def test_tasks_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["tasks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["preset"]) for row in rows] == [(x.data.task, name) for name, x in PRESETS.items()]
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(TASKS) + len(PRESETS) and all(line == line.rstrip() for line in lines)
    assert next(line for line in lines if " ten-digits " in line).endswith("numbers of up to ten digits")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["tasks"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80 and " ".join(narrow.split()) == " ".join("\n".join(lines).split())


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("next-word", {"model": "transformer", "hidden": 32, "epochs": 1}),
        ("formula", {"width": 36, "heads": 3}),  # neither goes without the other
        ("formula", {"leaky_split": True, "epochs": 2}),
    ],
)
def test_what_follows_from_other_settings_is_no_change(preset: str, changes: dict[str, Any]) -> None:
    assert listing.changed_settings(PRESETS[preset].with_settings(changes)) == changes


def test_the_runs_of_a_sweep_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, exact in (1, 0.25), (2, 0.75):
        member = tmp_path / "sweep-1" / f"seed={seed}"
        shutil.copytree(runs / "one", member)
        (member / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "loss": 1.0, "exact_match": exact}) + "\n")
    assert main(["runs", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3  # they are no sweep yet
    (tmp_path / "sweep-1" / "sweep.json").write_text("{}")
    assert main(["runs", str(tmp_path)]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{tmp_path}/sweep-1 +formula +formula +2/2 runs +exact match 0.7500 +\d+ s", line)
    assert main(["runs", str(tmp_path), "--json"]) == 0 and len(json.loads(capsys.readouterr().out)) == 2


def test_what_is_on_both_sides_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"train_size": 40, "valid_size": 20, "epochs": 1, "width": 8, "hidden": 8, "processes": 1, "device": "cpu"}
    for leaky in False, True:
        train(PRESETS["formula"].with_settings({**tiny, "complexity": 1, "leaky_split": leaky}), bar=False)
    told = re.findall(r"held out(.*?);", capsys.readouterr().err)
    assert told[0] == "" and 0 < int(re.fullmatch(r", (\d+) of which are trained on too", told[1])[1]) <= 20  # type: ignore[index]


@pytest.mark.usefixtures("registered")
def test_a_side_without_examples_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PRESETS["cycle"].data.build().split()
    for side, what in enumerate(("train on", "hold out")):
        empty = list(whole)
        empty[side] = whole[side].select(torch.tensor([], dtype=torch.int64))
        monkeypatch.setattr(CycleTask, "split", lambda _, sides=empty: sides)
        assert f"no examples are left to {what}; change how many are held out" in fails(capsys, "train", "cycle")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (7_300, "2 h"), (1e6, "11 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert listing.since(seconds) == text


@pytest.mark.parametrize("words", [["tasks"], ["runs"], ["info", "one"], ["train", "expression", "--help"]])
def test_what_is_told_does_not_wait_for_torch(words: list[str], runs: Path) -> None:
    words = [str(runs / "one") if word == "one" else word for word in words]
    Path("runs").symlink_to(runs)
    program = (
        "import sys, time; started = time.perf_counter()\nfrom calcformer.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules or time.perf_counter() - started > 3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).returncode == 0

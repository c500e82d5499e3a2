"""Settings, metrics, the run folder and the training loop."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from calcformer import worker
from calcformer.config import PRESETS, RunConfig
from calcformer.model.settings import MODELS
from calcformer.plots import save_curve
from calcformer.runs.checkpoint import load_run, save_checkpoint
from calcformer.runs.files import hold, write_atomically
from calcformer.runs.folder import RunError, finished_epochs
from calcformer.runs.run_log import RunLog
from calcformer.settings import TrainingConfig
from calcformer.solver import Solver
from calcformer.tasks import TASKS
from calcformer.tasks.expression import Expressions
from calcformer.training import evaluate, loop, measure_answers, optimizer, resume, team, train, trainer
from calcformer.training.metrics import LARGE, Totals, token_loss

SMALL = {
    "complexity": 1,
    "train_size": 61,
    "valid_size": 29,
    "width": 12,
    "heads": 3,
    "hidden": 11,
    "dropout": 0.05,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "batch_size": 17,
    "epochs": 4,
    "device": "cpu",
    "processes": 1,
}
ARITHMETIC = [name for name, preset in PRESETS.items() if preset.data.task in ("formula", "expression")]
TIMES = ("seconds", "examples_per_second")

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


def small(preset: str = "formula", **changes: Any) -> RunConfig:
    known = {name: value for name, value in SMALL.items() if name in PRESETS[preset].kinds}
    return PRESETS[preset].with_settings({**known, **changes})


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    entries = RunLog(folder / "metrics.jsonl").read()
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


# Settings


@pytest.mark.parametrize("preset", ARITHMETIC)
def test_config_survives_json(preset: str) -> None:
    config = small(preset, clip_norm=1, hidden=5)
    assert RunConfig.from_json(config.to_json()) == config
    assert config.preset == preset and type(config.training.clip_norm) is float


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"heads": 5}, "width 12 and 5 heads"),
        ({"epochs": 0}, "epochs must be 1 to 1000000, got 0"),
        ({"dropout": 1.0}, "dropout must be 0 to 0.99, got 1.0"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"norm": "mid"}, "norm must be one of .*post.*, got 'mid'"),
        ({"epochs": 2.5}, "epochs must be of type int"),
        ({"signed": 1}, "signed must be of type bool"),
        ({"task": "expression"}, "no setting 'task'"),
        ({"model": "cat"}, "model must be one of encoder-decoder, got 'cat'"),
        ({"learning_rat": 1.0}, "no setting 'learning_rat'"),
        ({"sampling": "hard"}, "sampling hard is for fresh problems"),
        ({"truncate": True, "zero_pad": True}, "takes no zero_pad"),
        ({"fresh": True, "leaky_split": True}, "held apart by construction"),
        ({"width": 10**9}, "width must be 1 to 16384, got 1000000000"),
        ({"hidden": 2**63}, "hidden must be 1 to 65536"),
        ({"width": 10**5_000}, "got a number of 16610 bits"),
        ({"encoder_layers": 10**9}, "must be 0 to 100"),
        ({"train_size": 10**9}, "train_size must be 1 to 10000000"),
        ({"norm": "n" * 10**5}, "got 'n*'... .100000 characters"),
        ({"learning_rate": math.inf}, "learning_rate must be 0 to 1000, got inf"),
        ({"weight_decay": math.inf}, "weight_decay must be 0 to 1000, got inf"),
        ({"weight_decay": 500}, "learning_rate times weight_decay, .* must be below 1, got 0.002 times 500"),
        ({"warmup_steps": 17}, "warmup_steps must be at most the 16 steps of the whole run, got 17"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_every_number_has_limits() -> None:
    for section in (*TASKS.values(), *MODELS.values(), TrainingConfig):
        for item in dataclasses.fields(section):
            assert item.type not in (int, float) or item.metadata["low"] < item.metadata["high"] < math.inf, item.name


def test_warm_up_of_a_preset_fits_a_shorter_run() -> None:
    assert PRESETS["formula"].training.warmup_steps == 200
    short = PRESETS["formula"].with_settings({"epochs": 2})
    assert short.training.warmup_steps == 16  # a tenth of 160
    assert short.with_settings({"processes": 1}).training.warmup_steps == 16
    assert PRESETS["formula"].with_settings({"epochs": 2, "warmup_steps": 150}).training.warmup_steps == 150


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "not of format 1"),
        ("[1]", "not of format 1"),
        ("[" * 100_000, "not JSON"),
        ('{"format": ' + "9" * 5_000 + "}", "not JSON"),
        ('{"format": 2}', "not of format 1"),
        ('{"format": 1, "data": 3}', "data must hold settings by name, got 3"),
        ('{"format": 1, "preset": null}', "preset must be of type str, got None"),
        ('{"format": 1, "data": {"task": "song"}}', "there is no task 'song' in this version of calcformer"),
        ('{"format": 1, "data": {"task": []}}', r"there is no task \[\] in this version of calcformer"),
        ('{"format": 1, "model": {"kind": "bag"}}', "there is no kind of model 'bag' in this version of calcformer"),
        ('{"format": 1, "colour": "red"}', "there is no setting 'colour' in this version of calcformer"),
        ('{"format": 1, "model": {"flux": 1}}', "there is no setting 'model.flux' in this version of calcformer"),
    ],
)
def test_other_json_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RunConfig.from_json(text)


@pytest.mark.parametrize("section", ["data", "model", "training"])
def test_a_key_that_an_older_version_did_not_write_takes_its_default(section: str) -> None:
    written = small(valid_size=7, heads=2, label_smoothing=0.25)
    content = json.loads(written.to_json())
    for name in list(content[section]):
        without = json.loads(json.dumps(content))
        del without[section][name]
        changes = {} if name == "task" else {name: getattr(type(written.sections[section]), name)}
        assert RunConfig.from_json(json.dumps(without)) == written.with_settings(changes), name
    del content[section], content["preset"]
    found = RunConfig.from_json(json.dumps(content))
    assert found == dataclasses.replace(written, preset="", **{section: type(written.sections[section])()})


def test_a_run_written_long_ago_is_read_and_continued(tmp_path: Path) -> None:
    """tests/golden/run as version 0.1.0 wrote it, then without what a still older version did not write."""
    shutil.copytree(Path(__file__).parent / "golden" / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    (answer,) = Solver(tmp_path / "run", "cpu").answers(["1+1"])
    assert answer.said == "227" and answer.probability == pytest.approx(0.00439156998156494)
    content = json.loads(path.read_text())
    del content["training"]["label_smoothing"], content["model"]["embeddings"], content["data"]["sampling"]
    content["training"]["epochs"] = 3
    path.write_text(json.dumps(content))
    assert load_run(tmp_path / "run")[3] == 2
    last = resume(tmp_path / "run", bar=False)
    assert last["epoch"] == 3 and last["valid_loss"] == pytest.approx(2.9341485500335693, rel=1e-5)
    path.write_text(json.dumps({**content, "data": {**content["data"], "colour": "red"}}))
    with pytest.raises(RunError, match="config.json cannot be used .there is no setting 'data.colour' in this version"):
        load_run(tmp_path / "run")


def test_presets_are_the_seeds() -> None:
    formula, expression = PRESETS["formula"], PRESETS["expression"]
    model = formula.model
    assert (model.encoder_layers, model.decoder_layers, model.width, model.heads, model.hidden) == (2, 2, 64, 4, 64)
    assert (formula.data.train_size, formula.training.epochs, formula.training.batch_size) == (10_000, 100, 125)
    assert (formula.model.dropout, formula.training.learning_rate) == (0.01, 2e-3)
    assert expression.data == Expressions(train_size=4_602, valid_size=15_000, data_seed=0)


# Metrics


@pytest.mark.parametrize("pad_id", [None, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_formula(pad_id: int | None, smoothing: float) -> None:
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    labels[0, 3:] = 3
    expected = 0.0
    for scores, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist()):
        if label == pad_id:
            continue
        total = math.log(sum(math.exp(score) for score in scores))
        losses = [total - score for score in scores]
        expected += (1 - smoothing) * losses[label] + smoothing * sum(losses) / 7
    assert token_loss(logits, labels, pad_id, smoothing).item() == pytest.approx(expected)


@pytest.mark.parametrize("pad_id", [None, 3])
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_loss_and_gradient_of_many_tokens_are_those_of_pytorch(pad_id: int | None, smoothing: float) -> None:
    labels = torch.randint(0, LARGE, (3, 5))
    labels[0, 3:] = 3
    exact = torch.randn(3, 5, LARGE, dtype=torch.float64).mul_(9)
    exact[1, 1].mul_(0.1)[labels[1, 1]] = -200.0  # next to no probability
    exact.requires_grad_()
    ignored = -100 if pad_id is None else pad_id
    options = {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": "sum"}
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), **options)
    for dtype, bound in (torch.float64, 1e-12), (torch.float32, 1e-6):
        scores = exact.detach().to(dtype).requires_grad_()
        loss = token_loss(scores, labels, pad_id, smoothing)
        assert loss.grad_fn is not None and "SmoothedLoss" in loss.grad_fn.name()
        torch.testing.assert_close(loss.double(), expected, rtol=bound, atol=0.0)
        for upstream in 1.0, 0.3:
            (found,) = torch.autograd.grad(loss, scores, torch.full_like(loss, upstream), retain_graph=True)
            (right,) = torch.autograd.grad(expected, exact, torch.full_like(expected, upstream), retain_graph=True)
            torch.testing.assert_close(found.double(), right, rtol=bound, atol=bound)


def test_totals_weigh_batches_by_their_tokens() -> None:
    totals = Totals(pad_id=0)
    right, wrong = torch.eye(4)[None], torch.eye(4).flip(1)[None]
    totals.add(torch.tensor(4.0), right, torch.tensor([[0, 1, 2, 0]]))  # two tokens, both right
    totals.add(torch.tensor(5.0), wrong, torch.tensor([[1, 0, 0, 0]]))  # one token, wrong
    assert totals.result() == pytest.approx((3.0, 2 / 3))


def test_evaluation_does_not_depend_on_the_batch_size_and_restores_training() -> None:
    torch.manual_seed(0)
    config = small()
    task = config.data.build()
    model = config.model.build(task).train()
    _, valid = task.split()
    whole, parts = (evaluate(model, valid, task.vocabulary.pad_id, size) for size in (29, 7))
    assert dataclasses.astuple(parts) == pytest.approx(dataclasses.astuple(whole))
    assert measure_answers(model, valid, task, 7) == measure_answers(model, valid, task, 29)
    assert whole.n == 29 and model.training


# Optimiser


def test_schedules() -> None:
    config = TrainingConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    rates = [optimizer.learning_rate(step, 12, config) for step in range(12)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(1.0) and rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    constant = TrainingConfig(learning_rate=2.0)
    assert {optimizer.learning_rate(step, 12, constant) for step in range(12)} == {2.0}


def test_weight_decay_spares_vectors() -> None:
    config = small(weight_decay=0.5)
    model = config.model.build(config.data.build())
    decayed, spared = optimizer.build_optimizer(model, config.training)[0].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    sizes = {matrix: sum(p.numel() for p in model.parameters() if (p.dim() > 1) == matrix) for matrix in (True, False)}
    assert (decayed["params"][0].numel(), spared["params"][0].numel()) == (sizes[True], sizes[False])


def test_small_parameters_are_parts_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "LARGE", 20)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7,), (3, 7), (2,))]
    before = [parameter.detach().clone() for parameter in parameters]
    parts = optimizer.flatten(parameters)
    assert [len(held) for _, held in parts] == [2, 1, 1] and parts[1][0] is parameters[2]
    assert torch.equal(parts[0][0].detach(), torch.cat([x.flatten() for x in before[:2]]))
    gradient = optimizer.Gradient(parts)
    for _ in range(2):  # it is written, not added up
        gradient.fill(sum(i * x.sum() for i, x in enumerate(parameters)))  # type: ignore[arg-type]
    assert [x.flatten().tolist() for x in gradient.tensors] == [[0.0] * 15 + [1.0] * 7, [2.0] * 21, [3.0] * 2]
    torch.optim.SGD([whole for whole, _ in parts], lr=1.0).step()
    for i, (parameter, old) in enumerate(zip(parameters, before)):
        torch.testing.assert_close(parameter.detach(), old - i)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_checkpoint_tells_nothing_of_which_parameters_are_large(
    decay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's state is written as if all of a group were one vector, as versions wrote it that made one of them."""
    config = small(weight_decay=decay)
    files = {large: tmp_path / str(large) / "resume.safetensors" for large in (1_000_000, 0)}
    for large, file in files.items():
        monkeypatch.setattr(optimizer, "LARGE", large)
        train(config, file.parent, bar=False)
    few, many = map(load_file, files.values())
    assert few.keys() == many.keys()
    for name in few:  # not the weights: Adam makes steps of what rounding leaves where a gradient is zero
        if name.startswith("exp_avg"):
            torch.testing.assert_close(few[name], many[name], rtol=1e-3, atol=1e-4)
    begun = trainer.Trainer(config, bar=False)
    assert len(begun.gradient.parts) > 10 and begun.load(files[1_000_000].parent) == config.training.epochs
    save_checkpoint(files[0].parent, begun.model, begun.optimizer, config.training.epochs)
    assert files[0].read_bytes() == files[1_000_000].read_bytes()


# Runs


@pytest.mark.slow
def test_learns_four_problems_by_heart(tmp_path: Path) -> None:
    config = small(
        train_size=4,
        batch_size=4,
        epochs=200,
        valid_every=200,
        width=32,
        heads=4,
        hidden=32,
        dropout=0.0,
        learning_rate=3e-3,
    )
    last = train(config, tmp_path / "run", bar=False)
    assert last["token_accuracy"] == 1.0 and last["loss"] < 0.05
    _, task, model, epoch = load_run(tmp_path / "run")
    assert epoch == 200 and measure_answers(model, task.split()[0], task) == {"exact_match": 1.0}


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if "exact_match" in preset.data.figures])
def test_run_folder_is_complete_and_can_be_loaded(preset: str, tmp_path: Path) -> None:
    config = small(preset, valid_every=3, exact_match_every=2)
    last = train(config, tmp_path / "run", bar=False)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "model.safetensors", "resume.safetensors"}
    entries = log_without_times(tmp_path / "run")
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4]
    assert ["valid_loss" in entry for entry in entries] == [False, False, True, True]
    assert ["exact_match" in entry for entry in entries] == [False, True, False, True]
    loaded, task, model, _ = load_run(tmp_path / "run")
    assert loaded == config and not model.training
    score = evaluate(model, task.split()[1], task.vocabulary.pad_id)
    assert (score.loss, score.token_accuracy) == pytest.approx((last["valid_loss"], last["valid_token_accuracy"]))


@pytest.mark.parametrize("moment", ["in the third epoch", "before the third epoch is saved", "before the first epoch"])
def test_killed_run_continues_to_the_same_numbers(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(schedule="cosine", warmup_steps=3, weight_decay=0.1, clip_norm=1.0, label_smoothing=0.1)
    train(config, tmp_path / "whole", bar=False)
    steps = 0

    def step(trainer: loop.Trainer, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == (10 if moment == "in the third epoch" else 1):
            raise KeyboardInterrupt
        whole_step(trainer, *args)

    def save(folder: Path, model: Any, optimizer: Any, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        whole_save(folder, model, optimizer, epoch)

    whole_step, whole_save = loop.Trainer.step, trainer.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment.endswith("saved"):
            patch.setattr(trainer, "save_checkpoint", save)
        else:
            patch.setattr(loop.Trainer, "step", step)
        train(config, tmp_path / "killed", bar=False)
    finished = 0 if moment == "before the first epoch" else 2
    assert finished_epochs(tmp_path / "killed") == finished
    resume(tmp_path / "killed", bar=False)
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")
    for name in "model.safetensors", "resume.safetensors":
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Several processes


def test_a_process_that_waits_sleeps() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        alone = team.SharedMemoryTeam(0, torch.zeros(2, 2, 1), [ours])
        threading.Timer(0.5, lambda: theirs.send(b"+")).start()
        used, started = time.process_time(), time.monotonic()
        alone.meet()
        assert time.monotonic() - started > 0.4 and time.process_time() - used < 0.1
        theirs.close()
        with pytest.raises(team.TeamLost):
            alone.meet()


def test_parts_of_a_batch_are_the_batch() -> None:
    batch = small().data.build().split()[0]
    parts = [batch.part(rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [20, 20, 21]
    assert torch.equal(torch.cat([part.source for part in parts]), batch.source)
    assert torch.equal(torch.cat([part.target for part in parts]), batch.target)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes share memory as Linux and macOS do it")
def test_processes_train_as_one_would(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "dropout": 0.0,
        "clip_norm": 0.5,
        "label_smoothing": 0.1,
        "exact_match_every": 2,
        "batch_size": 3,
    }
    last = train(small(**settings), tmp_path / "one", bar=False)
    shared = train(small(processes=2, **settings), tmp_path / "two", bar=False)  # the last batch has one problem
    for name in "loss", "token_accuracy", "valid_loss", "valid_token_accuracy", "exact_match":
        assert shared[name] == pytest.approx(last[name], rel=1e-4), name
    (_, _, one, _), (_, _, two, _) = load_run(tmp_path / "one"), load_run(tmp_path / "two")
    for mine, theirs in zip(two.parameters(), one.parameters()):
        if mine.dim() > 1:  # of biases, those of keys have no gradient but rounding, which Adam makes steps of
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes share memory as Linux and macOS do it")
def test_lost_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_epoch, started = loop.Trainer.epoch, []

    def start(*args: Any, **options: Any) -> Popen[bytes]:
        started.append(Popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(worker.subprocess, "Popen", start)

    def epoch(trainer: loop.Trainer, number: int) -> dict[str, Any]:
        if number == 2:
            started[0].kill()
        return whole_epoch(trainer, number)

    monkeypatch.setattr(loop.Trainer, "epoch", epoch)
    with pytest.raises(ValueError, match="a training process ended before its time.*--resume .*run"):
        train(small(processes=2), tmp_path / "run", bar=False)
    assert finished_epochs(tmp_path / "run") == 1 and started[0].poll() is not None


def test_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    last = train(small(epochs=1), tmp_path / "run", bar=False)
    assert resume(tmp_path / "run", bar=False) == last


def test_training_leaves_the_generator_and_threads_alone(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(small(epochs=1, threads=threads + 1), tmp_path / "run", bar=False)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads


def test_seed_decides(tmp_path: Path) -> None:
    losses = [
        train(small(epochs=1, seed=seed), tmp_path / name, bar=False)["loss"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_size": 10_000, "valid_size": 100}, "cannot be held out"),
        ({"device": "cuda:99"}, "is not here"),
        ({"device": "tpu9"}, "device must be auto"),
        ({"device": ""}, "device must be auto"),
        ({"device": "cpu\0"}, "device must be auto"),
        ({"processes": 1024}, "this would keep 1024 CPU cores busy and there are [0-9]+; lower --processes"),
        ({"threads": 1024}, "this would keep 1024 CPU cores busy and there are [0-9]+; lower --processes or --threads"),
        ({"width": 16_383, "encoder_layers": 100, "hidden": 65_536}, "GB of memory and .* GB are free; lower --width"),
        ({"fresh": True, "held_out": 0.001}, "leaves too few to hold out: 29 are not found in 100,000,000 draws"),
    ],
)
def test_nothing_is_written_for_a_run_that_cannot_start(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        train(small(**changes), tmp_path / "run", bar=False)
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already exists"):
        train(small(), tmp_path, bar=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_divergence_is_said_and_the_last_good_epoch_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "learning_rate", lambda step, steps, training: 1e30 if step > 7 else 1e-3)
    with pytest.raises(ValueError, match="became infinite or NaN in epoch 3, which is not saved; lower --learning"):
        train(small(), tmp_path / "run", bar=False)
    assert [entry["epoch"] for entry in RunLog(tmp_path / "run" / "metrics.jsonl").read()] == [1, 2]
    _, _, model, _ = load_run(tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_weights_that_are_no_numbers_end_a_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_measure = loop.Trainer.measure

    def measure(trainer: loop.Trainer, *args: Any, **options: Any) -> dict[str, Any]:
        entry = whole_measure(trainer, *args, **options)
        with torch.no_grad():
            next(iter(trainer.optimizer.param_groups[0]["params"]))[5] = math.inf
        return entry

    monkeypatch.setattr(loop.Trainer, "measure", measure)
    with pytest.raises(ValueError, match="the weights became infinite or NaN in epoch 1, which is not saved"):
        train(small(), tmp_path / "run", bar=False)
    assert load_run(tmp_path / "run")[3] == 0 and (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_bar_shows_loss_accuracy_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(), tmp_path / "run", bar=True)
    shown = capsys.readouterr().err
    assert re.search(r"4/4 loss \d\.\d{4} exact \d\.\d{4}: 100% 00:00 left, accuracy 0\.\d{4} .*ex/s", shown)
    assert re.search(r"2/4 loss \d\.\d{4} held out 0\.\d{4}: 50% ", shown) and "2/4 loss" in shown
    assert "1/4 loss" in shown and " measuring: " in shown


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (20, r"4/4 loss \d\.\d{4} "),
        (44, r"4/4 loss \d\.\d{4} exact \d\.\d{4}: 100% 00:00 l"),
        (80, r"4/4 loss .* left, accuracy 0\.\d{4}.*ex/s"),
    ],
)
def test_narrow_terminals_show_what_matters_first(
    columns: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 20))
    train(small(), tmp_path / "run", bar=True)
    frames = re.split(r"[\r\n]", capsys.readouterr().err)
    bars = [frame for frame in frames if re.match("[1-4]/4 ", frame)]
    assert bars and all(len(bar) <= columns for bar in bars) and any(re.match(expected, bar) for bar in bars)


def test_the_first_line_says_what_is_trained_and_where_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(), tmp_path / "run", bar=False)
    parameters = sum(parameter.numel() for parameter in load_run(tmp_path / "run")[2].parameters())
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"{tmp_path / 'run'}: {parameters:,} parameters; 61 formulas an epoch, 29 held out; cpu, 1 process"


LOGS = {
    "empty": lambda lines: [],
    "objects": lambda lines: [b"{}", b"[1]", b"7", *lines],
    "texts": lambda lines: [b'{"epoch": "one", "loss": "low"}', b'{"epoch": 3, "loss": "low"}', *lines],
    "binary": lambda lines: [b"\xff\xfe\x00", *lines],
    "nested": lambda lines: [b"[" * 100_000, *lines],
    "garbled": lambda lines: [lines[0], lines[1][:20], *lines[2:]],
    "large": lambda lines: [b'{"epoch": 1' + b"0" * 301 + b"}", b'{"epoch": 2, "loss": 1e999, "seconds": NaN}', *lines],
    "untrue": lambda lines: [b'{"epoch": 3, "loss": -1, "exact_match": 9, "valid_loss": 1e300}', *lines],
    "another line of an epoch": lambda lines: [*lines, *([b'{"epoch": 4, "seconds": "5"}'] if len(lines) == 4 else [])],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run that is finished, and one that was stopped after 3 of its 4 epochs."""
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in ("finished", "unfinished")}

    def epoch(trainer: loop.Trainer, number: int) -> dict[str, Any]:
        if number == 4:
            raise KeyboardInterrupt
        return whole_epoch(trainer, number)

    whole_epoch = loop.Trainer.epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        train(small(), folders["finished"], bar=False)
        patch.setattr(loop.Trainer, "epoch", epoch)
        with pytest.raises(KeyboardInterrupt):
            train(small(), folders["unfinished"], bar=False)
    return folders


@pytest.mark.parametrize("damage", LOGS)
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_log_by_other_hands_harms_nothing(damage: str, state: str, ended: dict[str, Path], tmp_path: Path) -> None:
    whole, folder = RunLog(ended["finished"] / "metrics.jsonl").read()[-1], tmp_path / "run"
    shutil.copytree(ended[state], folder)
    path = folder / "metrics.jsonl"
    lines = LOGS[damage](path.read_bytes().splitlines())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    last = resume(folder, bar=False)
    for name in "exact_match", "valid_loss", "valid_token_accuracy":
        assert last[name] == whole[name]
    left = path.read_bytes().splitlines()
    assert [line for line in left if line in lines] == lines  # nothing that stood there is gone
    assert RunLog(path).read()[-1]["epoch"] == 4
    assert resume(folder, bar=False)["exact_match"] == whole["exact_match"]


# Files


@pytest.mark.skipif(os.name != "posix", reason="folders are held as POSIX has it")
def test_one_process_writes_a_run_at_a_time(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calcformer.runs.files.PATIENCE", 0.1)
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with hold(folder), pytest.raises(ValueError, match=f"{folder} is being written by another process; wait for it"):
        resume(folder, bar=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    resume(folder, bar=False)
    holder = Popen(
        [
            sys.executable,
            "-c",
            "import sys; from calcformer.runs.files import hold\n"
            "with hold(sys.argv[1]): print('held', flush=True); sys.stdin.read()",
            str(folder),
        ],
        stdin=PIPE,
        stdout=PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="is being written"):
        resume(folder, bar=False)
    holder.kill()
    holder.communicate()
    resume(folder, bar=False)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        folder = tmp_path_factory.mktemp("trained") / "run"
        train(small(epochs=1), folder, bar=False)
    return folder


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"", "is damaged"),
        ("model.safetensors", 5_000, "is damaged"),
        ("config.json", b"{}", "not of format 1"),
        ("config.json", b"\xff\xfe", "config.json cannot be used"),
        ("config.json", None, "has no config.json"),
    ],
    ids=["no weights", "empty weights", "cut weights", "old config", "binary config", "no config"],
)
def test_damaged_runs_are_refused_in_one_line(
    name: str, content: Any, match: str, trained: Path, tmp_path: Path
) -> None:
    path = copy(trained, tmp_path / "run") / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(RunError, match=match) as caught:
        load_run(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(trained: Path, tmp_path: Path) -> None:
    run = copy(trained, tmp_path / "run")
    (run / "config.json").write_text(small(epochs=1, hidden=13).to_json())
    with pytest.raises(RunError, match="does not fit the model of its config.json.*feed_forward"):
        load_run(run)


def test_run_log_drops_an_unfinished_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    for epoch in 1, 2, 3:
        log.append({"epoch": epoch})
    with log.path.open("a") as file:
        file.write('{"epoch": 4, "lo')
    assert [entry["epoch"] for entry in log.read()] == [1, 2, 3]
    log.rewind(2)
    log.append({"epoch": 3, "again": 1})
    assert log.read() == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3, "again": 1}]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)
    write_atomically(tmp_path / "pipe", b"page")
    assert (tmp_path / "pipe").is_fifo() and os.read(descriptor, 100) == b"page"
    os.close(descriptor)


def test_curve_is_drawn_each_epoch_unless_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, str]] = []
    now = 0.0

    def draw(entries: list[dict[str, Any]], title: str, *_: object) -> bool:
        nonlocal now
        now += cost
        drawn.append((entries[-1]["epoch"], title))
        return True

    monkeypatch.setattr(trainer, "save_curve", draw)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now)
    for cost, expected in (0.4, [1, 2, 3, 4, 5, 6]), (1.0, [1, 4]):  # seconds, of epochs of ten
        drawn.clear()
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        log, curve = RunLog(tmp_path / "metrics.jsonl"), trainer.Curve(tmp_path, small().data)
        for epoch in range(1, 7):
            now += 10
            log.append({"epoch": epoch})
            curve.draw()
        assert drawn == [(epoch, str(tmp_path)) for epoch in expected]


def test_bleu_of_a_curve_lies_between_0_and_100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("calcformer.plots._save", lambda figure, path: figures.append(figure))
    for bleu in 100.0, 40.0:
        entries = [{"epoch": epoch, "loss": 1.0 / epoch, "bleu": bleu, "chrf": bleu} for epoch in (1, 2)]
        assert save_curve(entries, "runs/translate-1", tmp_path / "curve.png")
    limits = [figure.axes[2].get_ylim() for figure in figures]
    assert figures[0].axes[2].get_title() == "BLEU and chrF"
    assert limits[0] == (0, 103) and limits[1][0] == 0 and 40 < limits[1][1] < 60


def test_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries = [
        {"epoch": 1, "loss": 2.0, "token_accuracy": 0.3},
        {"epoch": 2, "loss": 1.0, "token_accuracy": 0.6, "valid_loss": 1.5, "exact_match": 0.1},
    ]
    assert save_curve(entries, "runs/formula-1", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Losses without a logarithm, as of a text of one letter: no warning, which would be an error here.
    assert save_curve([{"epoch": epoch, "loss": 0.0} for epoch in (1, 2)], "runs/text-1", tmp_path / "zero.png")

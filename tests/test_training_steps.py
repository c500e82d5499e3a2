"""How steps are taken: precision, compilation, CUDA graphs; and what TensorBoard is told of them."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calcformer.config import PRESETS, RunConfig
from calcformer.runs.run_log import RunLog
from calcformer.training import resume, train, trainer
from calcformer.training.cuda_graph import CudaRecorder, GraphedSteps, Recorder
from calcformer.training.trainer import Trainer

# 59 problems in batches of 5: eleven whole batches and one of four. The rate is a float32 number, as a GPU takes it.
BATCH, EPOCHS = 5, 5
SMALL = {
    "complexity": 1,
    "train_size": 59,
    "valid_size": 23,
    "width": 12,
    "heads": 3,
    "hidden": 11,
    "dropout": 0.05,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "learning_rate": 2**-7,
    "schedule": "constant",
    "warmup_steps": 0,
    "clip_norm": 0.5,
    "weight_decay": 0.1,
    "device": "cpu",
    "processes": 1,
}

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


def small(**changes: Any) -> RunConfig:
    return PRESETS["formula"].with_settings({**SMALL, **changes})


# Precision and compilation


def test_bfloat16_is_near_float32_and_keeps_its_weights(tmp_path: Path) -> None:
    losses = {
        precision: train(small(precision=precision, dropout=0.0), tmp_path / precision, bar=False)["loss"]
        for precision in ("float32", "bfloat16")
    }
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02) and len(set(losses.values())) == 2
    assert {value.dtype for value in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.long
def test_compiled_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as always; only the machine code, which takes a minute to make, is left out.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = {"dropout": 0.0, "weight_decay": 0.0, "epochs": 2}
    plain = train(small(**settings), tmp_path / "plain", bar=False)
    compiled = train(small(compile=True, **settings), tmp_path / "compiled", bar=False)
    for name in "loss", "token_accuracy", "valid_loss":
        assert compiled[name] == pytest.approx(plain[name], rel=1e-4), name
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    assert resume(tmp_path / "compiled", bar=False) == compiled


def test_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*_: Any) -> None:
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_nothing))
    with pytest.raises(ValueError, match=r"does not work here \(no C.. compiler was found\); leave out --compile$"):
        train(small(compile=True), tmp_path / "run", bar=False)


# CUDA graphs


def trainer_for(folder: Path, graphed: Callable[[Trainer], Recorder] | None = None, **changes: Any) -> Trainer:
    """A trainer that takes its steps one by one, or as graphs of this recorder."""
    made = Trainer(small(**changes), bar=False)
    folder.mkdir()
    made.begin(folder)
    if graphed is not None:
        made.graphed_steps = GraphedSteps(made.step, BATCH, graphed(made))
    return made


def assert_same_training(one: Trainer, other: Trainer, rtol: float, atol: float) -> None:
    for epoch in range(1, EPOCHS + 1):
        left, right = one.epoch(epoch), other.epoch(epoch)
        for name in "loss", "token_accuracy", "valid_loss":
            assert left[name] == pytest.approx(right[name], rel=rtol, abs=0), (epoch, name)
    for mine, theirs in zip(one.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


class Counting(Recorder):
    """Keeps what is recorded to call it again, as a graph is replayed; counts both."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.mark.parametrize("fresh", [False, True], ids=["fixed problems", "fresh problems"])
def test_what_is_captured_is_the_ordinary_step(fresh: bool, tmp_path: Path) -> None:
    recorder = Counting()
    plain = trainer_for(tmp_path / "plain", fresh=fresh)
    graphed = trainer_for(tmp_path / "graphed", lambda _: recorder, fresh=fresh)
    assert_same_training(graphed, plain, rtol=0, atol=0)
    # Of eleven batches the first epoch takes three one by one and replays eight at once; the others replay eight and
    # three. The last, smaller batch is taken as it is in three epochs and replayed in two.
    assert (recorder.recorded, recorder.replayed) == (3, 1 + 4 * (1 + 3) + 2)


def test_graphed_steps_count_what_they_take() -> None:
    batches: list[tuple[int, float]] = []
    steps = GraphedSteps(lambda batch, rate: batches.append((len(batch), rate.item())), 4, Recorder())
    examples = Trainer(small(train_size=43), bar=False).train_examples
    rates = [2.0**-step for step in range(11)]
    assert list(steps(examples, rates)) == [4, 4, 4] + [4] * 7 + [3]
    assert list(steps(examples, rates)) == [32, 4, 4, 3]
    assert batches == 2 * ([(4, rate) for rate in rates[:-1]] + [(3, rates[-1])])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed problems", "fresh problems"])
def test_graph_trains_as_eager_steps_do(fresh: bool, precision: str, tmp_path: Path) -> None:
    settings = {"device": "cuda", "fresh": fresh, "precision": precision}
    eager = trainer_for(tmp_path / "eager", lambda _: Recorder(), **settings)
    graphed = trainer_for(tmp_path / "graphed", lambda made: CudaRecorder(made.device, made.optimizer), **settings)
    assert_same_training(graphed, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it does not see every wait
def test_gpu_run_takes_graphs_and_waits_nowhere_in_a_step(tmp_path: Path) -> None:
    made = Trainer(small(device="cuda"), bar=False)
    made.begin(tmp_path)
    assert isinstance(made.graphed_steps, GraphedSteps)
    made.epoch(1)  # warms up, captures
    examples, rates = made.train_examples, [2**-7] * made.steps_per_epoch
    made.graphed_steps._fill(examples, rates)
    try:
        torch.cuda.set_sync_debug_mode("error")
        made.graphed_steps._graphs[8, 5]()
        made.graphed_steps._take(1, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_run_moves_between_devices(first: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"dropout": 0.0, "weight_decay": 0.0}
    whole = train(small(device=then, **settings), tmp_path / "whole", bar=False)
    save = trainer.save_checkpoint

    def stop(*arguments: Any) -> None:
        save(*arguments)
        if arguments[3] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_checkpoint", stop)
        train(small(device=first, **settings), tmp_path / "moved", bar=False)
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["training"]["device"] = then
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert resume(tmp_path / "moved", bar=False)["loss"] == pytest.approx(whole["loss"], rel=1e-3)


# TensorBoard


def test_tensorboard_shows_the_log_also_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )

    save = trainer.save_checkpoint

    def die(*arguments: Any) -> None:
        if arguments[3] == 3:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "save_checkpoint", die)
        train(small(tensorboard=True, valid_every=2), tmp_path, bar=False)
    resume(tmp_path, bar=False)
    shown = reading.EventAccumulator(str(tmp_path)).Reload()
    entries = RunLog(tmp_path / "metrics.jsonl").read()
    names = {name for entry in entries for name in entry} - {"epoch"}
    assert set(shown.Tags()["scalars"]) == names >= {"loss", "valid_loss", "exact_match", "learning_rate"}
    for name in names:
        logged = [(entry["epoch"], pytest.approx(entry[name])) for entry in entries if name in entry]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == logged, name


def test_missing_tensorboard_is_one_line_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="needs the package tensorboard; install it with") as caught:
        train(small(tensorboard=True), tmp_path / "run", bar=False)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []

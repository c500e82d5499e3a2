"""Training under torchrun: two processes that sum their gradients through gloo, on one machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import distributed

import calcformer
from calcformer.config import PRESETS
from calcformer.runs.checkpoint import load_run
from calcformer.runs.device import pick_device
from calcformer.runs.folder import finished_epochs
from calcformer.runs.run_log import RunLog
from calcformer.training import resume, train

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")


# An epoch is one step on 31 problems: 15 of them for one process, 16 for the other.
SMALL = {
    "complexity": 1,
    "train_size": 31,
    "valid_size": 23,
    "width": 12,
    "heads": 3,
    "hidden": 11,
    "dropout": 0.0,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "batch_size": 31,
    "epochs": 6,
    "clip_norm": 0.5,
    "device": "cpu",
}
FLAGS = [
    "--preset",
    "formula",
    *(word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))),
]
LIMIT = 300  # seconds for a command, nearly all of them to start three Pythons beside other work

# The command, but for one of the processes, which is killed where it would finish its third epoch.
KILLED = """
import os, signal, sys
from calcformer.cli import main
from calcformer.training.trainer import Trainer
whole = Trainer.epoch
def epoch(self, number):
    if number == 3 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, number)
Trainer.epoch = epoch
sys.exit(main(sys.argv[2:]))
"""


def torchrun(*words: object, module: bool = True) -> subprocess.CompletedProcess[str]:
    """Two processes of a module, or of a program, with a port of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(calcformer.__file__).parents[1]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
        *(["-m"] if module else []),
        *map(str, words),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)


def losses(folder: Path) -> list[float]:
    return [entry[name] for entry in RunLog(folder / "metrics.jsonl").read() for name in ("loss", "valid_loss")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of two processes, and what they said."""
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    return folder, torchrun("calcformer", "train", "--out", folder, *FLAGS)


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_of_them_speaks(
    trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, said = trained
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("\n") == 1 and said.stdout.startswith(f"{folder}: exact match")
    assert said.stderr.count("epoch 6/6") == 1
    assert load_run(folder)[0].training.processes == 2
    train(PRESETS["formula"].with_settings({**SMALL, "processes": 1}), tmp_path / "one", bar=False)
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_dead_process_ends_the_others_and_the_run_continues(
    rank: int, trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    whole, program = trained[0], tmp_path / "killed.py"
    program.write_text(KILLED)
    folder, started = tmp_path / "run", time.monotonic()
    said = torchrun(program, rank, "train", "--out", folder, *FLAGS, module=False)
    assert said.returncode != 0 and time.monotonic() - started < LIMIT
    assert finished_epochs(folder) == 2
    if rank == 1:
        resumed = torchrun("calcformer", "train", "--resume", folder)
        assert resumed.returncode == 0, resumed.stderr
    else:  # by as many processes of another kind
        resume(folder, bar=False)
    assert losses(folder) == losses(whole)
    for name, value in load_file(folder / "model.safetensors").items():
        assert value.equal(load_file(whole / "model.safetensors")[name]), name


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert pick_device("cuda").index == 1 and pick_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device cuda:2 is not here .2 GPUs found.; use --device cpu, or fewer proc"):
        pick_device("cuda")


def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    settings: dict[str, Any] = {**SMALL, "epochs": 1}
    with pytest.raises(ValueError, match="that torchrun started cannot meet .*MASTER_ADDR") as caught:
        train(PRESETS["formula"].with_settings(settings), tmp_path / "run", bar=False)
    assert "\n" not in str(caught.value)

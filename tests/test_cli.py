"""The command, as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import calcformer
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.solver import Solver
from calcformer.training import loop, train

TINY = ["--complexity", "1", "--train-size", "50", "--valid-size", "20", "--width", "8", "--heads", "2",
        "--hidden", "8", "--encoder-layers", "1", "--decoder-layers", "1", "--epochs", "2", "--batch-size", "25",
        "--device", "cpu", "--processes", "1"]

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A barely trained run of each task."""
    tiny = {"train_size": 50, "valid_size": 20, "width": 8, "heads": 2, "hidden": 8, "epochs": 1, "device": "cpu",
            "processes": 1}
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        for name, preset in PRESETS.items():
            train(preset.with_settings(tiny), folder / name, bar=False)
    return {name: folder / name for name in PRESETS}


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail; returns its one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == "" and captured.err.startswith("calcformer: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_train_evaluate_solve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "formula", *TINY]) == 0
    assert "runs/formula-1: exact match" in capsys.readouterr().out
    assert main(["evaluate", "runs/formula-1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = json.loads(Path("runs/formula-1/metrics.jsonl").read_text().splitlines()[-1])
    assert result.keys() >= {"exact_match", "token_accuracy", "loss", "n", "checkpoint", "preset"}
    assert (result["n"], result["preset"], result["epoch"]) == (20, "formula", 2)
    assert result["loss"] == pytest.approx(last["valid_loss"]) and result["exact_match"] == last["exact_match"]
    assert Path(result["checkpoint"]).is_file()
    assert main(["solve", "-9-8", "3+4"]) == 0  # the newest run in runs/
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_evaluate_in_words(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs["expression"])]) == 0
    assert "20 held-out problems: exact match 0." in capsys.readouterr().out


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--norm", "pre", "--no-signed", "--learning-rate", "0.25", "--data-seed", "7", "--positions", "learned"]
    assert main(["train", "--out", "run", *TINY, *flags]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert (config["model"]["norm"], config["model"]["positions"]) == ("pre", "learned")
    assert config["data"]["signed"] is False
    assert (config["training"]["learning_rate"], config["data"]["data_seed"]) == (0.25, 7)


def test_solves_expressions_with_and_without_marks(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = "NEGATIVE 30 subtract NEGATIVE 34"
    assert main(["solve", "--run", str(runs["expression"]), words, f"BOS {words} EOS"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_package_door(runs: dict[str, Path]) -> None:
    solver = calcformer.load(runs["formula"])
    questions = ["12+7", "-940-819", "1-1", "1000+1000"]
    answers = solver.solve(questions)
    assert isinstance(solver, Solver) and len(answers) == 4
    assert answers == [answer for question in questions for answer in solver.solve([question])]
    assert solver.solve(questions, batch_size=3) == answers
    with pytest.raises(TypeError, match="list of strings"):
        solver.solve("12+7")


@pytest.mark.parametrize(("words", "match"), [
    (["train", "--preset", "sums"], "'sums' (choose from"), (["train", "--heads", "3"], "width 64 and 3 heads"),
    (["train", "--epochs", "many"], "invalid int value: 'many'"), (["train", "--wings", "2"], "--wings"),
    (["train", "--preset", "expression", "--complexity", "2"], "complexity is a setting of formulas"),
    (["train", "--train-size", "0"], "train_size must be 1 or more, got 0"),
    (["train", "--device", "cuda:99"], "cuda:99 is not here"),
    (["train", "--resume", "nowhere"], "no run folder nowhere"),
    (["train", "--resume", "nowhere", "--epochs", "3"], "leave out --epochs"),
    (["evaluate", "nowhere"], "no run folder nowhere"), (["solve", "1+1"], "no trained run in runs/"),
    (["solve"], "required: PROBLEM"), ([], "required: COMMAND"), (["sing"], "invalid choice: 'sing'"),
], ids=lambda value: "-".join(value[:4]) if isinstance(value, list) else "")
def test_wrong_input_is_one_line_and_writes_nothing(words: list[str], match: str, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert match in fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("task", "question", "match"), [
    ("formula", "12+x7", "'x' at place 4"), ("formula", "12+7777", "7777 is longer than this run was trained for"),
    ("formula", "-12", "not of the form"), ("expression", "12+7", "is not a word this run knows"),
])
def test_wrong_problems_are_one_line(task: str, question: str, match: str, runs: dict[str, Path],
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert match in fails(capsys, "solve", "--run", runs[task], question)


def test_damaged_run_is_one_line(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((runs["formula"] / "config.json").read_bytes())
    (damaged / "model.safetensors").write_bytes((runs["formula"] / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors is damaged" in fails(capsys, "evaluate", damaged)
    assert "already exists" in fails(capsys, "train", "--out", damaged)


def test_interrupt_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = loop.Trainer.epoch

    def epoch(trainer: loop.Trainer, number: int) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return whole(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "epoch", epoch)
        assert main(["train", "--out", "run", *TINY]) == 130
    assert "stopped after epoch 1; continue with: calcformer train --resume run" in capsys.readouterr().err
    assert main(["train", "--resume", "run"]) == 0
    assert "run: exact match" in capsys.readouterr().out


def test_control_c_in_a_real_process(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "calcformer", "train", "--out", "run", *TINY, "--epochs", "100000"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(calcformer.__file__).parents[1])}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("run/metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: calcformer train --resume run" in errors and "Traceback" not in errors


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ["--version"], ["--help"], ["train", "--help"]:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    assert f"calcformer {calcformer.__version__}" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; import calcformer.cli; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(calcformer.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0

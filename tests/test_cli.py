"""The command, as a user types it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import calcformer
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.solver import Solver
from calcformer.training import loop, train
from tests.pictures import is_picture

CALCULATORS = [name for name, preset in PRESETS.items() if "exact_match" in preset.data.figures]
TINY = [
    "--preset",
    "formula",
    "--complexity",
    "1",
    "--train-size",
    "50",
    "--valid-size",
    "20",
    "--width",
    "8",
    "--heads",
    "2",
    "--hidden",
    "8",
    "--encoder-layers",
    "1",
    "--decoder-layers",
    "1",
    "--epochs",
    "2",
    "--batch-size",
    "25",
    "--device",
    "cpu",
    "--processes",
    "1",
]

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


ARITHMETIC = {name: preset for name, preset in PRESETS.items() if preset.data.task in ("formula", "expression")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A barely trained run of each preset that calculates."""
    tiny = {
        "train_size": 50,
        "valid_size": 20,
        "width": 8,
        "heads": 2,
        "hidden": 8,
        "epochs": 1,
        "device": "cpu",
        "processes": 1,
    }
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        for name, preset in ARITHMETIC.items():
            train(preset.with_settings(tiny), folder / name, bar=False)
    return {name: folder / name for name in ARITHMETIC}


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail; returns its one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == "" and captured.err.startswith("calcformer: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_train_evaluate_solve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY]) == 0
    assert "runs/formula-1: exact match" in capsys.readouterr().out
    assert main(["evaluate", "runs/formula-1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = json.loads(Path("runs/formula-1/metrics.jsonl").read_text().splitlines()[-1])
    assert result.keys() >= {"exact_match", "token_accuracy", "loss", "n", "checkpoint", "preset"}
    assert (result["n"], result["preset"], result["epoch"]) == (20, "formula", 2)
    assert result["loss"] == pytest.approx(last["valid_loss"]) and result["exact_match"] == last["exact_match"]
    assert Path(result["checkpoint"]).is_file()
    assert main(["solve", "-9-8", "3+4"]) == 0  # the newest run in runs/
    captured = capsys.readouterr()
    assert [line.split(" = ")[0] for line in captured.out.splitlines()] == ["-9-8", "3+4"]
    assert captured.err == "answered by runs/formula-1, epoch 2 of 2\n"


def typed(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put text into standard input, which is then no terminal."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_answers_say_how_probable_they_are_and_whether_they_are_right(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, questions = str(runs["formula"]), ["12+7", "-940-819", "5-5"]
    assert main(["solve", "--run", run, *questions]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["solve", "--run", run, "--json", *questions]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["preset"], found["epoch"], found["epochs"]) == (run, "formula", 1, 1)
    solver = calcformer.load(run)
    said = solver.solve(questions)
    for line, answer, question, words in zip(lines, found["answers"], questions, said):
        right = str(eval(question))
        assert (answer["problem"], answer["said"], answer["expected"]) == (question, words, right)
        assert answer["right"] == (words == right) and 0 < answer["probability"] < 1
        verdict = "right" if words == right else f"wrong, {right} is right"
        assert line == f"{question} = {words}  (probability {answer['probability']:.4f}, {verdict})"
    # The probability is the product over the tokens said, of what the model gives to each after those before.
    ids, vocabulary = solver.task.vocabulary.encode(said[0]), solver.task.vocabulary
    source = torch.tensor([[*vocabulary.encode("12+7"), vocabulary.eos_id]])
    chance, read = 1.0, [vocabulary.bos_id]
    for token in [*ids, vocabulary.eos_id][: solver.task.target_length - 1]:
        with torch.no_grad():
            chance *= float(solver.model(source, torch.tensor([read]))[0, -1].double().softmax(0)[token])
        read.append(token)
    assert found["answers"][0]["probability"] == pytest.approx(chance, rel=1e-4)


def test_right_answers_are_called_right(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    solver = calcformer.load(runs["formula-best"])
    form = solver.task.form
    examples = form.encode(torch.tensor([12, 5]), torch.tensor([7, 5]), torch.tensor([True, False]))
    monkeypatch.setattr("calcformer.data.task.decode", lambda *_: examples.labels)
    for questions, is_right in ((["12+7", "5-5"], True), (["12+8", "5-6"], False)):
        answers = solver.answers(questions)
        assert [(answer.said, answer.is_right) for answer in answers] == [("19", is_right), ("0", is_right)]


def test_problems_from_standard_input_or_a_file(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = str(runs["formula"]), b"12+7\n\n -940 - 819 \r\n1+1"
    assert main(["solve", "--run", run, "12+7", "-940-819", "1+1"]) == 0
    expected = capsys.readouterr().out
    Path("problems.txt").write_bytes(text)
    assert main(["solve", "--run", run, "--input", "problems.txt"]) == 0
    assert capsys.readouterr().out == expected
    for words in [], ["--input", "-"]:
        typed(text, monkeypatch)
        assert main(["solve", "--run", run, *words]) == 0
        assert capsys.readouterr().out == expected
    Path("problems.txt").write_bytes(b"\xef\xbb\xbf" + text)  # as some editors begin a file
    assert main(["solve", "--run", run, "--input", "problems.txt"]) == 0
    assert capsys.readouterr().out == expected
    Path("problems.txt").write_bytes(b"1+1\f\n\n2+\xff\n")
    assert "problems.txt, line 3: formula '2+" in fails(capsys, "solve", "--run", run, "--input", "problems.txt")
    typed(b"\n", monkeypatch)
    assert "no problem was given" in fails(capsys, "solve", "--run", run)


def test_weights_too_large_for_numbers_are_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs["formula"], tmp_path / "large")
    path = tmp_path / "large" / "model.safetensors"
    save_file({name: value * 1e35 for name, value in load_file(path).items()}, path, {"epoch": "1"})
    assert "its weights are so large that a probability is no number" in fails(capsys, "solve", "--run", "large", "1+1")
    assert "its weights are so large that its loss is no number" in fails(capsys, "evaluate", "large", "--json")


@pytest.mark.parametrize("quits", [True, False])
def test_prompt_answers_until_the_input_ends(
    quits: bool, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(b"", monkeypatch)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    lines = iter(["12+7", "", "12+x", "1+1", *([" quit ", "2+2"] if quits else [])])

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert main(["solve", "--run", str(runs["formula"])]) == 0
    captured = capsys.readouterr()
    assert [line.split(" = ")[0] for line in captured.out.splitlines()] == ["12+7", "1+1"]
    assert "formula '12+x': 'x' at place 4 is not a digit" in captured.err


def test_the_run_that_is_asked_knows_the_problem_and_is_finished(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def put(preset: str, name: str, age: int) -> Path:
        folder = tmp_path / "runs" / name
        shutil.copytree(runs[preset], folder)
        written = time.time() - age
        os.utime(folder / "model.safetensors", (written, written))
        return folder

    def asked(*questions: str) -> str:
        assert main(["solve", *questions]) == 0
        return capsys.readouterr().err

    half = put("formula", "half", 1)
    config = json.loads((half / "config.json").read_text())
    config["training"]["epochs"] = 9
    (half / "config.json").write_text(json.dumps(config))
    assert asked("1+1") == "answered by runs/half, unfinished, epoch 1 of 9\n"
    put("formula", "old", 9)
    put("formula-best", "newer", 5)
    put("expression", "words", 2)
    (put("formula", "damaged", 0) / "config.json").write_text("{")
    (put("formula", "empty", 0) / "model.safetensors").write_bytes(b"")
    assert asked("1+1") == "answered by runs/newer, epoch 1 of 1\n"
    assert asked("NEGATIVE 30 subtract NEGATIVE 34") == "answered by runs/words, epoch 1 of 1\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("| head -c 1", 141, ""),
        pytest.param(
            "> /dev/full", 2, "calcformer: error: standard output: No space left on device", marks=pytest.mark.long
        ),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.long),
        pytest.param("2>&-", 0, "", marks=pytest.mark.long),
        pytest.param("<&-", 0, "", marks=pytest.mark.long),
        pytest.param("<&- 2>&-", 0, "", marks=pytest.mark.long),
        pytest.param(">&-", 2, "calcformer: error: standard output: Bad file descriptor", marks=pytest.mark.long),
        pytest.param("<&- >&- 2>&-", 2, "", marks=pytest.mark.long),
    ],
)
def test_streams_that_break_are_no_traceback(ending: str, code: int, said: str, runs: dict[str, Path]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(calcformer.__file__).parents[1])}
    Path("problems.txt").write_text("1+1\n" * (20_000 if ending.startswith("|") else 2_000))  # more than a pipe holds
    command = f"{sys.executable} -m calcformer solve --run {runs['formula']} --input problems.txt {ending}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr and said in done.stderr


def test_evaluate_in_words(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs["expression"])]) == 0
    assert "20 held-out expressions: exact match 0." in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["train", "--preset", "sums"], "'sums' (choose from"),
        (["train", "--heads", "3"], "width 64 and 3 heads"),
        (["train", "--epochs", "many"], "must be a whole number, got 'many'"),
        (["train", "--wings", "2"], "--wings"),
        (["train", "--epochs", "9" * 5_000], "must be a whole number, got '9999"),
        (["train", "--learning-rate", "fast"], "must be a number, got 'fast'"),
        (["train", "--out", ""], "must be the name of a file or folder, got ''"),
        (["train", "--resume", ""], "got ''"),
        (["train", "--out", "a\0b"], "got 'a\\x00b'"),
        (["evaluate", ""], "must be the name of a file or folder"),
        (["evaluate", "x", "--beam", "100000"], "must be a whole number, 1 to 100, got '100000'"),
        (["evaluate", "x", "--processes", "2"], "--processes is for --exhaustive"),
        (["evaluate", "x", "--processes", "0"], "must be a whole number, 1 to 1024, got '0'"),
        (["train", "--" + "x" * 100_000], "unrecognized arguments: --xxx"),
        (["train", "--processes", "900"], "CPU cores busy"),
        (
            ["train", "--preset", "expression", "--complexity", "2"],
            "complexity is a setting of formula, not of expression",
        ),
        (["train", "--train-size", "0"], "train_size must be 1 to 10000000, got 0"),
        (["train", "--learning-rate", "inf"], "learning_rate must be 0 to 1000, got inf"),
        (["train", "--warmup-steps", "20000", "--epochs", "3"], "at most the 600 steps of the whole run, got 20000"),
        (["train", "--complexity", "1", "--held-out", "0.001"], "leaves too few to hold out"),
        (["train", "--device", "cuda:99"], "cuda:99 is not here"),
        (["train", "--resume", "nowhere"], "no run folder nowhere"),
        (["train", "--resume", "nowhere", "--epochs", "3"], "leave out --epochs"),
        (["evaluate", "nowhere"], "no run folder nowhere"),
        (["solve", "1+1"], "no trained run in runs/"),
        (["solve", "--input", "nowhere"], "nowhere: No such file or directory"),
        ([], "required: COMMAND"),
        (["solve", "1+1", "--input", "x"], "leave out --input or the problems"),
        (["sing"], "invalid choice: 'sing'"),
    ],
    ids=lambda value: "-".join(value[:4]) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, *words)
    assert match in error and len(error) < 700
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "question", "match"),
    [
        ("formula", "12+x7", "'x' at place 4"),
        ("formula", "12+7777", "'7777' is more than 1000, the largest number"),
        ("formula", "-12", "not of the form"),
        ("expression", "12+7", "is not a word this run knows"),
        ("formula", "--5+3", "formula '--5+3' is not of the form"),
        ("formula", "", "formula '' is not of the form"),
        ("formula", "9" * 100_000 + "+1", "(100000 characters) is more than 1000"),
    ],
)
def test_wrong_problems_are_one_line(
    task: str, question: str, match: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert is_picture(Path("run/curve.png"))
    assert main(["train", "--resume", "run"]) == 0
    assert "run: exact match" in capsys.readouterr().out


@pytest.mark.long
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

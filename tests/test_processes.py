"""Processes: none outlives the one that started it, there are no more than cores, and two never share a folder."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import calcformer
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.runs import device
from calcformer.runs.device import check_cores, count_cores
from calcformer.runs.folder import finished_epochs
from calcformer.training import resume, train
from calcformer.training.trainer import Trainer

TINY = {
    "complexity": 1,
    "train_size": 50,
    "valid_size": 20,
    "width": 8,
    "heads": 2,
    "hidden": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "batch_size": 25,
    "epochs": 2,
    "device": "cpu",
}
FLAGS = [
    "--preset",
    "formula",
    *(word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))),
]
ENDLESS = ["--epochs", "100000"]
LIMIT = 120  # seconds, nearly all of them to start Pythons beside other work
GONE = 10  # seconds that a worker may take to notice

pytestmark = [
    pytest.mark.usefixtures("as_on_a_cpu", "empty_folder"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes as Linux shows them"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def descendants(process: int) -> set[int]:
    """The processes that it started, and those that they started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # gone meanwhile
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found, newest = set(), {process}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest}
        found |= newest
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so: Callable[[], object], limit: float = LIMIT) -> bool:
    end = time.monotonic() + limit
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def command(*words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(calcformer.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "calcformer", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def is_written(path: str) -> bool:
    return Path(path).exists() and Path(path).stat().st_size > 0


# What a test starts, and how it knows that the workers are at work.
WORK = {
    "train": (
        ["train", "--out", "run", *FLAGS, *ENDLESS, "--processes", "2"],
        1,
        lambda: is_written("run/metrics.jsonl"),
    ),
    "train, just started": (["train", "--out", "run", *FLAGS, *ENDLESS, "--processes", "2"], 1, lambda: True),
    "sweep": (
        ["sweep", "--out", "sweep", *FLAGS, *ENDLESS, "--seeds", "2", "--jobs", "2"],
        2,
        lambda: all(is_written(f"sweep/seed={seed}/metrics.jsonl") for seed in (0, 1)),
    ),
    "evaluate": (["evaluate", "wide", "--exhaustive", "--processes", "2", "--device", "cpu"], 2, lambda: True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "end"),
    [
        ("train", signal.SIGKILL),
        pytest.param("train", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("train", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("train, just started", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("sweep", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("sweep", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("evaluate", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("evaluate", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_workers_end_with_their_parent(work: str, end: signal.Signals) -> None:
    words, workers, is_at_work = WORK[work]
    if work == "evaluate":
        train(PRESETS["formula"].with_settings({**TINY, "complexity": 3, "epochs": 1}), "wide", bar=False)
    with command(*words) as process:
        try:
            assert wait_until(lambda: len(descendants(process.pid)) >= workers and is_at_work())
            started = descendants(process.pid)
            process.send_signal(end)
            assert process.wait(LIMIT) == (-end if end is signal.SIGKILL else 130)
            assert wait_until(lambda: not any(map(is_alive, started)), GONE)
        finally:
            for each in {process.pid, *descendants(process.pid)}:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


@pytest.mark.long
def test_evaluation_says_that_a_worker_was_killed() -> None:
    train(PRESETS["formula"].with_settings({**TINY, "complexity": 3, "epochs": 1}), "wide", bar=False)
    words = [sys.executable, "-m", "calcformer", *WORK["evaluate"][0]]
    environment = {**os.environ, "PYTHONPATH": str(Path(calcformer.__file__).parents[1])}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: len(descendants(process.pid)) >= 2)
        started = descendants(process.pid)
        os.kill(max(started), signal.SIGKILL)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "ended before its time" in errors and "Traceback" not in errors
    assert wait_until(lambda: not any(map(is_alive, started)), GONE)


def test_no_more_processes_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    check_cores(count_cores(), "--jobs")
    with pytest.raises(ValueError, match="would keep [0-9]+ CPU cores busy and there are [0-9]+; lower --jobs$"):
        check_cores(count_cores() + 1, "--jobs")
    monkeypatch.setattr(device, "count_cores", lambda: 3)
    counts = {
        (processes, threads): device.count_processes(
            PRESETS["formula"].with_settings({"processes": processes, "threads": threads}).training,
            device.pick_device("cpu"),
        )
        for processes, threads in ((0, 0), (0, 2), (1, 3), (3, 1))
    }
    assert counts == {(0, 0): 2, (0, 2): 1, (1, 3): 1, (3, 1): 3}


def test_run_of_more_processes_than_cores_continues_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PRESETS["formula"].with_settings({**TINY, "processes": 1})
    train(config, "run", bar=False)
    path = Path("run/config.json")
    path.write_text(config.with_settings({"processes": 64, "threads": 8}).to_json())
    monkeypatch.setattr("calcformer.training.loop.count_cores", lambda: 1)
    assert resume("run", bar=False)["epoch"] == 2
    assert (
        "run: trained with 64 processes of 8 threads so far, continued with 1 of 1: there are 1 CPU cores"
        in capsys.readouterr().err
    )


@pytest.mark.long
def test_workers_import_what_this_process_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    monkeypatch.syspath_prepend(str(Path(calcformer.__file__).parents[1]))
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    train(PRESETS["formula"].with_settings({**TINY, "processes": 2}), "run", bar=False)
    assert finished_epochs(tmp_path / "run") == 2


# Two at once


def start(*words: str) -> int:
    """Run a command in a copy of this process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(LIMIT)
        try:
            sys.stderr = sys.stdout = open(os.devnull, "w")
            code = main(words)
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            os._exit(code)
    return child


def at_once(*words: str) -> list[int]:
    """The exit codes of two commands that are started at the same time."""
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in [start(*words) for _ in range(2)])


TWICE = 5  # times


@pytest.mark.slow
def test_two_trainings_into_one_folder_are_one_training_and_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_begin = Trainer.begin

    def begin(trainer: Trainer, folder: Path) -> int:
        time.sleep(0.3)  # both have looked into the folder before one writes
        return whole_begin(trainer, folder)

    monkeypatch.setattr(Trainer, "begin", begin)
    words = ["train", *FLAGS, "--processes", "1"]
    for number in range(TWICE):
        assert at_once(*words, "--out", f"run-{number}") == [0, 2]
    for folder in tmp_path.iterdir():
        assert finished_epochs(folder) == 2 and len((folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_trainings_without_a_folder_get_one_each(tmp_path: Path) -> None:
    for _ in range(TWICE):
        assert at_once("train", *FLAGS, "--processes", "1") == [0, 0]
    folders = list((tmp_path / "runs").iterdir())
    assert {folder.name for folder in folders} == {f"formula-{number}" for number in range(1, 2 * TWICE + 1)}
    assert all(finished_epochs(folder) == 2 for folder in folders)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_no_folder_can_be_made_in_a_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").touch() if kind == "file" else (tmp_path / "runs").symlink_to("nowhere")
    with pytest.raises(SystemExit):
        main(["train", *FLAGS])
    assert "calcformer: error: runs: File exists" in capsys.readouterr().err


@pytest.mark.long
def test_two_sweeps_at_once(tmp_path: Path) -> None:
    words = ["sweep", *FLAGS, "--epochs", "1"]
    assert Counter(at_once(*words)) == {0: 2}
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sweep-1", "sweep-2"]


FAULTS = """
import resource, torch
from calcformer.runs.device import keep_memory

def faults():
    for count in range(12):
        if count == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(1 << 22) for _ in range(4)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10

print(faults())
keep_memory()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    """A page is had from the system once, not for every block anew."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 100 and after < 10, done.stdout

"""What happens to a run when its process is killed, its disk is full or its files are damaged."""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from calcformer.cli import main
from calcformer.config import PRESETS, RunConfig
from calcformer.runs.checkpoint import load_run
from calcformer.runs.folder import finished_epochs
from calcformer.runs.run_log import RunLog
from calcformer.training import resume, train, trainer

pytestmark = [
    pytest.mark.usefixtures("as_on_a_cpu"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX has them"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]  # of threads, which take no lock here

SMALL = {
    "complexity": 1,
    "train_size": 90,
    "valid_size": 20,
    "width": 8,
    "heads": 2,
    "hidden": 8,
    "dropout": 0.1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "batch_size": 15,
    "epochs": 4,
    "device": "cpu",
}
FRESH: dict[str, Any] = {"fresh": True, "held_out": 0.5}
KINDS: dict[str, dict[str, Any]] = {"one process": {}, "fresh problems": FRESH, "two processes": {"processes": 2}}
KILLS = 3  # of each run, before it is left in peace
LIMIT = 300  # seconds, after which a process ends by itself


def small(**changes: Any) -> RunConfig:
    return PRESETS["formula"].with_settings({**SMALL, "processes": 1, **changes})


def start(work: Callable[[], object]) -> int:
    """Do the work in another process, which is a copy of this one; returns its id."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        sys.stderr = sys.stdout = open(os.devnull, "w")
        try:
            work()
        finally:
            os._exit(0)
    return child


def continue_or_begin(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What a user does after a kill: go on where a checkpoint is, else begin anew."""
    if finished_epochs(folder) is not None:
        return resume(folder, bar=False)
    shutil.rmtree(folder, ignore_errors=True)
    return train(config, folder, bar=False)


def assert_same_run(folder: Path, whole: Path) -> None:
    for name in "model.safetensors", "resume.safetensors":
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    losses, expected = ([entry["loss"] for entry in RunLog(path / "metrics.jsonl").read()] for path in (folder, whole))
    assert losses == expected
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Path, float]]]:
    """The run of a kind that nobody disturbed, and how many seconds it took."""
    runs: dict[str, tuple[Path, float]] = {}

    def train_whole(kind: str) -> tuple[Path, float]:
        if kind not in runs:
            folder, started = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
            train(small(**KINDS[kind]), folder, bar=False)
            runs[kind] = folder, time.monotonic() - started
        return runs[kind]

    yield train_whole


# Kills


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_any_moment_change_nothing(
    kind: str, tmp_path: Path, whole: Callable[[str], tuple[Path, float]]
) -> None:
    expected, seconds = whole(kind)
    config, folder = small(**KINDS[kind]), tmp_path / "run"
    moments = random.Random(kind)
    for _ in range(KILLS):
        child = start(lambda: continue_or_begin(config, folder))
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / "model.safetensors").exists():
            load_run(folder)  # what is there can be used at any time
    continue_or_begin(config, folder)
    assert_same_run(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resume.safetensors", "model.safetensors"])
@pytest.mark.parametrize("moment", ["half written", "not renamed"])
@pytest.mark.parametrize("epoch", [2, 4])
def test_kill_within_a_checkpoint(
    name: str,
    moment: str,
    epoch: int,
    tmp_path: Path,
    whole: Callable[[str], tuple[Path, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = whole("one process")
    folder, rename, left = tmp_path / "run", os.replace, epoch

    def die(source: Path, target: Path) -> None:
        nonlocal left
        if Path(target).name == name:
            left -= 1
            if left < 0:  # the checkpoint before the first epoch counts too
                if moment == "half written":
                    os.truncate(source, os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        child = start(lambda: train(small(), folder, bar=False))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    saved = epoch if name == "model.safetensors" else epoch - 1
    assert (finished_epochs(folder), load_run(folder)[3]) == (saved, epoch - 1)
    resume(folder, bar=False)
    assert_same_run(folder, expected)


# Full disks


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail; returns the one line that says why, the last one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    *others, error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert error.startswith("calcformer: error: ") and not [line for line in others if "rror" in line]
    return error


def flags() -> list[str]:
    return [
        "--preset",
        "formula",
        *(
            word
            for name, value in {**SMALL, "processes": 1}.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ),
    ]


@pytest.mark.parametrize("name", ["resume.safetensors", "model.safetensors", "metrics.jsonl"])
def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: Callable[[str], tuple[Path, float]],
) -> None:
    folder, whole_epoch, full = tmp_path / "run", trainer.Trainer.epoch, False
    opened = Path.open

    def epoch(self: trainer.Trainer, number: int) -> dict[str, Any]:
        nonlocal full
        full = number == 3
        return whole_epoch(self, number)

    def open_file(self: Path, *arguments: Any, **options: Any) -> Any:
        written = {"wb", "a"} & {*arguments, *options.values()}
        return opened(Path("/dev/full") if full and written and name in self.name else self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "epoch", epoch)
        patch.setattr(Path, "open", open_file)
        patch.setattr(os, "fsync", lambda descriptor: None)  # a device has nothing to write through
        error = fails(capsys, "train", "--out", folder, *flags())
    assert os.strerror(errno.ENOSPC) in error
    assert f"make room, then continue with: calcformer train --resume {folder}" in error
    assert finished_epochs(folder) == (3 if name == "model.safetensors" else 2) and load_run(folder)[3] == 2
    assert main(["train", "--resume", str(folder)]) == 0
    assert_same_run(folder, whole("one process")[0])


def test_disk_that_is_full_at_once_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # config.json fits, the first checkpoint does not
        error = fails(capsys, "train", "--out", tmp_path / "run", *flags())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / 'run' / 'resume.safetensors'}: {os.strerror(errno.EFBIG)}" in error


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EIO, "mend that")]
)
def test_what_to_do_fits_what_went_wrong(
    code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(trainer.RunLog, "append", fail)
    with pytest.raises(ValueError, match=f"{os.strerror(code)}; what was finished before is saved: {remedy}, then"):
        train(small(), tmp_path / "run", bar=False)


def test_run_folder_that_is_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_measure = trainer.Trainer.measure

    def measure(*arguments: Any, **options: Any) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "run")
        return whole_measure(*arguments, **options)

    monkeypatch.setattr(trainer.Trainer, "measure", measure)
    with pytest.raises(ValueError, match="metrics.jsonl: No such file or directory; the run folder was moved or del"):
        train(small(), tmp_path / "run", bar=False)
    assert list(tmp_path.iterdir()) == []


def test_run_whose_first_checkpoint_was_never_written_begins_anew(
    tmp_path: Path, whole: Callable[[str], tuple[Path, float]]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(whole("one process")[0] / "config.json", folder)
    resume(folder, bar=False)
    assert_same_run(folder, whole("one process")[0])


def test_folder_with_nothing_but_what_a_kill_left_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.tmp").write_text("{")
    train(small(epochs=1), tmp_path / "run", bar=False)
    assert finished_epochs(tmp_path / "run") == 1


@pytest.mark.parametrize("name", ["d$a_{$", "\N{CJK UNIFIED IDEOGRAPH-8BAD}", "b\udcff"])
def test_any_name_of_a_folder_can_be_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train(small(epochs=1), tmp_path / name, bar=False)
    assert (tmp_path / name / "curve.png").stat().st_size > 1_000


def test_lost_weights_come_back(tmp_path: Path, whole: Callable[[str], tuple[Path, float]]) -> None:
    shutil.copytree(whole("one process")[0], tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    resume(tmp_path / "run", bar=False)
    assert_same_run(tmp_path / "run", whole("one process")[0])


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, whole: Callable[[str], tuple[Path, float]]) -> None:
    shutil.copytree(whole("one process")[0], tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path, {"epoch": "4"})
    with pytest.raises(ValueError, match="model.safetensors holds numbers that are infinite or NaN; restore it with"):
        load_run(tmp_path / "run")


# Damaged files


def changed(section: str, **values: Any) -> Callable[[bytes], bytes]:
    """Changes what config.json says; an empty section is the whole of it."""

    def change(content: bytes) -> bytes:
        config = json.loads(content)
        (config[section] if section else config).update(values)
        return json.dumps(config).encode()

    return change


def tensors(
    epoch: str = "4", dtype: torch.dtype | None = None, change: tuple[str, float] | None = None
) -> Callable[[bytes], bytes]:
    """Changes what a file of tensors holds: its epoch, its dtype, or the first number of one of them."""

    def write(content: bytes) -> bytes:
        values = safetensors.torch.load(content)
        if change is not None:
            values[change[0]].view(-1)[0] = change[1]
        return safetensors.torch.save({name: value.to(dtype) for name, value in values.items()}, {"epoch": epoch})

    return write


DAMAGES = [
    ("model.safetensors", "evaluate", lambda content: random.Random(0).randbytes(len(content)), "is damaged"),
    ("model.safetensors", "evaluate", lambda content: content[: len(content) // 2], "is damaged"),
    ("model.safetensors", "evaluate", None, "is missing"),
    ("resume.safetensors", "resume", lambda content: random.Random(0).randbytes(len(content)), "is damaged"),
    ("resume.safetensors", "resume", lambda content: content[:-1], "is damaged"),
    ("resume.safetensors", "resume", lambda content: b"", "is damaged"),
    ("resume.safetensors", "resume", None, "is missing"),
    ("resume.safetensors", "resume", tensors(epoch="-3"), "is damaged .epoch -3."),
    ("resume.safetensors", "resume", tensors(dtype=torch.float16), "does not fit the model"),
    ("resume.safetensors", "resume", tensors(change=("exp_avg.0", float("nan"))), "numbers that are infinite or NaN"),
    ("model.safetensors", "evaluate", tensors(epoch="soon"), "is damaged"),
    ("model.safetensors", "evaluate", tensors(dtype=torch.float8_e4m3fn), "does not fit the model"),
    ("config.json", "resume", lambda content: b"", "cannot be used"),
    ("config.json", "evaluate", lambda content: content[:-9], "cannot be used"),
    ("config.json", "evaluate", changed("", format=2), "not of format 1"),
    ("config.json", "resume", changed("model", flux=1), "no setting 'model.flux' in this version of calc"),
    ("config.json", "resume", changed("training", weight_decay=0.5), "does not fit the settings of its config.json"),
    ("config.json", "resume", changed("training", epochs=3), "is of epoch 4 and .*config.json tells of 3"),
    ("config.json", "evaluate", lambda content: b"[" * 100_000, "cannot be used .not JSON"),
    ("config.json", "evaluate", changed("model", width=[64]), "width must be of type int, got .64"),
    ("config.json", "evaluate", changed("model", width=2**63), "width must be 1 to 16384"),
    ("config.json", "evaluate", changed("training", clip_norm=float("inf")), "clip_norm must be 0 to 1000000, got inf"),
    ("config.json", "evaluate", changed("model", width=16_384, hidden=65_536, encoder_layers=100), "GB of memory"),
]


@pytest.mark.parametrize(("name", "command", "damage", "match"), DAMAGES)
def test_damaged_files_are_one_line_that_names_file_and_remedy(
    name: str,
    command: str,
    damage: Callable[[bytes], bytes] | None,
    match: str,
    tmp_path: Path,
    whole: Callable[[str], tuple[Path, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole("one process")[0], folder)
    path = folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    error = fails(capsys, *(["train", "--resume", folder] if command == "resume" else [command, folder]))
    if "memory" not in match:
        mended = name == "model.safetensors" and "fit" not in match
        remedy = f"train --resume {folder}" if mended else "train the run again"
        assert name in error and remedy in error
    assert re.search(match, error) and len(error) < 700
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

"""Training: from a configuration to a run folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from calcformer.config import RunConfig
from calcformer.errors import InputError, tell
from calcformer.interrupt import Stopped
from calcformer.memory import check_memory, memory_to_train
from calcformer.runs.checkpoint import load_resume_state
from calcformer.runs.device import count_cores, count_processes, keep_memory, pick_device, torchrun_place
from calcformer.runs.files import hold, new_folder
from calcformer.runs.folder import finished_epochs, read_config
from calcformer.settings import TrainingConfig
from calcformer.training.board import require_tensorboard
from calcformer.training.team import Team, TeamLost, join_team
from calcformer.training.torchrun import join_torchrun
from calcformer.training.trainer import Trainer

__all__ = ["follow", "resume", "train"]


def set_up(training: TrainingConfig) -> None:
    """What PyTorch keeps for a whole process."""
    torch.set_num_threads(training.threads or 1)
    torch.set_float32_matmul_precision(training.matmul_precision)
    keep_memory()


def follow(folder: Path, team: Team) -> None:
    """Train the epochs that are left of the run in `folder` beside rank 0, which writes it."""
    config = read_config(folder)
    set_up(config.training)
    trainer = Trainer(config, bar=False, team=team, task=config.data.restore(folder))
    finished = load_resume_state(folder, trainer.model, trainer.optimizer)
    team.meet()
    for epoch in range(finished + 1, config.training.epochs + 1):
        trainer.epoch(epoch)


def work(_: "SimpleQueue[str]", folder: str, *place: str) -> None:
    """The work of one of the other processes that `start_team` starts."""
    with suppress(InputError, TeamLost):  # rank 0 says it, or is gone
        follow(Path(folder), join_team(*map(int, place)))


def _follow_torchrun() -> None:
    """Nothing for rank 0. The others train beside it and then leave: what comes after is for rank 0 alone."""
    place = torchrun_place()
    if place is None or place.rank == 0:
        return
    try:
        with join_torchrun() as team:
            follow(Path(team.share("")), team)  # the folder that rank 0 writes
    except (InputError, TeamLost, KeyboardInterrupt):
        raise SystemExit(1) from None  # rank 0 says it, or is gone
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: threads of PyTorch's groups have ended a process that was winding up, which then failed


@contextmanager
def _name_compiler(is_wanted: bool) -> Iterator[None]:
    """Say in words for users that torch.compile cannot work here, as it cannot without a C++ compiler."""
    if not is_wanted:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed  # not at the top: it takes seconds

    try:
        yield
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().splitlines()[0]
        raise InputError(f"torch.compile does not work here ({reason}); leave out --compile") from None


def _run(
    config: RunConfig, claimed: AbstractContextManager[Path], bar: bool | None, of: Path | None = None
) -> dict[str, Any]:
    """Check all that can be checked, then take the folder, and only then write. `of`: the run that goes on."""
    device = pick_device(config.training.device)
    processes = count_processes(config.training, device)
    task = config.data.build() if of is None else config.data.restore(of)
    check_memory(memory_to_train(config, task, 1 if torchrun_place() else processes), device)
    config = config.with_settings({"processes": processes})
    if config.training.tensorboard:
        require_tensorboard()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    set_up(config.training)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            trainer = Trainer(config, bar, task=task)
            with claimed as folder, _name_compiler(config.training.compile):
                try:
                    finished = trainer.begin(folder) if of is None else trainer.load(folder)
                    with trainer.start_team() as trainer.team:
                        return {"run": str(folder), **trainer.run(finished)}
                except KeyboardInterrupt:
                    raise Stopped(folder, finished_epochs(folder) or 0) from None
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def train(config: RunConfig, out: Path | str | None = None, bar: bool | None = None) -> dict[str, Any]:
    """Train a model and write it, epoch by epoch, to the folder `out`.

    Args:
        config: all settings. On a CPU they decide every number: the same settings give the same run.
        out: a folder that does not exist or is empty; None for runs/PRESET-N with the first N that is free.
        bar: True draws a progress bar, False does not, None draws one on a terminal.

    Returns:
        The last line of metrics.jsonl: loss, token_accuracy, valid_loss, valid_token_accuracy, exact_match, ...; and
        the folder as "run". Under torchrun only in rank 0: the other processes train beside it and end.

    Raises:
        InputError: a setting that cannot be used here, or a folder with something in it; nothing is written then.
        Stopped: Ctrl-C or SIGTERM came; what is finished is saved.
    """
    _follow_torchrun()
    return _run(config, new_folder(None if out is None else Path(out), config.preset), bar)


def resume(folder: Path | str, bar: bool | None = None) -> dict[str, Any]:
    """Continue a run from its last finished epoch, with its own settings; on a CPU, with the numbers it would have had.

    Raises:
        RunError: the folder is missing or damaged.
    """
    _follow_torchrun()
    folder = Path(folder)
    return _run(_fit_cores(read_config(folder), folder), hold(folder), bar, folder)


def _fit_cores(config: RunConfig, folder: Path) -> RunConfig:
    """The settings of a run that a larger machine began, with no more processes and threads than there are cores."""
    before = max(1, config.training.processes), max(1, config.training.threads)
    threads = min(before[1], count_cores())
    processes = min(before[0], count_cores() // threads)
    if before == (processes, threads) or torchrun_place() is not None:
        return config
    tell(
        f"{folder}: trained with {before[0]} processes of {before[1]} threads so far, continued with {processes} of "
        f"{threads}: there are {count_cores()} CPU cores here"
    )
    return config.with_settings({"processes": processes, "threads": threads})

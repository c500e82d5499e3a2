"""Many runs that differ in a few settings: trained side by side, continued after a kill, compared in one table.

sweep.json     what is compared (calcformer/studies.py)
NAME=VALUE/    the run folder of each member
results.json   figures of every run, their mean and spread over the seeds, a report's own figures
table.md       the same, to be read
sweep.png      the same, to be seen: by a setting that is a number, else by epoch
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calcformer.comparison import draw, make_table, summarize
from calcformer.errors import InputError
from calcformer.interrupt import Stopped
from calcformer.memory import check_memory, memory_to_train
from calcformer.pool import run_jobs
from calcformer.runs.device import check_cores, count_cores, count_processes, pick_device
from calcformer.runs.files import hold, new_folder, write_atomically
from calcformer.runs.folder import CONFIG, METRICS, MODEL, RESUME, saved_epoch
from calcformer.runs.run_log import RunLog
from calcformer.studies import SWEEP, Member, Sweep
from calcformer.training import resume, train

__all__ = ["read_sweep", "run_sweep"]

RESULTS, TABLE, PICTURE = "results.json", "table.md", "sweep.png"


def read_sweep(folder: Path) -> Sweep:
    """What the sweep in `folder` compares; InputError where there is none."""
    return Sweep.read(folder / SWEEP)


def train_members(folder: Path, members: list[Member], jobs: int, bar: bool | None) -> dict[str, str]:
    """Train what is not finished, `jobs` at a time; returns, for each member that failed, why."""
    failed: dict[str, str] = {}
    epochs = {member.name: member.config.training.epochs for member in members}
    waiting = [member.name for member in members if not is_finished(folder, member)]
    left, done = set(waiting), epochs | dict.fromkeys(waiting, 0)
    with tqdm(
        total=sum(epochs.values()), unit="epoch", dynamic_ncols=True, disable=None if bar is None else not bar
    ) as progress:

        def show(at_work: list[str]) -> None:
            if not progress.disable:
                done.update((name, len(RunLog(folder / name / METRICS).read())) for name in at_work)
                progress.set_description(f"{len(members) - len(left)}/{len(members)} runs", False)
                progress.update(sum(done.values()) - progress.n)

        with closing(run_jobs("calcformer.sweep", [folder], waiting, jobs, show)) as outcomes:
            for name, outcome in outcomes:
                left.remove(name)
                done[name] = epochs[name]
                if isinstance(outcome, InputError):
                    failed[name] = str(outcome)
                if name in failed or progress.disable:
                    progress.write(f"{name}: {failed.get(name, 'finished')}", file=sys.stderr)
                show([])
    return failed


def do_job(name: str, folder: str) -> None:
    """Start or continue one member of the sweep in `folder`, in a worker."""
    member = next(member for member in read_sweep(Path(folder)).members() if member.name == name)
    run = Path(folder, name)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # what is printed there is why a worker ended
        if any((run / file).exists() for file in (RESUME, MODEL)):
            resume(run, bar=False)
        else:
            shutil.rmtree(run, ignore_errors=True)  # a kill came before the first checkpoint
            train(member.config, run, bar=False)


def is_finished(folder: Path, member: Member) -> bool:
    """Whether nothing is left to do: not so where the log of a finished run was lost and can be made again."""
    run, epochs = folder / member.name, member.config.training.epochs
    if saved_epoch(run / MODEL) != epochs or not (run / CONFIG).is_file():
        return False
    last = next(iter(RunLog(run / METRICS).read()[-1:]), {})
    return last.keys() >= member.config.data.figures.keys() or saved_epoch(run / RESUME) is None


@contextmanager
def claim(out: Path | None, sweep: Sweep) -> Iterator[Path]:
    """Hold the folder of this sweep, which is made if need be; InputError where it holds something else."""
    if out is None or not (out / SWEEP).exists():
        with new_folder(out, sweep.study or "sweep") as folder:
            write_atomically(folder / SWEEP, sweep.to_json().encode())
            yield folder
        return
    with hold(out):
        if read_sweep(out) != sweep:
            raise InputError(
                f"{out} holds another sweep; give --out another name, or continue that one with --resume {out}"
            )
        yield out


def count_jobs(members: list[Member], jobs: int) -> int:
    """How many runs to train at a time; InputError where they want more cores or memory than there are."""
    configs = [(member.config, pick_device(member.config.training.device)) for member in members]
    processes = max(count_processes(config.training, device) for config, device in configs)
    threads = max(config.training.threads or 1 for config, _ in configs)
    jobs = jobs or max(1, count_cores() // (processes * threads))
    check_cores(jobs * processes, "--jobs or --processes", threads)
    tasks = {data: data.build() for data in dict.fromkeys(config.data for config, _ in configs)}
    for config, device in configs:
        needed = memory_to_train(config, tasks[config.data], count_processes(config.training, device))
        check_memory(min(jobs, len(members)) * needed, device)
    return jobs


def run_sweep(sweep: Sweep, out: Path | str | None = None, jobs: int = 0, bar: bool | None = None) -> dict[str, Any]:
    """Train every run of a sweep and compare them. A folder that holds part of this sweep is continued.

    Args:
        out: where the runs, results.json, table.md and sweep.png go; None for runs/STUDY-N or runs/sweep-N.
        jobs: runs at a time, 0 for as many as there are CPU cores.
        bar: True draws a progress bar, False does not, None draws one on a terminal.

    Returns:
        What results.json holds: under "rows" the varied values, the mean and the spread over the seeds, the report's
        own figures, and every run; the folder beside them. A run that failed has the reason under "failed" and does
        not stop the others.

    Raises:
        InputError: a setting that cannot be used, or a folder with something else in it, and nothing is written; or
            not one run could be finished.
    """
    if jobs < 0:
        raise InputError(f"jobs must be 0 or more, got {jobs}")
    members = sweep.members()
    jobs = count_jobs(members, jobs)
    with claim(None if out is None else Path(out), sweep) as folder:
        try:
            failed = train_members(folder, members, jobs, bar)
        except KeyboardInterrupt:
            raise Stopped(folder, sum(is_finished(folder, member) for member in members)) from None
        results = summarize(folder, sweep, failed)
        write_atomically(folder / RESULTS, (json.dumps(results, indent=2) + "\n").encode())
        write_atomically(folder / TABLE, make_table(results).encode())
        draw(results, folder, folder / PICTURE)
    if len(failed) == len(members):
        raise InputError(f"no run of {folder} could be finished; the first one: {failed[members[0].name]}")
    return {"folder": str(folder), **results}

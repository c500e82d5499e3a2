"""Commands one after the other, each stopped by force at its limit, so that none can take the others' time.

A stage is one or several commands beside each other, each a process group of its own. Nothing but SIGKILL stops a call
that hangs on a GPU: at the stage's end it gets one, and so does everything it started. What they print is appended to
log.txt, what became of them to rows.jsonl. Needs nothing but Python: no fault of a package can end the run.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from bench.rows import ROOT, Row, read_rows, write_row

ROWS, LOG = "rows.jsonl", "log.txt"
# Exit codes that no other program has: a command needs a GPU, and there is none, so that what follows would fail too;
# it cannot go on, as after a fault on the GPU, but a fresh process can do the rest.
NO_GPU, AGAIN = 90, 91
MOST_STARTS = 8
GRACE = 10.0  # seconds for a killed process to be gone
PDEATHSIG = 1  # prctl(PR_SET_PDEATHSIG)


class Stage(NamedTuple):
    """Commands that run beside each other, and when they are stopped: seconds after the start of the first stage."""

    name: str
    end: float
    commands: tuple[tuple[str, ...], ...]


def one_after_another(plan: Iterable[tuple[str, float, tuple[tuple[str, ...], ...]]]) -> list[Stage]:
    """Stages by name, seconds for them, and commands."""
    found, end = [], 0.0
    for name, seconds, commands in plan:
        end += seconds
        found.append(Stage(name, end, commands))
    return found


def cores() -> int:
    """How many processes work side by side: one a core, and never so many that memory runs out."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, whose number is given, dies, however that dies."""
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)


def worker_pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that start afresh, as CUDA wants it, and do not outlive this one."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, die_with_parent, (os.getpid(),))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, those that outlived it too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def wait_until_gone(process: subprocess.Popen[bytes]) -> None:
    """Wait for a killed process, but not for a driver that holds it."""
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass


def outcome(code: int | None, why_killed: str = "at its limit") -> str:
    """An exit code in words; None for one that had to be killed."""
    if code is None:
        return f"killed {why_killed}"
    words = {0: "passed", NO_GPU: "found no GPU", AGAIN: "a fault on the GPU"}
    return words.get(code, f"died of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")


def run_stage(
    stage: Stage, seconds: float, out: Path, environment: dict[str, str], stopped: Sequence[int] = ()
) -> bool:
    """Run its commands for at most so many seconds; False where one of them found that there is no GPU.

    One that crashes, or ends with AGAIN, is started again: it goes on after what it was at.
    """
    end = time.monotonic() + seconds
    with (out / LOG).open("ab", buffering=0) as log:
        log.write(f"== {stage.name}, {seconds:.0f} s at most\n".encode())
        waiting = {start(command, log, environment): command for command in stage.commands}
        starts, started, lacks_gpu = Counter(stage.commands), time.monotonic(), False
        try:
            while waiting:
                time.sleep(0.05)
                if stopped:
                    raise KeyboardInterrupt
                for process, command in list(waiting.items()):
                    code, late = process.poll(), time.monotonic() > end or lacks_gpu
                    if code is None and not late:
                        continue
                    kill_group(process)
                    del waiting[process]
                    if code is None:
                        wait_until_gone(process)
                    elif (code < 0 or code == AGAIN) and not late and starts[command] < MOST_STARTS:
                        log.write(f"== {stage.name}: {outcome(code)}, started again\n".encode())
                        starts[command] += 1
                        waiting[start(command, log, environment)] = command
                        continue
                    lacks_gpu |= code == NO_GPU
                    why = "since there is no GPU" if lacks_gpu else "at its limit"
                    tell(out, stage, command, outcome(code, why), time.monotonic() - started, starts[command])
        finally:
            for process in waiting:
                kill_group(process)
    return not lacks_gpu


def start(command: Sequence[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command as a process group of its own that does not outlive this process."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )


def tell(out: Path, stage: Stage, command: Sequence[str], result: str, seconds: float, starts: int) -> None:
    """A row and a line on what became of a command."""
    name = " ".join(command[1:])
    try:
        write_row(out / ROWS, "stage", stage=stage.name, command=name, result=result, seconds=seconds, starts=starts)
    except OSError as error:  # a full disk: the other stages may still print what they find
        print(f"cannot write a row: {error}", flush=True)
    again = f" ({starts} starts)" if starts > 1 else ""
    print(f"{stage.name:<20} {seconds:6.1f} s  {result}{again}  {name}", flush=True)


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    seconds: float,
    environment: Callable[[Stage, list[Row]], dict[str, str]],
    stopped: Sequence[int] = (),
) -> bool:
    """Run them in order. The ends are stretched so that the last one is at `seconds`.

    Args:
        environment: variables for a stage's commands, by what the rows so far say.
        stopped: becomes other than empty where all is to end, by KeyboardInterrupt.

    Returns:
        False where there is no GPU.
    """
    started, stretch = time.monotonic(), seconds / stages[-1].end
    for stage in stages:
        left = stage.end * stretch - (time.monotonic() - started)
        if left <= 0:
            tell(out, stage, (), "left out, the time is used up", 0.0, 0)
        elif not run_stage(stage, left, out, environment(stage, read_rows(out / ROWS)), stopped):
            return False
    return True

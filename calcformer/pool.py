"""Jobs done by worker processes, several at a time."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from calcformer.errors import InputError
from calcformer.worker import start_worker

__all__ = ["run_jobs"]

WATCH_SECONDS = 0.1  # between calls of `watch`


class Worker:
    """A process that does jobs, one after the other: to import PyTorch takes longer than many of them.

    Args:
        replies: gets this worker with what came of each job, and in the end with why the process ended.
    """

    def __init__(self, module: str, arguments: Sequence[object], replies: SimpleQueue[tuple[Worker, Any]]) -> None:
        self.errors = tempfile.TemporaryFile()
        self.process = start_worker("calcformer.pool", module, *arguments, stdout=subprocess.PIPE, stderr=self.errors)
        self.listener = threading.Thread(target=self.listen, args=(replies,), daemon=True)
        self.listener.start()

    def give(self, job: str) -> None:
        self.job = job
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended, as `listen` will say
            os.write(self.process.stdin.fileno(), f"{job}\n".encode())

    def listen(self, replies: SimpleQueue[tuple[Worker, Any]]) -> None:
        assert self.process.stdout is not None
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                replies.put((self, pickle.load(self.process.stdout)))
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").splitlines()
        reason = next(filter(None, reversed(lines)), f"its process ended with exit code {code}")
        if code < 0:
            reason = f"its process was ended by {signal.Signals(-code).name} (killed, or out of memory?)"
        replies.put((self, InputError(reason)))

    def close(self) -> None:
        self.process.kill()
        self.listener.join()
        with self.process, self.errors:
            pass


def run_jobs(
    module: str,
    arguments: Sequence[object],
    jobs: Iterable[str],
    processes: int,
    watch: Callable[[list[str]], object] = lambda jobs: None,
) -> Generator[tuple[str, Any], None, None]:
    """Do jobs, each a line of text, in worker processes; yields each with what came of it, as they are finished.

    That is what `do_job(job, *arguments)` of the module returned or, where it raised InputError or its process ended,
    an InputError. To leave undone what is not finished, close the iterator.

    Args:
        arguments: which `do_job` gets as text.
        processes: jobs at a time.
        watch: called with the jobs at work, every WATCH_SECONDS or sooner.
    """
    waiting, working = deque(jobs), list[Worker]()
    replies: SimpleQueue[tuple[Worker, Any]] = SimpleQueue()
    try:
        while waiting or working:
            while waiting and len(working) < processes:
                working.append(Worker(module, arguments, replies))
                working[-1].give(waiting.popleft())
            watch([worker.job for worker in working])
            try:
                worker, reply = replies.get(timeout=WATCH_SECONDS)
            except Empty:
                continue
            if worker not in working:  # it was closed
                continue
            job = worker.job
            if waiting and worker.process.poll() is None:
                worker.give(waiting.popleft())
            else:
                working.remove(worker)
                worker.close()
            yield job, reply
    finally:
        for worker in working:
            worker.close()


def work(jobs: SimpleQueue[str], module: str, *arguments: str) -> None:
    """Do the jobs that come in, in a worker."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    do_job = importlib.import_module(module).do_job
    while True:
        try:
            reply = do_job(jobs.get(), *arguments)
        except InputError as error:
            reply = error
        pickle.dump(reply, replies)
        replies.flush()

"""Ctrl-C, and SIGTERM, which is treated as it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Stopped", "handle_signals", "interruptible"]


class Stopped(KeyboardInterrupt):
    """A run was interrupted.

    Args:
        folder: its run folder, which is written.
        finished: how many epochs of it are saved; of a sweep, how many runs.
    """

    def __init__(self, folder: Path, finished: int) -> None:
        self.folder, self.finished = folder, finished
        super().__init__(f"{folder}: stopped after epoch {finished}")


@contextmanager
def handle_signals(handler: Callable[..., Any], *numbers: signal.Signals) -> Iterator[None]:
    """Within it these signals call `handler`; in a thread that gets none, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Within it Ctrl-C raises KeyboardInterrupt only where the function it gives is called; pressed twice, at once.

    Raised wherever Python happens to be, it can fall into a callback of a library, which prints and forgets it.
    """
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    with handle_signals(note, signal.SIGINT, signal.SIGTERM):
        yield check

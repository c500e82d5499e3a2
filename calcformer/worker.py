"""Processes that work for this one and end when it does, however it ends: python -m calcformer.worker MODULE ARGUMENTS.

What keeps a worker alive is its input, which closes with the process that holds the other end.
"""

import importlib
import os
import subprocess
import sys
import threading
from queue import SimpleQueue
from typing import Any

__all__ = ["start_worker"]


def start_worker(module: str, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Call `work(lines, *arguments)` of a module in a new process.

    Args:
        arguments: which `work` gets as text, behind a queue of the lines that are written to the process's input.
        options: of subprocess.Popen.
    """
    # It imports from where this process does: with -m alone the current folder would come first.
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "calcformer.worker", module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        start_new_session=True,
        **options,
    )  # its own session: Ctrl-C is for this process alone


def listen(lines: "SimpleQueue[str]") -> None:
    """Pass on the lines of the input; end the process when it closes, in the middle of whatever it does."""
    for line in os.fdopen(os.dup(0)):
        lines.put(line.rstrip("\n"))
    os._exit(1)


if __name__ == "__main__":
    received: "SimpleQueue[str]" = SimpleQueue()
    threading.Thread(target=listen, args=(received,), daemon=True).start()  # before PyTorch is imported
    importlib.import_module(sys.argv[1]).work(received, *sys.argv[2:])

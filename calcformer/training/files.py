"""Writing files so that a kill at any moment leaves either the old file or the new one, and nobody writes between."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calcformer.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["hold", "write_atomically"]

PATIENCE = 5.0  # seconds; a process that was killed may hold a folder for a moment yet


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes that ask by this function from the folder. The end of the process frees it in any case.

    Raises:
        InputError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(f"{folder} is being written by another process; wait for it or stop it") from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name stands for either the old content or all of the new, even after a power cut.

    The temporary name is the same each time: what a kill leaves behind, the next write to `path` takes away.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # writing, unlike opening, does not say what
        raise

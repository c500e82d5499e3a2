"""Writing files so that a kill at any moment leaves either the old file or the new one, and nobody writes between."""

import errno
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from calcformer.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["hold", "new_folder", "write_atomically"]

PATIENCE = 5.0  # seconds; a process that was killed may hold a folder for a moment yet


@contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """Keep other processes that ask by this function from the folder. The end of the process frees it in any case.

    Raises:
        InputError: another process holds it.
    """
    if fcntl is None:
        yield folder
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
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))  # made anew meanwhile
        yield folder
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Make a folder and hold it: `out`, or else runs/NAME-N with the first N that is free.

    Two processes never get the same one: who finds it made, or no longer empty, takes the next number or is told. It is
    gone again where nothing was written to it.

    Raises:
        InputError: `out` is a file, a folder with something in it, or held by another process.
    """
    for number in itertools.count(1):
        folder = Path("runs", f"{name}-{number}") if out is None else out
        made = not folder.exists()
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(exist_ok=out is not None)
        except FileExistsError:
            if out is not None:
                break
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(folder))
                is_free = all(is_temporary(path) for path in folder.iterdir())
            except FileNotFoundError:  # who held it wrote nothing and took it away
                continue
            if is_free:
                if made:
                    stack.callback(remove_empty, folder)
                yield folder
                return
        if out is not None:
            break
    raise InputError(f"{out} already exists; give --out another name, or continue it with --resume {out}")


def remove_empty(folder: Path) -> None:
    with suppress(OSError):  # there is something in it
        folder.rmdir()


def is_temporary(path: Path) -> bool:
    """Whether it is what a kill within `write_atomically` left."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that its name stands for either the old content or all of the new, even after a power cut.

    The temporary name is the same each time: what a kill leaves behind, the next write to `path` takes away. A link
    stays one. What is no file, such as /dev/stdout, is written to: a file would take its place and be no terminal.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # writing, unlike opening, does not say what
        raise

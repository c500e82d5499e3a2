"""Writing files so that a kill at any moment leaves either the old file or the new one."""

import os
from pathlib import Path

__all__ = ["write_atomically"]


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

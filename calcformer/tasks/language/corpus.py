"""A text on disk: a file, or the files of a folder, perhaps compressed."""

import gzip
import zlib
from pathlib import Path

from calcformer.errors import InputError

__all__ = ["read_bytes", "read_file", "read_text"]

ENDINGS = ".txt", ".txt.gz"


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or of a folder: its input.txt, else all of its *.txt, by name; each may be .gz.

    Raises:
        InputError: there is no such file, or nothing in it, or it is something else.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and file.is_file())
        files = [file for file in found if file.name in ("input.txt", "input.txt.gz")][:1] or found
        if not files:
            raise InputError(f"{path} has no text in it (*.txt or *.txt.gz); give --data another folder or a file")
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise InputError(f"{path} is no file on a disk, and a text is read more than once; write it to one")
    else:
        raise InputError(f"there is no text {path}; give --data FILE or FOLDER, or put it back")
    text = "\n".join(map(read_file, files))
    if not text.strip():
        raise InputError(f"{path} is empty; give --data a text")
    return text


def read_file(path: Path) -> str:
    """The text of one file in UTF-8, with "\\n" at the ends of lines; InputError where it is something else."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is no gzip file, or not all of one ({error}); give another one") from None
    return read_bytes(content, str(path))


def read_bytes(content: bytes, name: str) -> str:
    """A text in UTF-8, with "\\n" at the ends of lines; InputError, which calls it by a name, for something else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is no text in UTF-8 (byte {error.start} is {content[error.start]:#04x}); convert it, or give "
            "another one"
        ) from None
    return text.replace("\r\n", "\n")

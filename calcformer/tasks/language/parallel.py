"""A parallel corpus on disk: two files of lines, of which each line of one translates the same line of the other."""

from __future__ import annotations

from pathlib import Path

from calcformer.errors import InputError
from calcformer.tasks.language.corpus import read_file

__all__ = ["TEST", "VALID", "find_parts", "read_pairs"]

TRAIN, VALID, TEST = "train", ("val", "valid", "dev"), "test"


def find_file(folder: Path, part: str, language: str) -> Path | None:
    """The file of a part in a language, such as train.en or train.en.gz; None where there is none."""
    files = folder / f"{part}.{language}", folder / f"{part}.{language}.gz"
    return next((file for file in files if file.is_file()), None)


def find_parts(folder: Path, source: str, target: str) -> dict[str, tuple[Path, Path]]:
    """The files of each part of a corpus, source and target: train, one of `VALID`, and those that begin with test.

    Raises:
        InputError: the folder has no files to train on in one of the languages, or a part in only one.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give --data another one, or put it back")
    names = [path.name.removesuffix(".gz").rpartition(".") for path in sorted(folder.iterdir()) if path.is_file()]
    languages = sorted({language for part, _, language in names if part == TRAIN and language != "gz"})
    for flag, language in ("--source", source), ("--target", target):
        if language not in languages:
            known = ", ".join(languages) or "none"
            raise InputError(
                f"{folder} has no {TRAIN}.{language} (or .gz); give {flag} a language that it has ({known})"
                if language
                else f"a corpus in a folder needs {flag} LANGUAGE; {folder} has {known}"
            )
    if source == target:
        raise InputError(f"--source and --target are both {source}; give two languages")
    tests = sorted({part for part, _, _ in names if part.startswith(TEST)})
    found = {}
    for part in (TRAIN, *VALID, *tests):
        first, second = find_file(folder, part, source), find_file(folder, part, target)
        if first and second:
            found[part] = first, second
        elif (first or second) and part not in tests:
            raise InputError(f"{folder} has {part} in one of {source} and {target} only; add the other, or take it out")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without spaces around them."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; give another one, or put it back")
    lines = read_file(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def read_pairs(source: Path, target: Path) -> tuple[list[str], list[str]]:
    """The lines of two files that belong together; InputError where they cannot."""
    both = [read_lines(path) for path in (source, target)]
    if len(both[0]) != len(both[1]):
        raise InputError(
            f"{source} has {len(both[0]):,} lines and {target} {len(both[1]):,}; each line of one must translate the "
            "same line of the other"
        )
    for path, lines in zip((source, target), both):
        empty = [number for number, line in enumerate(lines, start=1) if not line]
        if not lines:
            raise InputError(f"{path} is empty; give a text with a line for each sentence")
        if empty:
            others = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
            raise InputError(f"{path}: line {empty[0]:,}{others} is empty; take such lines out of both files")
    return both[0], both[1]

"""metrics.jsonl: one line of JSON an epoch."""

import json
import math
from pathlib import Path
from typing import Any

from calcformer.files import write_atomically

__all__ = ["RunLog"]


def parse(line: str) -> dict[str, Any] | None:
    """The finite numbers of a line by their names; None where it is no entry, as when other hands were at the file."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or type(content.get("epoch")) is not int or content["epoch"] < 1:
        return None
    return {name: value for name, value in content.items()
            if type(value) in (int, float) and abs(value) <= 1e300 and not math.isnan(value)}


class RunLog:
    """Appends lines to a file, and forgets those of epochs that a resumed run repeats."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _lines(self) -> list[str]:
        """All lines but a last one that a kill left unfinished."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        return lines[:-1] + [line for line in lines[-1:] if parse(line)]

    def append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The entries by epoch, of several of one epoch the last. Lines that are none are passed over."""
        entries = {entry["epoch"]: entry for entry in map(parse, self._lines()) if entry is not None}
        return [entries[epoch] for epoch in sorted(entries)]

    def rewind(self, epoch: int) -> None:
        """Drop the entries after `epoch`, and nothing else: a line that cannot be read stays as it is."""
        kept = [line + "\n" for line in self._lines() if (parse(line) or {"epoch": 0})["epoch"] <= epoch]
        write_atomically(self.path, "".join(kept).encode("utf-8", "surrogateescape"))

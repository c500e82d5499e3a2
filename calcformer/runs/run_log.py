"""metrics.jsonl: one line of JSON an epoch."""

import json
from pathlib import Path
from typing import Any

from calcformer.runs.files import write_atomically
from calcformer.settings import MOST_EPOCHS

__all__ = ["RunLog"]

SHARES = ("token_accuracy", "valid_token_accuracy", "exact_match")
LARGEST = 1e12  # figure that is believed


def parse(line: str) -> dict[str, Any] | None:
    """The numbers of a line that can be true, by their names; None where it is no entry, as by other hands."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or type(content.get("epoch")) is not int:
        return None
    if not 1 <= content["epoch"] <= MOST_EPOCHS:
        return None
    return {
        name: value
        for name, value in content.items()
        if type(value) in (int, float) and 0 <= value <= (1 if name in SHARES else LARGEST)
    }


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
        """The entries by epoch, of several figures of one name and epoch the last. Other lines are passed over."""
        entries: dict[int, dict[str, Any]] = {}
        for entry in map(parse, self._lines()):
            if entry is not None:
                entries.setdefault(entry["epoch"], {}).update(entry)
        return [entries[epoch] for epoch in sorted(entries)]

    def rewind(self, epoch: int) -> None:
        """Drop the entries after `epoch`, and nothing else: a line that cannot be read stays as it is."""
        kept = [line + "\n" for line in self._lines() if (parse(line) or {"epoch": 0})["epoch"] <= epoch]
        write_atomically(self.path, "".join(kept).encode("utf-8", "surrogateescape"))

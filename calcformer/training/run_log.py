"""metrics.jsonl: one line of JSON an epoch."""

import json
from pathlib import Path
from typing import Any

from calcformer.training.files import write_atomically

__all__ = ["RunLog"]


class RunLog:
    """Appends lines to a file, and forgets those of epochs that a resumed run repeats."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All entries; a last line that a killed run left unfinished is dropped."""
        entries: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return entries

    def rewind(self, epoch: int) -> None:
        """Keep the entries up to `epoch`."""
        kept = [json.dumps(entry) + "\n" for entry in self.read() if entry["epoch"] <= epoch]
        write_atomically(self.path, "".join(kept).encode())

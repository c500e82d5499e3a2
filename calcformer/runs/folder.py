"""What a run folder holds, read without torch.

config.json          all settings
model.safetensors    the weights after the last finished epoch
resume.safetensors   the same weights with Adam's state: one file, so that the two can never be of different epochs
metrics.jsonl        a line an epoch
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calcformer.config import RunConfig
from calcformer.errors import InputError

__all__ = [
    "CONFIG",
    "METRICS",
    "MODEL",
    "RESUME",
    "RunError",
    "epoch_of",
    "finished_epochs",
    "read_config",
    "read_head",
    "saved_epoch",
]

CONFIG, MODEL, RESUME, METRICS = "config.json", "model.safetensors", "resume.safetensors", "metrics.jsonl"


class RunError(InputError):
    """A run folder that is missing or damaged."""


def read_config(folder: Path) -> RunConfig:
    """The settings of a run; RunError where the folder is not one."""
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}; make one with: calcformer train --out {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}; give the folder that training wrote")
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} cannot be used ({error}); train the run again or give another one") from None


def epoch_of(metadata: dict[str, str] | None) -> int:
    """The epoch that a file of tensors says it is from; KeyError or ValueError where it does not."""
    epoch = int((metadata or {})["epoch"])
    if epoch < 0:
        raise ValueError(f"epoch {epoch}")
    return epoch


def read_head(path: Path) -> dict[str, Any]:
    """What a file of safetensors says of its tensors: dtype, shape and place of each, by name, and "__metadata__".

    Raises:
        OSError, ValueError: it cannot be read, or is no such file, or not all of it.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        head = json.loads(file.read(length)) if 0 < length <= size else None
    if not isinstance(head, dict):
        raise ValueError("no head")
    ends = [tensor["data_offsets"][1] for name, tensor in head.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{size} bytes")
    return head


def saved_epoch(path: Path) -> int | None:
    """The epoch that a file of tensors is from; None where it cannot be read. Reads the file's head only."""
    try:
        return epoch_of(read_head(path).get("__metadata__"))
    except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def finished_epochs(folder: Path) -> int | None:
    """How many epochs of a run are saved, None where there is no run to continue."""
    return saved_epoch(folder / RESUME)

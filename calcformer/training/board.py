"""TensorBoard's event files, where they are asked for."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from calcformer.errors import InputError

__all__ = ["Board", "require_tensorboard"]


def require_tensorboard() -> None:
    """Raise InputError where the package tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401  # not at the top: it takes seconds
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard; install it with: pip install tensorboard, "
            "or leave out --tensorboard"
        ) from None


class Board:
    """The figures of metrics.jsonl as scalars by epoch, in event files of the run folder.

    Args:
        finished: epochs finished. What an earlier process wrote of later ones TensorBoard then hides.
    """

    def __init__(self, folder: Path, finished: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=finished + 1)

    def add(self, entry: dict[str, Any]) -> None:
        """Write a line of the log."""
        for name, value in entry.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, entry["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Nothing is left to be written; that it could not be, `add` has said."""
        with suppress(OSError):
            self._writer.close()

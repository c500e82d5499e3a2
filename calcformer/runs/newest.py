"""Which run is asked where none is named."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from calcformer.config import RunConfig
from calcformer.errors import InputError
from calcformer.runs.folder import MODEL, read_config, saved_epoch

__all__ = ["newest_run"]

RUNS = Path("runs")


def newest_run(questions: Sequence[str] = (), folder: Path = RUNS) -> Path:
    """The run in `folder` to ask: of those that can read the `questions` the newest finished one, else the newest.

    Raises:
        InputError: there is no run.
    """
    found: list[tuple[bool, float, Path, RunConfig]] = []
    for path in folder.glob(f"*/{MODEL}"):
        with suppress(InputError, OSError):  # damaged, or deleted meanwhile
            config = read_config(path.parent)
            found.append((saved_epoch(path) == config.training.epochs, path.stat().st_mtime, path.parent, config))
    if not found:
        raise InputError(
            f"there is no trained run in {folder}/; make one with: calcformer train, or name one with --run"
        )
    # What has no example comes last: a language model reads any text.
    found.sort(key=lambda each: (bool(each[3].data.example), *each[:2]), reverse=True)
    return next((run for *_, run, config in found if can_read(run, config, questions)), found[0][2])


def can_read(run: Path, config: RunConfig, questions: Sequence[str]) -> bool:
    """Whether all questions are ones that a run knows."""
    try:
        task = config.data.restore(run)
        for question in questions:
            task.read_question(question)
    except (InputError, OSError):
        return False
    return True

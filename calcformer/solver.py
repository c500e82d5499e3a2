"""A trained run that answers typed problems."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from calcformer.decoding import greedy_decode
from calcformer.errors import InputError
from calcformer.training import load_run, pick_device

__all__ = ["Solver", "newest_run"]

RUNS = Path("runs")


def newest_run(folder: Path = RUNS) -> Path:
    """The run in `folder` whose weights were written last; InputError where there is none."""
    weights = sorted(folder.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise InputError(f"there is no trained run in {folder}/; make one with: calcformer train --preset formula, "
                         "or name one with --run")
    return weights[-1].parent


class Solver:
    """The model of a run folder, in evaluation mode, with its settings and its task."""

    def __init__(self, run: str | PathLike[str], device: str = "auto") -> None:
        self.device = pick_device(device)
        self.config, self.task, self.model, self.epoch = load_run(Path(run), self.device)

    def solve(self, questions: Sequence[str], batch_size: int = 1_000) -> list[str]:
        """The model's answers, in order; they can be wrong.

        Args:
            questions: such as "649+864", or "NEGATIVE 30 subtract NEGATIVE 34" for a run on expressions.

        Raises:
            InputError: a question is not one that the run was trained for.
        """
        if isinstance(questions, str):
            raise TypeError(f"questions must be a list of strings, got the string {questions!r}")
        encoded = [self.task.encode_question(question) for question in questions]
        vocabulary, answers = self.task.vocabulary, []
        for start in range(0, len(encoded), batch_size):
            rows = encoded[start:start + batch_size]
            length = max(map(len, rows))
            if vocabulary.pad_id is not None:
                rows = [row + [vocabulary.pad_id] * (length - len(row)) for row in rows]
            said = greedy_decode(self.model, torch.tensor(rows, device=self.device), self.task.target_length - 1,
                                 vocabulary)
            answers += [self.task.decode_answer(row) for row in said.tolist()]
        return answers

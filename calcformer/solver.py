"""A trained run that answers typed problems."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from calcformer.decoding import BATCH, decode
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
        self.folder = Path(run)
        self.device = pick_device(device)
        self.config, self.task, self.model, self.epoch = load_run(self.folder, self.device)

    def solve(self, questions: Sequence[str], batch_size: int = BATCH, beam: int = 1) -> list[str]:
        """The model's answers, in order; they can be wrong.

        Args:
            questions: such as "649+864", or "NEGATIVE 30 subtract NEGATIVE 34" for a run on expressions.
            batch_size: beginnings of answers followed at once.
            beam: how many beginnings of an answer are followed; 1 decodes greedily.

        Raises:
            InputError: a question is not one that the run was trained for, or `beam` is below 1.
        """
        if isinstance(questions, str):
            raise TypeError(f"questions must be a list of strings, got the string {questions!r}")
        encoded = [self.task.encode_question(question) for question in questions]
        vocabulary, longest = self.task.vocabulary, max(map(len, encoded), default=0)
        if vocabulary.pad_id is not None:
            encoded = [ids + [vocabulary.pad_id] * (longest - len(ids)) for ids in encoded]
        source = torch.tensor(encoded, dtype=torch.long, device=self.device).view(len(encoded), longest)
        said = decode(self.model, source, self.task.target_length - 1, vocabulary, beam, batch_size)
        return [self.task.decode_answer(ids) for ids in said.tolist()]

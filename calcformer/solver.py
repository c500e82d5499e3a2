"""A trained run that answers typed problems."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from calcformer.data import Answer
from calcformer.decoding import BATCH, check_beam
from calcformer.errors import InputError
from calcformer.runs.checkpoint import load_run
from calcformer.runs.device import pick_device

__all__ = ["Answer", "Solver"]


class Solver:
    """The model of a run folder, in evaluation mode, with its settings and its task."""

    def __init__(self, run: str | PathLike[str], device: str = "auto") -> None:
        self.folder = Path(run)
        self.device = pick_device(device)
        self.config, self.task, self.model, self.epoch = load_run(self.folder, self.device)

    def __str__(self) -> str:
        """Which run this is, and whether it is finished."""
        epochs = self.config.training.epochs
        return f"{self.folder}, {'' if self.epoch == epochs else 'unfinished, '}epoch {self.epoch} of {epochs}"

    def solve(self, questions: Sequence[str], batch_size: int = BATCH, beam: int = 1) -> list[str]:
        """The model's answers, in order; they can be wrong.

        Args:
            questions: such as "649+864", or "NEGATIVE 30 subtract NEGATIVE 34" for a run on expressions.
            batch_size: problems, and beginnings of answers, at once.
            beam: how many beginnings of an answer are followed; 1 decodes greedily.

        Raises:
            InputError: a question is not one that the run was trained for, or no beam is as wide.
        """
        return [answer.said for answer in self.answers(questions, batch_size, beam)]

    def answers(
        self,
        questions: Sequence[str],
        batch_size: int = BATCH,
        beam: int = 1,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Answer]:
        """What `solve` says, with its probability and the right answer; arguments and errors as there.

        Args:
            advance: called with the number of problems answered, after each batch.
        """
        if isinstance(questions, str):
            raise TypeError(f"questions must be a list of strings, got the string {questions!r}")
        check_beam(beam)
        problems = [self.task.read_question(question) for question in questions]
        found: list[Answer] = []
        for start in range(0, len(problems), batch_size):
            part = self.task.answers(self.model, problems[start : start + batch_size], self.device, beam, batch_size)
            if not all(math.isfinite(answer.probability) for answer in part):
                raise InputError(
                    f"{self.folder}: its weights are so large that a probability is no number; "
                    "train the run again or give another one"
                )
            found += part
            advance(len(part))
        return found

"""The next word of one line, from the words before it: nothing is held out, the line is to be known by heart."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from calcformer.errors import InputError
from calcformer.model.settings import RecurrentSettings
from calcformer.settings import Preset, Study, TaskSettings, TrainingConfig, setting

if TYPE_CHECKING:
    from calcformer.tasks.next_word_task import NextWordTask

__all__ = ["LINE", "NextWords"]

LINE = "If you win, you live! If you lose, you die! If you don't fight, you can't win!"  # S2, a report
MOST_WORDS = 10_000


@dataclass(frozen=True)
class NextWords(TaskSettings):
    """A word is what stands between spaces, its comma included: as the report must have cut its line.

    So it has 10 words that differ, whose loss by chance is ln 10 = 2.303. Of its 17 words the report never asks for the
    last: 15, 14 and 13 examples of 1, 2 and 3 words before it. Nothing is held out, since what one line says at one
    place cannot be known from the others: what counts is how fast and how exactly a model learns what it was shown.
    """

    task = "next-word"
    about = "the next word of a line, known by heart: after If comes you"
    example = "you"
    models = ("recurrent", "feed-forward", "transformer")
    figures = {"valid_token_accuracy": "accuracy", "valid_loss": "loss"}
    holds_out = False
    epochs_a_checkpoint = 50

    # No settings here: how many there are the line tells.
    train_size: ClassVar[Any] = property(lambda self: len(self.words) - self.context - self.skip_last)  # type: ignore[misc]
    valid_size: ClassVar[Any] = train_size  # type: ignore[misc]
    data_seed: ClassVar[int] = 0  # type: ignore[misc]

    line: str = setting(LINE, "what is learned; words stand between spaces")
    context: int = setting(1, "words before the next one", 1, 1000)
    skip_last: bool = setting(False, "never ask for the last word, as the report did")

    def __post_init__(self) -> None:
        super().__post_init__()
        count, least = len(self.words), self.context + 1 + self.skip_last
        if not least <= count <= MOST_WORDS:
            raise InputError(
                f"line must have {least} to {MOST_WORDS} words where {self.context} stand before the next one"
                f"{' and the last is left out' if self.skip_last else ''}, got {count}; give another line or context"
            )

    @property
    def words(self) -> list[str]:
        return self.line.split()

    def following(self) -> dict[tuple[str, ...], Counter[str]]:
        """How often which word follows each of the contexts that are trained on."""
        found: dict[tuple[str, ...], Counter[str]] = {}
        for start in range(self.train_size):
            *before, word = self.words[start : start + self.context + 1]
            found.setdefault(tuple(before), Counter())[word] += 1
        return found

    @property
    def best_possible(self) -> dict[str, float]:
        """Accuracy and loss of a model that knows after each context how often which word follows.

        It says the most frequent one; and its loss is the entropy of the word given the context, the mean over the
        examples of -ln(count of the word there / count of all words there).
        """
        counts = self.following().values()
        right = sum(max(words.values()) for words in counts)
        nats = sum(-n * math.log(n / words.total()) for words in counts for n in words.values())
        return {"valid_token_accuracy": right / self.train_size, "valid_loss": nats / self.train_size}

    def build(self) -> NextWordTask:
        from calcformer.tasks.next_word_task import NextWordTask

        return NextWordTask(self)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        training = TrainingConfig(epochs=500, batch_size=16, processes=1)
        return {
            "next-word": Preset(
                "the line of S2, a report, by a recurrent network", cls(), RecurrentSettings(), training
            )
        }

    @classmethod
    def studies(cls) -> dict[str, Study]:
        models = ["feed-forward", "recurrent", "transformer"]
        return {
            "s2-next-word": Study(
                "next-word",
                {"model": models, "layers": [1, 2], "context": [1, 2, 3]},
                [],
                {"skip_last": True, "seed": 1},
                seeds=10,
                epochs=(5, 50),
            )
        }

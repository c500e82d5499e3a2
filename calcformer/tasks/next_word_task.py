"""The next word: contexts as tensors, and what a model says to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calcformer.data import Answer, Examples, Labelled, Task, Vocabulary
from calcformer.decoding import BATCH
from calcformer.errors import InputError, shown

if TYPE_CHECKING:
    from calcformer.tasks.next_word import NextWords

__all__ = ["NextWord", "NextWordTask"]

Context = tuple[str, ...]


@dataclass(frozen=True)
class NextWord(Answer):
    """A word said after a context, and how often which words follow there: nowhere in the line, none."""

    follows: dict[str, int]
    sign = "->"

    @property
    def is_right(self) -> bool | None:
        return self.said in self.follows if self.follows else None

    @property
    def verdict(self) -> str:
        if not self.follows:
            return "the line does not have these words so"
        total = sum(self.follows.values())
        counted = ", ".join(f"{word} {count} of {total}" for word, count in self.follows.items())
        return f"{'right' if self.is_right else 'wrong'}; by counting {counted}"


class NextWordTask(Task):
    """Contexts of a fixed number of words. A problem is such a context."""

    ignored_label = None
    has_answers = False

    def __init__(self, data: NextWords) -> None:
        self.vocabulary = Vocabulary(tuple(dict.fromkeys(data.words)))
        self.source_length, self.target_length = data.context, 1
        self.following = data.following()
        windows = torch.tensor(self.vocabulary.encode(data.words)).unfold(0, data.context + 1, 1)[: data.train_size]
        self.examples = Labelled(windows[:, :-1], windows[:, -1])

    def split(self) -> tuple[Examples, Examples]:
        """The same examples twice: nothing is held out."""
        return self.examples, self.examples

    def read_question(self, text: str) -> Context:
        words = tuple(text.split())
        for word in words:
            if word not in self.vocabulary.tokens:
                known = " ".join(self.vocabulary.tokens)
                raise InputError(f"{shown(text)}: {shown(word)} is no word of this run's line; it has {shown(known)}")
        if len(words) != self.source_length:
            raise InputError(
                f"{shown(text)} has {len(words)} words, and this run says the next one after {self.source_length}; "
                "give as many"
            )
        return words

    def question(self, problem: Context) -> str:
        return " ".join(problem)

    def right_answer(self, problem: Context) -> str | None:
        """The most frequent one, of equal ones the first in the line."""
        counts = self.following.get(problem)
        return counts.most_common(1)[0][0] if counts else None

    def questions(self, examples: Examples) -> list[str]:
        return [" ".join(self.vocabulary.decode(ids)) for ids in examples.inputs[0].tolist()]

    def ask(self, problems: Sequence[Context]) -> Labelled:
        ids = torch.tensor([self.vocabulary.encode(problem) for problem in problems]).view(-1, self.source_length)
        labels = [self.vocabulary.id(self.right_answer(problem) or self.vocabulary.tokens[0]) for problem in problems]
        return Labelled(ids, torch.tensor(labels))

    @torch.no_grad()
    def answers(
        self, model: Any, problems: Sequence[Context], device: torch.device, beam: int = 1, batch_size: int = BATCH
    ) -> list[Answer]:
        """The most probable word after each context, its probability, and what the line has there."""
        if beam != 1:
            raise InputError("an answer of one word has no beginnings that a beam could follow; leave out --beam")
        chances, words = model(*self.ask(problems).to(device).inputs).double().softmax(dim=1).max(dim=1)
        return [
            NextWord(
                self.question(problem),
                self.vocabulary.tokens[word],
                chance,
                self.right_answer(problem),
                dict(self.following.get(problem, Counter())),
            )
            for problem, word, chance in zip(problems, words.tolist(), chances.tolist())
        ]

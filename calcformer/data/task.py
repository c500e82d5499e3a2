"""What training, decoding, evaluation and the command line ask of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from calcformer.data.examples import Examples, Pairs
from calcformer.data.vocab import Vocabulary
from calcformer.decoding import BATCH, decode, log_probability
from calcformer.errors import InputError, shown

__all__ = ["Answer", "Task"]


@dataclass(frozen=True)
class Answer:
    """What a model says to a problem, with which probability, and what is right; None where nobody knows."""

    problem: str
    said: str
    probability: float
    expected: str | None
    sign: ClassVar[str] = "="  # between a problem and its answer

    @property
    def is_right(self) -> bool | None:
        return None if self.expected is None else self.said == self.expected

    @property
    def verdict(self) -> str:
        return "" if self.expected is None else "right" if self.is_right else f"wrong, {self.expected} is right"

    def __str__(self) -> str:
        facts = [f"probability {self.probability:.4f}", self.verdict]
        return f"{self.equation}  ({', '.join(filter(None, facts))})"

    @property
    def equation(self) -> str:
        """The problem and the answer; in quotes what could not be seen, or would be several lines."""
        seen = [text if text.strip() and text.isprintable() else repr(text) for text in (self.problem, self.said)]
        return f" {self.sign} ".join(seen)


class Task:
    """A kind of problem: what it is made of, which problems are held out, how questions are read and answers written.

    As it stands: a text is asked and a text is the answer, whose characters are the tokens. A task has at least a
    vocabulary, both lengths and `split`, and what makes it another task: `right_answer`, or `tokens` and `text`, or the
    methods that `calcformer.tasks.arithmetic.problems` changes.

    A problem is whatever `read_question` returns. Numbers of problems, (N,) int64, are in 0..size-1.
    """

    vocabulary: Vocabulary  # of what is said, and of what is asked
    source_length: int  # tokens of the longest source, end token included
    target_length: int  # tokens of the longest target, begin and end token included
    size: int | None = None  # distinct problems, where they are numbered: those have `encode` and `trained_on`
    count: int | None = None  # examples on both sides, where that is not what the settings say
    fresh = False  # each epoch draws its problems anew, by `draw`
    has_answers = True  # what is held out has an answer that a model can say by itself
    translates = False  # a question is a sentence, which may be translated in more ways than one
    kind_of_answer: type[Answer] = Answer
    length_penalty = 0.0  # of a search for answers, see `beam_search`
    tests: Sequence[str] = ()  # more examples that are kept from training, measured at its end
    probes: Sequence[str] = ()  # questions that are answered for all to see while a model is trained
    group_labels: dict[str, str] = {}  # how a table names the members of a group, such as "{} digits"

    @property
    def source_vocabulary(self) -> Vocabulary:
        """That of what is asked, where it is another one: its special tokens have the same ids."""
        return self.vocabulary

    @property
    def measured_at_once(self) -> int:
        """Examples of a batch that is only measured: a thousand, or as many as have 2^15 tokens and 2^26 scores."""
        tokens = min(1 << 15, (1 << 26) // len(self.vocabulary))
        return max(1, min(1_000, tokens // self.target_length))

    @property
    def ignored_label(self) -> int | None:
        """The label that is none: neither loss nor accuracy counts it."""
        return self.vocabulary.pad_id

    def files(self) -> dict[str, bytes]:
        """What a run folder keeps for `TaskSettings.restore`, by the names of files."""
        return {}

    # Examples

    def split(self) -> tuple[Examples, Examples]:
        """Training and held-out examples, which share none; where problems are fresh, those of one epoch."""
        raise NotImplementedError

    def test(self, name: str) -> Examples:
        """Those of one of the `tests`."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> Examples:
        """The examples of an epoch where they are `fresh`, on the generator's device."""
        raise NotImplementedError

    def encode(self, index: torch.Tensor) -> Examples:
        """The problems of these numbers."""
        raise NotImplementedError

    def trained_on(self, index: torch.Tensor) -> torch.Tensor:
        """Which of the problems of these numbers may have been in training: (N,) bool."""
        raise NotImplementedError

    def hard_sets(self) -> dict[str, tuple[Examples, torch.Tensor]]:
        """Problems known to be hard, by name, and which of them may have been in training, (N,) bool."""
        return {}

    def groups(self, examples: Examples) -> dict[str, tuple[Sequence[str], torch.Tensor]]:
        """What evaluation divides examples by: the names of each group's members, and each example's, (N,) int64."""
        return {}

    # Questions and answers

    def unknown_words(self, text: str) -> list[str]:
        """The words of a question that are no tokens, and are read as one that stands for any word."""
        return []

    def read_question(self, text: str) -> Any:
        """A problem typed by a user; InputError where a model of this task cannot know it."""
        text, vocabulary = text.strip(), self.vocabulary
        for token in self.tokens(text):
            if token not in vocabulary.tokens or token in (vocabulary.bos, vocabulary.eos, vocabulary.pad):
                raise InputError(f"{shown(text)}: {shown(token)} is nothing this run knows; leave it out")
        if not 0 < len(self.tokens(text)) < self.source_length:
            raise InputError(
                f"{shown(text)} has {len(self.tokens(text))} tokens, and this run was trained for 1 to "
                f"{self.source_length - 1}; give as many"
            )
        return text

    def question(self, problem: Any) -> str:
        """A problem as a user types it."""
        return str(problem)

    def right_answer(self, problem: Any) -> str | None:
        """The answer as `decode_answer` writes it, None where nobody knows."""
        return None

    def tokens(self, text: str) -> Sequence[str]:
        return text

    def text(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def ask(self, problems: Sequence[Any]) -> Examples:
        """Problems as examples, with their right answers, where those are known."""
        vocabulary = self.vocabulary
        sources, targets = [], []
        for problem in problems:
            answer = vocabulary.encode(self.tokens(self.right_answer(problem) or ""))
            sources.append([*vocabulary.encode(self.tokens(self.question(problem))), vocabulary.eos_id])
            targets.append([vocabulary.bos_id, *answer, vocabulary.eos_id])
        return Pairs(vocabulary.pad_all(sources, self.source_length), vocabulary.pad_all(targets, self.target_length))

    def questions(self, examples: Examples) -> list[str]:
        """What examples ask, as a user types it."""
        return [self.text(self.vocabulary.decode_until_eos(ids)) for ids in examples.inputs[0].tolist()]

    def decode_answer(self, ids: list[int]) -> str:
        """An answer, or labels, as text."""
        return self.text(self.vocabulary.decode_until_eos(ids))

    # What a model says

    def show(self, model: Any, device: torch.device) -> list[str]:
        """Lines for all to see while a model, in evaluation mode, is trained: what it says to the probes."""
        if not self.probes:
            return []
        problems = [self.read_question(question) for question in self.probes]
        return [str(answer) for answer in self.answers(model, problems, device)]

    def beginning(self, text: str | None) -> list[int]:
        """The tokens of a text that a language model goes on with, None for one of its own; InputError for others."""
        raise InputError(
            "this run answers problems and goes on with no text; ask it by: calcformer "
            f"{'translate RUN' if self.translates else 'solve --run RUN'}"
        )

    def answer(
        self,
        model: Any,
        examples: Examples,
        beam: int = 1,
        batch_size: int = BATCH,
        advance: Callable[[int], object] = lambda count: None,
    ) -> torch.Tensor:
        """What a model in evaluation mode says by itself, shaped as the labels of untrimmed examples; see `decode`."""
        source, length = examples.inputs[0], self.target_length - 1
        return decode(model, source, length, self.vocabulary, beam, batch_size, advance, self.length_penalty)

    def log_probability(self, model: Any, examples: Examples, said: torch.Tensor) -> torch.Tensor:
        """The natural logarithm of the probability a model gives to each of the answers `said`: (N,) float64."""
        sources, answers = (x.split(self.measured_at_once) for x in (examples.inputs[0], said))
        found = [log_probability(model, *part, self.vocabulary) for part in zip(sources, answers)]
        return torch.cat(found)

    def answers(
        self, model: Any, problems: Sequence[Any], device: torch.device, beam: int = 1, batch_size: int = BATCH
    ) -> list[Answer]:
        """What a model says to problems, with its probability and the right answer."""
        examples = self.ask(problems).to(device).trim(self.vocabulary.pad_id)
        said = self.answer(model, examples, beam, batch_size)
        chances = self.log_probability(model, examples, said).exp().tolist()
        return [
            self.kind_of_answer(self.question(problem), self.decode_answer(ids), chance, self.right_answer(problem))
            for problem, ids, chance in zip(problems, said.tolist(), chances)
        ]

    def is_right(self, said: torch.Tensor, examples: Examples) -> torch.Tensor:
        """(N,) bool, whether the whole answer is right, end token included."""
        same = said == examples.labels
        return same if same.dim() == 1 else same.all(dim=1)

    def text_figures(self, loss: float) -> dict[str, float]:
        """Figures of held-out texts beside loss, accuracy and perplexity, from the loss of a token in nats."""
        return {}

    def answer_figures(self, said: torch.Tensor, examples: Examples) -> dict[str, float]:
        """Figures of the answers `said`, (N, T) int64, to all of the examples that are measured."""
        return {"exact_match": int(self.is_right(said, examples).sum()) / len(examples)}

    def describe_answers(self, said: torch.Tensor, examples: Examples, folder: Path, part: str) -> dict[str, Any]:
        """What evaluation says of answers beside figures of translations; it may write to the folder."""
        return {}

    def report_answers(self, result: dict[str, Any]) -> list[str]:
        """That as lines to be read, from the whole of an evaluation's result."""
        return []

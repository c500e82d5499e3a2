"""Windows of a text, and what a model goes on to say."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calcformer.data import Answer, Examples, Task, Texts
from calcformer.errors import InputError, shown
from calcformer.runs.folder import RunError
from calcformer.sampling import generate
from calcformer.tasks.language.corpus import read_text
from calcformer.tasks.language.tokenizers import UNKNOWN, BytePairs, Characters, Tokenizer, WordPieces, Words

if TYPE_CHECKING:
    from calcformer.tasks.text import Text

__all__ = ["NextToken", "TextTask"]

TOKENIZER, DIGEST = "tokenizer.json", "text.sha256"  # in a run folder
KINDS: dict[str, type[Tokenizer]] = {
    "characters": Characters,
    "words": Words,
    "word-piece": WordPieces,
    "bpe": BytePairs,
}
MEASURED_BEFORE = -100  # the label of a token that an earlier window has
SHOWN = 120  # tokens of a sample


class NextToken(Answer):
    """The likeliest token after a text; what is right nobody knows."""

    sign = "->"


def cut(ids: torch.Tensor, context: int, most: int) -> Texts:
    """Windows (N, context), N at most `most`, of which each token of ids (L,) but the first is a label once.

    Each begins with the last token of the one before. The last one ends with the text; what others have is no label.
    """
    starts = torch.arange(0, len(ids) - 1, context)[:most]
    begins = starts.clamp(max=len(ids) - 1 - context)
    rows = ids.unfold(0, context + 1, 1)[begins]
    before = torch.arange(context) < (starts - begins)[:, None]
    return Texts(rows[:, :-1].contiguous(), rows[:, 1:].masked_fill(before, MEASURED_BEFORE))


def is_unicode(text: str) -> bool:
    """Whether it has no part of a character, as Python reads the bytes of a word in another encoding."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def digest(text: str) -> bytes:
    """What a run folder knows its text by."""
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


class TextTask(Task):
    """A text whose end is held out; training draws windows of the rest.

    Args:
        folder: of a run, which keeps the tokenizer, and by which the text is known again.
    """

    fresh = True
    has_answers = False
    ignored_label = MEASURED_BEFORE
    vocabulary: Any  # a Tokenizer

    def __init__(self, data: Text, folder: Path | None = None) -> None:
        self.data, self.folder = data, folder
        self.source_length = self.target_length = data.context
        self.kept = None if folder is None or not (folder / TOKENIZER).exists() else folder / TOKENIZER
        self.vocabulary = self.make_tokenizer()

    def make_tokenizer(self) -> Tokenizer:
        data, kind = self.data, KINDS[self.data.tokenizer]
        if self.kept is not None:
            try:
                return kind.from_json(self.kept.read_text(encoding="utf-8"))
            except InputError:
                raise
            except ValueError:
                raise RunError(f"{self.kept} is damaged; train the run again or give another one") from None
        if kind is WordPieces:
            return WordPieces.read(Path(data.vocabulary))
        if kind is BytePairs:
            return BytePairs.of(self.raw[: self.border(len(self.raw))], data.vocabulary_size)
        assert kind is Characters or kind is Words
        return kind.of(self.raw)

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER: self.vocabulary.to_json().encode(), DIGEST: digest(self.raw)}

    @property
    def source(self) -> str:
        """What the text is called in errors."""
        return self.data.data or "--text"

    @cached_property
    def raw(self) -> str:
        text = read_text(Path(self.data.data)) if self.data.data else self.data.text.replace("\r\n", "\n")
        if not text.strip():
            raise InputError("there is no text to learn; give --data FILE or FOLDER")
        if not is_unicode(text):
            raise InputError("--text has bytes that are no UTF-8; give it in UTF-8")
        kept = None if self.folder is None else self.folder / DIGEST
        if kept is not None and kept.exists() and kept.read_bytes() != digest(text):
            raise InputError(f"{self.source} is not the text that {self.folder} learned; put that one back")
        return text

    def border(self, length: int) -> int:
        """Where the held-out end of a text of so many characters begins."""
        return length - int(length * self.data.held_out)

    @cached_property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that are trained on and those held out, (L,) int64 each."""
        border = self.border(len(self.raw))
        texts = [self.raw[:border], self.raw[border:]] if self.data.held_out else [self.raw]
        sides = [torch.tensor(self.vocabulary.encode(text), dtype=torch.long) for text in texts]
        return sides[0], sides[-1]

    def check_length(self) -> None:
        """InputError where a side has not one window, or a vocabulary of pieces not half of the words."""
        if self.data.tokenizer == "word-piece":
            ids = torch.cat(self.sides)
            unknown, count = int((ids == self.vocabulary.ids[UNKNOWN]).sum()), len(ids)
            if 2 * unknown > count:
                raise InputError(
                    f"{self.data.vocabulary} has no pieces for {unknown} of the {count} tokens of {self.source}; give "
                    "--vocabulary a file for its language"
                )
        least = self.data.context + 1
        for ids, what in zip(self.sides, ("to train on", "held out")):
            if len(ids) < least:
                raise InputError(
                    f"{self.source} has {len(ids)} tokens {what} and a window, with the token after it, has {least}; "
                    "lower --context, or give a longer text"
                )

    def split(self) -> tuple[Examples, Examples]:
        held_out = cut(self.sides[1], self.data.context, self.data.valid_size)
        return self.draw(torch.Generator().manual_seed(0)), held_out

    def draw(self, generator: torch.Generator) -> Examples:
        ids, context = self.sides[0].to(generator.device), self.data.context
        starts = torch.randint(
            len(ids) - context, (self.data.train_size,), generator=generator, device=generator.device
        )
        rows = ids.unfold(0, context + 1, 1)[starts]
        return Texts(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def text_figures(self, loss: float) -> dict[str, float]:
        """Bits a character: what the tokens of the held-out text cost, shared among its characters."""
        characters = len(self.raw) - self.border(len(self.raw)) if self.data.held_out else len(self.raw)
        return {"bits_per_character": loss / math.log(2) * len(self.sides[1]) / characters}

    def read_question(self, text: str) -> str:
        """A text, whose next token is asked for."""
        self.beginning(text)
        return text

    def ask(self, problems: Sequence[str]) -> Texts:
        """The ends of texts, as long as a window, with zeros behind those that are shorter."""
        rows = [torch.tensor(self.beginning(text)[-self.data.context :]) for text in problems]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Texts(ids, torch.full_like(ids, MEASURED_BEFORE))

    @torch.no_grad()
    def answers(
        self, model: Any, problems: Sequence[str], device: torch.device, *_: Any, **options: Any
    ) -> list[Answer]:
        """The likeliest token after each text, and its probability."""
        found: list[Answer] = []
        for text in problems:
            chance, token = model(*self.ask([text]).to(device).inputs)[0, -1].double().softmax(0).max(0)
            found.append(NextToken(text, self.decode_answer([int(token)]), float(chance), None))
        return found

    def beginning(self, text: str | None) -> list[int]:
        if text is None:  # as a line begins
            return [self.vocabulary.ids.get("\n", self.vocabulary.ids.get("Ċ", self.vocabulary.ids.get("[CLS]", 0)))]
        if not is_unicode(text):
            raise InputError(f"{shown(text)} has bytes that are no UTF-8; begin with another text, or none")
        ids = self.vocabulary.encode(text.replace("\r\n", "\n"))
        unknown = self.vocabulary.ids.get(UNKNOWN)
        if not ids or (unknown is not None and unknown in ids and self.data.tokenizer == "word-piece"):
            what = "has words with no token in the vocabulary" if ids else "has no token"
            raise InputError(f"{shown(text)} {what}; begin with another text, or none")
        return ids

    def decode_answer(self, ids: list[int]) -> str:
        return self.vocabulary.decode(ids)

    def show(self, model: Any, device: torch.device) -> list[str]:
        """A sample."""
        said = generate(model, [self.beginning(None)], SHOWN, temperature=0.8, seed=0)[0]
        return [line for line in self.decode_answer(said).splitlines() if line.strip()]

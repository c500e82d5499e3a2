"""Pairs of sentences, and what a model translates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calcformer.data import Answer, Examples, Pairs, Task
from calcformer.data.examples import held_out_side
from calcformer.decoding import decode
from calcformer.errors import InputError, shown, tell
from calcformer.runs.folder import RunError
from calcformer.tasks.language.parallel import VALID, find_parts, read_pairs
from calcformer.tasks.language.scores import metrics, score
from calcformer.tasks.language.tokenizers import SPECIAL, BytePairs, Tokenizer, Words

if TYPE_CHECKING:
    from calcformer.tasks.translation import Translation

__all__ = ["Translated", "TranslationTask"]

SOURCE, TARGET, DIGEST = "source.json", "target.json", "pairs.sha256"  # in a run folder
KINDS: dict[str, type[Tokenizer]] = {"bpe": BytePairs, "words": Words}
TOGETHER = 16_384  # tokens of hypotheses that are followed at once


class Translated(Answer):
    """A sentence and its translation; what is right nobody knows."""

    sign = "->"


def digest(pairs: tuple[list[str], list[str]]) -> bytes:
    """What a run folder knows the pairs by that it learned."""
    text = "\0".join("\n".join(lines) for lines in pairs)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


class TranslationTask(Task):
    """Pairs of a corpus. A problem is a sentence; examples know their line, and so the words of its translation.

    Args:
        folder: of a run, which keeps the tokenizers, and by which the pairs are known again.
    """

    vocabulary: Any  # a Tokenizer
    part: str | None = None  # of the corpus, that is measured instead of what is held out while training

    def __init__(self, data: Translation, folder: Path | None = None) -> None:
        self.data, self.folder = data, folder
        self.source_length, self.target_length = data.longest + 1, data.longest + 2
        self.tokenizers = self.make_tokenizers() if folder is None else self.read_tokenizers(folder)
        self.vocabulary = self.tokenizers[-1]

    @property
    def source_vocabulary(self) -> Any:
        return self.tokenizers[0]

    def make_tokenizers(self) -> list[Tokenizer]:
        """One for both languages, or one each."""
        sides = self.trained
        texts = ["\n".join(side) for side in sides]
        if self.data.vocabularies == "shared":
            texts = ["\n".join(texts)]
        if self.data.tokenizer == "words":
            return [Words.of(text, self.data.minimum_count, SPECIAL) for text in texts]
        return [BytePairs.of(text, self.data.vocabulary_size, SPECIAL[:3]) for text in texts]

    def read_tokenizers(self, folder: Path) -> list[Tokenizer]:
        """Those that `files` gave."""
        names = (TARGET,) if self.data.vocabularies == "shared" else (SOURCE, TARGET)
        try:
            texts = [(folder / name).read_text(encoding="utf-8") for name in names]
            return [KINDS[self.data.tokenizer].from_json(text) for text in texts]
        except InputError:
            raise
        except (OSError, ValueError):
            raise RunError(
                f"{folder}: {' or '.join(names)} is missing or damaged; train the run again or give another one"
            ) from None

    def files(self) -> dict[str, bytes]:
        kept = dict(zip((SOURCE, TARGET)[-len(self.tokenizers) :], self.tokenizers))
        return {name: made.to_json().encode() for name, made in kept.items()} | {DIGEST: digest(self.trained)}

    # The corpus

    @cached_property
    def parts(self) -> dict[str, tuple[Path, Path]]:
        """The files of each part; of two files, train alone."""
        data = self.data
        if not data.data:
            return {"train": (Path(data.source), Path(data.target))}
        return find_parts(Path(data.data), data.source, data.target)

    @cached_property
    def sides(self) -> dict[str, tuple[list[str], list[str]]]:
        """What is trained on and what is held out, "train" and "valid", source and target each."""
        sources, targets = read_pairs(*self.parts["train"])
        valid = next((part for part in VALID if part in self.parts), None)
        if valid is not None:
            return {"train": (sources, targets), "valid": read_pairs(*self.parts[valid])}
        keys = [int.from_bytes(hashlib.sha256(line.encode()).digest()[:7], "big") for line in sources]
        is_held = held_out_side(torch.tensor(keys), self.data.held_out, self.data.data_seed).tolist()
        found = {}
        for name, wanted in ("train", False), ("valid", True):
            chosen = [pair for pair, held in zip(zip(sources, targets), is_held) if held == wanted]
            found[name] = [source for source, _ in chosen], [target for _, target in chosen]
        return found

    @property
    def trained(self) -> tuple[list[str], list[str]]:
        sources, targets = self.sides["train"]
        return sources[: self.data.train_size], targets[: self.data.train_size]

    @cached_property
    def measured(self) -> tuple[list[str], list[str]]:
        """The pairs that are measured."""
        if self.part is not None and self.part in self.parts:
            return read_pairs(*self.parts[self.part])
        sources, targets = self.sides["valid"]
        return sources[: self.data.valid_size], targets[: self.data.valid_size]

    def check(self) -> None:
        """InputError where it cannot be trained here."""
        metrics()
        kept = None if self.folder is None else self.folder / DIGEST
        if kept is not None and kept.exists() and kept.read_bytes() != digest(self.trained):
            raise InputError(f"the pairs are not those that {self.folder} learned; put those back")

    def encode_pairs(self, pairs: tuple[list[str], list[str]], is_cut: bool) -> Pairs:
        """Pairs as examples. What is too long is cut, or else left out."""
        first, last, longest = self.source_vocabulary, self.vocabulary, self.data.longest
        rows = [(first.encode(source), last.encode(target)) for source, target in zip(*pairs)]
        lines = [place for place, row in enumerate(rows) if is_cut or max(map(len, row)) <= longest]
        if len(lines) < len(rows):
            tell(f"{len(rows) - len(lines):,} pairs of more than {longest} tokens are not trained on (--longest)")
        sources = [[*rows[line][0][:longest], first.eos_id] for line in lines]
        targets = [[last.bos_id, *rows[line][1][:longest], last.eos_id] for line in lines]
        return Pairs(pad_rows(sources), pad_rows(targets), problem=torch.tensor(lines)[:, None])

    def split(self) -> tuple[Examples, Examples]:
        return self.encode_pairs(self.trained, is_cut=False), self.encode_pairs(self.measured, is_cut=True)

    # What a model says

    def read_question(self, text: str) -> str:
        text = text.strip()
        count = len(self.source_vocabulary.encode(text))
        if not 0 < count <= self.data.longest:
            raise InputError(
                f"{shown(text)} has {count} tokens, and this run translates sentences of 1 to {self.data.longest}; "
                "give one, or several shorter ones"
            )
        return text

    def ask(self, problems: Sequence[str]) -> Pairs:
        sources = [[*self.source_vocabulary.encode(text), self.source_vocabulary.eos_id] for text in problems]
        nothing = torch.tensor([[self.vocabulary.bos_id, self.vocabulary.eos_id]]).expand(len(sources), -1)
        return Pairs(pad_rows(sources), nothing.contiguous())

    def questions(self, examples: Examples) -> list[str]:
        return [self.source_vocabulary.decode(ids) for ids in examples.inputs[0].tolist()]

    def decode_answer(self, ids: list[int]) -> str:
        end = self.vocabulary.eos_id
        return self.vocabulary.decode(ids[: ids.index(end)] if end in ids else ids)

    def answer(
        self,
        model: Any,
        examples: Examples,
        beam: int = 1,
        batch_size: int = 0,
        advance: Callable[[int], object] = lambda count: None,
    ) -> torch.Tensor:
        source = examples.inputs[0]
        size = max(1, TOGETHER // source.shape[1])
        return decode(model, source, self.target_length - 1, self.vocabulary, beam, size, advance)

    def answer_figures(self, said: torch.Tensor, examples: Examples) -> dict[str, float]:
        assert examples.problem is not None
        references = [self.measured[1][line] for line in examples.problem.flatten().tolist()]
        return score([self.decode_answer(ids) for ids in said.tolist()], references)


def pad_rows(rows: list[list[int]]) -> torch.Tensor:
    """Rows of ids as one tensor (N, the longest), with zeros behind, which is the id that fills."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

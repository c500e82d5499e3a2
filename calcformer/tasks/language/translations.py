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
from calcformer.decoding import BATCH
from calcformer.errors import InputError, shown, tell
from calcformer.runs.files import write_atomically
from calcformer.runs.folder import RunError
from calcformer.tasks.language.parallel import TEST, VALID, find_parts, read_pairs
from calcformer.tasks.language.scores import score, sentence_scores, signature
from calcformer.tasks.language.tokenizers import SPECIAL, BytePairs, Tokenizer, Words

if TYPE_CHECKING:
    from calcformer.tasks.translation import Translation

__all__ = ["Translated", "TranslationTask"]

SOURCE, TARGET, DIGEST = "source.json", "target.json", "pairs.sha256"  # in a run folder
KINDS: dict[str, type[Tokenizer]] = {"bpe": BytePairs, "words": Words}
SHOWN = 3  # of the worst and of the best sentences
TOGETHER = 16_384  # tokens of hypotheses that are followed at once


class Translated(Answer):
    """A sentence and its translation; nobody says that another one is wrong."""

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
    translates = True
    kind_of_answer = Translated
    length_penalty = 1.0

    def __init__(self, data: Translation, folder: Path | None = None) -> None:
        self.data, self.folder = data, folder
        self.kept: dict[int, tuple[list[str], list[str]]] = {}
        self.source_length, self.target_length = data.longest + 1, data.longest + 2
        self.tokenizers = self.make_tokenizers() if folder is None else self.read_tokenizers(folder)
        self.vocabulary = self.tokenizers[-1]

    @property
    def source_vocabulary(self) -> Any:
        return self.tokenizers[0]

    def make_tokenizers(self) -> list[Tokenizer]:
        """One for both languages, or one each."""
        sources, targets = self.trained
        sides = [sources + targets] if self.data.vocabularies == "shared" else [sources, targets]
        if self.is_words:
            return [Words.of(" ".join(side), self.data.minimum_count, SPECIAL) for side in sides]
        return [BytePairs.of("\n".join(side), self.data.vocabulary_size, SPECIAL[:3]) for side in sides]

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

    @cached_property
    def trained(self) -> tuple[list[str], list[str]]:
        """The pairs that are trained on; InputError where a run learned others."""
        sources, targets = self.sides["train"]
        pairs = sources[: self.data.train_size], targets[: self.data.train_size]
        known = None if self.folder is None else self.folder / DIGEST
        if known is not None and known.exists() and known.read_bytes() != digest(pairs):
            files = " and ".join(map(str, self.parts["train"]))
            raise InputError(f"{files} are not the pairs that {self.folder} learned; put those back")
        return pairs

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.trained[0]) + min(len(self.lines(0)[0]), self.data.valid_size)

    @property
    def tests(self) -> Sequence[str]:  # type: ignore[override]
        return [part for part in self.parts if part.startswith(TEST)]

    def lines(self, number: int) -> tuple[list[str], list[str]]:
        """The pairs that can be measured, source and target: number 0 is what is held out, the others are the tests."""
        if number not in self.kept:
            self.kept[number] = self.sides["valid"] if number == 0 else read_pairs(*self.parts[self.tests[number - 1]])
        return self.kept[number]

    def test(self, name: str) -> Pairs:
        number = 1 + list(self.tests).index(name)
        return self.encode_pairs(self.lines(number), number)

    def encode_pairs(self, pairs: tuple[list[str], list[str]], number: int | None) -> Pairs:
        """Pairs as examples, whose problem is the number of `lines` they are of, and the line.

        What is too long is cut where it is measured, and left out where it is trained on, without a number.
        """
        first, last, longest = self.source_vocabulary, self.vocabulary, self.data.longest
        rows = [(first.encode(source), last.encode(target)) for source, target in zip(*pairs)]
        lines = [place for place, row in enumerate(rows) if number is not None or max(map(len, row)) <= longest]
        if len(lines) < len(rows):
            tell(f"{len(rows) - len(lines):,} pairs of more than {longest} tokens are not trained on (--longest)")
        sources = [[*rows[line][0][:longest], first.eos_id] for line in lines]
        targets = [[last.bos_id, *rows[line][1][:longest], last.eos_id] for line in lines]
        problem = torch.tensor([(number or 0, line) for line in lines]).view(-1, 2)
        return Pairs(pad_rows(sources), pad_rows(targets), problem=problem)

    def split(self) -> tuple[Examples, Examples]:
        sources, targets = self.lines(0)
        held_out = sources[: self.data.valid_size], targets[: self.data.valid_size]
        return self.encode_pairs(self.trained, None), self.encode_pairs(held_out, 0)

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
        return one_line(self.vocabulary.decode(ids[: ids.index(end)] if end in ids else ids))

    def answer(
        self,
        model: Any,
        examples: Examples,
        beam: int = 1,
        batch_size: int = BATCH,
        advance: Callable[[int], object] = lambda count: None,
    ) -> torch.Tensor:
        size = min(batch_size, max(1, TOGETHER // examples.inputs[0].shape[1]))
        return super().answer(model, examples, beam, size, advance)

    def compare(self, said: torch.Tensor, examples: Examples) -> tuple[list[str], list[str]]:
        """The translations `said`, (N, T) int64, and the right ones."""
        assert examples.problem is not None
        right = [self.lines(number)[1][line] for number, line in examples.problem.tolist()]
        return [self.decode_answer(ids) for ids in said.tolist()], right

    def answer_figures(self, said: torch.Tensor, examples: Examples) -> dict[str, float]:
        return score(*self.compare(said, examples))

    def describe_answers(self, said: torch.Tensor, examples: Examples, folder: Path, part: str) -> dict[str, Any]:
        """sacrebleu's signature, and all sentences by chrF: the worst and the best, and a file with each."""
        translations, right = self.compare(said, examples)
        scores = sentence_scores(translations, right)
        rows = sorted(zip(scores, *(map(one_line, texts) for texts in (self.questions(examples), translations, right))))
        path = folder / f"translations-{part}.tsv"
        text = "".join("\t".join([f"{row[0]:.2f}", *row[1:]]) + "\n" for row in rows)
        write_atomically(path, f"chrF\tsource\tsaid\tright\n{text}".encode())
        named = [dict(zip(("chrf", "source", "said", "right"), row)) for row in rows]
        return {
            "signature": signature(translations, right),
            "worst": named[:SHOWN],
            "best": named[: -SHOWN - 1 : -1],
            "file": str(path),
        }

    def report_answers(self, result: dict[str, Any]) -> list[str]:
        lines = [f"sacrebleu's signature of BLEU: {result['signature']}"]
        for which in "worst", "best":
            lines += ["", f"the {which} sentences by chrF"]
            for row in result[which]:
                lines += [f"{row['chrf']:7.2f}  {row['source']}", f"   said  {row['said']}", f"  right  {row['right']}"]
        return [*lines, "", f"all of them: {result['file']}"]

    def unknown_words(self, text: str) -> list[str]:
        vocabulary = self.source_vocabulary
        return [word for word in vocabulary.split(text) if word not in vocabulary.ids] if self.is_words else []

    @property
    def is_words(self) -> bool:
        return self.data.tokenizer == "words"


def one_line(text: str) -> str:
    """A text with one space for all between its words: byte pairs can say tabs and line ends too."""
    return " ".join(text.split())


def pad_rows(rows: list[list[int]]) -> torch.Tensor:
    """Rows of ids as one tensor (N, the longest), with zeros behind, which is the id that fills."""
    if not rows:
        return torch.zeros(0, 1, dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

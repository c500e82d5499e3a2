"""From text to tokens and back: characters, words, BERT's word pieces, and byte pairs by the library `tokenizers`."""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from calcformer.errors import InputError, shown

__all__ = ["SPECIAL", "BytePairs", "Characters", "Tokenizer", "WordPieces", "Words"]

UNKNOWN = "[UNK]"
PAD, BEGIN, END = "<pad>", "<bos>", "<eos>"
SPECIAL = (PAD, BEGIN, END, UNKNOWN)  # what the tokens of sentences begin with
# Chinese signs, which are words each.
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]")
# What belongs to the letter before it, as vowels of Hindi and accents that are signs of their own.
MARKS = "".join(x for x in map(chr, range(0x300, 0x1F000)) if unicodedata.category(x).startswith("M"))
LETTERS = rf"\w+(?:[{MARKS}\u200c\u200d]+\w*)*"
FEW = 0.01  # share of tokens with a capital letter, such as <EOS>, up to which a vocabulary is one of small letters
LONGEST_WORD = 100  # characters, beyond which BERT takes a word for unknown


class Tokenizer:
    """An ordered list of tokens; the id of a token is its place. As it stands, each word of `split` is a token.

    Those of sentences begin with tokens that fill, begin and end them; None where there are none, as in windows.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(tokens)
        self.ids = {token: place for place, token in enumerate(self.tokens)}
        self.pad_id, self.bos_id, self.eos_id, self.unknown_id = map(self.ids.get, (PAD, BEGIN, END, UNKNOWN))

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, text: str) -> Sequence[str]:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of a text; InputError for the first word that is no token, where none stands for unknown ones."""
        words = self.split(text)
        found = [self.ids.get(word, self.unknown_id) for word in words]
        if None in found:
            word = shown(words[found.index(None)])
            raise InputError(f"{word} is not in the text that this run learns; leave it out of {shown(text)}")
        return found  # type: ignore[return-value]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; those that fill, begin and end a sentence are none of it."""
        raise NotImplementedError

    def name(self, place: int) -> str:
        """The token with this id, to be read beside others."""
        return self.tokens[place]

    def to_json(self) -> str:
        return json.dumps({"tokens": self.tokens}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """What `to_json` wrote; ValueError for another text."""
        content = json.loads(text)
        tokens = content.get("tokens") if isinstance(content, dict) else None
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise ValueError("no tokens")
        return cls(tokens)


class Characters(Tokenizer):
    """Every character of a text is a token."""

    @classmethod
    def of(cls, text: str) -> Characters:
        return cls(sorted(set(text)))

    def split(self, text: str) -> Sequence[str]:
        return text

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.tokens[place] for place in ids)


class Words(Tokenizer):
    """Words, each other character that is no space, and line ends. How many spaces there were is forgotten."""

    PATTERN = re.compile(rf"\n|{LETTERS}(?:['\u2019-]{LETTERS})*|[^\w\s]")
    AFTER = frozenset(".,;:!?)]}%\n\u2019\u201d")  # have no space before them
    BEFORE = frozenset("([{\n\u201c\u2018")  # have none behind them

    @classmethod
    def of(cls, text: str, least: int = 1, special: Sequence[str] = ()) -> Words:
        """The words that a text has at least so many times, behind the special tokens."""
        counts = Counter(cls.PATTERN.findall(text))
        return cls([*special, *sorted(word for word, count in counts.items() if count >= least)])

    def split(self, text: str) -> Sequence[str]:
        return self.PATTERN.findall(text)

    def decode(self, ids: Iterable[int]) -> str:
        said = ""
        for place in ids:
            word = self.tokens[place]
            if place in (self.pad_id, self.bos_id, self.eos_id):
                continue
            said += word if not said or word in self.AFTER or said[-1] in self.BEFORE else f" {word}"
        return said


@cache
def apart(sign: str) -> str:
    """A character as BERT reads it: punctuation and Chinese ones between spaces, those of control left out."""
    kind = unicodedata.category(sign)
    if sign in "\t\n\r" or kind == "Zs":
        return " "
    if kind.startswith("C") or sign == "\ufffd":
        return ""
    return f" {sign} " if kind.startswith("P") or sign in "$+<=>^`|~" or CHINESE.match(sign) else sign


class WordPieces(Tokenizer):
    """BERT's tokens: of each word the longest beginning that is one, then of what is left, with ## before it.

    Words are in lower case, and without accents, where the vocabulary has next to no capital letter. What has no tokens
    is [UNK].

    Source: Devlin et al. 2019, "BERT", section 3; Wu et al. 2016, "Google's Neural Machine Translation System",
    section 4.1.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        super().__init__(tokens)
        capital = sum(token != token.lower() for token in self.tokens if not token.startswith("["))
        self.lower = capital <= FEW * len(self.tokens)
        self.longest = max(map(len, self.tokens))
        self.known: dict[str, list[str]] = {}  # the pieces of each word met so far

    @classmethod
    def read(cls, path: Path) -> WordPieces:
        """A vocabulary file, vocab.txt, a token a line; InputError where it is something else."""
        if not path.is_file():
            raise InputError(f"there is no vocabulary {path}; give --vocabulary BERT's vocab.txt")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            lines = []
        tokens = [line.rstrip("\r") for line in (lines[:-1] if lines[-1:] == [""] else lines)]
        twice = len(tokens) - len(set(tokens))
        if UNKNOWN not in tokens or twice or "" in tokens:
            what = f"{twice} tokens twice" if UNKNOWN in tokens and twice else f"no line {UNKNOWN}, or empty ones"
            raise InputError(
                f"{path} is no vocabulary of word pieces, a different token on each line ({what}); give --vocabulary "
                "BERT's vocab.txt"
            )
        return cls(tokens)

    def words(self, text: str) -> list[str]:
        """Words and single signs, as BERT divides a text before it looks for pieces."""
        if self.lower:
            text = "".join(x for x in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(x) != "Mn")
        return "".join(map(apart, text)).split()

    def pieces(self, word: str) -> list[str]:
        if word in self.known:
            return self.known[word]
        found, start = [], 0
        while start < len(word) <= LONGEST_WORD:
            sign = "##" if start else ""
            for end in range(min(len(word), start + self.longest), start, -1):
                if sign + word[start:end] in self.ids:
                    found.append(sign + word[start:end])
                    start = end
                    break
            else:
                break
        self.known[word] = found if start == len(word) else [UNKNOWN]
        return self.known[word]

    def split(self, text: str) -> Sequence[str]:
        return [piece for word in self.words(text) for piece in self.pieces(word)]

    def decode(self, ids: Iterable[int]) -> str:
        said = " ".join(self.tokens[place] for place in ids).replace(" ##", "")
        return re.sub(r" ([.,;:!?%)\]])", r"\1", said)


class BytePairs(Tokenizer):
    """Byte pairs of the library `tokenizers`: any text has tokens, and becomes itself again.

    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2; on bytes:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """

    def __init__(self, made: Any) -> None:
        self.made = made
        made.encode_special_tokens = True  # which a text has no way to say
        super().__init__(made.id_to_token(place) for place in range(made.get_vocab_size()))

    @classmethod
    def of(cls, text: str, size: int, special: Sequence[str] = ()) -> BytePairs:
        """As many tokens as `size`, or fewer where a text has no more; the special ones come first."""
        made = library().Tokenizer(library().models.BPE())
        # A sentence's first word is the same token as within one; a window of a text begins anywhere.
        made.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=bool(special))
        made.decoder = library().decoders.ByteLevel()
        alphabet = library().pre_tokenizers.ByteLevel.alphabet()
        trainer = library().trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
        )
        made.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(made)

    def encode(self, text: str) -> list[int]:
        try:
            return self.made.encode(text).ids
        except (TypeError, UnicodeEncodeError):  # bytes of a command line that are no UTF-8
            raise InputError(f"{shown(text)} is no text in UTF-8; leave out what is none") from None

    def decode(self, ids: Iterable[int]) -> str:
        text = self.made.decode(list(ids))
        return text.removeprefix(" ") if self.eos_id is not None else text

    def name(self, place: int) -> str:
        """A word without the space before it; ## before what goes on with one, as BERT writes it."""
        if place in (self.pad_id, self.bos_id, self.eos_id):
            return self.tokens[place]
        text = self.made.decode([place])
        if not text.strip():
            return text
        return text[1:] if text.startswith(" ") else f"##{text}"

    def to_json(self) -> str:
        return self.made.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        try:
            return cls(library().Tokenizer.from_str(text))
        except InputError:
            raise
        except Exception as error:  # the library has no class of its own for it
            raise ValueError(str(error)) from None


def library() -> Any:
    """The package `tokenizers`, which nothing else needs."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise InputError("--tokenizer bpe needs the package tokenizers; pip install tokenizers") from None

"""Vocabularies: which tokens exist, in which order, and which of them begin, end and fill a sequence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """An ordered list of tokens; the id of a token is its place in the list.

    Args:
        tokens: the tokens, without repetition.
        bos: the token that begins every target, None where nothing does.
        eos: the token that ends every source and every target, None where nothing does.
        pad: the token that fills short sequences, None where all sequences have the same length.
    """

    tokens: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"the tokens of a vocabulary must differ from each other, got {self.tokens}")
        for token in filter(None, (self.bos, self.eos, self.pad)):
            self.id(token)

    def __len__(self) -> int:
        return len(self.tokens)

    def id(self, token: str | None) -> int:
        """The id of one token; ValueError where it is not in the vocabulary."""
        try:
            return self.tokens.index(token)
        except ValueError:
            raise ValueError(f"{token!r} is not a token; the tokens are {' '.join(self.tokens)}") from None

    def name(self, place: int) -> str:
        """The token with this id, to be read beside others."""
        return self.tokens[place]

    @property
    def bos_id(self) -> int:
        return self.id(self.bos)

    @property
    def eos_id(self) -> int:
        return self.id(self.eos)

    @property
    def pad_id(self) -> int | None:
        return None if self.pad is None else self.id(self.pad)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The ids of `tokens`: a list of tokens, or a string whose characters are tokens."""
        return [self.id(token) for token in tokens]

    def pad_all(self, rows: Sequence[list[int]], length: int) -> torch.Tensor:
        """Rows of ids as one tensor (N, length) int64, with padding behind; ValueError where one is longer."""
        if any(len(row) != length if self.pad_id is None else len(row) > length for row in rows):
            raise ValueError(f"rows must have {length} tokens, got {max(map(len, rows))}")
        return torch.tensor([row + [self.pad_id or 0] * (length - len(row)) for row in rows]).view(-1, length)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of `ids`, special tokens included; ValueError where an id is out of range."""
        tokens = []
        for index in ids:
            if not 0 <= index < len(self.tokens):
                raise ValueError(f"a token id must be in 0..{len(self.tokens) - 1}, got {index}")
            tokens.append(self.tokens[index])
        return tokens

    def decode_until_eos(self, ids: Iterable[int]) -> list[str]:
        """The tokens before the first end token, without begin and pad tokens."""
        tokens = []
        for token in self.decode(ids):
            if token == self.eos:
                break
            if token not in (self.bos, self.pad):
                tokens.append(token)
        return tokens

"""Small models that say the next word from a fixed number of words before it."""

import torch
from torch import nn

from calcformer.model.decoder_only import DecoderOnly

__all__ = ["FeedForwardNextWord", "RecurrentNextWord", "TransformerNextWord"]

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class FeedForwardNextWord(nn.Module):
    """The embeddings of all words side by side, one hidden layer, and scores: linear(tanh(linear(embeddings))).

    Args:
        vocabulary_size: V.
        context: N, how many words it sees.
        width, hidden: of an embedding, and of the hidden layer.

    Source: Bengio et al. 2003, "A Neural Probabilistic Language Model", section 2, without direct connections.
    """

    def __init__(self, vocabulary_size: int, context: int, *, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.expand = nn.Linear(context * width, hidden)
        self.prediction = nn.Linear(hidden, vocabulary_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, N) int64, the words before; returns scores (B, V) of the word that follows.

        Raises:
            ValueError: there are more or fewer than N.
        """
        if ids.shape[1] != self.context:
            raise ValueError(f"the model sees {self.context} words, got {ids.shape[1]}; give the last {self.context}")
        return self.prediction(self.expand(self.embedding(ids).flatten(1)).tanh())


class RecurrentNextWord(nn.Module):
    """Embeddings, one or more recurrent layers of torch.nn, and scores of the last state.

    Args:
        vocabulary_size: V.
        cell: "rnn", "lstm" or "gru".
        layers: how many.
        width, hidden: of an embedding, and of the states.
        dropout: the probability, in training, between layers.
    """

    def __init__(
        self,
        vocabulary_size: int,
        cell: str = "rnn",
        layers: int = 1,
        *,
        width: int = 16,
        hidden: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be {', '.join(CELLS)}, got {cell!r}")
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.recurrent = CELLS[cell](width, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.prediction = nn.Linear(hidden, vocabulary_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, N) int64, the words before, of any number; returns scores (B, V) of the word that follows."""
        states, _ = self.recurrent(self.embedding(ids))
        return self.prediction(states[:, -1])


class TransformerNextWord(nn.Module):
    """A decoder-only transformer that says what follows its last word only.

    Args:
        vocabulary_size: V.
        context: N, how many words it sees.
        width, heads, layers, hidden, dropout: as of `DecoderOnly`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        *,
        width: int = 16,
        heads: int = 4,
        layers: int = 1,
        hidden: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.decoder = DecoderOnly(
            vocabulary_size, context, width=width, heads=heads, layers=layers, hidden=hidden, dropout=dropout
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, N) int64, the words before; returns scores (B, V) of the word that follows."""
        return self.decoder(ids)[:, -1]

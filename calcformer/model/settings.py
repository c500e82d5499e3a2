"""The kinds of model and what of each can be set. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calcformer.errors import InputError
from calcformer.settings import ModelSettings, setting

if TYPE_CHECKING:
    from calcformer.data import Task
    from calcformer.model.decoder_only import DecoderOnly
    from calcformer.model.encoder_decoder import EncoderDecoder
    from calcformer.model.next_word import FeedForwardNextWord, RecurrentNextWord, TransformerNextWord

__all__ = [
    "MODELS",
    "DecoderOnlyConfig",
    "FeedForwardSettings",
    "ModelConfig",
    "RecurrentSettings",
    "TransformerSettings",
]


def check_heads(width: int, heads: int, positions: str = "none", size: int | None = None) -> None:
    """InputError where heads without a `size`, None or 0, do not divide the width, or rotary positions an odd size."""
    if not size and width % heads:
        where = " where no head_size is given" if size is not None else ""
        raise InputError(f"width must be a multiple of heads{where}, got width {width} and {heads} heads")
    size = size or width // heads
    if positions == "rotary" and size % 2:
        raise InputError(f"rotary positions need an even head size, got {size}")


@dataclass(frozen=True)
class ModelConfig(ModelSettings):
    """The encoder-decoder transformer."""

    kind: ClassVar[str] = "encoder-decoder"

    width: int = setting(64, "model width", 1, 16_384)
    heads: int = setting(4, "attention heads", 1, 1024)
    encoder_layers: int = setting(2, "encoder layers", 0, 100)
    decoder_layers: int = setting(2, "decoder layers", 1, 100)
    hidden: int = setting(64, "width of the feed-forward layers", 1, 65_536)
    dropout: float = setting(0.01, "dropout probability", 0, 0.99)
    norm: Literal["post", "pre", "course"] = setting(
        "post", "layer norm after or before each sublayer; course: after it, and then dropout"
    )
    activation: Literal["relu", "gelu"] = setting("relu", "activation of the feed-forward layers")
    positions: Literal["sinusoid", "learned", "relative", "rotary", "simple", "course", "none"] = setting(
        "sinusoid", "position encoding; simple and course are the expression report's"
    )
    embeddings: Literal["separate", "shared", "output", "tied"] = setting(
        "separate", "source, target and output matrices apart; source and target one; target and output one; all one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads, self.positions)

    def build(self, task: Task) -> EncoderDecoder:
        from calcformer.model.encoder_decoder import EncoderDecoder

        vocabulary, source = task.vocabulary, task.source_vocabulary
        if source is not vocabulary and self.embeddings in ("shared", "tied"):
            raise InputError(
                f"embeddings {self.embeddings} need one vocabulary for source and target; give --vocabularies shared, "
                "or --embeddings output or separate"
            )
        return EncoderDecoder(
            len(vocabulary),
            task.source_length,
            task.target_length,
            **vars(self),
            pad_id=vocabulary.pad_id,
            source_vocabulary_size=len(source),
        )

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        encoder, decoder = self.encoder_layers, self.decoder_layers
        scores = 2 * self.heads * (source**2 * encoder + target * (target + source) * decoder)
        tokens = source * encoder * (12 * self.width + 3 * self.hidden)
        tokens += target * decoder * (20 * self.width + 3 * self.hidden) + target * 4 * vocabulary
        return tokens + scores

    @property
    def layers(self) -> int:
        return self.encoder_layers + self.decoder_layers


@dataclass(frozen=True)
class FeedForwardSettings(ModelSettings):
    """The embeddings of a fixed number of words side by side, and one hidden layer."""

    kind: ClassVar[str] = "feed-forward"

    width: int = setting(16, "numbers of a word", 1, 16_384)
    hidden: int = setting(64, "width of the hidden layer", 1, 65_536)

    def build(self, task: Task) -> FeedForwardNextWord:
        from calcformer.model.next_word import FeedForwardNextWord

        return FeedForwardNextWord(len(task.vocabulary), task.source_length, **vars(self))

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        return 2 * source * self.width + 2 * self.hidden + 4 * vocabulary

    @property
    def layers(self) -> int:
        return 1


@dataclass(frozen=True)
class RecurrentSettings(ModelSettings):
    """Recurrent layers of torch.nn, whose last state says what follows."""

    kind: ClassVar[str] = "recurrent"

    cell: Literal["rnn", "lstm", "gru"] = setting("rnn", "recurrent cell")
    layers: int = setting(1, "recurrent layers", 1, 100)
    width: int = setting(16, "numbers of a word", 1, 16_384)
    hidden: int = setting(64, "numbers of a state", 1, 65_536)
    dropout: float = setting(0.0, "dropout probability, between layers", 0, 0.99)

    def build(self, task: Task) -> RecurrentNextWord:
        from calcformer.model.next_word import RecurrentNextWord

        return RecurrentNextWord(len(task.vocabulary), **vars(self))

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        return source * (self.width + 6 * self.hidden * self.layers) + 4 * vocabulary


@dataclass(frozen=True)
class TransformerSettings(ModelSettings):
    """One layer of the decoder-only transformer, whose last place says what follows."""

    kind: ClassVar[str] = "transformer"

    width: int = setting(16, "model width", 1, 16_384)
    heads: int = setting(4, "attention heads", 1, 1024)
    hidden: int = setting(64, "width of the feed-forward layer", 1, 65_536)
    dropout: float = setting(0.0, "dropout probability", 0, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads)

    def build(self, task: Task) -> TransformerNextWord:
        from calcformer.model.next_word import TransformerNextWord

        return TransformerNextWord(len(task.vocabulary), task.source_length, **vars(self))

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        return source * (12 * self.width + 3 * self.hidden + 2 * self.heads * source) + 4 * vocabulary

    @property
    def layers(self) -> int:
        return 1


@dataclass(frozen=True)
class DecoderOnlyConfig(ModelSettings):
    """The decoder-only transformer, a language model."""

    kind: ClassVar[str] = "decoder-only"

    width: int = setting(64, "model width", 1, 16_384)
    heads: int = setting(4, "attention heads", 1, 1024)
    layers: int = setting(2, "layers", 1, 100)
    hidden: int = setting(256, "width of the feed-forward layers", 1, 65_536)
    dropout: float = setting(0.0, "dropout probability", 0, 0.99)
    norm: Literal["layer", "rms"] = setting("layer", "layer norm or RMS norm, before each sublayer")
    activation: Literal["gelu", "gelu-tanh", "relu", "swiglu"] = setting(
        "gelu", "activation of the feed-forward layers; swiglu has a gate beside it"
    )
    positions: Literal["learned", "sinusoid", "relative", "rotary", "simple", "course", "none"] = setting(
        "rotary", "position encoding"
    )
    tied: bool = setting(True, "the output's matrix is the embedding's")
    key_heads: int = setting(0, "heads of keys and values, shared by those of queries; 0 for as many", 0, 1024)
    head_size: int = setting(0, "numbers of a head's query and key, 0 for width / heads", 0, 4096)
    value_size: int = setting(0, "numbers of a head's value, 0 for as many as of its key", 0, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.width, self.heads, self.positions, self.head_size)
        if self.key_heads and self.heads % self.key_heads:
            raise InputError(f"heads must be a multiple of key_heads, got {self.heads} and {self.key_heads}")

    def build(self, task: Task) -> DecoderOnly:
        from calcformer.model.decoder_only import DecoderOnly

        settings: dict[str, Any] = dict(vars(self))
        for name in "key_heads", "head_size", "value_size":
            settings[name] = settings[name] or None
        return DecoderOnly(len(task.vocabulary), task.source_length, **settings)

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        inner = self.heads * (self.head_size or self.width // self.heads)
        token = self.layers * (8 * self.width + 6 * inner + 4 * self.hidden) + 4 * vocabulary
        return source * token + self.layers * self.heads * source**2


MODELS: dict[str, type[ModelSettings]] = {  # add a kind here
    kind.kind: kind
    for kind in (ModelConfig, DecoderOnlyConfig, FeedForwardSettings, RecurrentSettings, TransformerSettings)
}

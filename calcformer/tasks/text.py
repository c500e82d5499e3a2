"""Texts: what comes next, character by character or word by word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calcformer.errors import InputError
from calcformer.model.settings import DecoderOnlyConfig
from calcformer.settings import Preset, TaskSettings, TrainingConfig, setting

if TYPE_CHECKING:
    from calcformer.tasks.language.texts import TextTask

__all__ = ["Text"]

LINE = "If you win, you live! If you lose, you die! If you don't fight, you can't win!"


@dataclass(frozen=True)
class Text(TaskSettings):
    task = "text"
    about = "what comes next in a text of yours, by characters, words or pieces of words"
    noun = "windows"
    models = ("decoder-only",)
    figures = {"valid_loss": "loss", "perplexity": "perplexity", "bits_per_character": "bits a character"}

    data_seed: ClassVar[int] = 0  # type: ignore[misc]  # no setting: an epoch's windows are drawn by --seed
    former = {"data_seed": 0}

    train_size: int = setting(4_000, "windows of the text drawn an epoch", 1, 10_000_000)
    valid_size: int = setting(10_000, "most windows of the held-out end that are measured", 1, 10_000_000)
    data: str = setting("", "the text, a file or a folder with input.txt or other *.txt, each may be .gz")
    text: str = setting("", "the text itself, where no --data is given")
    tokenizer: Literal["characters", "words", "word-piece", "bpe"] = setting(
        "characters", "what tokens are: characters; words and punctuation; BERT's pieces of words; byte pairs"
    )
    vocabulary: str = setting("", "BERT's vocab.txt, for word-piece")
    vocabulary_size: int = setting(2_000, "tokens of bpe, learned from what is not held out", 257, 1_000_000)
    context: int = setting(64, "tokens of a window: how far back the model sees", 1, 65_536)
    held_out: float = setting(0.1, "share at the end that is held out; 0 measures what is trained on", 0, 0.9)

    @property
    def holds_out(self) -> bool:
        return bool(self.held_out)

    def build(self) -> TextTask:
        from calcformer.tasks.language.texts import TextTask

        if bool(self.vocabulary) != (self.tokenizer == "word-piece"):
            raise InputError(
                "--tokenizer word-piece needs --vocabulary FILE, BERT's vocab.txt"
                if not self.vocabulary
                else f"--vocabulary is for --tokenizer word-piece, got {self.tokenizer}; leave one of them out"
            )
        task = TextTask(self)
        task.check_length()
        return task

    def restore(self, folder: Path) -> TextTask:
        from calcformer.tasks.language.texts import TextTask

        return TextTask(self, folder)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        sentence: dict[str, Any] = {"train_size": 4, "text": LINE, "context": 16, "held_out": 0.0}
        narrow = DecoderOnlyConfig(heads=8, head_size=64, positions="sinusoid", tied=False)
        steady = TrainingConfig(epochs=10, batch_size=2, exact_match_every=5)
        characters = Preset(
            "a text of yours in characters, in nine minutes on two cores",
            cls(train_size=4_000, context=128),
            DecoderOnlyConfig(width=128, heads=4, layers=4, hidden=512),
            TrainingConfig(
                epochs=20,
                batch_size=16,
                learning_rate=3e-3,
                schedule="cosine",
                warmup_steps=200,
                weight_decay=0.1,
                beta2=0.99,
                clip_norm=1.0,
                valid_every=2,
                exact_match_every=5,
            ),
        )
        return {
            "text": characters,
            "shakespeare": replace(characters, about="the same by the name of what it was made for"),
            # nanoGPT's setting of train_shakespeare_char.py, which it says reaches 1.4697.
            "shakespeare-gpu": Preset(
                "the same with 10.7 million parameters, for a GPU; not run yet",
                cls(train_size=16_000, context=256),
                DecoderOnlyConfig(width=384, heads=6, layers=6, hidden=1_536, dropout=0.2, positions="learned"),
                replace(characters.training, batch_size=64, learning_rate=1e-3, warmup_steps=100, valid_every=1),
                {"valid_loss": 1.4697},
            ),
            "sentence-report": Preset(
                "one sentence in BERT's word pieces, as S2, a report, learned it; needs --vocabulary vocab.txt",
                cls(tokenizer="word-piece", **sentence),
                narrow,
                steady,
                {"valid_loss": 6.09},
            ),
            "sentence-words": Preset(
                "the same in words, a tokenizer built from the text", cls(tokenizer="words", **sentence), narrow, steady
            ),
        }

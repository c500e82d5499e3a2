"""Translations: a sentence in one language, the same in another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calcformer.errors import InputError
from calcformer.model.settings import ModelConfig
from calcformer.settings import LARGEST_SET, Preset, TaskSettings, TrainingConfig, setting

if TYPE_CHECKING:
    from calcformer.tasks.language.translations import TranslationTask

__all__ = ["Translation"]


@dataclass(frozen=True)
class Translation(TaskSettings):
    task = "translate"
    about = "a sentence of one language in another, from two files of lines that translate each other"
    noun = "sentences"
    figures = {"bleu": "BLEU", "chrf": "chrF", "valid_token_accuracy": "token accuracy", "valid_loss": "loss"}

    train_size: int = setting(100_000, "most pairs that are trained on", 1, LARGEST_SET)
    valid_size: int = setting(5_000, "most held-out pairs that are measured", 1, LARGEST_SET)
    data: str = setting("", "folder with train.LANGUAGE, val.LANGUAGE, test*.LANGUAGE, each may be .gz")
    source: str = setting("en", "language that is read; without --data a file of its sentences")
    target: str = setting("fr", "language that is said; without --data a file of its sentences")
    tokenizer: Literal["bpe", "words"] = setting("bpe", "what tokens are: byte pairs; words and punctuation")
    vocabulary_size: int = setting(4_000, "tokens of bpe, learned from the pairs that are trained on", 300, 1_000_000)
    minimum_count: int = setting(2, "times a word is seen, to be a token of words", 1, 1_000_000)
    vocabularies: Literal["shared", "separate"] = setting("shared", "one for both languages, or one each")
    longest: int = setting(100, "tokens of a sentence; longer pairs are not trained on", 1, 65_536)
    held_out: float = setting(0.05, "share held out where the corpus has no val", 0.0001, 0.9)

    def build(self) -> TranslationTask:
        from calcformer.tasks.language.scores import metrics
        from calcformer.tasks.language.translations import TranslationTask

        metrics()  # now, and not after the first epochs
        if not self.data and not (Path(self.source).is_file() and Path(self.target).is_file()):
            raise InputError(
                "there is no corpus to learn; give --data FOLDER with --source LANGUAGE and --target LANGUAGE, or "
                "--source FILE and --target FILE"
            )
        return TranslationTask(self)

    def restore(self, folder: Path) -> TranslationTask:
        from calcformer.tasks.language.translations import TranslationTask

        return TranslationTask(self, folder)

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {
            "translate": Preset(
                "English to French by a small transformer; needs --data",
                cls(),
                ModelConfig(
                    width=192,
                    heads=4,
                    encoder_layers=3,
                    decoder_layers=3,
                    hidden=512,
                    dropout=0.3,
                    norm="pre",
                    embeddings="tied",
                ),
                TrainingConfig(
                    epochs=30,
                    batch_tokens=2_000,
                    learning_rate=3e-3,
                    schedule="noam",
                    warmup_steps=1_000,
                    beta2=0.98,
                    clip_norm=1.0,
                    label_smoothing=0.1,
                    average=5,
                    exact_match_every=5,
                ),
            )
        }

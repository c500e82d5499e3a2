"""Translations: a sentence in one language, the same in another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calcformer.errors import InputError
from calcformer.model.settings import ModelConfig
from calcformer.settings import LARGEST_SET, Preset, Study, TaskSettings, TrainingConfig, setting

if TYPE_CHECKING:
    from calcformer.tasks.language.translations import TranslationTask

__all__ = ["Translation"]

# S3, a report: layers, heads, width, dropout; accuracy in training, then loss, accuracy and BLEU of its dev set.
S3 = {
    "2-layers": (2, 8, 512, 0.1, 0.903, 1.94, 0.748, 37.45),
    "4-layers": (4, 8, 512, 0.2, 0.898, 1.94, 0.750, 37.96),
    "4-wide-layers": (4, 12, 768, 0.2, 0.901, 2.08, 0.740, 38.54),
    "6-wide-layers": (6, 12, 768, 0.1, 0.637, 4.77, 0.633, 31.54),
}


def sizes(layers: int, heads: int, width: int, dropout: float) -> dict[str, Any]:
    """Settings of S3's model; how wide its feed-forward is it does not say, and 4 x width is the paper's."""
    both = {"encoder_layers": layers, "decoder_layers": layers}
    return {**both, "heads": heads, "width": width, "hidden": 4 * width, "dropout": dropout}


def reported(*found: float) -> dict[str, float]:
    """What S3 says of a setting, by the names of metrics.jsonl."""
    return dict(zip(("token_accuracy", "valid_loss", "valid_token_accuracy", "bleu"), found))


@dataclass(frozen=True)
class Translation(TaskSettings):
    task = "translate"
    about = "a sentence of one language in another, from two files of lines that translate each other"
    noun = "sentences"
    figures = {"bleu": "BLEU", "chrf": "chrF", "valid_token_accuracy": "token accuracy", "valid_loss": "loss"}

    train_size: int = setting(100_000, "pairs to train on, at most", 1, LARGEST_SET)
    valid_size: int = setting(5_000, "held-out pairs to measure, at most", 1, LARGEST_SET)
    data: str = setting("", "folder with train.LANGUAGE, val.LANGUAGE, test*.LANGUAGE of both, each may be .gz")
    source: str = setting("en", "language to translate from, the ending of its files; without --data a file")
    target: str = setting("fr", "language to translate into, the ending of its files; without --data a file")
    tokenizer: Literal["bpe", "words"] = setting(
        "bpe", "what tokens are: pieces of words (byte pairs); words, punctuation"
    )
    vocabulary_size: int = setting(3_000, "tokens of bpe, learned from the pairs that are trained on", 300, 1_000_000)
    minimum_count: int = setting(2, "of words: how often one must be seen to be known", 1, 1_000_000)
    vocabularies: Literal["shared", "separate"] = setting("shared", "one vocabulary for both languages, or one each")
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
        task = TranslationTask(self)
        for number in range(1 + len(task.tests)):  # what is wrong with a test is said now, and not after the last epoch
            task.lines(number)
        return task

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
                    epochs=40,
                    batch_tokens=2_000,
                    learning_rate=3e-3,
                    schedule="cosine",
                    warmup_steps=500,
                    beta2=0.98,
                    clip_norm=1.0,
                    label_smoothing=0.1,
                    exact_match_every=5,
                ),
            ),
            # S3 says no learning rate, here Adam's at a constant 1e-4, and no vocabulary, here plain words.
            "translation-report": Preset(
                "S3, a report, by its best setting; needs --data",
                cls(train_size=30_000, tokenizer="words", vocabularies="separate"),
                ModelConfig(**sizes(*S3["4-wide-layers"][:4])),
                TrainingConfig(epochs=10, batch_size=16, learning_rate=1e-4, exact_match_every=1),
                {name: figure for name, figure in reported(*S3["4-wide-layers"][4:]).items() if name in cls.figures},
            ),
        }

    @classmethod
    def studies(cls) -> dict[str, Study]:
        return {
            "s3": Study(
                "translation-report",
                {},
                [({"case": name}, reported(*row[4:])) for name, row in S3.items()],
                cases={name: sizes(*row[:4]) for name, row in S3.items()},
            )
        }

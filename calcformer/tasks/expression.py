"""Expressions in words: NEGATIVE 30 subtract NEGATIVE 34 is POSITIVE 04."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calcformer.model.settings import ModelConfig
from calcformer.settings import Preset, Study, TrainingConfig
from calcformer.tasks.arithmetic import ArithmeticSettings, reported

if TYPE_CHECKING:
    from calcformer.tasks.arithmetic.expressions import ExpressionTask

__all__ = ["Expressions"]

LEARNING_RATES = {
    1e-2: (2.3461, 2.3397, 0.25),
    1e-3: (0.0228, 0.0088, 1.00),
    1e-4: (0.9837, 0.7957, 0.77),
    1e-5: (2.4652, 2.3359, 0.35),
    1e-6: (3.0363, 2.8027, 0.19),
    1e-7: (3.4504, 3.4122, 0.05),
    1e-8: (3.2717, 3.0475, 0.10),
    1e-9: (3.4178, 3.2929, 0.07),
}
REPORT = {"valid_loss": 0.0088, "valid_token_accuracy": 1.0}  # S0, with its best learning rate


@dataclass(frozen=True)
class Expressions(ArithmeticSettings):
    task = "expression"
    about = "sums and differences in words: NEGATIVE 30 subtract NEGATIVE 34 is POSITIVE 04"
    noun = "expressions"
    example = "NEGATIVE 30 subtract NEGATIVE 34"
    former = {
        "complexity": 3,
        "signed": True,
        "truncate": False,
        "zero_pad": False,
        "reverse_answer": False,
        "sampling": "uniform",
    }

    def build(self) -> ExpressionTask:
        from calcformer.tasks.arithmetic.expressions import ExpressionTask

        return ExpressionTask(
            self.train_size, self.valid_size, self.data_seed, self.leaky_split, self.fresh, self.held_out
        )

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        return {
            # What stays wrong longest is the sign of zero, one training expression in a hundred. Strong weight decay
            # makes the rule win over memory, width 128 and a little dropout make it stay: at width 64 runs ended with 0
            # to 9 of the 15,000 held-out answers wrong, whatever the dropout.
            "expression": Preset(
                "all expressions with numbers up to 49, from a quarter of them",
                cls(train_size=4_602, valid_size=15_000),
                ModelConfig(width=128, hidden=256, dropout=0.02, norm="pre"),
                TrainingConfig(
                    epochs=400,
                    batch_size=256,
                    schedule="cosine",
                    warmup_steps=200,
                    weight_decay=1.0,
                    beta2=0.98,
                    clip_norm=1.0,
                    valid_every=10,
                ),
                REPORT,
            ),
            "expression-report": Preset(
                "S0, a report, as it was, a split that overlaps included",
                cls(train_size=4_000, valid_size=1_000, leaky_split=True),
                ModelConfig(width=32, hidden=32, encoder_layers=4, decoder_layers=4, dropout=0.2, norm="course"),
                TrainingConfig(epochs=10, batch_size=256),
                REPORT,
            ),
        }

    @classmethod
    def studies(cls) -> dict[str, Study]:
        four = {"train_size": 4, "valid_size": 1, "batch_size": 4, "epochs": 200}
        shallow = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}  # S0 says no dropout; with 0.2 some fail
        return {
            "s0-learning-rate": Study(
                "expression-report", {"learning_rate": list(LEARNING_RATES)}, reported("learning_rate", LEARNING_RATES)
            ),
            "s0-overfit": Study(
                "expression-report",
                {},
                [({}, {"valid_loss": 0.0070, "valid_token_accuracy": 1.0})],
                four | shallow,
                measure_training=True,
            ),
        }

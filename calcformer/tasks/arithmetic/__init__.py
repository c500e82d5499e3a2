"""What tasks of arithmetic have in common: what can be set, and what reports said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calcformer.errors import InputError
from calcformer.settings import TaskSettings, setting

__all__ = ["ArithmeticSettings", "reported"]


@dataclass(frozen=True)
class ArithmeticSettings(TaskSettings):
    fresh: bool = setting(False, "draw new problems each epoch instead of a fixed list")
    held_out: float = setting(0.5, "of fresh problems: the share of all that is never trained on", 0.001, 0.999)
    leaky_split: bool = setting(False, "let problems be both trained on and held out, as the reports did")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh and self.leaky_split:
            raise InputError("fresh problems are held apart by construction; leave out --leaky-split")


def reported(
    name: str, figures: dict[Any, tuple[float, float, float]]
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Training loss, validation loss and token accuracy by the value of one setting."""
    keys = "loss", "valid_loss", "valid_token_accuracy"
    return [({name: value}, dict(zip(keys, row))) for value, row in figures.items()]

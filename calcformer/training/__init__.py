"""Training and measuring."""

from calcformer.training.loop import resume, train
from calcformer.training.metrics import Score, evaluate, exact_match

__all__ = ["Score", "evaluate", "exact_match", "resume", "train"]

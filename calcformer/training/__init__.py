"""Training and measuring."""

from calcformer.training.loop import resume, train
from calcformer.training.metrics import Score, evaluate, measure, measure_answers

__all__ = ["Score", "evaluate", "measure", "measure_answers", "resume", "train"]

"""Training, measuring and saving."""

from calcformer.training.checkpoint import RunError, load_run
from calcformer.training.loop import resume, train
from calcformer.training.metrics import Score, evaluate, exact_match

__all__ = ["RunError", "Score", "evaluate", "exact_match", "load_run", "resume", "train"]

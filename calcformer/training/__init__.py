"""Training, measuring and saving."""

from calcformer.training.checkpoint import RunError, finished_epochs, load_run
from calcformer.training.device import pick_device
from calcformer.training.loop import resume, train
from calcformer.training.metrics import Score, evaluate, exact_match

__all__ = ["RunError", "Score", "evaluate", "exact_match", "finished_epochs", "load_run", "pick_device",
           "resume", "train"]

"""Runs on disk, and the device they compute on: what training, solving, sweeps and evaluation stand on."""

from calcformer.runs.checkpoint import RunError, finished_epochs, load_run
from calcformer.runs.device import pick_device
from calcformer.runs.newest import newest_run

__all__ = ["RunError", "finished_epochs", "load_run", "newest_run", "pick_device"]

"""Training: from a configuration to a run folder."""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calcformer.build import build_model, build_task
from calcformer.config import RunConfig
from calcformer.data import Examples
from calcformer.errors import InputError
from calcformer.plots import save_curve
from calcformer.training.checkpoint import CONFIG, METRICS, load_resume_state, read_config, save_checkpoint
from calcformer.training.files import write_atomically
from calcformer.training.interrupt import interruptible
from calcformer.training.metrics import Totals, count_labels, evaluate, exact_match, token_loss
from calcformer.training.optimizer import build_optimizer, learning_rate, trained_parameters
from calcformer.training.run_log import RunLog
from calcformer.training.team import Team, start_team

__all__ = ["epoch_seed", "pick_device", "resume", "train"]

QUIET_SECONDS = 5.0  # between lines where there is no terminal to draw a bar on
BAR_SECONDS = 0.2  # between updates of the bar, which wait for the device


def pick_device(name: str) -> torch.device:
    """The device called `name`; InputError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} is not here ({torch.cuda.device_count()} GPUs found); use --device cpu")
    return device


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's order and dropout: a resumed run needs no generator state, only the epoch's number."""
    return (seed * 1_000_003 + epoch) % 2**63


class Trainer:
    """The state of one training run."""

    def __init__(self, config: RunConfig, folder: Path, bar: bool | None, team: Team | None = None) -> None:
        self.config = config
        self.team = team or Team()
        self.folder = folder
        self.device = pick_device(config.training.device)
        self.task = build_task(config.data)
        train, valid = self.task.split()
        self.train_examples, self.valid_examples = train.to(self.device), valid.to(self.device)
        torch.manual_seed(config.training.seed)
        self.model = build_model(config.model, self.task).to(self.device)
        self.optimizer, self.gradient = build_optimizer(self.model, config.training)
        self.steps_per_epoch = math.ceil(len(train) / config.training.batch_size)
        self.log = RunLog(folder / METRICS)
        self.want_bar = bar
        self.bar = tqdm(disable=True)
        self.last_shown = 0.0
        self.check_interrupt: Callable[[], None] = lambda: None

    def begin(self) -> int:
        """Write the run folder as it is before the first epoch; returns 0, the epochs finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / CONFIG, self.config.to_json().encode())
        save_checkpoint(self.folder, self.model, self.optimizer, 0)
        return 0

    def start_team(self) -> AbstractContextManager[Team]:
        """Start the other processes of a run whose folder is written."""
        return start_team(self.folder, self.config.training.processes, len(self.gradient))

    def step(self, batch: Examples, rate: float, totals: Totals) -> None:
        """One step of the optimiser on one batch; `totals` hears of this process's part of it."""
        training, pad_id = self.config.training, self.task.vocabulary.pad_id
        self.gradient.zero_()
        count = count_labels(batch.labels, pad_id)
        part = batch.part(self.team.rank, self.team.size)
        if len(part):
            if self.device.type == "cpu":
                part = part.trim(pad_id)
            logits = self.model(part.source, part.decoder_input)
            loss = token_loss(logits, part.labels, pad_id, training.label_smoothing)
            (loss / count).backward()
            totals.add(loss, logits, part.labels)
        self.team.sum_(self.gradient)
        if training.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained_parameters(self.optimizer), training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, numbered from 1, and validate; returns its line of the log."""
        training, pad_id = self.config.training, self.task.vocabulary.pad_id
        started = time.perf_counter()
        torch.manual_seed(epoch_seed(training.seed, epoch))
        if self.task.fresh:
            generator = torch.Generator(self.device).manual_seed(epoch_seed(training.seed, epoch))
            self.train_examples = self.task.draw(generator)
        order = torch.randperm(len(self.train_examples)).to(self.device)
        if self.team.rank:  # the same order for all, but dropout of one's own
            torch.manual_seed(epoch_seed(training.seed, epoch) + self.team.rank * 0x9E3779B97F4A7C15 % 2**62)
        totals = Totals(pad_id, self.device)
        step = (epoch - 1) * self.steps_per_epoch
        self.model.train()
        self.bar.set_description(f"epoch {epoch}/{training.epochs}", refresh=False)
        for batch in self.train_examples.batches(training.batch_size, order):
            rate = learning_rate(step, training.epochs * self.steps_per_epoch, training)
            self.step(batch, rate, totals)
            self._show(len(batch), totals)
            self.check_interrupt()
            step += 1
        self.team.sum_(totals.sums)
        loss, accuracy = totals.result()
        if not math.isfinite(loss):
            raise InputError(f"the loss became {loss} in epoch {epoch}; lower --learning-rate or set --clip-norm")
        seconds = time.perf_counter() - started
        entry = {"epoch": epoch, "loss": loss, "token_accuracy": accuracy, "learning_rate": rate}
        last = epoch == training.epochs
        if last or epoch % training.valid_every == 0:
            score = evaluate(self.model, self.valid_examples, pad_id, team=self.team)
            entry |= {"valid_loss": score.loss, "valid_token_accuracy": score.token_accuracy}
        if last or (training.exact_match_every and epoch % training.exact_match_every == 0):
            entry["exact_match"] = exact_match(self.model, self.valid_examples, self.task, team=self.team)
        return entry | {"seconds": round(seconds, 4), "examples_per_second": round(len(order) / seconds, 1)}

    def _show(self, count: int, totals: Totals) -> None:
        if self.bar.disable:
            return
        if time.perf_counter() - self.last_shown > BAR_SECONDS:
            self.last_shown = time.perf_counter()
            loss, accuracy = totals.result()
            self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.4f}", refresh=False)
        self.bar.update(count)

    def _say(self, entry: dict[str, Any]) -> None:
        """A line to stderr now and then, where there is no bar."""
        last = entry["epoch"] == self.config.training.epochs
        if self.bar.disable and (last or time.perf_counter() - self.last_shown > QUIET_SECONDS):
            self.last_shown = time.perf_counter()
            numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in entry.items()
                                if isinstance(value, float) and name not in ("seconds", "learning_rate"))
            print(f"epoch {entry['epoch']}/{self.config.training.epochs}: {numbers}", file=sys.stderr, flush=True)

    def run(self, finished: int) -> dict[str, Any]:
        """Train the epochs after `finished`; returns the last line of the log."""
        size = len(self.train_examples)
        self.bar = tqdm(total=self.config.training.epochs * size, initial=finished * size, unit="ex", unit_scale=True,
                        dynamic_ncols=True, disable=None if self.want_bar is None else not self.want_bar)
        self.last_shown = 0.0 if not self.bar.disable else time.perf_counter()
        try:
            with interruptible() as self.check_interrupt:
                for epoch in range(finished + 1, self.config.training.epochs + 1):
                    entry = self.epoch(epoch)
                    # The log first: on resume a line whose epoch was never saved is dropped, a missing one is lost.
                    self.log.append(entry)
                    save_checkpoint(self.folder, self.model, self.optimizer, epoch)
                    self._say(entry)
        finally:
            self.bar.close()
        entries = self.log.read()
        if not entries or entries[-1]["epoch"] != self.config.training.epochs:
            raise InputError(f"{self.log.path} is damaged: it does not reach the last epoch; train the run again")
        save_curve(entries, self.folder / "curve.png")
        return entries[-1]


def _run(config: RunConfig, folder: Path, bar: bool | None, continued: bool) -> dict[str, Any]:
    device = pick_device(config.training.device)
    if device.type == "cuda":
        config = config.with_settings({"processes": 1})
    if config.training.processes > 1 and os.name != "posix":
        raise InputError("several processes share memory as Linux and macOS do it; use --processes 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.training.threads or 1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            trainer = Trainer(config, folder, bar)
            finished = load_resume_state(folder, trainer.model, trainer.optimizer) if continued else trainer.begin()
            trainer.log.rewind(finished)
            with trainer.start_team() as trainer.team:
                return trainer.run(finished)
    finally:
        torch.set_num_threads(threads)


def train(config: RunConfig, out: Path | str, bar: bool | None = None) -> dict[str, Any]:
    """Train a model and write it, epoch by epoch, to the folder `out`.

    Args:
        config: all settings. On a CPU they decide every number: the same settings give the same run.
        out: a folder that does not exist or is empty.
        bar: True draws a progress bar, False does not, None draws one on a terminal.

    Returns:
        The last line of metrics.jsonl: loss, token_accuracy, valid_loss, valid_token_accuracy, exact_match, ...

    Raises:
        InputError: a setting that cannot be used here, or a folder with something in it; nothing is written then.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists; give --out another name, or continue it with --resume {folder}")
    return _run(config, folder, bar, continued=False)


def resume(folder: Path | str, bar: bool | None = None) -> dict[str, Any]:
    """Continue a run from its last finished epoch, with its own settings; on a CPU, with the numbers it would have had.

    Raises:
        RunError: the folder is missing or damaged.
    """
    folder = Path(folder)
    return _run(read_config(folder), folder, bar, continued=True)

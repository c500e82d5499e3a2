"""The epochs of a run."""

import errno
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calcformer.config import RunConfig, describe_figures
from calcformer.data import Examples, Task
from calcformer.data.examples import like_lengths, shared
from calcformer.errors import InputError, tell
from calcformer.interrupt import interruptible
from calcformer.plots import save_curve
from calcformer.runs.checkpoint import load_resume_state, save_checkpoint, save_weights, trained_parameters
from calcformer.runs.device import pick_device, torchrun_place
from calcformer.runs.files import write_atomically
from calcformer.runs.folder import CONFIG, METRICS, MODEL, RESUME, RunError
from calcformer.runs.run_log import RunLog
from calcformer.settings import TaskSettings
from calcformer.training.board import Board
from calcformer.training.cuda_graph import CudaRecorder, GraphedSteps
from calcformer.training.metrics import Totals, count_labels, measure, measure_answers, token_loss
from calcformer.training.optimizer import average_weights, build_optimizer, learning_rate
from calcformer.training.team import Team, start_team
from calcformer.training.torchrun import lead_torchrun

__all__ = ["Trainer", "epoch_seed"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk
QUIET_SECONDS = 5.0  # between lines where there is no terminal to draw a bar on
# What matters most stands first: a narrow terminal cuts the end off.
BAR = "{desc}{percentage:.0f}% {remaining} left{postfix} |{bar}| {rate_fmt}"
BAR_SECONDS = 0.2  # between updates of the bar, which wait for the device


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's order and dropout: a resumed run needs no generator state, only the epoch's number."""
    return (seed * 1_000_003 + epoch) % 2**63


class Curve:
    """curve.png of a run, drawn after an epoch unless drawing would take more than a twentieth of the time."""

    def __init__(self, folder: Path, data: TaskSettings) -> None:
        self.folder, self.data = folder, data
        self.next_time = time.monotonic() + QUIET_SECONDS

    def draw(self, at_once: bool = False) -> None:
        started = time.monotonic()
        entries = RunLog(self.folder / METRICS).read()
        if entries and (at_once or started > self.next_time):
            save_curve(entries, str(self.folder), self.folder / "curve.png", self.data)
            finished = time.monotonic()
            self.next_time = finished + 20 * (finished - started)


class Trainer:
    """The state of one training run.

    Args:
        task: that of the settings, where it is built already.
    """

    folder: Path

    def __init__(self, config: RunConfig, bar: bool | None, team: Team | None = None, task: Task | None = None) -> None:
        self.config = config
        self.team = team or Team()
        self.device = pick_device(config.training.device)
        self.task = config.data.build() if task is None else task
        if config.training.batch_tokens and self.task.fresh:
            raise InputError(
                f"batch_tokens needs {config.data.noun} that stay the same; leave it out, and set batch_size"
            )
        train, valid = self.task.split()
        for side, what in (train, "train on"), (valid, "hold out"):
            if not len(side):
                raise InputError(f"no {config.data.noun} are left to {what}; change how many are held out")
        self.train_examples, self.valid_examples = train.to(self.device), valid.to(self.device)
        torch.manual_seed(config.training.seed)
        self.model = config.model.build(self.task).to(self.device)
        # Only the steps are compiled: those who measure and save the model know it by its own names.
        self.forward = torch.compile(self.model, fullgraph=True) if config.training.compile else self.model
        self.optimizer, self.gradient = build_optimizer(self.model, config.training)
        self.totals = Totals(self.task.ignored_label, self.device)
        self.lengths = train.lengths(self.task.ignored_label) if config.training.batch_tokens else None
        self.steps_per_epoch = len(self.order_epoch()[1])
        self.want_bar = bar
        self.bar = tqdm(disable=True)
        self.last_shown = 0.0
        self.measured = ""
        self.check_interrupt: Callable[[], None] = lambda: None
        self.board: Board | None = None

    @property
    def log(self) -> RunLog:
        return RunLog(self.folder / METRICS)

    def begin(self, folder: Path) -> int:
        """Write a run folder as it is before the first epoch; returns 0, the epochs finished."""
        self.folder = folder
        write_atomically(folder / CONFIG, self.config.to_json().encode())
        for name, content in self.task.files().items():
            write_atomically(folder / name, content)
        save_checkpoint(folder, self.model, self.optimizer, 0)
        return 0

    def load(self, folder: Path) -> int:
        """Go back to the last checkpoint in a run folder; returns the epochs finished."""
        if not any((folder / name).exists() for name in (RESUME, MODEL, METRICS)):  # a kill came before the first one
            return self.begin(folder)
        self.folder = folder
        finished = load_resume_state(folder, self.model, self.optimizer)
        if finished > self.config.training.epochs:
            raise RunError(
                f"{folder / RESUME} is of epoch {finished} and {folder / CONFIG} tells of "
                f"{self.config.training.epochs}; train the run again or give another one"
            )
        save_weights(folder, self.model, finished)  # a kill may have come between the two files of a checkpoint
        return finished

    def start_team(self) -> AbstractContextManager[Team]:
        """The other processes of a run whose folder is written."""
        if torchrun_place() is not None and self.config.training.processes > 1:
            return lead_torchrun(self.folder)
        longest = max(tensor.numel() for tensor in self.gradient.tensors)
        return start_team(self.folder, self.config.training.processes, longest)

    def step(self, batch: Examples, rate: float | torch.Tensor) -> None:
        """One step of the optimiser on one batch; the totals hear of this process's part of it.

        On a GPU it waits for no value, so that it can be a part of a CUDA graph.
        """
        training, ignored = self.config.training, self.task.ignored_label
        count = count_labels(batch.labels, ignored)
        part = batch.part(self.team.rank, self.team.size)
        if len(part):
            is_short = self.lengths is not None or self.device.type == "cpu"
            if is_short and not training.compile:  # compiled code is made for one shape
                part = part.trim(self.task.vocabulary.pad_id)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
                logits = self.forward(*part.inputs)
            loss = token_loss(logits.float(), part.labels, ignored, training.label_smoothing)
            self.gradient.fill(loss / count)
            self.totals.add(loss, logits, part.labels)
        else:
            for tensor in self.gradient.tensors:
                tensor.zero_()
        for tensor in self.gradient.tensors:
            self.team.sum_(tensor)
        if training.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained_parameters(self.optimizer), training.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def order_epoch(self) -> tuple[torch.Tensor, list[int]]:
        """A random order of the examples, (N,) int64, and the sizes of the batches in it."""
        size, order = self.config.training.batch_size, torch.randperm(len(self.train_examples))
        if self.lengths is not None:
            return like_lengths(self.lengths, order, self.config.training.batch_tokens)
        return order, [min(size, len(order) - start) for start in range(0, len(order), size)]

    @cached_property
    def graphed_steps(self) -> GraphedSteps | None:
        """What takes the steps of an epoch by CUDA graphs on a GPU, where all batches have one shape.

        Not where the model is compiled, or the sum over several GPUs would have to be captured.
        """
        if self.device.type != "cuda" or self.team.size > 1 or self.config.training.compile or self.lengths is not None:
            return None
        return GraphedSteps(self.step, self.config.training.batch_size, CudaRecorder(self.device, self.optimizer))

    def take_steps(self, examples: Examples, sizes: Sequence[int], rates: Sequence[float]) -> Iterator[int]:
        """Train on the batches of an epoch, with a learning rate a step; yields how many examples at a time."""
        if self.graphed_steps is not None:
            yield from self.graphed_steps(examples, rates)
            return
        for batch, rate in zip(examples.batches(sizes), rates):
            self.step(batch, rate)
            yield len(batch)

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, numbered from 1, and validate; returns its line of the log."""
        training = self.config.training
        started = time.perf_counter()
        torch.manual_seed(epoch_seed(training.seed, epoch))
        if self.task.fresh:
            generator = torch.Generator(self.device).manual_seed(epoch_seed(training.seed, epoch))
            self.train_examples = self.task.draw(generator)
        order, sizes = self.order_epoch()
        if self.team.rank:  # the same order for all, but dropout of one's own
            torch.manual_seed(epoch_seed(training.seed, epoch) + self.team.rank * 0x9E3779B97F4A7C15 % 2**62)
        first, steps = (epoch - 1) * self.steps_per_epoch, training.epochs * self.steps_per_epoch
        rates = [learning_rate(first + step, steps, training) for step in range(self.steps_per_epoch)]
        self.totals.sums.zero_()
        self.model.train()
        self.epoch_name = f"{epoch}/{training.epochs}"
        examples = replace(self.train_examples, problem=None).select(order.to(self.device))
        for count in self.take_steps(examples, sizes, rates):
            self._show(count)
            self.check_interrupt()
        self.team.sum_(self.totals.sums)
        loss, accuracy = self.totals.result()
        average_weights(self.optimizer, epoch, training)
        seconds = time.perf_counter() - started
        entry = {"epoch": epoch, "loss": loss, "token_accuracy": accuracy, "learning_rate": rates[-1]}
        last = epoch == training.epochs
        self.bar.set_description(f"{self.epoch_name} loss {loss:.4f} measuring")
        answers = last or (training.exact_match_every > 0 and epoch % training.exact_match_every == 0)
        entry |= self.measure(self.team, validation=last or epoch % training.valid_every == 0, answers=answers)
        entry |= self.measure_tests(self.team) if last else {}
        self._check_finite(entry)
        self._show_measured(entry)
        if answers and self.team.rank == 0:
            self._show_probes()
        return entry | {"seconds": round(seconds, 4), "examples_per_second": round(len(order) / seconds, 1)}

    def measure(self, team: Team, validation: bool = True, answers: bool = True) -> dict[str, Any]:
        """What an entry of the log says of the held-out problems."""
        wanted = self.config.data.figures
        return measure(self.model, self.valid_examples, self.task, wanted, validation, answers, team)

    def measure_tests(self, team: Team) -> dict[str, Any]:
        """What the last entry of the log says of the answers to the task's tests, such as test_bleu."""
        found: dict[str, Any] = {}
        for name in self.task.tests:
            figures = measure_answers(self.model, self.task.test(name).to(self.device), self.task, team=team)
            found |= {f"{name}_{figure}": value for figure, value in figures.items()}
        return found

    def _check_finite(self, entry: dict[str, Any]) -> None:
        """InputError where weights or losses are no numbers any more, which the epoch before is then kept from."""
        lost = [name.replace("_", " ") for name, value in entry.items() if not math.isfinite(value)]
        if not all(bool(parameter.isfinite().all()) for parameter in trained_parameters(self.optimizer)):
            lost.append("weights")
        if lost:
            raise InputError(
                f"the {' and '.join(lost)} became infinite or NaN in epoch {entry['epoch']}, which is not "
                "saved; lower --learning-rate or --weight-decay, or set --clip-norm, and train again"
            )

    def _show(self, count: int) -> None:
        """Draw the bar after `count` examples."""
        if self.bar.disable:
            return
        if time.perf_counter() - self.last_shown > BAR_SECONDS:
            self.last_shown = time.perf_counter()
            self._describe(*self.totals.result())
        self.bar.update(count)

    def _describe(self, loss: float, accuracy: float) -> None:
        """Loss and the newest figure of the held-out problems first: the one that counts where it was ever measured."""
        self.bar.set_description(f"{self.epoch_name} loss {loss:.4f}{self.measured}", refresh=False)
        self.bar.set_postfix_str(f"accuracy {accuracy:.4f}", refresh=False)

    def _show_measured(self, entry: dict[str, Any]) -> None:
        """Show a finished epoch in the bar."""
        (main, label), *others = self.config.data.figures.items()
        is_held_out = self.config.data.holds_out
        word = "held out" if main.startswith("valid_") and is_held_out else label.split()[0]
        found = [entry[name] for name, _ in others if name in entry]
        if main in entry:
            self.measured = f" {word} {entry[main]:.4f}"
        elif found and f" {word} " not in self.measured:
            self.measured = f" held out {found[0]:.4f}"
        self._describe(entry["loss"], entry["token_accuracy"])
        self.bar.refresh()

    def _show_probes(self) -> None:
        """Lines to stderr: what the task shows of the model."""
        self.model.eval()
        for line in self.task.show(self.model, self.device):
            self.bar.write(f"  {line}", file=sys.stderr)

    def _say(self, entry: dict[str, Any]) -> None:
        """A line to stderr now and then, where there is no bar."""
        last = entry["epoch"] == self.config.training.epochs
        if self.bar.disable and (last or time.perf_counter() - self.last_shown > QUIET_SECONDS):
            self.last_shown = time.perf_counter()
            numbers = ", ".join(
                f"{name.replace('_', ' ')} {value:.{4 if name != 'examples_per_second' else 0}f}"
                for name, value in entry.items()
                if isinstance(value, float) and name not in ("seconds", "learning_rate")
            )
            tell(f"epoch {entry['epoch']}/{self.config.training.epochs}: {numbers}")

    def _write(self, entry: dict[str, Any]) -> None:
        """Save an epoch. The log first: on resume, a line of an epoch not saved is dropped, a missing one lost."""
        try:
            self.log.append(entry)
            if self.board is not None:
                self.board.add(entry)
            epoch = entry["epoch"]
            if epoch % self.config.data.epochs_a_checkpoint == 0 or epoch == self.config.training.epochs:
                save_checkpoint(self.folder, self.model, self.optimizer, epoch)
            self.curve.draw()
        except OSError as error:
            what = f"{error.filename or self.folder}: {error.strerror or error}"
            if not (self.folder / RESUME).exists():
                raise InputError(
                    f"{what}; the run folder was moved or deleted meanwhile: continue it where it is now, "
                    "or train again"
                ) from None
            remedy = "make room" if error.errno in FULL else "mend that"
            raise InputError(
                f"{what}; what was finished before is saved: {remedy}, then continue with: "
                f"calcformer train --resume {self.folder}"
            ) from None

    def run(self, finished: int) -> dict[str, Any]:
        """Train the epochs after `finished`; returns the last line of the log."""
        self.log.rewind(finished)
        self.curve = Curve(self.folder, self.config.data)
        self._introduce(finished)
        size = len(self.train_examples)
        hidden = None if self.want_bar is None else not self.want_bar
        self.bar = tqdm(
            total=self.config.training.epochs * size,
            initial=finished * size,
            unit="ex",
            unit_scale=True,
            bar_format=BAR,
            dynamic_ncols=True,
            disable=hidden,
        )
        self.last_shown = 0.0 if not self.bar.disable else time.perf_counter()
        self.board = Board(self.folder, finished) if self.config.training.tensorboard else None
        try:
            with interruptible() as self.check_interrupt:
                for epoch in range(finished + 1, self.config.training.epochs + 1):
                    entry = self.epoch(epoch)
                    self._write(entry)
                    self._say(entry)
        except BaseException:
            with suppress(OSError):  # what was raised matters more
                self.curve.draw(at_once=True)
            raise
        finally:
            self.bar.close()
            if self.board is not None:
                self.board.close()
        self.curve.draw(at_once=True)
        last = next(iter(self.log.read()[-1:]), {})
        # The log was lost, the weights not.
        if last.get("epoch") != self.config.training.epochs or not last.keys() >= self.config.data.figures.keys():
            last = {"epoch": self.config.training.epochs, **self.measure(Team()), **self.measure_tests(Team())}
            self.log.append(last)
        return last

    def _introduce(self, finished: int) -> None:
        """A line to stderr: what is trained, and where to."""
        training, size = self.config.training, len(self.train_examples)
        is_held_out = self.config.data.holds_out
        held_out = f"{len(self.valid_examples):,}" if is_held_out else "none"
        both = shared(self.train_examples, self.valid_examples) if is_held_out and not self.task.fresh else 0
        seen = f", {both:,} of which are trained on too" if both else ""
        best = describe_figures({}, self.config) if self.config.data.best_possible else ""
        again = f", {finished} of {training.epochs} epochs done" if finished else ""
        tell(
            f"{self.folder}: {sum(tensor.numel() for tensor in self.gradient.tensors):,} parameters; {size:,} "
            f"{'fresh ' if self.task.fresh else ''}{self.config.data.noun} an epoch, {held_out} held out{seen}; "
            f"{self.device}, {self.team.size} process{'es' if self.team.size > 1 else ''}{again}{best}"
        )

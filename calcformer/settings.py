"""What can be set: fields with help and limits; what every task, kind of model and preset has; training.

All values are checked here and in the classes that stand on these, and only there. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from calcformer.errors import InputError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from calcformer.data import Task

__all__ = ["ModelSettings", "Preset", "Study", "TaskSettings", "TrainingConfig", "is_loss", "kinds_of", "setting"]

MOST_EPOCHS = 1_000_000
LARGEST_SET = 10_000_000  # problems to train on or to measure


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its help text and its limits, both included. Every number has both."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def is_loss(name: str) -> bool:
    """Whether a figure, by its name or its label, is the better the lower, without an end, and not a share."""
    return any(word in name for word in ("loss", "perplexity", "bits"))


def kinds_of(settings: Any) -> dict[str, Any]:
    """The type of each field of a dataclass, by name."""
    hints = get_type_hints(settings if isinstance(settings, type) else type(settings))
    return {item.name: hints[item.name] for item in fields(settings)}


@dataclass(frozen=True)
class Settings:
    """Fields made by `setting`. InputError for the first of them with a wrong type or value."""

    def __post_init__(self) -> None:
        kinds = kinds_of(self)
        for item in fields(self):
            value, kind = getattr(self, item.name), kinds[item.name]
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise InputError(f"{item.name} must be one of {', '.join(get_args(kind))}, got {shown(value)}")
                continue
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InputError(f"{item.name} must be of type {kind.__name__}, got {shown(value)}")
            low, high = item.metadata["low"], item.metadata["high"]
            if low is not None and not low <= value <= high:  # NaN lies nowhere
                raise InputError(f"{item.name} must be {low} to {high}, got {shown(value)}")
            if kind is float:
                object.__setattr__(self, item.name, float(value))


@dataclass(frozen=True)
class TaskSettings(Settings):
    """What every task has. A task is a subclass, in a file of its own, and a line of `calcformer.tasks.TASKS`."""

    task: ClassVar[str]  # its name
    about: ClassVar[str]  # what it is, in one line
    noun: ClassVar[str] = "examples"  # what several of its problems are called
    example: ClassVar[str] = ""  # a question as a user types it
    models: ClassVar[Sequence[str]] = ("encoder-decoder",)  # the kinds it can be learned by
    # What is measured on held-out examples, as metrics.jsonl names it and as people do; the one that counts first.
    figures: ClassVar[dict[str, str]] = {
        "exact_match": "exact match",
        "valid_token_accuracy": "token accuracy",
        "valid_loss": "loss",
    }
    epochs_a_checkpoint: ClassVar[int] = 1  # more where to write one takes longer than an epoch
    former: ClassVar[dict[str, Any]] = {}  # keys that older versions wrote to config.json, with what meant nothing

    train_size: int = setting(10_000, "problems to train on, fresh or not, an epoch", 1, LARGEST_SET)
    valid_size: int = setting(5_000, "problems held out", 1, LARGEST_SET)
    data_seed: int = setting(0, "seed of the data and its split", 0, 2**62)

    @property
    def holds_out(self) -> bool:
        """Whether what is measured is kept from training."""
        return True

    @property
    def measured(self) -> str:
        """What the figures are of."""
        return f"held-out {self.noun}" if self.holds_out else f"the {self.noun} trained on"

    def build(self) -> Task:
        """The task itself; only now is torch needed."""
        raise NotImplementedError

    @property
    def best_possible(self) -> dict[str, float]:
        """The figures that no model can surpass, by the names of metrics.jsonl, where the data tell them."""
        return {}

    def restore(self, folder: Path) -> Task:
        """The task of the run in `folder`, where it keeps what `Task.files` gave."""
        return self.build()

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Named runs of this task; the first is the one that is meant where none is named."""
        raise NotImplementedError

    @classmethod
    def studies(cls) -> dict[str, Study]:
        """Comparisons that reports made, for `calcformer sweep --study`."""
        return {}


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What every kind of model has. A kind is a subclass in `calcformer/model/settings.py`, and a word there."""

    kind: ClassVar[str]

    def build(self, task: Task) -> Any:
        """The model with fresh weights, drawn from torch's global generator."""
        raise NotImplementedError

    def activations(self, source: int, target: int, vocabulary: int) -> int:
        """Roughly how many numbers are kept of one example for the backward pass, by its lengths in tokens."""
        raise NotImplementedError

    @property
    def layers(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class TrainingConfig(Settings):
    epochs: int = setting(100, "passes over the training problems", 1, MOST_EPOCHS)
    batch_size: int = setting(125, "problems in a step", 1, 1_000_000)
    learning_rate: float = setting(1e-3, "peak learning rate of Adam", 0, 1000)
    batch_tokens: int = setting(
        0, "tokens in a step, of examples of like lengths, instead of --batch-size; 0 for that", 0, 10_000_000
    )
    schedule: Literal["constant", "cosine", "noam"] = setting(
        "constant", "learning rate after the warm-up; noam: falls as 1 / sqrt(step)"
    )
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0", 0, 1_000_000_000)
    weight_decay: float = setting(0.0, "decay of the matrices, as AdamW applies it", 0, 1000)
    beta2: float = setting(0.999, "Adam's decay of squared gradients", 0, 0.999999)
    clip_norm: float = setting(0.0, "largest norm of the gradient, 0 for no limit", 0, 1_000_000)
    label_smoothing: float = setting(0.0, "share of the target spread over all tokens", 0, 0.99)
    seed: int = setting(0, "seed of initial weights, order and dropout", 0, 2**62)
    average: int = setting(0, "the last epochs whose weights are averaged at the end, 0 for none", 0, MOST_EPOCHS)
    valid_every: int = setting(1, "epochs between validations (the last epoch always has one)", 1, MOST_EPOCHS)
    exact_match_every: int = setting(
        0, "epochs between measurements of answers, or samples of a text; 0: the last epoch only", 0, MOST_EPOCHS
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU where there is one")
    processes: int = setting(
        0, "CPU processes that share each batch, 0 for two where there are two cores (a GPU has one)", 0, 1024
    )
    threads: int = setting(0, "CPU threads of a process, 0 for one (small models are slower with more)", 0, 1024)
    precision: Literal["float32", "bfloat16"] = setting("float32", "of products in training; bfloat16 by autocast")
    compile: bool = setting(False, "torch.compile the model (seldom faster on a CPU)")
    tensorboard: bool = setting(False, "write TensorBoard event files to the run folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate * self.weight_decay >= 1:
            raise InputError(
                "learning_rate times weight_decay, what a step takes away of a weight, must be below 1, "
                f"got {self.learning_rate:g} times {self.weight_decay:g}"
            )


@dataclass(frozen=True)
class Preset:
    """A run with a name.

    Args:
        about: what it is, in one line.
        model: None for the first kind that its task is learned by, as it is by default.
        reported: figures of the report that it repeats, by the names of metrics.jsonl.
    """

    about: str
    data: TaskSettings
    model: ModelSettings | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    reported: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A comparison that a report made, and what it found.

    Args:
        preset, settings: the run that is varied, as a preset and what differs from it.
        vary: the values of each setting that is varied.
        cases: where several settings go together, those of each run, by its name.
        seeds: how many training seeds each has.
        epochs: those before the last whose figures the table has too.
        reported: the report's figures, each with the values of the varied settings, or the "case", it belongs to.
        questions: asked of every run at the end.
        measure_training: the figures of validation are of the problems trained on.
    """

    preset: str
    vary: dict[str, list[Any]]
    reported: list[tuple[dict[str, Any], dict[str, float]]]
    settings: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    questions: tuple[str, ...] = ()
    measure_training: bool = False
    seeds: int = 1
    epochs: tuple[int, ...] = ()

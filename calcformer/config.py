"""All settings of one run, as a file and as flags give them; and the named ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from calcformer.errors import InputError, shown
from calcformer.model.settings import MODELS, ModelConfig
from calcformer.settings import ModelSettings, TaskSettings, TrainingConfig, kinds_of
from calcformer.tasks import TASKS

__all__ = ["DEFAULT", "PRESETS", "RunConfig", "describe_figures"]

# Of config.json; raised when an old file can no longer be read. A setting that is newer than a file takes its default,
# which must therefore be what runs did without it.
FORMAT = 1
# Written only where they say something: older versions refuse them.
NEWER = {"batch_tokens", "average", "matmul_precision"}


def count_steps(data: TaskSettings, training: TrainingConfig) -> int:
    """Steps of the optimiser in all epochs; at most, where batches are made by tokens."""
    return training.epochs * math.ceil(data.train_size / (1 if training.batch_tokens else training.batch_size))


def owners(name: str) -> list[str]:
    """The tasks and kinds of model that have a setting of this name."""
    kinds: dict[str, Any] = {**TASKS, **MODELS}
    return [owner for owner, settings in kinds.items() if name in kinds_of(settings)]


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run, and the preset they were made from."""

    preset: str
    data: TaskSettings
    model: ModelSettings = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.model.kind not in self.data.models:
            known = " or ".join(self.data.models)
            raise InputError(f"{self.data.task} is learned by a model of kind {known}, got {shown(self.model.kind)}")
        steps = count_steps(self.data, self.training)
        if self.training.warmup_steps > steps:
            raise InputError(
                f"warmup_steps must be at most the {steps} steps of the whole run, got {self.training.warmup_steps}"
            )

    @property
    def sections(self) -> dict[str, Any]:
        """The settings by the names of config.json."""
        return {"data": self.data, "model": self.model, "training": self.training}

    @property
    def reported(self) -> dict[str, float]:
        """Figures of the report that the preset repeats, by the names of metrics.jsonl."""
        preset = type(self.data).presets().get(self.preset)
        return preset.reported if preset else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by name; "model" is the kind of model."""
        found: dict[str, Any] = {"model": self.model.kind}
        for section in self.sections.values():
            found |= vars(section)
        return found

    @property
    def kinds(self) -> dict[str, Any]:
        """The type of every setting, by name."""
        return {"model": str} | {name: kind for part in self.sections.values() for name, kind in kinds_of(part).items()}

    def with_settings(self, changes: dict[str, Any]) -> RunConfig:
        """The same run with some settings changed by name; InputError for a wrong name or value.

        A warm-up that is not among them becomes a tenth of the run where the run has become shorter than it. Another
        kind of model, by "model", begins with its own defaults.
        """
        changes, warmup_is_given = dict(changes), "warmup_steps" in changes
        parts = self.sections
        kind = changes.pop("model", self.model.kind)
        if kind != self.model.kind:
            if kind not in MODELS:
                raise InputError(f"model must be one of {', '.join(self.data.models)}, got {shown(kind)}")
            parts["model"] = MODELS[kind]()
        for part, section in parts.items():
            names = kinds_of(section).keys() & changes.keys()
            parts[part] = replace(section, **{name: changes.pop(name) for name in names})
        if changes:
            name = sorted(changes)[0]
            if owners(name):
                mine = kind if owners(name)[0] in MODELS else self.data.task
                raise InputError(f"{name} is a setting of {' and '.join(owners(name))}, not of {mine}; leave it out")
            raise InputError(f"there is no setting {shown(name)}")
        training, steps = parts["training"], count_steps(parts["data"], parts["training"])
        if training.warmup_steps > steps and not warmup_is_given:
            parts["training"] = replace(training, warmup_steps=steps // 10)
        return replace(self, **parts)

    def to_json(self) -> str:
        parts = {name: asdict(section) for name, section in self.sections.items()}
        usual = vars(TrainingConfig())
        parts["training"] = {
            name: value for name, value in parts["training"].items() if name not in NEWER or value != usual[name]
        }
        if self.model.kind != ModelConfig.kind:  # which older versions do not write, and take no other
            parts["model"] = {"kind": self.model.kind, **parts["model"]}
        parts["data"] = {"task": self.data.task, **parts["data"]}
        return json.dumps({"format": FORMAT, "preset": self.preset, **parts}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Read what `to_json` wrote, of an older version too: a missing key takes its default.

        Raises:
            InputError: the text is something else, or has a key that is not known.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise InputError(f"not of format {FORMAT}, the one this version of calcformer reads")
        preset = content.pop("preset", "")
        if not isinstance(preset, str):
            raise InputError(f"preset must be of type str, got {shown(preset)}")
        parts: dict[str, dict[str, Any]] = {name: content.pop(name, {}) for name in ("data", "model", "training")}
        for name, values in parts.items():
            if not isinstance(values, dict):
                raise InputError(f"{name} must hold settings by name, got {shown(values)}")
        task, kind = parts["data"].pop("task", next(iter(TASKS))), parts["model"].pop("kind", ModelConfig.kind)
        for what, name, known in ("task", task, list(TASKS)), ("kind of model", kind, list(MODELS)):
            if name not in known:
                raise InputError(f"there is no {what} {shown(name)} in this version of calcformer")
        sections: dict[str, Any] = {"data": TASKS[task], "model": MODELS[kind], "training": TrainingConfig}
        former = TASKS[task].former.items()
        parts["data"] = {key: value for key, value in parts["data"].items() if (key, value) not in former}
        unknown = list(content)
        for name, values in parts.items():
            unknown += [f"{name}.{key}" for key in values if key not in kinds_of(sections[name])]
        if unknown:
            raise InputError(f"there is no setting {shown(unknown[0])} in this version of calcformer")
        return cls(preset, **{name: section(**parts[name]) for name, section in sections.items()})


def describe_figures(figures: dict[str, float], config: RunConfig) -> str:
    """Figures in words, the one that counts first, and beside them those that nothing can surpass and the report's."""
    said = {
        beside: ", ".join(f"{label} {found[name]:.4f}" for name, label in config.data.figures.items() if name in found)
        for beside, found in (
            ("", figures),
            ("best possible", config.data.best_possible),
            ("the report", config.reported),
        )
    }
    return said.pop("") + "".join(f" ({beside}: {text})" for beside, text in said.items() if text)


PRESETS = {
    name: RunConfig(name, preset.data, preset.model or MODELS[preset.data.models[0]](), preset.training)
    for task in TASKS.values()
    for name, preset in task.presets().items()
}
DEFAULT = next(iter(PRESETS))  # where none is named

"""Which runs a sweep trains: settings varied over a grid, or the study of a report with the report's own figures."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from calcformer.config import DEFAULT, PRESETS, SECTIONS, RunConfig
from calcformer.errors import InputError, shown

__all__ = ["STUDIES", "Member", "Study", "Sweep", "parse_vary"]

FORMAT = 1  # of sweep.json
MOST_SEEDS, MOST_RUNS = 1000, 10_000
LONGEST_NAME = 200  # characters of a folder
KINDS: dict[str, Any] = {name: kind for section in SECTIONS.values() for name, kind in get_type_hints(section).items()}


@dataclass(frozen=True)
class Study:
    """A comparison that a report made, and what it found.

    Args:
        preset, settings: the run that is varied, as a preset and what differs from it.
        vary: the values of each setting that is varied.
        reported: the report's figures, each with the values of the varied settings it belongs to.
        questions: asked of every run at the end.
        measure_training: the figures of validation are of the problems trained on.
    """

    preset: str
    vary: dict[str, list[Any]]
    reported: list[tuple[dict[str, Any], dict[str, float]]]
    settings: dict[str, Any] = field(default_factory=dict)
    questions: tuple[str, ...] = ()
    measure_training: bool = False


def _reported(
    name: str, figures: dict[Any, tuple[float, float, float]]
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Training loss, validation loss and token accuracy by the value of one setting."""
    keys = "loss", "valid_loss", "valid_token_accuracy"
    return [({name: value}, dict(zip(keys, row))) for value, row in figures.items()]


LEARNING_RATES = {
    1e-2: (2.3461, 2.3397, 0.25),
    1e-3: (0.0228, 0.0088, 1.00),
    1e-4: (0.9837, 0.7957, 0.77),
    1e-5: (2.4652, 2.3359, 0.35),
    1e-6: (3.0363, 2.8027, 0.19),
    1e-7: (3.4504, 3.4122, 0.05),
    1e-8: (3.2717, 3.0475, 0.10),
    1e-9: (3.4178, 3.2929, 0.07),
}
STUDIES = {
    "s0-learning-rate": Study(
        "expression-report", {"learning_rate": list(LEARNING_RATES)}, _reported("learning_rate", LEARNING_RATES)
    ),
    "s0-overfit": Study(
        "expression-report",
        {},
        [({}, {"valid_loss": 0.0070, "valid_token_accuracy": 1.0})],
        {
            "train_size": 4,
            "valid_size": 1,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "batch_size": 4,
            "epochs": 200,
            "dropout": 0.0,
        },  # S0 says nothing of it; with 0.2 some end at .875
        measure_training=True,
    ),
    "s1-positions": Study(
        "formula-report",
        {"positions": ["sinusoid", "none"]},
        _reported("positions", {"sinusoid": (0.126, 0.117, 0.963), "none": (1.129, 1.878, 0.440)}),
        questions=("123+123", "321+321"),
    ),
}


@dataclass(frozen=True)
class Member:
    """One run of a sweep: the name of its folder, the values that are its own, and all settings."""

    name: str
    values: dict[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """A grid of runs: every combination of the varied values, each with `seeds` training seeds from the base's on."""

    base: RunConfig
    vary: dict[str, list[Any]]
    seeds: int = 1
    study: str | None = None

    def __post_init__(self) -> None:
        if type(self.seeds) is not int or not 1 <= self.seeds <= MOST_SEEDS:
            raise InputError(f"seeds must be 1 to {MOST_SEEDS}, got {shown(self.seeds)}")
        if self.study is not None and self.study not in STUDIES:
            raise InputError(f"there is no study {shown(self.study)}")
        for name, values in self.vary.items():
            if name not in KINDS or type(values) is not list or not values:
                raise InputError(f"{shown(name)} cannot be varied over {shown(values)}")
        runs = self.seeds * math.prod(map(len, self.vary.values()))
        if runs > MOST_RUNS:
            raise InputError(f"a sweep has at most {MOST_RUNS} runs, this one {runs}")
        if "seed" in self.vary and self.seeds > 1:
            raise InputError("--seeds counts up from one seed; leave it out or --vary seed")
        for name, values in self.vary.items():
            if len(set(values)) < len(values):
                raise InputError(f"--vary {name.replace('_', '-')} names a value twice")

    @classmethod
    def of(
        cls,
        settings: dict[str, Any],
        vary: dict[str, list[Any]],
        seeds: int = 1,
        preset: str = DEFAULT,
        study: str | None = None,
    ) -> "Sweep":
        """A preset with some settings changed and others varied; or a study, changed in the same way.

        Runs are to stand side by side, so that each has one process unless `settings` says otherwise.
        """
        if study is not None:
            preset = STUDIES[study].preset
            own = {name: value for name, value in STUDIES[study].settings.items() if name not in vary}
            settings, vary = {**own, **settings}, {**STUDIES[study].vary, **vary}
        for name in vary.keys() & settings.keys():
            raise InputError(f"{name} is varied; leave out --{name.replace('_', '-')}")
        return cls(PRESETS[preset].with_settings({"processes": 1, **settings}), vary, seeds, study)

    def members(self) -> list[Member]:
        """Every run, in the order of the table; InputError where a combination of settings is refused."""
        first = self.base.training.seed
        axes = {**self.vary, **({"seed": range(first, first + self.seeds)} if self.seeds > 1 else {})}
        members = []
        given, usual = self.base.training.warmup_steps, PRESETS.get(self.base.preset, self.base).training.warmup_steps
        warmup = {} if given == usual else {"warmup_steps": given}  # what a user wants is not cut to fit a shorter run
        for combination in itertools.product(*axes.values()):
            settings = dict(zip(axes, combination))
            name = ",".join(f"{name.replace('_', '-')}={value}" for name, value in settings.items()) or "run"
            if len(name) > LONGEST_NAME or "/" in name:
                raise InputError(f"{shown(name)} cannot be the name of a folder; vary fewer settings at once")
            members.append(
                Member(name, {key: settings[key] for key in self.vary}, self.base.with_settings(warmup | settings))
            )
        return members

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "study": self.study,
            "vary": self.vary,
            "seeds": self.seeds,
            "base": json.loads(self.base.to_json()),
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        """Read what `to_json` wrote; InputError where the file is missing or something else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            return cls(RunConfig.from_json(json.dumps(content.pop("base"))), **content)
        except FileNotFoundError:
            raise InputError(
                f"{path.parent} is not a sweep folder: it has no {path.name}; give the folder that "
                "calcformer sweep wrote"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} cannot be used: {error}; start the sweep again with another --out") from None


def _value(name: str, text: str) -> Any:
    """One value of a setting as typed after --vary."""
    kind = KINDS[name]
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        if kind is not bool:
            return kind(text)
    except ValueError:
        pass
    expected = "true or false" if kind is bool else f"of type {kind.__name__}"
    raise InputError(f"{name} must be {expected}, got {shown(text)}")


def parse_vary(words: Sequence[str]) -> dict[str, list[Any]]:
    """Settings and their values from words such as learning-rate=1e-3,1e-4; InputError where a word is not one."""
    vary: dict[str, list[Any]] = {}
    for word in words:
        flag, _, values = word.partition("=")
        name = flag.replace("-", "_")
        if not values:
            raise InputError(
                f"--vary {shown(word)} is not of the form SETTING=VALUE,VALUE, such as learning-rate=1e-3,1e-4"
            )
        if name not in KINDS:
            raise InputError(f"there is no setting {shown(flag)} to vary; calcformer train --help lists them")
        if name in vary:
            raise InputError(f"--vary {flag} stands twice; give all its values to one")
        vary[name] = [_value(name, text) for text in values.split(",")]
    return vary

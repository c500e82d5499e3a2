"""Which runs a sweep trains: settings varied over a grid, or the study of a report with the report's own figures."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

from calcformer.config import DEFAULT, PRESETS, RunConfig
from calcformer.errors import InputError, shown
from calcformer.tasks import TASKS

__all__ = ["STUDIES", "SWEEP", "Member", "Sweep", "parse_vary"]

SWEEP, FORMAT = "sweep.json", 1  # the file of a sweep's folder
MOST_SEEDS, MOST_RUNS = 1000, 10_000
LONGEST_NAME = 200  # characters of a folder


STUDIES = {name: study for task in TASKS.values() for name, study in task.studies().items()}


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
            if name not in self.base.kinds or type(values) is not list or not values:
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
        seeds: int | None = None,
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
            seeds = seeds or STUDIES[study].seeds
        for name in vary.keys() & settings.keys():
            raise InputError(f"{name} is varied; leave out --{name.replace('_', '-')}")
        return cls(PRESETS[preset].with_settings({"processes": 1, **settings}), vary, seeds or 1, study)

    def members(self) -> list[Member]:
        """Every run, in the order of the table; InputError where a combination of settings is refused.

        Where kinds of model are compared, what one of them does not have is left out of its runs.
        """
        first = self.base.training.seed
        axes = {**self.vary, **({"seed": range(first, first + self.seeds)} if self.seeds > 1 else {})}
        members: dict[str, Member] = {}
        given, usual = self.base.training.warmup_steps, PRESETS.get(self.base.preset, self.base).training.warmup_steps
        warmup = {} if given == usual else {"warmup_steps": given}  # what a user wants is not cut to fit a shorter run
        for combination in itertools.product(*axes.values()):
            settings = dict(zip(axes, combination))
            if "model" in axes:
                known = self.base.with_settings({"model": settings["model"]}).kinds
                settings = {name: value for name, value in settings.items() if name in known}
            name = ",".join(f"{name.replace('_', '-')}={value}" for name, value in settings.items()) or "run"
            if len(name) > LONGEST_NAME or "/" in name:
                raise InputError(f"{shown(name)} cannot be the name of a folder; vary fewer settings at once")
            values = {key: settings[key] for key in self.vary if key in settings}
            if name not in members:
                members[name] = Member(name, values, self.base.with_settings(warmup | settings))
        return list(members.values())

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


def _value(name: str, kind: Any, text: str) -> Any:
    """One value of a setting of this type as typed after --vary."""
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


def parse_vary(words: Sequence[str], base: RunConfig) -> dict[str, list[Any]]:
    """Settings of `base` and their values, from words such as learning-rate=1e-3,1e-4; InputError where one is not."""
    vary: dict[str, list[Any]] = {}
    for word in words:
        flag, _, values = word.partition("=")
        name = flag.replace("-", "_")
        if not values:
            raise InputError(
                f"--vary {shown(word)} is not of the form SETTING=VALUE,VALUE, such as learning-rate=1e-3,1e-4"
            )
        if name not in base.kinds:
            task = base.data.task
            raise InputError(f"{task} has no setting {shown(flag)} to vary; calcformer train {task} --help lists them")
        if name in vary:
            raise InputError(f"--vary {flag} stands twice; give all its values to one")
        vary[name] = [_value(name, base.kinds[name], text) for text in values.split(",")]
    return vary

"""Which runs a sweep trains: settings varied over a grid, or the study of a report with the report's own figures."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin

from calcformer.config import DEFAULT, PRESETS, RunConfig
from calcformer.errors import InputError, shown
from calcformer.tasks import TASKS

__all__ = ["CASE", "STUDIES", "SWEEP", "Member", "Sweep", "parse_vary"]

SWEEP, FORMAT = "sweep.json", 1  # the file of a sweep's folder
CASE = "case"  # settings that go together, in a sweep beside those that are varied
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
    """A grid of runs: every combination of the varied values, each with `seeds` training seeds from the base's on.

    Args:
        cases: settings that go together, by a name; every one of them stands in every combination.
    """

    base: RunConfig
    vary: dict[str, list[Any]]
    seeds: int = 1
    study: str | None = None
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.seeds) is not int or not 1 <= self.seeds <= MOST_SEEDS:
            raise InputError(f"seeds must be 1 to {MOST_SEEDS}, got {shown(self.seeds)}")
        if self.study is not None and self.study not in STUDIES:
            raise InputError(f"there is no study {shown(self.study)}")
        for name, values in self.vary.items():
            if name not in self.base.kinds or type(values) is not list or not values:
                raise InputError(f"{shown(name)} cannot be varied over {shown(values)}")
        for name, settings in self.cases.items():
            if type(settings) is not dict or not settings.keys() <= self.base.kinds.keys():
                raise InputError(f"case {shown(name)} cannot have the settings {shown(settings)}")
        runs = self.seeds * math.prod(map(len, self.axes.values()))
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
        cases: dict[str, dict[str, Any]] = {}
        chosen, vary = vary.get(CASE), {name: values for name, values in vary.items() if name != CASE}
        if study is not None:
            preset = STUDIES[study].preset
            own = {name: value for name, value in STUDIES[study].settings.items() if name not in vary}
            for case, values in STUDIES[study].cases.items():  # what a user sets or varies is no longer the case's
                cases[case] = {name: value for name, value in values.items() if name not in {**vary, **settings}}
            settings, vary = {**own, **settings}, {**STUDIES[study].vary, **vary}
            seeds = seeds or STUDIES[study].seeds
        for case in chosen or ():
            if case not in cases:
                known = ", ".join(cases) or "none"
                raise InputError(f"there is no case {shown(case)} of {study or 'a sweep'} ({known}); give another")
        cases = {case: cases[case] for case in chosen or cases}
        for name in vary.keys() & settings.keys():
            raise InputError(f"{name} is varied; leave out --{name.replace('_', '-')}")
        base = PRESETS[preset].with_settings({"processes": 1, **settings})
        return cls(base, vary, seeds or 1, study, cases)

    @property
    def axes(self) -> dict[str, list[Any]]:
        """What is varied: the case, where there are some, and settings."""
        return {**({CASE: list(self.cases)} if self.cases else {}), **self.vary}

    def members(self) -> list[Member]:
        """Every run, in the order of the table; InputError where a combination of settings is refused.

        Where kinds of model are compared, what one of them does not have is left out of its runs.
        """
        first = self.base.training.seed
        axes = {**self.axes, **({"seed": range(first, first + self.seeds)} if self.seeds > 1 else {})}
        members: dict[str, Member] = {}
        given, usual = self.base.training.warmup_steps, PRESETS.get(self.base.preset, self.base).training.warmup_steps
        warmup = {} if given == usual else {"warmup_steps": given}  # what a user wants is not cut to fit a shorter run
        for combination in itertools.product(*axes.values()):
            values = dict(zip(axes, combination))
            if "model" in axes:
                known = {CASE, *self.base.with_settings({"model": values["model"]}).kinds}
                values = {name: value for name, value in values.items() if name in known}
            name = ",".join(f"{name.replace('_', '-')}={value}" for name, value in values.items()) or "run"
            if len(name) > LONGEST_NAME or "/" in name:
                raise InputError(f"{shown(name)} cannot be the name of a folder; vary fewer settings at once")
            if name not in members:
                settings = {**warmup, **self.cases.get(values.get(CASE, ""), {}), **values}
                settings.pop(CASE, None)
                own = {key: values[key] for key in self.axes if key in values}
                members[name] = Member(name, own, self.base.with_settings(settings))
        return list(members.values())

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "study": self.study,
            "vary": self.vary,
            "seeds": self.seeds,
            "cases": self.cases,
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
        kind = str if name == CASE else base.kinds.get(name)
        if kind is None:
            task = base.data.task
            raise InputError(f"{task} has no setting {shown(flag)} to vary; calcformer train {task} --help lists them")
        if name in vary:
            raise InputError(f"--vary {flag} stands twice; give all its values to one")
        vary[name] = [_value(name, kind, text) for text in values.split(",")]
    return vary

"""What `calcformer evaluate` measures: how many answers of a run are right, to which problems, the worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from calcformer.config import describe_figures
from calcformer.data import Examples
from calcformer.decoding import BATCH
from calcformer.errors import InputError, shown
from calcformer.runs.folder import MODEL
from calcformer.settings import kinds_of
from calcformer.solver import Solver
from calcformer.training import evaluate

__all__ = ["Mistake", "Tally", "evaluate_run", "find_mistakes", "report", "share", "wilson_interval"]

NORMAL_QUANTILE = 1.959963984540054  # leaves 2.5 % on each side
WORST = 10  # mistakes shown
HELD_OUT = "valid"  # the part that is measured while training


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """Between which shares of right answers the true one lies with 95 % confidence, if `right` of n drawn are right.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with p = right / n and z = 1.96: unlike
    p -+ z sqrt(p (1 - p) / n), of use also where all answers are right.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22.
    """
    if n == 0:
        return 0.0, 1.0
    p, square = right / n, NORMAL_QUANTILE**2 / n
    middle, half = p + square / 2, math.sqrt(p * (1 - p) * square + square**2 / 4)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


class Tally:
    """How many problems there were and how many were answered right, in all and in each member of a task's groups.

    In NumPy's arrays: a tensor would go from process to process as a file in shared memory.
    """

    def __init__(self) -> None:
        self.n = self.right = 0
        self.members: dict[str, Sequence[str]] = {}
        self.counts: dict[str, np.ndarray] = {}  # of each group: problems and right answers by member

    def add(self, groups: dict[str, tuple[Sequence[str], torch.Tensor]], right: torch.Tensor) -> None:
        """Count N problems, divided as `Task.groups` does, of which `right` (N,) bool were answered right."""
        self.n += len(right)
        self.right += int(right.sum())
        for group, (members, code) in groups.items():
            self.members[group] = members
            counts = [chosen.bincount(minlength=len(members)) for chosen in (code, code[right])]
            self.counts[group] = self.counts.get(group, 0) + torch.stack(counts).cpu().numpy()

    def merge(self, other: Tally) -> None:
        self.n += other.n
        self.right += other.right
        self.members |= other.members
        for group, counts in other.counts.items():
            self.counts[group] = self.counts.get(group, 0) + counts

    def groups(self, distinct: Tally | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """By group and member: the `share` of those problems, where there are any.

        Args:
            distinct: each of them once, where they are a sample.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for group, members in self.members.items():
            once = distinct.counts[group][0].tolist() if distinct else [None] * len(members)
            found[group] = {
                member: share(right, n, different)
                for member, n, right, different in zip(members, *self.counts[group].tolist(), once)
                if n
            }
        return found


def share(right: int, n: int, distinct: int | None = None) -> dict[str, Any]:
    """An entry of the result: n, wrong, exact_match, and an interval where the problems are a sample of all.

    Args:
        distinct: how many different ones the sample has. One that was drawn twice tells nothing new: the interval is
            as wide as if each had been drawn once.
    """
    entry = {"n": n, "wrong": n - right, "exact_match": right / n}
    if distinct is None:
        return entry
    return entry | {"distinct": distinct, "interval": list(wilson_interval(right / n * distinct, distinct))}


@dataclass(frozen=True)
class Mistake:
    """A problem, the answer said, the right one, and the probability the model gave to what it said."""

    problem: str
    said: str
    right: str
    probability: float

    def __str__(self) -> str:
        return f"{self.problem} = {self.right}, said {self.said!r} with probability {self.probability:.4f}"


def find_mistakes(solver: Solver, examples: Examples, said: torch.Tensor) -> Iterator[Mistake]:
    """The wrong ones of the answers `said` (N, ...) to N problems, in their order."""
    task = solver.task
    wrong = (~task.is_right(said, examples)).nonzero().squeeze(1)
    for start in range(0, len(wrong), BATCH):
        rows = wrong[start : start + BATCH]
        part = examples.select(rows)
        chances = task.log_probability(solver.model, part, said[rows]).exp()
        columns = (x.tolist() for x in (said[rows], part.labels, chances))
        for problem, words, right, chance in zip(task.questions(part), *columns):
            yield Mistake(problem, task.decode_answer(words), task.decode_answer(right), chance)


def worst(mistakes: Iterator[Mistake], count: int = WORST) -> list[Mistake]:
    """Those said with the highest probability, each problem once."""
    distinct = {mistake.problem: mistake for mistake in mistakes}
    return sorted(distinct.values(), key=lambda mistake: -mistake.probability)[:count]


def measure_hard(solver: Solver, beam: int = 1) -> dict[str, dict[str, Any]]:
    """Exact match on each of the task's sets of hard problems, and how many of them may have been in training."""
    found = {}
    for name, (examples, trained_on) in solver.task.hard_sets().items():
        examples = examples.to(solver.device)
        right = solver.task.is_right(solver.task.answer(solver.model, examples, beam), examples)
        found[name] = share(int(right.sum()), len(examples)) | {"trained_on": int(trained_on.sum())}
    return found


def distinct_rows(examples: Examples) -> torch.Tensor:
    """The place of one of each of the problems that differ from each other."""
    known = examples.inputs[0] if examples.problem is None else examples.problem
    _, number = known.unique(dim=0, return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(number), device=number.device)
    return first.scatter_reduce(0, number, torch.arange(len(number), device=number.device), "amin")


def measure_answers(solver: Solver, examples: Examples, beam: int, part: str) -> dict[str, Any]:
    """What `evaluate_run` says of the answers that a run gives by itself."""
    task = solver.task
    with tqdm(total=len(examples), unit="ex", unit_scale=True, disable=None, delay=2, leave=False) as bar:
        said = task.answer(solver.model, examples, beam, advance=bar.update)
    if task.translates:
        facts = task.describe_answers(said, examples, solver.folder, part)
        return {**task.answer_figures(said, examples), **facts, "beam": beam, "length_penalty": task.length_penalty}
    tally, once = Tally(), Tally()
    right, groups = task.is_right(said, examples), task.groups(examples)
    tally.add(groups, right)
    rows = distinct_rows(examples)
    once.add({group: (members, code[rows]) for group, (members, code) in groups.items()}, right[rows])
    return {
        **task.answer_figures(said, examples),
        **share(tally.right, tally.n, once.n),
        "beam": beam,
        "groups": tally.groups(once),
        "hard": measure_hard(solver, beam),
        "mistakes": [vars(mistake) for mistake in worst(find_mistakes(solver, examples, said))],
    }


def choose_part(solver: Solver, part: str | None, problems: int | None) -> tuple[Examples, str]:
    """What is measured, and its name: one of the task's tests, "valid" for what is held out; None for the first."""
    data, task = solver.config.data, solver.task
    if part not in (None, HELD_OUT, *task.tests):
        known = " or ".join((*task.tests, HELD_OUT))
        raise InputError(f"{solver.folder} has no part {shown(part)} to measure; give --part {known}")
    if problems is not None and "valid_size" not in kinds_of(data):
        raise InputError(f"{data.task} is measured on {data.measured}, all of them; leave out --problems")
    if problems is not None and part in task.tests:
        raise InputError(f"--problems is of what is held out, and --part {part} is a test; leave one of them out")
    part = part or (HELD_OUT if problems is not None or not task.tests else task.tests[0])
    if part == HELD_OUT:
        task = task if problems is None else replace(data, valid_size=problems).restore(solver.folder)
        return task.split()[1], part
    return task.test(part), part


def evaluate_run(solver: Solver, beam: int = 1, problems: int | None = None, part: str | None = None) -> dict[str, Any]:
    """Everything measured on the held-out problems of a run, and on hard ones, ready for JSON.

    Args:
        beam: width of the search for answers; 1 decodes greedily.
        problems: held-out problems drawn; None for as many as the run was validated with.
        part: what is measured, one of the task's tests, or "valid"; None for the first test where there is one.

    Returns:
        n, token_accuracy, loss and the other figures of the task; part, epoch, preset, checkpoint; where its problems
        have answers, also distinct, wrong, exact_match, interval, groups, hard, mistakes, beam; or of translations
        bleu, chrf, signature, worst, best, file, beam, length_penalty.
    """
    data = solver.config.data
    if beam != 1 and not solver.task.has_answers:
        raise InputError(f"{data.task} is measured without answers that a beam could search for; leave out --beam")
    task = solver.task
    chosen, part = choose_part(solver, part, problems)
    examples = chosen.to(solver.device)
    score = evaluate(solver.model, examples, task.ignored_label, task.measured_at_once)
    if not math.isfinite(score.loss):
        raise InputError(
            f"{solver.folder}: its weights are so large that its loss is no number; "
            "train the run again or give another one"
        )
    figures = score.figures | task.text_figures(score.loss)
    return {
        "n": len(examples),
        "part": part,
        **{name.removeprefix("valid_"): value for name, value in figures.items() if name in data.figures},
        "epoch": solver.epoch,
        "preset": solver.config.preset,
        "checkpoint": str(solver.folder / MODEL),
        **(measure_answers(solver, examples, beam, part) if task.has_answers else {}),
    }


def table_row(label: str, entry: dict[str, Any]) -> str:
    """A line of the table: an entry made by `share`."""
    interval = "  {:.4f} - {:.4f}".format(*entry["interval"]) if "interval" in entry else ""
    return f"{label:<28} {entry['n']:>9} {entry['wrong']:>9}  {entry['exact_match']:11.6f}{interval}"


def group_rows(groups: dict[str, dict[str, dict[str, Any]]], labels: dict[str, str]) -> list[str]:
    """The lines of a table for the groups of a Tally."""
    return [
        table_row("  " + labels.get(group, f"{group} {{}}").format(member), entry)
        for group, members in groups.items()
        for member, entry in members.items()
    ]


def report(solver: Solver, result: dict[str, Any]) -> str:
    """What `evaluate_run` returned, with that of `evaluate_all` as its "exhaustive", as text to be read."""
    data, labels = solver.config.data, solver.task.group_labels
    how = "" if result.get("beam", 1) == 1 else f" with a beam of {result['beam']}"
    found = {name: result[name.removeprefix("valid_")] for name in data.figures}
    held_out = data.measured.removeprefix("the ")
    what = held_out if result["part"] == HELD_OUT else f"{data.noun} of {result['part']}"
    figures = describe_figures(found, solver.config)
    lines = [f"{solver.folder}, epoch {result['epoch']}, {result['n']} {what}{how}: {figures}"]
    if solver.task.translates:
        return "\n".join([*lines, *solver.task.report_answers(result)])
    if not solver.task.has_answers:
        return lines[0]
    lines += [
        "",
        f"{'':<28} {'problems':>9} {'wrong':>9}  exact match  95 % interval",
        table_row("held out", result),
        *group_rows(result["groups"], labels),
    ]
    if result["distinct"] < result["n"]:
        lines.append(
            f"  ({result['distinct']} of the {result['n']} held-out problems differ from each other; the "
            "intervals are those of so many)"
        )
    if "exhaustive" in result:
        every = result["exhaustive"]
        lines += [table_row("all not trained on", every), *group_rows(every["groups"], labels)]
    if result["hard"]:
        lines += [f"hard {data.noun}", *(table_row(f"  {name}", entry) for name, entry in result["hard"].items())]
        trained_on = sum(entry["trained_on"] for entry in result["hard"].values())
        if trained_on:
            lines.append(f"  ({trained_on} of the hard {data.noun} may have been in training)")
    if result["mistakes"]:
        lines += ["", "held-out mistakes said with the highest probability"]
        lines += [f"  {Mistake(**mistake)}" for mistake in result["mistakes"]]
    if "exhaustive" in result:
        lines += ["", f"mistakes among all problems not trained on: {result['exhaustive']['mistakes_file']}"]
    return "\n".join(lines)

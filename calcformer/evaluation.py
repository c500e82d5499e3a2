"""What `calcformer evaluate` measures: how many answers of a run are right, to which problems, the worst mistakes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from calcformer.build import build_task
from calcformer.data import Examples, FormulaForm, FormulaTask, Task
from calcformer.decoding import BATCH, decode, log_probability
from calcformer.errors import InputError
from calcformer.hard_problems import hard_problems
from calcformer.runs.checkpoint import MODEL
from calcformer.solver import Solver
from calcformer.training import evaluate

__all__ = [
    "Mistake",
    "Tally",
    "answer",
    "evaluate_run",
    "find_mistakes",
    "held_out_operands",
    "is_right",
    "report",
    "share",
    "wilson_interval",
]

NORMAL_QUANTILE = 1.959963984540054  # leaves 2.5 % on each side
WORST = 10  # mistakes shown
WORDS = {"POSITIVE": "", "NEGATIVE": "-", "add": "+", "subtract": "-"}
GROUPS = {  # what problems are divided by
    "digits": tuple(map(str, range(1, 14))),
    "result": ("negative", "zero", "positive"),
    "operation": ("subtraction", "addition"),
}


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


def group_codes(a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where problems stand in each of GROUPS: (N,) int64 each.

    Args:
        a, b: (N,) int64, the operands; the longer one decides the number of digits.
        plus: (N,) bool, True = a+b, False = a-b.
    """
    powers = 10 ** torch.arange(1, len(GROUPS["digits"]), device=a.device)
    longest = torch.maximum(a.abs(), b.abs())
    return {
        "digits": torch.bucketize(longest, powers, right=True),
        "result": torch.where(plus, a + b, a - b).sign() + 1,
        "operation": plus.long(),
    }


class Tally:
    """How many problems there were and how many were answered right, in each of GROUPS.

    In NumPy's arrays: a tensor would go from process to process as a file in shared memory.
    """

    def __init__(self) -> None:
        self.counts = {group: np.zeros((2, len(members)), dtype=np.int64) for group, members in GROUPS.items()}

    def add(self, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], right: torch.Tensor) -> None:
        """Count N problems, a, b and plus as for `group_codes`, of which `right` (N,) bool were answered right."""
        for group, code in group_codes(*operands).items():
            counts = [chosen.bincount(minlength=len(GROUPS[group])) for chosen in (code, code[right])]
            self.counts[group] += torch.stack(counts).cpu().numpy()

    def merge(self, other: Tally) -> None:
        for group, counts in other.counts.items():
            self.counts[group] += counts

    @property
    def n(self) -> int:
        return int(self.counts["operation"][0].sum())

    @property
    def right(self) -> int:
        return int(self.counts["operation"][1].sum())

    def groups(self, distinct: Tally | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """By group and member: the `share` of those problems, where there are any.

        Args:
            distinct: each of them once, where they are a sample.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for group, members in GROUPS.items():
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


def held_out_operands(task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The held-out problems of task.split(), in its order: a, b (N,) int64 and plus (N,) bool."""
    if isinstance(task, FormulaTask):  # written so that nothing is cut off
        task = replace(task, form=FormulaForm(task.form.complexity, task.form.signed))
    problems = []
    for ids in task.split()[1].source.tolist():
        text = "".join(WORDS.get(token, token) for token in task.vocabulary.decode_until_eos(ids))
        match = re.fullmatch(r"(-?\d+)([+-])(-?\d+)", text)
        assert match is not None, text
        problems.append((int(match[1]), int(match[3]), match[2] == "+"))
    a, b, plus = torch.tensor(problems).unbind(dim=1)
    return a, b, plus.bool()


def answer(
    solver: Solver, examples: Examples, beam: int = 1, advance: Callable[[int], object] = lambda count: None
) -> torch.Tensor:
    """What the model says to each problem, (N, T - 1) int64, shaped as the labels; `advance` as for `decode`."""
    return decode(
        solver.model, examples.source, examples.labels.shape[1], solver.task.vocabulary, beam, advance=advance
    )


def is_right(said: torch.Tensor, examples: Examples) -> torch.Tensor:
    """(N,) bool, whether the whole answer is right, end token included."""
    return (said == examples.labels).all(dim=1)


def find_mistakes(
    solver: Solver, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor], examples: Examples, said: torch.Tensor
) -> Iterator[Mistake]:
    """The wrong ones of the answers `said` (N, T - 1) to N problems, in their order."""
    task = solver.task
    wrong = (~is_right(said, examples)).nonzero().squeeze(1)
    for start in range(0, len(wrong), BATCH):
        rows = wrong[start : start + BATCH]
        part = examples.select(rows)
        log_p = log_probability(solver.model, part.source, said[rows], task.vocabulary)
        columns = (*(x[rows.to(x.device)] for x in operands), said[rows], part.labels, log_p.exp())
        for a, b, plus, words, right, probability in zip(*(x.tolist() for x in columns)):
            yield Mistake(task.question(a, b, plus), task.decode_answer(words), task.decode_answer(right), probability)


def worst(mistakes: Iterator[Mistake], count: int = WORST) -> list[Mistake]:
    """Those said with the highest probability, each problem once."""
    distinct = {mistake.problem: mistake for mistake in mistakes}
    return sorted(distinct.values(), key=lambda mistake: -mistake.probability)[:count]


def measure_hard(solver: Solver, beam: int = 1) -> dict[str, dict[str, Any]]:
    """Exact match on each set of hard formulas, and how many of them may have been in training; none of expressions."""
    task, found = solver.task, {}
    if isinstance(task, FormulaTask):
        for name, problems in hard_problems(task.form.complexity, task.form.signed).items():
            a, b, plus = torch.tensor(problems, device=solver.device).unbind(dim=1)
            examples = task.form.encode(a, b, plus.bool())
            right = is_right(answer(solver, examples, beam), examples)
            trained_on = task.trained_on(task.form.index(a, b, plus))
            found[name] = share(int(right.sum()), len(problems)) | {"trained_on": int(trained_on.sum())}
    return found


def evaluate_run(solver: Solver, beam: int = 1, problems: int | None = None) -> dict[str, Any]:
    """Everything measured on the held-out problems of a run, and on hard ones, ready for JSON.

    Args:
        beam: width of the search for answers; 1 decodes greedily.
        problems: held-out problems drawn; None for as many as the run was validated with.

    Returns:
        n, distinct, wrong, exact_match, interval, token_accuracy, loss; groups, hard, mistakes; epoch, preset,
        checkpoint, beam.
    """
    task = solver.task if problems is None else build_task(replace(solver.config.data, valid_size=problems))
    examples, operands = task.split()[1].to(solver.device), held_out_operands(task)
    score = evaluate(solver.model, examples, task.vocabulary.pad_id)
    if not math.isfinite(score.loss):
        raise InputError(
            f"{solver.folder}: its weights are so large that its loss is no number; "
            "train the run again or give another one"
        )
    with tqdm(total=len(examples), unit="ex", unit_scale=True, disable=None, delay=2, leave=False) as bar:
        said = answer(solver, examples, beam, bar.update)
    tally, once = Tally(), Tally()
    right = is_right(said, examples).cpu()
    tally.add(operands, right)
    a, b, plus = torch.stack(operands, dim=1).unique(dim=0).unbind(dim=1)
    once.add((a, b, plus.bool()), torch.zeros_like(a, dtype=torch.bool))
    return {
        **share(tally.right, tally.n, once.n),
        "token_accuracy": score.token_accuracy,
        "loss": score.loss,
        "epoch": solver.epoch,
        "preset": solver.config.preset,
        "checkpoint": str(solver.folder / MODEL),
        "beam": beam,
        "groups": tally.groups(once),
        "hard": measure_hard(solver, beam),
        "mistakes": [vars(mistake) for mistake in worst(find_mistakes(solver, operands, examples, said))],
    }


def table_row(label: str, entry: dict[str, Any]) -> str:
    """A line of the table: an entry made by `share`."""
    interval = "  {:.4f} - {:.4f}".format(*entry["interval"]) if "interval" in entry else ""
    return f"{label:<28} {entry['n']:>9} {entry['wrong']:>9}  {entry['exact_match']:11.6f}{interval}"


def group_rows(groups: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The lines of a table for the groups of a Tally."""
    labels = {"digits": "digits of an operand: {}", "result": "{} result", "operation": "{}"}
    return [
        table_row(f"  {labels[group].format(member)}", entry)
        for group, members in groups.items()
        for member, entry in members.items()
    ]


def report(solver: Solver, result: dict[str, Any]) -> str:
    """What `evaluate_run` returned, with that of `evaluate_all` as its "exhaustive", as text to be read."""
    how = "" if result["beam"] == 1 else f" with a beam of {result['beam']}"
    lines = [
        f"{solver.folder}, epoch {result['epoch']}, {result['n']} held-out problems: "
        f"exact match {result['exact_match']:.4f}{how}, token accuracy {result['token_accuracy']:.4f}, "
        f"loss {result['loss']:.4f}",
        "",
        f"{'':<28} {'problems':>9} {'wrong':>9}  exact match  95 % interval",
        table_row("held out", result),
        *group_rows(result["groups"]),
    ]
    if result["distinct"] < result["n"]:
        lines.append(
            f"  ({result['distinct']} of the {result['n']} held-out problems differ from each other; the "
            "intervals are those of so many)"
        )
    if "exhaustive" in result:
        lines += [table_row("all not trained on", result["exhaustive"]), *group_rows(result["exhaustive"]["groups"])]
    if result["hard"]:
        lines += ["hard formulas", *(table_row(f"  {name}", entry) for name, entry in result["hard"].items())]
        trained_on = sum(entry["trained_on"] for entry in result["hard"].values())
        if trained_on:
            lines.append(f"  ({trained_on} of the hard formulas may have been in training)")
    if result["mistakes"]:
        lines += ["", "held-out mistakes said with the highest probability"]
        lines += [f"  {Mistake(**mistake)}" for mistake in result["mistakes"]]
    if "exhaustive" in result:
        lines += ["", f"mistakes among all problems not trained on: {result['exhaustive']['mistakes_file']}"]
    return "\n".join(lines)

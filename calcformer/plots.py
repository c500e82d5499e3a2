"""Pictures of runs, where matplotlib is installed."""

import importlib.util
import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calcformer.runs.files import write_atomically
from calcformer.settings import TaskSettings, is_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "can_draw", "save_curve", "save_heads", "save_losses", "save_panels", "visible"]

# What metrics.jsonl has beside figures.
NO_FIGURES = {"epoch", "learning_rate", "seconds", "examples_per_second"}
PERCENTAGES = {"bleu": "BLEU", "chrf": "chrF"}  # figures of 0..100
LIMIT: dict[str, Any] = {"color": "black", "linestyle": ":"}  # what nothing can surpass
WIDEST_HEADS = 16  # inches of a row of heads, 1,920 pixels: what a screen shows


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> "Figure | None":
    """An empty figure, in inches, which no window shows; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: "Figure", title: str) -> None:
    """A title of any characters and length: what looks like a formula to matplotlib is none, lines end at the edge."""
    width = max(1, int(figure.get_figwidth() / 0.11))  # characters
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, width) or [""]]
    figure.set_figheight(figure.get_figheight() + 0.2 * (len(lines) - 1 - title.count("\n")))
    figure.suptitle("\n".join(lines).encode("utf-8", "replace").decode(), parse_math=False)


def _save(figure: "Figure", path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # its box is drawn
        figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _limit_percentages(axes: "Axes") -> None:
    """An axis from 0 on for figures of 0 to 100, which ends where they end."""
    axes.set_ylim(0, min(103, axes.get_ylim()[1]))


def _label_loss(axes: "Axes") -> None:
    """A logarithmic axis with plain numbers: at 1, 2 and 5 of each power of ten, where it is long at the powers."""
    from matplotlib.ticker import LogLocator

    if axes.has_data() and axes.dataLim.y1 <= 0:  # of losses that are all 0 there is no logarithm
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 5 * low else "")
    axes.grid(alpha=0.15, which="minor", axis="y")


def save_curve(entries: list[dict[str, Any]], title: str, path: Path, data: TaskSettings | None = None) -> bool:
    """Draw loss and accuracy by epoch to a PNG; returns False where matplotlib is not installed.

    Args:
        entries: the lines of metrics.jsonl.
        data: which figures the best possible are drawn of, and whether anything is held out.
    """
    figure = _figure(10, 4.3)
    if figure is None:
        return False
    from matplotlib.ticker import MaxNLocator

    _title(figure, title)
    panels = {
        "loss": {"loss": "training", "valid_loss": "held out"},
        "accuracy": {
            "token_accuracy": "tokens, training",
            "valid_token_accuracy": "tokens, held out",
            "exact_match": "whole answers, held out",
        },
    }
    best = data.best_possible if data else {}
    if data and not data.holds_out:  # nothing is held out
        panels["loss"]["valid_loss"], panels["accuracy"]["valid_token_accuracy"] = "after the epoch", "after the epoch"
    others = {name for entry in entries for name in entry if not is_loss(name)} - NO_FIGURES
    wide = {name: label for name, label in PERCENTAGES.items() if name in others}  # by epoch, not shares of 1
    others = {name for name in others if not name.endswith(tuple(PERCENTAGES))}
    panels["accuracy"] |= {name: name.replace("_", " ") for name in sorted(others - panels["accuracy"].keys())}
    if wide:
        panels[" and ".join(wide.values())] = {name: f"{label}, held out" for name, label in wide.items()}
        figure.set_figwidth(15)
    for axes, (panel, names) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name, label in names.items():
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            if points:
                axes.plot(*zip(*points), label=label, marker="." if len(points) < 20 else None)
            if name in best and (best[name] or panel != "loss"):  # a logarithmic axis has no 0
                axes.axhline(best[name], label="best possible", **LIMIT)
        axes.set(title=panel, xlabel="epoch")
        if entries[-1]["epoch"] == entries[0]["epoch"]:
            axes.set_xlim(0, 2 * entries[0]["epoch"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if panel == "loss":
            _label_loss(axes)
        if panel not in ("loss", "accuracy"):
            _limit_percentages(axes)
        if axes.lines:
            axes.legend()
    _save(figure, path)
    return True


@dataclass(frozen=True)
class Line:
    """Points (x, y, spread around y) to draw; `reported` are another's figures, not ours, `limit` the best possible."""

    label: str
    points: Sequence[tuple[float, float, float]]
    color: str
    reported: bool = False
    limit: bool = False


def save_panels(
    panels: dict[str, list[Line]],
    xlabel: str,
    title: str,
    path: Path,
    ticks: Sequence[float] = (),
    best: float | None = None,
) -> bool:
    """Draw a panel for each figure of merit to a PNG; returns False where matplotlib is not installed.

    Args:
        panels: the lines of each panel by its title. A loss gets a logarithmic axis; BLEU and chrF lie in 0..100,
            anything else in 0..1.
        ticks: the values of x that were tried, in order, to be named at the axis, which is logarithmic where they are
            far apart; none for epochs.
        best: the value of x to be marked.
    """
    columns = 3 if len(panels) == 6 else 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(5.5 * columns, 0.8 + 3.4 * rows)
    if figure is None:
        return False
    from matplotlib.ticker import MaxNLocator, NullLocator

    _title(figure, title)
    handles: dict[str, Any] = {}
    epochs = {x for lines in panels.values() for line in lines for x, _, _ in line.points}
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, (name, lines) in zip(grid.flat, panels.items()):
        for line in filter(lambda line: line.points, lines):
            x, y, spread = zip(*line.points)
            style: dict[str, Any] = {"marker": "." if len(x) < 20 else None}
            if line.reported:
                style = {"marker": "x", "markersize": 8, "markeredgewidth": 2, "linestyle": "--", "zorder": 3}
            if line.limit:
                style = LIMIT
            (handles[line.label],) = axes.plot(x, y, **{"color": line.color, **style})
            if any(spread):
                low, high = ([value + sign * width for value, width in zip(y, spread)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=handles[line.label].get_color(), alpha=0.2, linewidth=0)
        axes.set(title=name, xlabel=xlabel)
        if ticks:
            axes.set_xscale("log" if 0 < 100 * ticks[0] <= ticks[-1] else "linear")
            axes.set_xticks(ticks, [f"{value:g}" for value in ticks], rotation=45 if len(ticks) > 6 else 0)
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(epochs) == 1:  # around which an axis would have fractions
                axes.set_xlim(0, 2 * max(epochs))
        if best is not None:
            handles["best"] = axes.axvline(best, color="0.6", linestyle=":", zorder=0)
        axes.tick_params(labelbottom=True)
        if is_loss(name):
            _label_loss(axes)
        elif name in PERCENTAGES.values():
            _limit_percentages(axes)
        elif all(y <= 1 for line in lines for _, y, _ in line.points):  # shares
            axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    fitting = int(figure.get_figwidth() / (0.8 + 0.08 * max(map(len, handles), default=0)))  # inches: line, characters
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(1, min(4, fitting)))
    _save(figure, path)
    return True


def save_losses(
    panels: dict[str, dict[str, tuple[list[float], list[float]]]], xlabel: str, title: str, path: Path
) -> bool:
    """Draw a panel of curves by title, each curve's x and y by its name, to a PNG; False without matplotlib."""
    figure = _figure(10, 4.3)
    if figure is None:
        return False
    _title(figure, title)
    for axes, (name, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
        for label, (x, y) in curves.items():
            axes.plot(x, y, label=label)
        axes.set(title=name, xlabel=xlabel)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, path)
    return True


def visible(token: str) -> str:
    """What stands for a token at an axis, where a space and a line's end would not be seen."""
    return token.replace("\n", "\u21b5") if token.strip(" ") else token.replace(" ", "\u2423")


def save_heads(
    weights: list[list[list[float]]],
    queries: Sequence[str],
    keys: Sequence[str],
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> bool:
    """Draw the attention weights of a layer to a PNG, a panel a head; returns False where matplotlib is not installed.

    Args:
        weights: H matrices, a row for each of the L queries and a column for each of the S keys; rows sum to 1.
        queries, keys: what stands at the rows and at the columns.
        labels: what the queries and the keys are.
    """
    queries, keys = ([visible(token) for token in tokens] for tokens in (queries, keys))
    # A cell has room for a digit, the axes for their longest word, which keys have upright.
    cell, word = 0.32, 0.085
    panel_width = max(cell * len(keys), 1.6) + word * max(map(len, queries)) + 0.6
    panel_height = max(cell * len(queries), 1.2) + word * max(map(len, keys)) + 0.9
    columns = max(1, min(len(weights), 4, int(WIDEST_HEADS / panel_width)))
    rows = math.ceil(len(weights) / columns)
    columns = math.ceil(len(weights) / rows)  # of eight, six to a row would leave two below
    figure = _figure(panel_width * columns + 0.9, panel_height * rows + 0.7)
    if figure is None:
        return False
    figure.set_layout_engine("compressed")  # for panels of square cells; otherwise names may lie outside the picture
    _title(figure, title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, (axes, head) in enumerate(zip(panels, weights), start=1):
        image = axes.imshow(head, vmin=0, vmax=1, cmap="Blues")
        axes.set_title(f"head {number}", fontsize="medium")
        axes.set_xticks(range(len(keys)), keys, parse_math=False)
        for label in axes.get_xticklabels():
            label.set_rotation(90 if len(label.get_text()) > 1 else 0)
        axes.set_yticks(range(len(queries)), queries, parse_math=False)
        axes.set(ylabel=labels[0], xlabel=labels[1])
    for axes in panels[len(weights) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels, label="attention weight", fraction=0.05, aspect=30)
    _save(figure, path)
    return True

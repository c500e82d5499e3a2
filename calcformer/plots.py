"""Pictures of a run, where matplotlib is installed."""

from pathlib import Path
from typing import Any

__all__ = ["save_curve"]


def save_curve(entries: list[dict[str, Any]], path: Path) -> bool:
    """Draw loss and accuracy by epoch to a PNG; returns False where matplotlib is not installed.

    Args:
        entries: the lines of metrics.jsonl.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"loss": ("loss", "valid_loss"),
              "accuracy": ("token_accuracy", "valid_token_accuracy", "exact_match")}
    for axes, (title, names) in zip(figure.subplots(1, 2), panels.items()):
        for name in names:
            points = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
            if points:
                axes.plot(*zip(*points), label=name.replace("_", " "), marker="." if len(points) < 20 else None)
        axes.set(title=title, xlabel="epoch", yscale="log" if title == "loss" else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True

"""Whether a file is a picture that shows something, and all of it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def is_picture(path: Path) -> bool:
    """Whether a file is an image with something on it; skips the test where matplotlib is not installed."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    pixels = imread(path)
    return bool(pixels.shape[0] > 100 and pixels.shape[1] > 100 and pixels[..., :3].std() > 0.02)


def cut_off(figure: "Figure") -> list[str]:
    """What reaches beyond a figure's edge or over a neighbour: the titles of such panels, and `title` for its own."""
    figure.canvas.draw()
    boxes = {axes.get_title() or "colorbar": axes.get_tightbbox() for axes in figure.axes}
    if figure.get_suptitle():
        boxes["title"] = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    edge = figure.bbox.padded(1)
    return [
        name
        for name, box in boxes.items()
        if not (edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1)
        or any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes.values() if other is not box)
    ]

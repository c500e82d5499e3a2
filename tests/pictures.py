"""Whether a file is a picture that shows something."""

from pathlib import Path

import pytest


def is_picture(path: Path) -> bool:
    """Whether a file is an image with something on it; skips the test where matplotlib is not installed."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    pixels = imread(path)
    return bool(pixels.shape[0] > 100 and pixels.shape[1] > 100 and pixels[..., :3].std() > 0.02)

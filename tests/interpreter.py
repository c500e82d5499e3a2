"""What Triton's interpreter needs to compute as a GPU does."""

from __future__ import annotations

import numpy as np
import torch


def round_bfloat16_to_nearest() -> None:
    """Make it round float32 to bfloat16 to the nearest, as GPUs do; by itself it cuts off bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(x: np.ndarray, source: object, target: object, rounding_mode: object) -> np.ndarray:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, rounding_mode)
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = to_nearest

"""The plain definitions that the kernels are tested against, and the text to read first."""

from kernels.attention.reference import (
    scaled_dot_product_no_loop_batch,
    scaled_dot_product_two_loop_batch,
    scaled_dot_product_two_loop_single,
)
from kernels.layer_norm.reference import layer_norm_no_loop, layer_norm_two_loop, rms_norm_no_loop, rms_norm_two_loop

__all__ = [
    "layer_norm_no_loop",
    "layer_norm_two_loop",
    "rms_norm_no_loop",
    "rms_norm_two_loop",
    "scaled_dot_product_no_loop_batch",
    "scaled_dot_product_two_loop_batch",
    "scaled_dot_product_two_loop_single",
]

"""Fused scaled-dot-product attention and layer norm for PyTorch, written in Triton."""

__distribution__ = "calcformer"  # before all else: kernels/ours.py looks for it
__version__ = "0.1.0"

from kernels import nn, reference
from kernels.attention.api import AttentionResult, scaled_dot_product_attention
from kernels.attention.explanation import explain
from kernels.attention.varlen import varlen_attention
from kernels.layer_norm.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.replace import Report, fuse, unfuse

__all__ = [
    "AttentionResult",
    "Report",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "explain",
    "fuse",
    "layer_norm",
    "nn",
    "reference",
    "rms_norm",
    "scaled_dot_product_attention",
    "unfuse",
    "varlen_attention",
]

"""Fused scaled-dot-product attention and layer norm for PyTorch, written in Triton."""

from kernels.attention.api import scaled_dot_product_attention
from kernels.layer_norm.api import layer_norm

__version__ = "0.1.0"
__all__ = ["__version__", "layer_norm", "scaled_dot_product_attention"]

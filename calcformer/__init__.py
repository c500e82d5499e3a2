"""A transformer that learns to calculate, built on the attention and the layer norm of `kernels`."""

__version__ = "0.1.0"

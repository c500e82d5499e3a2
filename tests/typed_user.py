"""What a user's checker must see: run by tests/test_types.py, never imported."""

import torch
from typing_extensions import assert_type

import kernels

x = torch.ones(2, 2, 5, 8)
flag = bool(x.sum() > 0)
assert_type(kernels.scaled_dot_product_attention(x, x, x, is_causal=True, window=(3, 0)), torch.Tensor)
result = kernels.scaled_dot_product_attention(x, x, x, return_lse=True)
assert_type(result, kernels.AttentionResult)
assert_type(kernels.scaled_dot_product_attention(x, x, x, need_weights=True, softcap=3.0), kernels.AttentionResult)
assert_type(kernels.scaled_dot_product_attention(x, x, x, need_weights=flag), torch.Tensor | kernels.AttentionResult)
assert_type(kernels.layer_norm(x, 8), torch.Tensor)
assert_type(kernels.rms_norm(x, [8], eps=1e-6), torch.Tensor)
assert_type(kernels.add_layer_norm(x, x), torch.Tensor)
assert_type(kernels.add_layer_norm(x, x, prenorm=True), tuple[torch.Tensor, torch.Tensor])
assert_type(kernels.add_rms_norm(x, x, prenorm=True), tuple[torch.Tensor, torch.Tensor])
assert_type(kernels.explain(x, x, x, window=(1, 1)).kernel, str)
kernels.scaled_dot_product_attention(x, x, x, windw=(3, 0))  # wrong: there is no such argument
kernels.layer_norm(x, "8")  # wrong: not a shape

"""`torch.nn.MultiheadAttention` on this package's attention."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn.functional import linear, pad

from kernels.attention.api import scaled_dot_product_attention
from kernels.attention.call import Call
from kernels.attention.checks import NUMBERS, _is_integer, _shapes, check_options
from kernels.attention.formula import allowed_pairs
from kernels.backend import as_number, autocasts, check_tensor_types, shown

__all__ = ["MultiheadAttention"]

Window = tuple[int | None, int | None] | None


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` computed by `kernels.scaled_dot_product_attention`.

        output = concat over heads(attention(query W_q, key W_k, value W_v)) W_out, each product with its bias

    Same arguments, parameters, state_dict and results, but for these: a query that may attend to no key gives the bias
    of `out_proj`, not NaN; the weights returned are those before dropout; nested tensors are refused. An instance of
    PyTorch's class becomes one of this by `module.__class__ = kernels.nn.MultiheadAttention`.

    Args:
        window: (left, right), how many keys before and after its own place a query may attend to, None for all. What
            `add_bias_kv` and `add_zero_attn` add has no place, and is never cut off.
        softcap: scores become softcap * tanh(score / softcap), before the masks.
        All others: as PyTorch has them.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """

    window: Window = None  # of the class, since an instance of PyTorch's that becomes ours has none of its own
    softcap: float | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        window: Window = None,
        softcap: float | None = None,
    ) -> None:
        check_options(torch.empty(0, device="cpu"), torch.Size(), 0, window=window, softcap=softcap)
        for name, x in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if not _is_integer(as_number(x)) or x < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, found {shown(x)}")
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, found {embed_dim} and {num_heads}; change one of them"
            )
        if not isinstance(as_number(dropout), NUMBERS) or not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is a probability from 0 to 1, found {shown(dropout)}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.window, self.softcap = window, softcap

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What PyTorch's constructor asks before it makes the weights. From then on False, whatever the sizes: where it
        is True, an encoder layer at inference attends by itself, past this module.
        """
        return not self._parameters and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value  # what PyTorch's class finds, if the instance becomes one again

    def _reset_parameters(self) -> None:
        """As PyTorch's, which asks `_qkv_same_embed_dim` what weights there are."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                torch.nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                torch.nn.init.zeros_(bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                torch.nn.init.xavier_normal_(row)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend. Letters: B batch, H heads, L queries, S keys, D `embed_dim`.

        Args:
            query: (L, B, D); with `batch_first` (B, L, D); or (L, D).
            key, value: (S, B, kdim) and (S, B, vdim), likewise.
            key_padding_mask: (B, S), or (S,) beside a query (L, D). bool: True = may not attend, the opposite of
                `kernels.scaled_dot_product_attention`. Floating point: added to the scores, differentiable.
            need_weights: return the weights too, an L x S matrix a head.
            attn_mask: (L, S) or (B * H, L, S), bool or floating point as the other.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: a hint that `attn_mask`, which must be given, is the causal one. It is then not looked at, unless
                weights are returned or keys added (`add_bias_kv`, `add_zero_attn`).

        Returns:
            output: shape of the query.
            weights: (B, L, S), by head (B, H, L, S), without B beside a query (L, D); S with the keys that are added.
                Before dropout. None unless `need_weights`.

        Raises:
            TypeError: a tensor is nested, or the dtype of a mask does not fit.
            ValueError: shapes or devices do not fit, or `is_causal` comes without a mask.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        q, k, v = self._projections(query, key, value)
        is_single, rows_first = query.ndim == 2, query.ndim == 3 and not self.batch_first
        if is_single:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif rows_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        n_queries, n_keys = q.shape[1], k.shape[1]
        k, v = self._with_added(k, self.bias_k), self._with_added(v, self.bias_v)
        n_added = k.shape[1] - n_keys
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))

        is_causal, window = is_causal and not need_weights and not n_added, self.window
        masks = []  # broadcastable to (B, H, L, S), in the sense of torch.nn
        if attn_mask is not None and not is_causal:
            masks.append(attn_mask[None, None] if attn_mask.ndim == 2 else attn_mask.unflatten(0, q.shape[:2]))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[..., None, None, :])
        if n_added and window is not None:
            allowed = allowed_pairs(Call(left=window[0], right=window[1]), n_queries, n_keys, q.device)
            masks += [] if allowed is None else [~allowed]
            window = None
        result: Any = scaled_dot_product_attention(
            q,
            k,
            v,
            _merged([pad(mask, (0, n_added)) for mask in masks] if n_added else masks),
            self.dropout if self.training else 0.0,
            is_causal,
            window=window,
            softcap=self.softcap,
            need_weights=need_weights,
        )
        output, weights = (result.output, result.weights) if need_weights else (result, None)
        output = output.permute(2, 0, 1, 3) if rows_first else output.transpose(1, 2)
        output = self.out_proj(output.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if is_single:
            output, weights = output.squeeze(0), weights if weights is None else weights.squeeze(0)
        return output, weights

    def _projections(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """query W_q, key W_k and value W_v, (..., D) each: in one product what has one input."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and key is value:
            if query is key:
                return linear(query, weight, bias).chunk(3, -1)
            of_query, of_both = weight.split((width, 2 * width))
            b_query, b_both = (None, None) if bias is None else bias.split((width, 2 * width))
            return linear(query, of_query, b_query), *linear(key, of_both, b_both).chunk(2, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(linear, (query, key, value), weights, biases))

    def _with_added(self, x: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        """x (B, S, D) with the row of `add_bias_kv` and that of `add_zero_attn` behind it: (B, S to S + 2, D)."""
        if row is not None:
            x = torch.cat((x, row.expand(x.shape[0], 1, -1)), 1)
        return pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def extra_repr(self) -> str:
        """What printing shows of the options that PyTorch's class lacks."""
        asked = {"window": self.window, "softcap": self.softcap}
        return ", ".join(f"{name}={x}" for name, x in asked.items() if x is not None)

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raise TypeError or ValueError in one line, with the rule, what was found and the remedy."""
        tensors = {"query": query, "key": key, "value": value}
        check_tensor_types(tensors)
        check_tensor_types({"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}, or_none=True)
        for name, x in tensors.items():
            if x.is_nested:
                raise TypeError(
                    f"{name} must be a padded tensor, found a nested one; pad it, and pass key_padding_mask (a "
                    f"torch.nn.TransformerEncoder makes no nested tensors once its use_nested_tensor is False)"
                )
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            found = _shapes(query, key, value)
            raise ValueError(f"query, key and value must have three dimensions each, or two without a batch; {found}")
        if query.shape[-1] != self.embed_dim or key.shape[-1] != self.kdim or value.shape[-1] != self.vdim:
            widths, found = (self.embed_dim, self.kdim, self.vdim), _shapes(query, key, value)
            raise ValueError(
                f"the last dimensions of query, key and value must be embed_dim, kdim and vdim, {widths}; {found}"
            )
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        dtypes = query.dtype, key.dtype, value.dtype
        if {*dtypes} != {weight.dtype} and weight.is_floating_point() and not autocasts(query.device):
            raise TypeError(
                f"query, key and value must have the dtype of the weights, {weight.dtype}, found "
                f"{', '.join(map(str, dtypes))}; convert them with .to()"
            )
        is_batch = query.ndim == 3
        of_rows = 1 if is_batch and self.batch_first else 0
        n_queries, n_keys = query.shape[of_rows], key.shape[of_rows]
        batches = [x.shape[1 - of_rows] if is_batch else 1 for x in (query, key, value)]
        if n_keys != value.shape[of_rows] or batches[0] != batches[1] or batches[0] != batches[2]:
            order = "(batch, length, width)" if self.batch_first else "(length, batch, width)"
            raise ValueError(
                f"query, key and value must have the same batch, and key and value the same length, as {order} with "
                f"batch_first={self.batch_first}; {_shapes(query, key, value)}"
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask, and there is none; pass the causal mask, as "
                "torch.nn.Transformer.generate_square_subsequent_mask makes it"
            )
        if attn_mask is not None:
            wanted, rows = "(L, S) or (batch * heads, L, S)", (n_queries, n_keys)
            by_head = (batches[0] * self.num_heads, *rows)
            _check_mask("attn_mask", attn_mask, query, by_head if attn_mask.ndim == 3 else rows, wanted)
        if key_padding_mask is not None:
            wanted = "(batch, S), or (S,) without a batch"
            shape = (batches[0], n_keys) if is_batch else (n_keys,)
            _check_mask("key_padding_mask", key_padding_mask, query, shape, wanted)


def _check_mask(name: str, mask: torch.Tensor, query: torch.Tensor, shape: tuple[int, ...], wanted: str) -> None:
    """Raise TypeError or ValueError for a mask that is not bool or float, or not of a shape; wanted: in words."""
    fits = mask.dtype in (torch.bool, torch.float32, query.dtype)
    if not fits and not (mask.is_floating_point() and autocasts(query.device)):
        raise TypeError(
            f"{name} must be bool (True = may not attend), float32 or of the query's dtype {query.dtype}, "
            f"found {mask.dtype}; convert it with .bool() or .to(query.dtype)"
        )
    if mask.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, found {mask.device}; use .to()")
    # One by one: compiled, where lengths may be symbols, tuples of them are taken to differ.
    if mask.ndim != len(shape) or not all(a == b for a, b in zip(mask.shape, shape)):
        raise ValueError(f"{name} must have the shape {wanted}, here {tuple(shape)}, found {tuple(mask.shape)}")


def _merged(masks: list[torch.Tensor]) -> torch.Tensor | None:
    """Masks that broadcast, in the sense of torch.nn (True = may not attend), as one in that of our function."""
    floats = [mask for mask in masks if mask.dtype != torch.bool]
    bools = [mask for mask in masks if mask.dtype == torch.bool]
    forbidden = functools.reduce(torch.logical_or, bools) if bools else None
    if not floats:
        return None if forbidden is None else ~forbidden
    bias = functools.reduce(torch.add, floats)
    return bias if forbidden is None else torch.where(forbidden, -math.inf, bias)

"""Fused attention for short sequences: the backward kernel.

Formulas as in general_backward.py, but nothing is kept for them: P is computed again from Q, K and the rules, with the
whole row of scores at hand, and delta as rowsum(P dP). A program owns all that its key heads get from their query
heads: no atomics.

Work of one head: 10 L S E flops (E = Ev), on tiles rounded up. Bytes: Q, K, V, dO, dQ, dK and dV, once each.
"""

import torch
import triton
import triton.language as tl

from kernels.attention.choice import is_wide
from kernels.attention.general import head_stride, numbers, positive_scale
from kernels.attention.pieces import NO_BAND, NO_MASK, cap_slope, dropout_factors, zero_nonfinite
from kernels.attention.rules import Extras, Rules
from kernels.attention.short import (
    exponentials, pointers_of, products, short_inputs, short_options, short_scores, survey, within,
)  # fmt: skip
from kernels.launch import cdiv, launch_on


@triton.jit
def short_backward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, key_lengths_ptr, slopes_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_ql, stride_qe,
    stride_kb, stride_kh, stride_ks, stride_ke,
    stride_vb, stride_vh, stride_vs, stride_ve,
    stride_mb, stride_mh, stride_ml, stride_ms,
    stride_gb, stride_gh, stride_gl, stride_ge,
    stride_dqb, stride_dqh, stride_dql, stride_dqe,
    stride_dkb, stride_dkh, stride_dks, stride_dke,
    stride_dvb, stride_dvh, stride_dvs, stride_dve,
    stride_ab,
    n_sequences, n_kv_heads, group, L, S, left, right, scale, softcap, drop_below, keep_scale, dq_scale, dk_scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr,
    BAND: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, HAS_LENGTHS: tl.constexpr, MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of HEADS * PACK key heads, and dQ of their queries.

    grad_ptr: dO, shaped as the output. dq_scale, dk_scale: factors of dS there. The rest as in short_forward_kernel.
    """
    i, b, h_kv, inside, row, b_row, h_row, there, used, j, together, n_keys, offset = survey(
        L, S, n_sequences, n_kv_heads, key_lengths_ptr, BLOCK_L, BLOCK_S, HEADS, PACK, BOTTOM_RIGHT, HAS_LENGTHS
    )
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    k_ptrs = pointers_of(k_ptr, b_row, h_row, row, stride_kb, stride_kh, stride_ks, stride_ke, BLOCK_E)
    v_ptrs = pointers_of(v_ptr, b_row, h_row, row, stride_vb, stride_vh, stride_vs, stride_ve, BLOCK_EV)
    k = tl.load(k_ptrs, mask=within(used, E, BLOCK_E), other=0.0)
    v = tl.load(v_ptrs, mask=within(used, EV, BLOCK_EV), other=0.0)
    dk = tl.zeros((HEADS, BLOCK_S, BLOCK_E), tl.float32)
    dv = tl.zeros((HEADS, BLOCK_S, BLOCK_EV), tl.float32)

    for member in range(0, group):
        h = h_kv * group + member
        q_ptrs = pointers_of(q_ptr, b, h, i, stride_qb, stride_qh, stride_ql, stride_qe, BLOCK_E)
        grad_ptrs = pointers_of(grad_ptr, b, h, i, stride_gb, stride_gh, stride_gl, stride_ge, BLOCK_EV)
        q = tl.load(q_ptrs, mask=within(inside, E, BLOCK_E), other=0.0)
        grad = tl.load(grad_ptrs, mask=within(inside, EV, BLOCK_EV), other=0.0)
        scores, capped, factor = short_scores(
            q, k, b, h, i, j, together, L, n_keys, offset, left, right, scale, softcap, slopes_ptr, stride_ab,
            mask_ptr, stride_mb, stride_mh, stride_ml, stride_ms,
            BAND, MASK, HAS_SOFTCAP, HAS_ALIBI, PACK, PRECISION,
        )  # fmt: skip
        weights, row_sum = exponentials(scores, factor, MASK)
        allowed = scores != float("-inf")
        weights = tl.where(allowed, weights / row_sum, 0.0)  # not NaN throughout where the query is
        dp = products(grad, tl.permute(v, (0, 2, 1)), None, PRECISION)
        dropped = weights
        if HAS_DROPOUT:
            factors = dropout_factors(seed, i, j, b * (n_kv_heads * group) + h, drop_below, keep_scale, PACK > 1)
            dp *= factors
            dropped = weights * factors
        dp = tl.where(allowed, dp, 0.0)  # it is NaN where a forbidden value is
        ds = weights * (dp - tl.sum(weights * dp, 2)[:, :, None])
        if HAS_SOFTCAP:
            ds *= cap_slope(capped, softcap)
        ds = tl.where(allowed, ds, 0.0).to(k.dtype)
        if PACK > 1:  # NaN of one sequence must not reach the next one; its own get it through ds and dropped
            finite = tl.min((tl.abs(grad) < float("inf")).to(tl.int32), 2)[:, :, None]
            dropped = tl.where(allowed & (finite == 0), float("nan"), dropped)
            grad = zero_nonfinite(grad)
            q = zero_nonfinite(q)
        dv = products(tl.permute(dropped.to(grad.dtype), (0, 2, 1)), grad, dv, PRECISION)
        dk = products(tl.permute(ds, (0, 2, 1)), q, dk, PRECISION)
        finite_k = k
        if BAND != NO_BAND or MASK != NO_MASK or PACK > 1:
            finite_k = zero_nonfinite(k)  # an allowed key that is NaN has made ds NaN already
        dq = products(ds, finite_k, None, PRECISION) * dq_scale
        dq_ptrs = pointers_of(dq_ptr, b, h, i, stride_dqb, stride_dqh, stride_dql, stride_dqe, BLOCK_E)
        tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=within(inside, E, BLOCK_E))

    dk_ptrs = pointers_of(dk_ptr, b_row, h_row, row, stride_dkb, stride_dkh, stride_dks, stride_dke, BLOCK_E)
    dv_ptrs = pointers_of(dv_ptr, b_row, h_row, row, stride_dvb, stride_dvh, stride_dvs, stride_dve, BLOCK_EV)
    tl.store(dk_ptrs, (dk * dk_scale).to(dk_ptr.dtype.element_ty), mask=within(there, E, BLOCK_E))
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=within(there, EV, BLOCK_EV))


def launch_short_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seed: torch.Tensor | None,
    extras: Extras, rules: Rules, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Launch the backward kernel.

    Args:
        grad: (B, Hq, L, Ev), gradient of the output, any strides.
        query, key, value, seed, extras, rules: as given to the forward.
        dq, dk, dv: gradients to write, any strides, shaped as their tensors.
    """
    if is_wide(grad):
        grad = grad.contiguous()
    dq_scale = rules.scale
    query, rules = positive_scale(query, rules)
    inputs, strides, shape = short_inputs(query, key, value, seed, extras)
    options = short_options("backward", query, key, value, seed, extras, rules)
    grid = (cdiv(shape[0], options["HEADS"] * options["PACK"]),)
    with launch_on(query.device):
        short_backward_kernel[grid](
            *inputs, grad, dq, dk, dv, *strides, *grad.stride(), *dq.stride(), *dk.stride(), *dv.stride(),
            head_stride(extras.alibi_slopes), *shape, *numbers(rules), dq_scale, rules.scale, **options,
        )  # fmt: skip

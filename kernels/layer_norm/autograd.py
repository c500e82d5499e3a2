"""The norms' autograd function, outside the registered operations: backward, double backward, vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kernels.again import is_plain
from kernels.autograd import differentiable, in_forward_mode
from kernels.layer_norm import ops
from kernels.layer_norm.eager import plain_gradients


class NormRules(NamedTuple):
    """What is computed.

    normalized_shape: the trailing dimensions. eps: added to the variance, or to the mean square. dropout_p: probability
    with which an element of the input is dropped before the residual is added. centre: layer norm, False for RMS norm.
    save_output: the backward starts from the output instead of the sum. need_sum: the sum is asked for, or kept for the
    backward.
    dtype: of the output, None for that of the input.
    """

    normalized_shape: Sequence[int]
    eps: float
    dropout_p: float = 0.0
    centre: bool = True
    save_output: bool = False
    need_sum: bool = False
    dtype: torch.dtype | None = None


class Norm(torch.autograd.Function):
    """The registered operations with backward, double backward (by the formula) and vmap."""

    @staticmethod
    def forward(
        input: torch.Tensor,
        residual: torch.Tensor | None,
        seed: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        rules: NormRules,
    ) -> tuple[torch.Tensor, ...]:
        """Output, sum, mean and rstd as the operation gives them; output and sum are differentiable."""
        shape, eps, dropout_p, centre, _, need_sum, dtype = rules
        is_direct = is_plain(input, residual, seed, weight, bias)
        run = ops._forward if is_direct else torch.ops.kernels.norm_forward.default
        return run(input, residual, seed, weight, bias, shape, eps, dropout_p, centre, need_sum, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep references, no copies: the input, the sum or the output, and one or two numbers a row."""
        input, residual, seed, weight, bias, ctx.rules = inputs
        result, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = input.dtype, input.dtype if residual is None else residual.dtype
        x = result if ctx.rules.save_output else input if residual is None else total
        ctx.has_sum = residual is not None and ctx.rules.need_sum
        ctx.save_for_backward(x, seed, weight, bias, mean, rstd)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_sum: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input, residual, weight and bias, those that are needed."""
        if not ctx.has_sum:  # torch.compile and functorch give the sum that is not there a gradient
            grad_sum = None
        if grad_output is None and grad_sum is None:
            return (None,) * 6
        x, seed, weight, bias, mean, rstd = ctx.saved_tensors
        rules, (*inputs, _, weight_needed, bias_needed, _) = ctx.rules, ctx.needs_input_grad
        needed = [*inputs, weight_needed, bias_needed]
        if grad_output is None:
            grad_output = torch.zeros_like(x)
        if torch.is_grad_enabled() or in_forward_mode():  # this backward is itself to be differentiated
            return _differentiable_backward(
                grad_output, grad_sum, x, seed, weight, bias, mean, rstd, rules, ctx.dtypes, needed
            )
        # Without dropout input and residual have the same gradient; it is written once where their dtypes agree.
        once = needed[0] and needed[1] and seed is None and ctx.dtypes[0] == ctx.dtypes[1]
        is_direct = is_plain(grad_output, grad_sum, x, seed, weight, bias, mean, rstd)
        run: Any = ops._backward if is_direct else torch.ops.kernels.norm_backward.default
        found = run(
            grad_output,
            grad_sum,
            x,
            seed,
            weight,
            bias,
            mean,
            rstd,
            rules.normalized_shape,
            *ctx.dtypes,
            rules.dropout_p,
            rules.centre,
            rules.save_output,
            [needed[0] and not once, *needed[1:]],
        )
        grads = [grad if need else None for grad, need in zip(found, needed)]
        return (grads[1] if once else grads[0], grads[1], None, *grads[2:], None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: torch.Tensor,
        residual: torch.Tensor | None,
        seed: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        rules: NormRules,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
        """A batch is more rows. Weight and bias that differ along it are applied after the kernel."""
        size, shape = info.batch_size, rules.normalized_shape
        if seed is not None:
            if in_dims[2] is None:
                raise NotImplementedError('vmap over dropout needs randomness="different"')
            seed = seed.select(in_dims[2], 0)  # rows have random numbers of their own
        batched = [
            x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((input, residual), in_dims)
        ]
        input, residual = batched[0], batched[1]  # type: ignore[assignment]
        if in_dims[3] is None and in_dims[4] is None:
            output, total, mean, rstd = apply_norm(input, residual, seed, weight, bias, rules)
        else:
            exact = rules._replace(dtype=torch.promote_types(input.dtype, torch.float32), save_output=False)
            output, total, mean, rstd = apply_norm(input, residual, seed, None, None, exact)
            parameter_shape = (size, *(1,) * (input.ndim - 1 - len(shape)), *shape)
            weight, bias = (
                x if x is None or dim is None else x.movedim(dim, 0).reshape(parameter_shape)
                for x, dim in ((weight, in_dims[3]), (bias, in_dims[4]))
            )
            output = output if weight is None else output * weight
            output = (output if bias is None else output + bias).to(rules.dtype or input.dtype)
        statistics = (x.reshape(size, -1) for x in (mean, rstd))
        has_sum = residual is not None and rules.need_sum
        return (output, total if has_sum else total.reshape(size, 0), *statistics), (0, 0, 0, 0)


def _differentiable_backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rules: NormRules,
    dtypes: tuple[torch.dtype, torch.dtype],
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients with a graph behind them, by the formula."""
    if rules.save_output:
        raise NotImplementedError("double backward with save_output: not supported; leave it off")
    shape = rules.normalized_shape
    dx, *sums = plain_gradients(grad_output, x, shape, weight, rules.eps, rules.centre)
    dinput = dresidual = None
    if needed[0] or needed[1]:
        dx = dx if grad_sum is None else dx + grad_sum
        dresidual = dx.to(dtypes[1]) if needed[1] else None
        if needed[0] and seed is not None:
            with torch.no_grad():  # the gradient of the sum alone, ones: what comes of it is dropout's factors
                factors = torch.ops.kernels.norm_backward.default(
                    torch.zeros_like(x),
                    torch.ones_like(x),
                    x,
                    seed,
                    weight,
                    bias,
                    mean,
                    rstd,
                    shape,
                    dx.dtype,
                    dx.dtype,
                    rules.dropout_p,
                    rules.centre,
                    False,
                    [True, False, False, False],
                )[0]
            dx = dx * factors
        dinput = dx.to(dtypes[0]) if needed[0] else None
    dweight, dbias = (
        grad.to(parameter.dtype) if need and parameter is not None else None
        for grad, parameter, need in zip(sums, (weight, bias), needed[2:])
    )
    return dinput, dresidual, None, dweight, dbias, None


def apply_norm(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rules: NormRules,
) -> tuple[torch.Tensor, ...]:
    """Differentiable output and sum, and mean and rstd, on the kernels; without residual the sum has 0 elements."""
    tensors = [input, residual, seed, weight, bias]
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice
        for place, x in enumerate(tensors):
            if x is not None and any(x is y for y in tensors[:place]):
                tensors[place] = x.view_as(x)
    return differentiable(Norm, *tensors, rules)

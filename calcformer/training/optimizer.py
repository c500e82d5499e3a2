"""Adam over all parameters at once."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from calcformer.config import TrainingConfig

__all__ = ["build_optimizer", "flatten", "learning_rate"]


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of step 0..steps-1: a linear warm-up, then constant, or half a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def flatten(parameters: Iterable[nn.Parameter]) -> nn.Parameter:
    """One parameter that holds all of `parameters`, which become views of it, as their gradients do of its gradient.

    An optimiser then has one long vector to work on, where seventy short ones would cost it a millisecond a step, and
    clipping and averaging over processes have one gradient. Gradients must be zeroed in place: set to None, they would
    no longer be views.
    """
    parameters = list(parameters)
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes)):
        parameter.data = data.view_as(parameter)
        parameter.grad = grad.view_as(parameter)
    return flat


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Adam whose weight decay, if any, is decoupled (Loshchilov and Hutter 2019) and spares biases and norms.

    The model's parameters become views of the optimiser's, see `flatten`.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": [flatten(matrices)], "weight_decay": config.weight_decay},
              {"params": [flatten(vectors)], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)

"""Adam over all parameters at once."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from calcformer.settings import TrainingConfig

__all__ = ["Gradient", "build_optimizer", "flatten", "learning_rate"]


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of step 0..steps-1: a linear warm-up, then constant, or half a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class Gradient:
    """The gradient of all that an optimiser trains, as one vector.

    Args:
        parameters: of the model, in the order of the vector.
        vector: (N,), whose parts are the gradients of the optimiser's own parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], vector: torch.Tensor) -> None:
        self.parameters, self.vector = parameters, vector

    def fill(self, loss: torch.Tensor) -> None:
        """Write the gradient of the loss (), in one pass over it: none is zeroed before, and none added up."""
        grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        torch.cat([grad.flatten() for grad in grads], out=self.vector)


def flatten(groups: Sequence[Sequence[nn.Parameter]]) -> tuple[list[nn.Parameter], Gradient]:
    """One parameter for each group, which holds all parameters of the group, and the gradient of all groups.

    The parameters given become views of those. An optimiser then has a few long vectors to work on, where seventy short
    ones would cost it a millisecond a step, and clipping and summing over processes have one gradient.
    """
    parameters = [parameter for group in groups for parameter in group]
    data = torch.cat([parameter.detach().flatten() for parameter in parameters])
    gradient = torch.zeros_like(data)
    for parameter, values in zip(parameters, data.split([parameter.numel() for parameter in parameters])):
        parameter.data = values.view_as(parameter)
    lengths = [sum(parameter.numel() for parameter in group) for group in groups]
    flat = [nn.Parameter(values) for values in data.split(lengths)]
    for parameter, grad in zip(flat, gradient.split(lengths)):
        parameter.grad = grad
    return flat, Gradient(parameters, gradient)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> tuple[torch.optim.Optimizer, Gradient]:
    """Adam whose weight decay, if any, is decoupled (Loshchilov and Hutter 2019) and spares biases and norms.

    Returns:
        The optimiser, and the gradient of all it trains. The model's parameters become views, see `flatten`.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    flat, gradient = flatten([matrices, vectors] if config.weight_decay else [matrices + vectors])
    groups = [
        {"params": [parameter], "weight_decay": decay} for parameter, decay in zip(flat, (config.weight_decay, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True), gradient

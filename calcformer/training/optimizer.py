"""Adam over many parameters at once, its learning rate, and the average of weights."""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from calcformer.runs.checkpoint import AVERAGE, trained_parameters
from calcformer.settings import TrainingConfig

__all__ = ["Gradient", "average_weights", "build_optimizer", "flatten", "learning_rate"]

LARGE = 1 << 16  # numbers of a parameter: to copy the gradient of a larger one takes longer than a step of its own


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of step 0..steps-1: a linear warm-up, then constant, half a cosine to 0, or 1 / sqrt(step).

    The last, "noam", is that of Vaswani et al. 2017, section 5.3, whose peak is 1 / sqrt(width * warmup_steps). A
    warm-up that is longer than the run is a tenth of it.
    """
    warmup = config.warmup_steps if config.warmup_steps <= steps else steps // 10
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "noam":
        return config.learning_rate * math.sqrt(max(1, warmup) / (step + 1))
    if config.schedule == "constant":
        return config.learning_rate
    share = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def average_weights(optimizer: torch.optim.Optimizer, epoch: int, config: TrainingConfig) -> None:
    """Keep the mean of the weights after each of the last `config.average` epochs, and end with it.

    It stands beside Adam's state, so that a checkpoint has it. Source: Vaswani et al. 2017, section 6.1.
    """
    place = epoch - max(0, config.epochs - config.average)  # of this epoch among those, from 1
    if not config.average or place < 1:
        return
    for parameter in trained_parameters(optimizer):
        mean = optimizer.state[parameter].setdefault(AVERAGE, torch.zeros_like(parameter))
        mean.lerp_(parameter, 1 / place)
        if epoch == config.epochs:
            parameter.copy_(mean)


class Gradient:
    """The gradients of all that an optimiser trains.

    Args:
        parts: each parameter of the optimiser, and those of the model that it holds, in its order.
    """

    def __init__(self, parts: Sequence[tuple[nn.Parameter, Sequence[nn.Parameter]]]) -> None:
        self.parts = parts
        self.parameters = [parameter for _, held in parts for parameter in held]
        for whole, _ in parts:
            whole.grad = torch.zeros_like(whole)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those of the optimiser's parameters."""
        return [whole.grad for whole, _ in self.parts if whole.grad is not None]

    def fill(self, loss: torch.Tensor) -> None:
        """Make them those of the loss (): none is zeroed before, and none added up."""
        grads = iter(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        for whole, held in self.parts:
            if len(held) == 1:
                whole.grad = next(grads).contiguous()
            else:
                torch.cat([next(grads).flatten() for _ in held], out=whole.grad)


def flatten(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
    """One parameter for each run of small ones, which then become views of it; large ones stay as they are.

    An optimiser then has a few long vectors to work on, where seventy short ones would cost it a millisecond a step,
    and so has who sums over processes.

    Returns:
        Each of them, and those it holds.
    """
    parts: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
    for is_large, run in itertools.groupby(parameters, lambda parameter: parameter.numel() > LARGE):
        held = list(run)
        if is_large or len(held) == 1:
            parts += [(parameter, [parameter]) for parameter in held]
            continue
        whole = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in held]))
        for parameter, values in zip(held, whole.detach().split([parameter.numel() for parameter in held])):
            parameter.data = values.view_as(parameter)
        parts.append((whole, held))
    return parts


def build_optimizer(model: nn.Module, config: TrainingConfig) -> tuple[torch.optim.Optimizer, Gradient]:
    """Adam whose weight decay, if any, is decoupled (Loshchilov and Hutter 2019) and spares biases and norms.

    Returns:
        The optimiser, and the gradients of all it trains. Parameters of the model become views, see `flatten`.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [(matrices, config.weight_decay), (vectors, 0.0)] if config.weight_decay else [(matrices + vectors, 0.0)]
    parts = [flatten(parameters) for parameters, _ in groups]
    options = [
        {"params": [whole for whole, _ in part], "weight_decay": decay} for part, (_, decay) in zip(parts, groups)
    ]
    optimizer = torch.optim.AdamW(options, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    return optimizer, Gradient(list(itertools.chain(*parts)))

"""Six loss functions side by side, on one problem small enough for a pocket calculator.

C classes, one of which is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from calcformer.by_hand.steps import Check, Matrix, Page, Step, apart, number
from calcformer.errors import InputError
from calcformer.plots import save_losses

__all__ = ["LOSSES", "draw_losses", "losses_page"]

WORDS, SCORES, RIGHT = ["win", "live", "die"], [2.0, 1.0, 0.0], 0
DIGITS = 4


@dataclass(frozen=True)
class Loss:
    """A loss function.

    Args:
        name: as people say it.
        use: what it is for.
        takes: which of scores, p and ln p it is given, beside y.
        formula: of the C numbers given, z, p or ln p.
        by_hand: from those, (C,), and y (C,) to the loss.
        gradient: from the same to its gradient, (C,).
        torch: the same by torch.nn.functional.
        example: the loss worked out, from those C numbers as they are printed.
    """

    name: str
    use: str
    takes: str
    formula: str
    by_hand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    torch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    example: Callable[[list[str]], str]


def index(y: torch.Tensor) -> torch.Tensor:
    return y.argmax()


LOSSES = [
    Loss(
        "cross-entropy",
        "one right class among several; the loss of language models",
        "scores z",
        "-ln(e^z_right / sum of e^z)",
        lambda z, y: -(z.exp() / z.exp().sum())[index(y)].log(),
        lambda z, y: z.exp() / z.exp().sum() - y,
        lambda z, y: F.cross_entropy(z, index(y)),
        lambda z: f"-ln(e^{z[0]} / (e^{z[0]} + e^{z[1]} + e^{z[2]}))",
    ),
    Loss(
        "NLL",
        "the same for a model that ends with log-softmax",
        "ln p",
        "-ln(p_right)",
        lambda log_p, y: -log_p[index(y)],
        lambda log_p, y: -y,
        lambda log_p, y: F.nll_loss(log_p, index(y)),
        lambda log_p: f"-({log_p[0]})",
    ),
    Loss(
        "BCE",
        "yes or no for each class by itself, several may be right",
        "p",
        "mean of -(y ln(p) + (1 - y) ln(1 - p))",
        lambda p, y: -(y * p.log() + (1 - y) * (1 - p).log()).mean(),
        lambda p, y: (p - y) / (p * (1 - p)) / len(p),
        F.binary_cross_entropy,
        lambda p: f"-(ln({p[0]}) + ln(1 - {p[1]}) + ln(1 - {p[2]})) / 3",
    ),
    Loss(
        "BCE with logits",
        "the same from scores, which cannot overflow; s is not the p above",
        "scores z",
        "BCE of s = 1 / (1 + e^-z)",
        lambda z, y: -(y * (1 / (1 + (-z).exp())).log() + (1 - y) * (1 - 1 / (1 + (-z).exp())).log()).mean(),
        lambda z, y: (1 / (1 + (-z).exp()) - y) / len(z),
        F.binary_cross_entropy_with_logits,
        lambda z: f"(ln(1 + e^(-{z[0]})) + ln(1 + e^{z[1]}) + ln(1 + e^{z[2]})) / 3",
    ),
    Loss(
        "MSE",
        "numbers, such as a price; large errors count most",
        "p",
        "mean of (p - y)^2",
        lambda p, y: ((p - y) ** 2).mean(),
        lambda p, y: 2 * (p - y) / len(p),
        F.mse_loss,
        lambda p: f"(({p[0]} - 1)^2 + {p[1]}^2 + {p[2]}^2) / 3",
    ),
    Loss(
        "L1",
        "numbers, where a few are far out: each error counts as it is",
        "p",
        "mean of |p - y|",
        lambda p, y: (p - y).abs().mean(),
        lambda p, y: (p - y).sign() / len(p),
        F.l1_loss,
        lambda p: f"((1 - {p[0]}) + {p[1]} + {p[2]}) / 3",
    ),
]


def losses_page() -> Page:
    """Each loss and its gradient by hand, held to torch.nn.functional and to autograd."""
    scores = torch.tensor(SCORES, dtype=torch.float64)
    p = scores.exp() / scores.exp().sum()
    y = torch.zeros_like(scores)
    y[RIGHT] = 1
    given = {"scores z": scores, "p": p, "ln p": p.log()}
    rows, checks, examples = [], [], []
    for loss in LOSSES:
        x = given[loss.takes].clone().requires_grad_()
        theirs = loss.torch(x, y)
        (slope,) = torch.autograd.grad(theirs, x)
        ours, gradient = loss.by_hand(x.detach(), y), loss.gradient(x.detach(), y)
        rows.append([ours.item(), *gradient.tolist()])
        differences = {"loss": apart([ours], [theirs.detach()]), "gradient": apart([gradient], [slope])}
        checks.append(Check(loss.name, differences, 1e-12))
        cells = [number(value, 0 if loss.takes == "scores z" else DIGITS) for value in x.tolist()]
        examples.append(f"{loss.name} = {loss.example(cells)} = {number(ours, DIGITS)}")
    table = torch.stack((scores, p, p.log(), y))
    names = [loss.name for loss in LOSSES]
    return Page(
        "Six loss functions on the same problem",
        ["A model gives each of three words a score z. Right is the first one: y is 1 there, and 0 elsewhere."],
        [
            Step(
                "The problem",
                "Softmax makes probabilities of the scores.",
                "p = e^z / (sum of all e^z)",
                [[Matrix("", table.tolist(), ["z", "p", "ln p", "y"], WORDS, DIGITS)]],
                [f"p[win] = e^2 / (e^2 + e^1 + e^0) = {number(p[0], DIGITS)}"],
            ),
            Step(
                "The losses",
                "Each with its gradient: how fast it grows with what it is given for that word. Training goes the "
                "other way.",
                "",
                [[Matrix("", rows, names, ["loss", *(f"by {word}" for word in WORDS)], DIGITS)]],
                examples,
                ["NLL of log-softmax is cross-entropy: the same loss, given ln p instead of z."],
            ),
            Step(
                "What each is for",
                "",
                notes=[f"{loss.name} (of {loss.takes}: {loss.formula}): {loss.use}." for loss in LOSSES],
            ),
        ],
        checks,
        "The same by torch.nn.functional, the gradients by autograd.",
        [
            "With --picture FILE they are drawn for a yes or no question. The surer a wrong answer, the harder "
            "cross-entropy pulls at its score; MSE and L1 of a probability then hardly pull at all."
        ],
    )


def draw_losses(path: Path) -> None:
    """Draw the losses of a yes or no question, by the probability p of what is right, to a PNG.

    The right-hand panel has how much they pull at the score z of which p is the sigmoid: |d loss / d z|.

    Raises:
        InputError: matplotlib is not installed; nothing is written then.
    """
    places = [place / 200 for place in range(2, 199)]
    curves: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
        "cross-entropy, NLL, BCE, BCE with logits": (lambda p: -math.log(p), lambda p: 1 - p),
        "MSE": (lambda p: (1 - p) ** 2, lambda p: 2 * p * (1 - p) ** 2),
        "L1": (lambda p: 1 - p, lambda p: p * (1 - p)),
    }
    panels = {
        title: {name: (places, [pair[place](p) for p in places]) for name, pair in curves.items()}
        for place, title in enumerate(("loss", "pull at the score: |d loss / d z|"))
    }
    if not save_losses(panels, "probability of what is right", "Losses of a yes or no question", path):
        raise InputError("pictures need matplotlib; install it with: pip install matplotlib")

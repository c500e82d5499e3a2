"""A tutorial's transformer, worked by hand: its inputs and weights, what it prints, and where it slips."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch

import kernels.nn
from calcformer.by_hand.calculation import Calculation
from calcformer.by_hand.pages import KERNELS, PRECISION, words_of
from calcformer.by_hand.steps import Matrix, Page, Step, apart
from calcformer.by_hand.weights import Attention, Linear

__all__ = ["read_tutorial", "tutorial_page"]

ROUNDING = 0.005  # of what is printed with two digits


def read_tutorial() -> dict[str, Any]:
    """What the tutorial has: words, x (6, 6), weights, and what it prints of queries, keys and the output (6, 6)."""
    content = json.loads((files("calcformer.by_hand") / "tutorial.json").read_text(encoding="utf-8"))
    matrices = [name for name, value in content.items() if isinstance(value, list) and isinstance(value[0], list)]
    return content | {name: torch.tensor(content[name], dtype=torch.float64) for name in matrices}


def agreement(name: str, ours: torch.Tensor, printed: torch.Tensor) -> str:
    """Whether what the tutorial prints is what is calculated here."""
    most = apart([ours], [printed])
    if most <= ROUNDING + 1e-9:
        return f"The tutorial prints the same {name}: at most {most:.3f} apart, as rounding to two digits leaves it."
    return f"The tutorial prints another {name}, up to {most:.2f} apart."


def readings(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: Linear, printed: torch.Tensor
) -> Matrix:
    """How far attention's output (L, D) is from the printed one if V and the divisor are read in several ways."""
    values = {"V = x W_V": value, "V = Q": query, "V = K": key}
    divisors = {f"sqrt({n})": math.sqrt(n) for n in (query.shape[1], printed.shape[1])} | {"1": 1.0}
    table = [
        [apart([output((query @ key.mT / divisor).softmax(-1) @ v)], [printed]) for divisor in divisors.values()]
        for v in values.values()
    ]
    return Matrix("apart, divided by", table, [*values], [*divisors], digits=3)


@torch.no_grad()
def tutorial_page() -> Page:
    """The encoder's attention with the tutorial's own numbers, each of its results beside ours."""
    given = read_tutorial()
    words, x = given["encoder_words"], given["x"]
    query, key, value, output = (Linear(given[f"w_{name}"]) for name in ("query", "key", "value", "output"))
    done = Calculation()
    branch = done.attention("Encoder self-attention", x, words, Attention(query, key, value, output, 1))
    done.add_and_norm("Encoder self-attention", words, x, branch, kernels.nn.LayerNorm(x.shape[1], dtype=x.dtype))
    projection, weighing, mixing, adding = done.steps
    vocabulary = list(dict.fromkeys(word for sentence in given["corpus"] for word in words_of(sentence)))
    size, width, printed = query.weight.shape[1], x.shape[1], given["output_projection"]
    tried = readings(query(x), key(x), value(x), output, printed)
    slipped = output((query(x) @ key(x).mT / math.sqrt(width)).softmax(-1) @ query(x))
    means = torch.stack([(x + branch).mean(1), (x + printed).mean(1)], 1)
    steps = [
        Step(
            "Vocabulary",
            f"The {len(vocabulary)} different words of its three sentences: {', '.join(vocabulary)}.",
            notes=[f"The tutorial counts {given['vocabulary_size']}."],
        ),
        Step(
            "Words as rows of numbers",
            "As the tutorial has them, places added: its embedding is not kept here.",
            matrices=[[Matrix.of("x", x, words)]],
        ),
        replace(
            projection,
            notes=[
                agreement("Q", query(x), given["query"]),
                agreement("K", key(x), given["key"]),
                "SLIP 1, the value matrix: its V has the numbers of its Q, though it shows the W_V above.",
            ],
        ),
        replace(
            weighing,
            notes=[
                f"SLIP 2, the divisor: it divides by sqrt({width}), of the model's width. The formula's d_k is the "
                f"width of a query: sqrt({size})."
            ],
        ),
        replace(
            mixing,
            matrices=[*mixing.matrices, [Matrix.of("the tutorial's output", printed, words), tried]],
            notes=[
                agreement("output", branch, printed),
                "The right-hand table tries what may have been calculated instead. With both slips the tutorial's "
                f"output is {apart([slipped], [printed]):.3f} away, which rounding on the way explains: they are all "
                "that is wrong with it.",
            ],
        ),
        replace(
            adding,
            matrices=[*adding.matrices, [Matrix.of("row means", means, words, ["here", "its output"])]],
            notes=[
                "SLIP 3, the row means: those that the tutorial prints here are wrong, says the note kept with its "
                "numbers; they are not kept themselves. Right are these, of the sum here and of x + its output."
            ],
        ),
    ]
    return Page(
        f'A tutorial\'s transformer by hand: "{" ".join(words)}"',
        [
            f"Its inputs and weights as printed, with two digits; width {width}, d_k = d_v = {size}. What it prints is "
            f"held to what comes out here, and three slips are named. {PRECISION}"
        ],
        steps,
        done.checks,
        KERNELS,
        [
            "Its other weights are not kept here. The rest of a transformer, for the same words, with drawn weights: "
            f'calcformer explain "{" ".join(words)}" --answer "{" ".join(given["decoder_words"])}" --width {width} '
            f"--d-k {size} --d-v {size}"
        ],
    )

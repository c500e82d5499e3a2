"""Sublayers of a transformer, worked out one step after the other.

Shapes: T words read, S words attended to, D model width, H heads, E head size of queries and keys, Ev of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import kernels.nn
from calcformer.by_hand.steps import (
    MOST_TERMS,
    Check,
    Matrix,
    Step,
    attend,
    dot,
    normalise,
    number,
    numbers,
    products,
    term,
)
from calcformer.by_hand.weights import Activation, Attention, Linear
from calcformer.model.positions import Positions
from calcformer.model.rows import Rows

__all__ = ["Calculation", "Memory", "named", "product", "rows_of", "second", "shown_linear"]

Memory = tuple[torch.Tensor, Sequence[str]]  # what is attended to, (S, D), and its words


class Calculation:
    """Steps as they are worked out, and what was checked.

    Args:
        activation: of the feed-forward.
        is_pre_norm: whether a norm stands before its sublayer, and not after the sum.

    While `is_shown`, `steps` grows; of an attention it has the first head. `checks` has all that was calculated.
    """

    def __init__(self, activation: Activation = ("relu", torch.relu), is_pre_norm: bool = False) -> None:
        self.activation, self.is_pre_norm = activation, is_pre_norm
        self.steps: list[Step] = []
        self.is_shown = True
        self._told: set[str] = set()
        self._checks: dict[str, Check] = {}

    @property
    def checks(self) -> list[Check]:
        return list(self._checks.values())

    def add(self, title: str, text: str, formula: str, lines: Sequence[Sequence[Matrix]], *examples: str) -> None:
        """A step, if it is to be shown. What one before has told is not told again, nor worked out."""
        if self.is_shown:
            if text in self._told:
                text, formula, examples = "", "", ()
            self._told.add(text)
            self.steps.append(Step(title, text, formula, lines, examples))

    def check(self, check: Check) -> None:
        known = self._checks.get(check.name)
        self._checks[check.name] = known.worst(check) if known else check

    def attention(
        self,
        where: str,
        x: torch.Tensor,
        words: Sequence[str],
        weights: Attention,
        positions: Positions | None = None,
        is_causal: bool = False,
        memory: Memory | None = None,
    ) -> torch.Tensor:
        """What attention makes of x (T, D), (T, D).

        Args:
            where: which attention it is.
            positions: what turns queries and keys or is added to scores, if anything is.
            is_causal: whether a word sees none after it.
            memory: what is attended to; None for x itself.
        """
        seen, seen_words = memory or (x, words)
        linears = [weights.query, weights.key, weights.value]
        query, key, value = (
            linear(y).unflatten(-1, (weights.heads, -1)).transpose(0, 1) for linear, y in zip(linears, (x, seen, seen))
        )  # (H, T, E), (H, S, E), (H, S, Ev)
        straight, bias, blocked = query, None, None
        if positions is not None:
            query, key = (positions.turn(y[None], rows_of(words))[0] for y in (query, key))
            bias = positions.bias(rows_of(words))
        if is_causal:
            blocked = torch.ones(len(words), len(words), dtype=torch.bool).triu(1)
        scores, scaled, shares, mix, check = attend(
            where, query, key, value, blocked, None if bias is None else bias[0]
        )
        self.check(check)
        mix = mix.transpose(0, 1).flatten(1)
        output = weights.output(mix)

        (i, at), heads, size = second(words), weights.heads, query.shape[2]
        of_head = " of head 1" if heads > 1 else ""
        first = [linear.pick(range(y.shape[2])) for linear, y in zip(linears, (query, key, value))]
        text = "Q is what a word looks for, K by what it is found, V what it tells."
        if memory is not None:
            text = "The answer asks (Q), the sentence is found (K) and tells (V): memory is the encoder's last step."
        is_turned = not torch.equal(straight, query)
        if is_turned:
            text += " Then Q and K are turned, two columns at a time, by an angle that grows with the place."
        name = "x" if memory is None else "memory"
        self.add(
            f"{where}: query, key, value",
            text,
            f"Q = x W_Q, K = {name} W_K, V = {name} W_V",
            [
                [shown_linear(f"W_{letter}{of_head}", linear) for letter, linear in zip("QKV", first)],
                [
                    Matrix.of("Q", query[0], words),
                    Matrix.of("K", key[0], seen_words),
                    Matrix.of("V", value[0], seen_words),
                ],
            ],
            *[product(f"Q[{at}, 0]", x[i], first[0])] * (not is_turned),
        )
        text = "How well each query (row) fits each key (column). Softmax makes each row positive, with the sum 1."
        if bias is not None:
            text += " A learned number for the distance of the two words is added to what is scaled."
        if is_causal:
            text += " A word must not see those after it, which it is to guess: they get -inf, so weight 0."
        pair, divided = f"[{at}, {named(seen_words[0])}]", "masked" if is_causal else "scaled"
        powers = [f"e^{term(value)}" for value in scaled[0, i] if value != -math.inf]
        self.add(
            f"{where}: weights",
            text,
            f"scores = Q K^T, scaled = scores / sqrt({size}), weights = softmax(scaled)",
            [
                [
                    Matrix.of("scores", scores[0], words, seen_words),
                    Matrix.of(divided, scaled[0], words, seen_words),
                    Matrix.of("weights", shares[0], words, seen_words),
                ]
            ],
            dot(f"scores{pair}", query[0, i], key[0, 0]),
            *[f"{divided}{pair} = {number(scores[0, i, 0])} / sqrt({size}) = {number(scaled[0, i, 0])}"]
            * (bias is None),
            *[f"weights{pair} = {powers[0]} / ({' + '.join(powers)}) = {number(shares[0, i, 0])}"]
            * (len(powers) <= MOST_TERMS),
        )
        self.add(
            f"{where}: output",
            "Each word takes of every V as much as its weights say. "
            + (f"All {heads} heads stand side by side. " if heads > 1 else "")
            + "W_O brings them back to the width of x.",
            f"mix = weights V{' of each head' if heads > 1 else ''}, output = mix W_O",
            [[Matrix.of("mix", mix, words), shown_linear("W_O", weights.output), Matrix.of("output", output, words)]],
            dot(f"mix[{at}, 0]", shares[0, i], value[0, :, 0]),
            product(f"output[{at}, 0]", mix[i], weights.output),
        )
        return output

    def add_and_norm(
        self,
        where: str,
        words: Sequence[str],
        x: torch.Tensor,
        branch: torch.Tensor | None,
        norm: kernels.nn.LayerNorm | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum x + branch (T, D), or x for no branch, and the layer norm of that, or itself for no norm."""
        total, (i, at) = x if branch is None else x + branch, second(words)
        name, text, formula, examples = "x", [], [], []
        if branch is not None:
            name = "sum"
            text.append(f"What comes out is added to what went in{', and goes on so' * self.is_pre_norm}.")
            formula.append("sum = x + output")
            examples.append(f"sum[{at}, 0] = {term(x[i, 0])} + {term(branch[i, 0])} = {number(total[i, 0])}")
        lines = [[Matrix.of(name, total, words)]]
        if norm is None:
            self.add(f"{where}: add", text[0], formula[0], lines, *examples)
            return total, total
        done = normalise(f"{where.split()[0].strip(',')} norms", total, norm)
        self.check(done.check)
        lines[0] += [
            Matrix.of("", torch.cat((done.mean, done.variance), 1), words, ["mean", "variance"]),
            Matrix.of("norm", done.output, words),
        ]
        use = ", for the next step," if self.is_pre_norm else ""
        text.append(f"The norm{use} gives each row the mean 0 and the variance 1.")
        formula.append(f"norm = ({name} - mean) / sqrt(variance + {norm.eps:.12f}".rstrip("0") + ")")
        row, mean, variance = total[i], done.mean[i, 0], done.variance[i, 0]
        if len(row) <= MOST_TERMS:
            squares = " + ".join(f"({number(value)} - {term(mean)})^2" for value in row)
            examples += [
                f"mean[{at}] = ({' + '.join(map(term, row))}) / {len(row)} = {number(mean)}",
                f"variance[{at}] = ({squares}) / {len(row)} = {number(variance, 4)}",
            ]
        last = f"({number(row[0])} - {term(mean)}) / sqrt({number(variance, 4)})"
        if (norm.weight != 1).any() or (norm.bias != 0).any():
            text.append("Then each column has a factor and a number to add, both learned.")
            formula[-1] += " * factor + added"
            lines.append([Matrix.of("learned", torch.stack((norm.weight, norm.bias)), ["factor", "added"])])
            last += f" * {term(norm.weight[0])} + {term(norm.bias[0])}"
        examples.append(f"norm[{at}, 0] = {last} = {number(done.output[i, 0])}")
        title = "norm" if branch is None else "add and norm"
        self.add(f"{where}: {title}", " ".join(text), ", ".join(formula), lines, *examples)
        return total, done.output

    def feed_forward(
        self, where: str, words: Sequence[str], x: torch.Tensor, expand: Linear, contract: Linear
    ) -> torch.Tensor:
        """What the feed-forward makes of x (T, D), each row by itself; (T, D)."""
        name, apply = self.activation
        hidden = apply(expand(x))
        output, (i, at) = contract(hidden), second(words)
        bend = "max(0, {})" if name == "relu" else f"{name}({{}})"
        how = "all that is negative cut to 0" if name == "relu" else f"bent by {name}"
        sums = products(x[i], expand.weight[:, 0], None if expand.bias is None else expand.bias[0])
        self.add(
            where,
            f"Each word by itself: wider, {how}, and back.",
            f"hidden = {bend.format('x W_1')}, output = hidden W_2",
            [
                [
                    shown_linear("W_1", expand),
                    Matrix.of("hidden", hidden, words),
                    shown_linear("W_2", contract),
                    Matrix.of("output", output, words),
                ]
            ],
            f"hidden[{at}, 0] = {bend.format(sums)} = {number(hidden[i, 0])}",
            product(f"output[{at}, 0]", hidden[i], contract),
        )
        return output


def rows_of(words: Sequence[str]) -> Rows:
    """Where the words of one sequence stand."""
    return Rows(torch.zeros(1, len(words), dtype=torch.int64), None)


def second(words: Sequence[str]) -> tuple[int, str]:
    """The row of which numbers are worked out, and its name: the second, since place 0 has only 0 and 1."""
    i = min(1, len(words) - 1)
    return i, named(words[i])


def named(word: str) -> str:
    """A word within brackets beside numbers."""
    return f"'{word}'" if word.isdigit() else word


def shown_linear(name: str, linear: Linear, columns: Sequence[str] = ()) -> Matrix:
    """The weight of a linear map, with its bias as the last row."""
    weight, rows = linear.weight, numbers(linear.weight.shape[0])
    if linear.bias is not None:
        weight, rows = torch.cat((weight, linear.bias[None])), [*rows, "bias"]
    return Matrix.of(name, weight, rows, columns)


def product(name: str, x: torch.Tensor, linear: Linear) -> str:
    """The first number of what a linear map makes of x (D,), worked out."""
    return dot(name, x, linear.weight[:, 0], None if linear.bias is None else linear.bias[0])

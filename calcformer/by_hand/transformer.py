"""An encoder-decoder transformer, worked out one step after the other.

Shapes: T words read, D model width, V words in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calcformer.by_hand.calculation import Calculation, Memory, named, product, rows_of, second, shown_linear
from calcformer.by_hand.steps import MOST_TERMS, Matrix, number, term
from calcformer.by_hand.weights import Layer, Weights
from calcformer.model.positions import Positions

__all__ = ["work_out"]

MOST_WORDS = 12  # of the vocabulary, side by side
# What is added for the place t, by the kind of positions; others change attention.
PLACES = {
    "sinusoid": "place[t, 2i] = sin(t / 10000^(2i/{width})), place[t, 2i + 1] = cos(the same)",
    "course": "place[t, 2i] = sin(t), place[t, 2i + 1] = cos(t)",
    "simple": "place[t, i] = t / the most places",
    "learned": "place: learned",
}


@torch.no_grad()
def work_out(weights: Weights, source: Sequence[int], target: Sequence[int]) -> tuple[Calculation, torch.Tensor]:
    """A whole transformer: the encoder reads the words `source`, the decoder the T words `target`.

    Returns:
        the steps, and the scores (T, V) of the word that follows each of the target.
    """
    done = Calculation(weights.activation, weights.is_pre_norm)
    memory = stack(done, weights, source)
    y, words = stack(done, weights, target, memory)
    return done, predict(done, weights, y, words)


def stack(done: Calculation, weights: Weights, ids: Sequence[int], memory: Memory | None = None) -> Memory:
    """The words `ids` through the encoder, or with its output through the decoder; of the layers the first is shown.

    Returns:
        what comes out, (T, D), and the words.
    """
    where, table, positions, layers = "Encoder", weights.source_embedding, weights.source_positions, weights.encoder
    if memory is not None:
        where, table, positions, layers = "Decoder", weights.target_embedding, weights.target_positions, weights.decoder
    words = [weights.words[index] for index in ids]
    x = embed(done, where, words, table[list(ids)], positions, weights.positions)
    for place, layer in enumerate(layers):
        done.is_shown = place == 0
        x = run_layer(done, where, layer, x, words, positions, memory)
    done.is_shown = True
    if len(layers) > 1:
        text = f"The same again with weights of their own, {len(layers) - 1} times."
        done.add(f"{where}: the layers after the first", text, "", [[Matrix.of("x", x, words)]])
    if weights.final_norms is not None:
        _, x = done.add_and_norm(f"{where}, in the end", words, x, None, weights.final_norms[memory is not None])
    return x, words


def embed(
    done: Calculation, where: str, words: Sequence[str], word: torch.Tensor, positions: Positions, kind: str
) -> torch.Tensor:
    """The embedding `word` (T, D) with positions of that kind, (T, D)."""
    x, (i, at), width = positions(word, rows_of(words)), second(words), word.shape[1]
    title, text = f"{where}: words as rows of numbers", "Each word becomes its row of the embedding"
    if kind not in PLACES:
        done.add(title, f"{text}.", "x = word", [[Matrix.of("x", x, words)]])
        return x
    place = x - word
    done.add(
        title,
        f"{text}, the same wherever it stands; so a row for its place t, from 0 on, is added."
        + " Angles are in radians." * (kind in ("sinusoid", "course")),
        f"x = word + place, {PLACES[kind].format(width=width)}",
        [[Matrix.of(name, y, words) for name, y in (("word", word), ("place", place), ("x", x))]],
        *[f"place[{at}, 0] = sin({i} / 10000^(0/{width})) = {number(place[i, 0])}"] * (kind == "sinusoid"),
        f"x[{at}, 0] = {term(word[i, 0])} + {term(place[i, 0])} = {number(x[i, 0])}",
    )
    return x


def run_layer(
    done: Calculation,
    where: str,
    layer: Layer,
    x: torch.Tensor,
    words: Sequence[str],
    positions: Positions,
    memory: Memory | None,
) -> torch.Tensor:
    """x (T, D) after a layer, (T, D)."""
    norms = list(layer.norms)
    names = ["self-attention", *["cross-attention"] * (memory is not None), "feed-forward"]
    read = x  # by the next sublayer, where x is what it adds to
    if done.is_pre_norm:
        _, read = done.add_and_norm(f"{where}, before {names[0]}", words, x, None, norms.pop(0))
    for name in names:
        title = f"{where} {name}"
        if name == "self-attention":
            branch = done.attention(title, read, words, layer.attention, positions, is_causal=memory is not None)
        elif name == "cross-attention" and layer.cross_attention is not None:
            branch = done.attention(title, read, words, layer.cross_attention, memory=memory)
        else:
            branch = done.feed_forward(title, words, read, layer.expand, layer.contract)
        total, read = done.add_and_norm(title, words, x, branch, norms.pop(0) if norms else None)
        x = total if done.is_pre_norm else read
    return x


def predict(done: Calculation, weights: Weights, x: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
    """Scores of all words, (T, V), to follow each of the words read, from x (T, D)."""
    scores = weights.prediction(x)
    p, (i, at), known = scores.softmax(-1), second(words), weights.words
    chosen = sorted(p.amax(0).topk(min(MOST_WORDS, len(known))).indices.tolist())
    likeliest = f" (the {MOST_WORDS} likeliest of {len(known)})" if len(chosen) < len(known) else ""
    names, linear = [known[index] for index in chosen], weights.prediction.pick(chosen)
    pair, powers = f"[{at}, {named(names[0])}]", [f"e^{term(value)}" for value in scores[i]]
    share = f"p{pair} = {powers[chosen[0]]} / ({' + '.join(powers)}) = {number(p[i, chosen[0]])}"
    done.add(
        "Scores of words, and softmax",
        "A score for every word to come next. Softmax makes probabilities of them, and the likeliest word is said.",
        "scores = x W, p = softmax(scores)",
        [
            [shown_linear(f"W{likeliest}", linear, names)],
            [
                Matrix.of(f"scores{likeliest}", scores[:, chosen], words, names),
                Matrix.of(f"p{likeliest}", p[:, chosen], words, names),
            ],
        ],
        product(f"scores{pair}", x[i], linear),
        *[share] * (len(known) <= MOST_TERMS),
    )
    return scores

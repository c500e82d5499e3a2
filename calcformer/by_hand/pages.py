"""Pages of a whole transformer: with drawn weights for any sentence, or with those of a trained run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from calcformer.attention_maps import attention_maps
from calcformer.by_hand.calculation import Calculation
from calcformer.by_hand.steps import Check, Page, Step, allowed, apart, number
from calcformer.by_hand.transformer import work_out
from calcformer.by_hand.weights import draw_weights, weights_of
from calcformer.errors import InputError, shown
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.settings import ModelConfig
from calcformer.solver import Solver

__all__ = ["KERNELS", "PRECISION", "draw_page", "run_page", "words_of"]

BEGIN, END = "<begin>", "<end>"
MOST_SENTENCE = 64  # words
MOST_TOKENS = 200  # of a run's vocabulary: a column each in its last tables
SENTENCE, ANSWER = "You win, you live!", "you live"
PRECISION = "Two digits are shown and all are calculated with: from those shown you may get a little more or less."
KERNELS = (
    "The same by this package: two loops over queries and keys, and no loop but whole matrices, by kernels.reference; "
    "fused by kernels.scaled_dot_product_attention and kernels.layer_norm."
)


def words_of(text: str, name: str = "the text") -> list[str]:
    """The words of a sentence, in small letters, without punctuation.

    Args:
        name: what an error calls it.

    Raises:
        InputError: there is none, or there are too many.
    """
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())
    if not words:
        raise InputError(f"{name} must have a word of letters or digits, got {shown(text)}; try: {SENTENCE}")
    if len(words) > MOST_SENTENCE:
        raise InputError(f"{name} must have at most {MOST_SENTENCE} words, got {len(words)}; give a shorter one")
    return words


def draw_page(
    sentence: str = SENTENCE,
    answer: str = ANSWER,
    width: int = 4,
    heads: int = 1,
    hidden: int = 4,
    key_size: int | None = None,
    value_size: int | None = None,
    seed: int = 0,
) -> Page:
    """A transformer of one encoder layer and one decoder layer, its weights drawn.

    Args:
        sentence: what the encoder reads.
        answer: what the decoder is to say.
        width, heads, hidden: D, H, and the width of the feed-forward.
        key_size, value_size: of each head; None for width / heads.
        seed: of the weights.

    Raises:
        InputError: a sentence has no word, or too many; or heads do not divide the width and have no sizes.
    """
    source, target = words_of(sentence, "the sentence"), words_of(answer, "--answer")
    if width % heads and None in (key_size, value_size):
        raise InputError(
            f"--width must be a multiple of --heads, got {width} and {heads}; change one, or give --d-k and --d-v"
        )
    key_size, value_size = key_size or width // heads, value_size or width // heads
    words = list(dict.fromkeys([BEGIN, END, *source, *target]))
    weights = draw_weights(words, width, heads, hidden, key_size, value_size, seed)
    id_of = {word: index for index, word in enumerate(words)}
    ids, say = [id_of[word] for word in source], [id_of[word] for word in (*target, END)]
    read = [id_of[BEGIN], *say[:-1]]
    done, scores = work_out(weights, ids, read)
    p = scores.softmax(-1)
    losses = [-p[i, right].log() for i, right in enumerate(say)]
    told = [
        f"After {words[seen]} it says {words[int(p[i].argmax())]}; right is {words[right]}, of which p is "
        f"{number(p[i, right], 4)}, so its loss is -ln({number(p[i, right], 4)}) = {number(losses[i])}."
        for i, (seen, right) in enumerate(zip(read, say))
    ]
    reads = f"The encoder reads {listed(ids)}; the decoder reads {listed(read)} and is to say {listed(say)}."
    sizes = f"d_k = {key_size}, d_v = {value_size}"
    return Page(
        f'A transformer by hand: "{" ".join(source)}" -> "{" ".join(target)}"',
        [
            f"Width {width}, {heads} {'head' if heads == 1 else 'heads'} ({sizes}), feed-forward {hidden}, a layer of "
            f"encoder and one of decoder. The weights are drawn (seed {seed}), not trained. {PRECISION}"
        ],
        [vocabulary_step(words, reads), *with_notes(done, told)],
        done.checks,
        KERNELS,
        [
            f"The mean loss is {number(sum(losses) / len(losses))}. Training changes all weights, little by little, so "
            "that it falls."
        ],
    )


def run_page(run: Path, question: str) -> Page:
    """A trained run at work on a problem, with its own weights: of many layers and heads the first in full.

    Raises:
        InputError: there is no such run, it was not trained for such a problem, or its model is of another kind.
    """
    solver = Solver(run, "cpu")
    model, settings, vocabulary = solver.model, solver.config.model, solver.task.vocabulary
    if not isinstance(model, EncoderDecoder) or not isinstance(settings, ModelConfig):
        raise InputError(f"{run}: its model is no encoder and decoder, which is what can be worked by hand")
    if len(vocabulary) > MOST_TOKENS or solver.task.source_vocabulary is not vocabulary:
        raise InputError(
            f"{run}: by hand there is one vocabulary of up to {MOST_TOKENS} tokens for source and target, and this run "
            f"has {len(vocabulary):,}{' for the target' if len(vocabulary) <= MOST_TOKENS else ''}; give another run"
        )
    maps = attention_maps(solver, question)
    source, target, said = ([vocabulary.tokens.index(x) for x in row] for row in (maps.source, maps.target, maps.said))
    weights = weights_of(model, vocabulary.tokens, settings)
    done, scores = work_out(weights, source, target)
    with torch.no_grad():
        theirs = model(torch.tensor([source]), torch.tensor([target]))[0]
    found = {"two loops": float("nan"), "no loop": float("nan"), "fused": apart([scores], [theirs])}
    p = scores.softmax(-1)
    told = [
        f"After {read} it says {word} (p = {number(p[i, index])})."
        for i, (read, word, index) in enumerate(zip(maps.target, maps.said, said))
    ]
    reads = f"The encoder reads {listed(source)}. The decoder reads what it has said itself: {listed(target)}."
    layers = f"{len(weights.encoder)} + {len(weights.decoder)} layers of {settings.heads} heads"
    return Page(
        f"A trained transformer by hand: {maps.answer.problem}",
        [
            f"The weights are those of {solver}: {layers}, width {settings.width}. Shown are the first "
            f"layer of encoder and decoder, and the first head. {PRECISION}"
        ],
        [vocabulary_step(vocabulary.tokens, reads), *with_notes(done, told)],
        [*done.checks, Check("the run's own scores", found, allowed(theirs))],
        KERNELS,
        [str(maps.answer)],
    )


def listed(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def vocabulary_step(words: Sequence[str], reads: str) -> Step:
    """Which number stands for which word, and what is read."""
    numbered = ", ".join(f"{index} {word}" for index, word in enumerate(words))
    return Step("Vocabulary", f"Every different word has a number: {numbered}.", notes=[reads])


def with_notes(done: Calculation, notes: Sequence[str]) -> list[Step]:
    """The steps of a calculation, the last one with notes."""
    return [*done.steps[:-1], replace(done.steps[-1], notes=notes)]

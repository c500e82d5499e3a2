"""Text from a language model: each token drawn from the scores of the model, which then reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from calcformer.errors import InputError, shown
from calcformer.memory import free_memory
from calcformer.model.decoder_only import DecoderOnly

__all__ = ["generate", "probabilities"]


def probabilities(scores: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """What the next token is drawn from: softmax(scores / temperature), cut to the likeliest tokens, scaled to sum 1.

    Args:
        scores: (B, V).
        temperature: above 0; below 1 favours likely tokens.
        top_k: how many of the likeliest are kept, 0 for all.
        top_p: of these, the fewest whose probabilities sum to top_p or more are kept; 0 keeps one.

    Of equal tokens the lower ones are the likelier. top_k comes before top_p.

    Returns:
        (B, V) float64.

    Source: top-p: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    scores = scores.double()
    chance = ((scores - scores.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)  # however small temperature is
    if top_k == 0 and top_p == 1.0:
        return chance
    best, token = chance.sort(dim=1, descending=True, stable=True)
    if top_k:
        best[:, top_k:] = 0.0
        best /= best.sum(dim=1, keepdim=True)
    if top_p < 1.0:
        enough = best.cumsum(dim=1) >= top_p
        best[:, 1:].masked_fill_(enough[:, :-1], 0.0)
        best /= best.sum(dim=1, keepdim=True)
    return torch.zeros_like(chance).scatter_(1, token, best)


def draw(chance: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The tokens (B,) at which the sum of chance (B, V) exceeds uniform (B,), from 0 to below 1, times all of it."""
    total = chance.cumsum(dim=1)
    return torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True).squeeze(1)


def check(prompts: list[list[int]], size: int, length: int, temperature: float, top_k: int, top_p: float) -> None:
    """InputError for the first argument of `generate` that is wrong."""
    if not (isinstance(length, int) and length >= 1):
        raise InputError(f"length must be a whole number of tokens, 1 or more, got {shown(length)}")
    if not 0.0 <= temperature < math.inf:
        raise InputError(f"temperature must be 0, for the likeliest token, or more, got {shown(temperature)}")
    if not (isinstance(top_k, int) and top_k >= 0):
        raise InputError(f"top_k must be a whole number of tokens, or 0 for all, got {shown(top_k)}")
    if not 0.0 <= top_p <= 1.0:
        raise InputError(f"top_p must be 0 to 1, got {shown(top_p)}")
    for prompt in prompts:
        if not isinstance(prompt, list):
            raise InputError(f"prompts must be lists of token ids, one a text, got {shown(prompt)}; put it in a list")
        if not prompt:
            raise InputError("a prompt must have at least one token, got an empty one; begin with a token of the text")
        wrong = [token for token in prompt if not 0 <= token < size]
        if wrong:
            raise InputError(f"a token of a prompt must be 0 to {size - 1}, got {shown(wrong[0])}")


def check_room(model: DecoderOnly, rows: int, length: int) -> None:
    """InputError where texts of so many tokens, prompts included, would take more memory than is free, roughly."""
    weights = model.embedding.weight
    window = min(model.context, length)
    inner = sum(model.layers[0].attention.sizes)
    kept = 2 * len(model.layers) * window * inner  # keys and values, and once more while texts end
    work = window * (inner + 8 * weights.shape[1]) + 12 * model.vocabulary_size  # probabilities are float64, and sorted
    needed, free = rows * (16 * length + weights.element_size() * (kept + work)), free_memory(weights.device)
    if needed > free:
        raise InputError(
            f"{rows} texts of {length} tokens would take about {needed / 1e9:,.1f} GB of memory and "
            f"{free / 1e9:,.1f} GB are free; ask for fewer or shorter ones"
        )


@torch.no_grad()
def generate(
    model: DecoderOnly,
    prompts: Sequence[Sequence[int]] | torch.Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    end_id: int | None = None,
) -> list[list[int]]:
    """Go on with each prompt, all side by side: each token is fed once, to a model that keeps keys and values.

    Prompts of different lengths begin together, and the shorter one is done with its prompt first: nothing is padded.
    Beyond the context of the model, each token is said from the last tokens that the context holds, as if the text
    began with them; this reads all of them again for every token. It is so for every kind of positions (learned ones
    say nothing of later places).

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one each; or (B, T) int64.
        length: tokens to say.
        temperature, top_k, top_p: see `probabilities`. Temperature 0 says the likeliest token, of equal ones the first.
        seed: row i draws from a generator of its own with seed + i: what it says depends on no other row (but by
            rounding). None draws from torch's global generator.
        end_id: the token that ends a text.

    Returns:
        What follows each prompt: `length` tokens, or those up to end_id, which is then the last.

    Raises:
        InputError: an argument is wrong, as its message says, or the model's scores are not numbers.
    """
    begun = [torch.as_tensor(prompt, dtype=torch.long).tolist() for prompt in prompts]
    check(begun, model.vocabulary_size, length, temperature, top_k, top_p)
    if not begun:
        return []
    device = model.embedding.weight.device
    check_room(model, len(begun), max(map(len, begun)) + length)
    known = torch.tensor([len(prompt) for prompt in begun])
    shortest, longest = int(known.min()), int(known.max())
    text = torch.zeros(len(begun), longest + length, dtype=torch.long)
    for row, prompt in zip(text, begun):
        row[: len(prompt)] = torch.tensor(prompt)
    if seed is None:
        uniform = torch.rand(len(begun), length, dtype=torch.float64)
    else:
        generators = [torch.Generator().manual_seed((seed + row) % 2**63) for row in range(len(begun))]
        uniform = torch.stack([torch.rand(length, dtype=torch.float64, generator=x) for x in generators])
    text, known, uniform = text.to(device), known.to(device), uniform.to(device)
    end = known + length
    rows = torch.arange(len(begun), device=device)  # the prompt of each row that is in the work
    cache = None
    for place in range(shortest, longest + length):
        if place > model.context:
            _, scores = model.start(text[rows, place - model.context : place], model.context)
        elif cache is None:
            cache, scores = model.start(text[:, :place], min(model.context, longest + length))
        else:
            scores = model.next(text[rows, place - 1], cache)
        if not bool(scores.amax(dim=1).isfinite().all()):
            raise InputError("the model's scores are infinite or NaN; train it again, with a lower learning rate")
        if temperature == 0:
            said = scores.argmax(dim=1)
        else:
            step = (place - known[rows]).clamp(min=0)
            said = draw(probabilities(scores, temperature, top_k, top_p), uniform[rows, step])
        in_prompt = place < known[rows]
        text[rows, place] = torch.where(in_prompt, text[rows, place], said)
        done = end[rows] == place + 1
        if end_id is not None:
            done = done | ((said == end_id) & ~in_prompt)
        if bool(done.any()):
            end[rows[done]] = place + 1
            kept = (~done).nonzero().squeeze(1)
            rows = rows[kept]
            if not len(rows):
                break
            if cache is not None and place < model.context:
                cache.select(kept)
    return [row[first:last].tolist() for row, first, last in zip(text, known.tolist(), end.tolist())]

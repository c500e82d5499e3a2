"""From a problem to its answer: the decoder's own words are fed back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from calcformer.errors import InputError, shown

if TYPE_CHECKING:
    from calcformer.data import Vocabulary
    from calcformer.model.encoder_decoder import EncoderDecoder

__all__ = ["beam_search", "best_token", "decode", "greedy_decode", "log_probability"]

BATCH = 2_000  # hypotheses at once: with many more, what a layer gives is no longer in a CPU's cache for the next
WIDEST = 100_000  # beam; of answers with fewer beginnings it finds every one
BLOCK = 64  # tokens
MANY = 8 * BLOCK  # tokens, from which on a search by blocks is faster
KEPT_SHARE = 0.8  # finished rows leave the work when those still running are fewer than this share


def behind_end(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Which places of tokens (..., T) stand behind an end token: (..., T) bool."""
    ends = (tokens == eos_id).int()
    return ends.cumsum(dim=-1) > ends


def fill_token(vocabulary: Vocabulary) -> int:
    """What stands behind an answer's end token: padding, or the end token where there is no padding."""
    return vocabulary.eos_id if vocabulary.pad_id is None else vocabulary.pad_id


def best_token(scores: torch.Tensor) -> torch.Tensor:
    """`scores.argmax(dim=-1)`: the first of the highest of scores (..., V), (...) int64.

    On a CPU PyTorch finds how high the highest is in a fifth of the time in which it finds its place: so that is done
    for each block of tokens, and the place looked for in the best block.
    """
    size = scores.shape[-1]
    if size < MANY or not scores.is_cpu or torch.compiler.is_compiling():
        return scores.argmax(dim=-1)
    whole = size // BLOCK * BLOCK
    blocks = scores[..., :whole].unflatten(-1, (-1, BLOCK))
    best, block = blocks.amax(dim=-1).max(dim=-1)
    within = blocks.take_along_dim(block[..., None, None], dim=-2).squeeze(-2).argmax(dim=-1)
    place = block * BLOCK + within
    if whole < size:
        last = scores[..., whole:].argmax(dim=-1) + whole
        highest = scores.take_along_dim(last[..., None], dim=-1).squeeze(-1)
        # A NaN counts as higher than any number, the first one most.
        place = torch.where((highest > best) | (highest.isnan() & ~best.isnan()), last, place)
    return place


def check_beam(width: int) -> None:
    """InputError where no search has this width."""
    if not 1 <= width <= WIDEST:
        raise InputError(f"beam width must be 1 to {WIDEST}, got {shown(width)}")


@torch.no_grad()
def greedy_decode(model: EncoderDecoder, source: torch.Tensor, length: int, vocabulary: Vocabulary) -> torch.Tensor:
    """Answer with the most probable token at each place, until every row has said the end token.

    The source is encoded once, and each token is fed once. Padding is never said: it means nothing within an answer.

    Args:
        model: in evaluation mode.
        source: (B, S) int64.
        length: the most tokens to say, end token included.

    Returns:
        (B, length) int64 without the begin token; the places after a row's end token hold padding, or the end
        token where the vocabulary has no padding.
    """
    fill = fill_token(vocabulary)
    said = torch.full((source.shape[0], length), fill, dtype=torch.long, device=source.device)
    token = torch.full_like(said[:, 0], vocabulary.bos_id)
    finished = torch.zeros_like(token, dtype=torch.bool)
    rows = torch.arange(len(token), device=source.device)  # the place in `said` of each row that is in the work
    cache = model.start(model.encode(source), length)
    for place in range(length):
        scores = model.next(token, cache)
        if vocabulary.pad_id is not None:
            scores[:, vocabulary.pad_id] = -torch.inf
        token = best_token(scores)
        said[rows, place] = token
        finished = finished | (token == vocabulary.eos_id)
        running = len(rows) - int(finished.sum())
        if running == 0:
            break
        if running < KEPT_SHARE * len(rows):
            kept = (~finished).nonzero().squeeze(1)
            cache.select(kept)
            rows, token, finished = rows[kept], token[kept], finished[kept]
    return said.masked_fill_(behind_end(said, vocabulary.eos_id), fill)


def length_factor(length: int, alpha: float) -> float:
    """What the score of a hypothesis of `length` tokens is divided by."""
    return float(((5 + length) / 6) ** alpha)


def take_best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest of each row of scores (B, N), and their columns: (B, count) each, of equal ones the first."""
    best, column = scores.sort(dim=1, descending=True, stable=True)  # topk leaves the order of equal ones open
    return best[:, :count], column[:, :count]


@torch.no_grad()
def beam_search(
    model: EncoderDecoder,
    source: torch.Tensor,
    length: int,
    vocabulary: Vocabulary,
    width: int,
    length_penalty: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best answers found when the `width` best beginnings are followed instead of one.

    Of all continuations of a problem's running hypotheses the `width` most probable are taken at each place, the
    earlier hypothesis and the lower token first where they are equal. Those that end are finished and leave the beam,
    as do those that reach `length`; width 1 is greedy decoding. A running hypothesis y is given up when `width`
    finished ones are as good as it can become: its log-probability only falls, and what it is divided by is at most
    the factor of `length`, so its score ends at or below log p(y) / factor(length).

    Args:
        model: in evaluation mode.
        source: (B, S) int64.
        length: the most tokens to say, end token included.
        width: hypotheses followed, and answers given, for a problem.
        length_penalty: alpha, 0 or more; finished answers are compared by log p / ((5 + T) / 6)^alpha with T tokens,
            end token included. 0, plain probability, suits answers of which just one is right; longer ones gain by
            more.

    Returns:
        tokens (B, width, length) int64, as from `greedy_decode`, the best first, and those scores (B, width) float64;
        -inf where a problem has fewer answers.

    Raises:
        InputError: width below 1 or above 100,000, or a negative length_penalty.

    Source: Graves 2012, "Sequence transduction with recurrent neural networks"; the length penalty is that of Wu et al.
    2016, "Google's neural machine translation system", equation 14.
    """
    check_beam(width)
    if not length_penalty >= 0:
        raise InputError(f"length_penalty must be 0 or more, got {length_penalty}")
    problems, device = source.shape[0], source.device
    tokens = torch.full((problems, width, length), fill_token(vocabulary), dtype=torch.long, device=device)
    answers = tokens.clone()
    scores = torch.full((problems, width), -torch.inf, dtype=torch.float64, device=device)
    first = torch.arange(problems, device=device)[:, None] * width  # slot of each problem's first hypothesis
    slots = first.squeeze(1)  # of the B * W slots of the beam, the one of each row of the cache
    running = torch.zeros(problems, dtype=torch.float64, device=device)  # log p of each row of the cache
    token = torch.full_like(slots, vocabulary.bos_id)
    cache = model.start(model.encode(source), length)
    for place in range(length):
        log_p = model.next(token, cache).double().log_softmax(dim=-1)
        if vocabulary.pad_id is not None:
            log_p[:, vocabulary.pad_id] = -torch.inf
        size = log_p.shape[1]
        grid = log_p.new_full((problems * width, size), -torch.inf)
        grid[slots] = log_p + running[:, None]
        best, choice = take_best(grid.view(problems, -1), width)
        parent, said = choice // size, choice % size
        tokens = tokens.gather(1, parent[..., None].expand_as(tokens))
        tokens[:, :, place] = said
        ends = said == vocabulary.eos_id if place < length - 1 else torch.ones_like(said, dtype=torch.bool)

        final = (best / length_factor(place + 1, length_penalty)).masked_fill(~ends, -torch.inf)
        scores, order = take_best(torch.cat((scores, final), dim=1), width)
        answers = torch.cat((answers, tokens), dim=1).gather(1, order[..., None].expand_as(answers))

        bound = best / length_factor(length, length_penalty)
        live = (~ends & (bound > scores[:, -1:])).flatten().nonzero().squeeze(1)
        if len(live) == 0:
            break
        row_of_slot = torch.empty(problems * width, dtype=torch.long, device=device)
        row_of_slot[slots] = torch.arange(len(slots), device=device)
        cache.select(row_of_slot[(first + parent).flatten()[live]])
        slots, running, token = live, best.flatten()[live], said.flatten()[live]
    return answers, scores


def decode(
    model: EncoderDecoder,
    source: torch.Tensor,
    length: int,
    vocabulary: Vocabulary,
    beam: int = 1,
    batch_size: int = BATCH,
    advance: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """The best answer to each of any number of problems, a batch at a time.

    Problems of one length go together: most batches then have no padding, which makes decoding a fifth faster.

    Args:
        model, source, length, vocabulary: as for `greedy_decode`.
        beam: the width of `beam_search`; 1 decodes greedily.
        batch_size: hypotheses followed at once.
        advance: called with the number of problems answered, after each batch.

    Returns:
        (B, length) int64, as from `greedy_decode`.

    Raises:
        InputError: beam below 1 or above 100,000.
    """
    check_beam(beam)
    said = torch.empty(source.shape[0], length, dtype=torch.long, device=source.device)
    if vocabulary.pad_id is None:
        lengths = torch.full_like(said[:, 0], source.shape[1])
    else:
        lengths = (source != vocabulary.pad_id).sum(dim=1)
    order, size = lengths.argsort(stable=True), max(batch_size // beam, 1)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        part = source[rows, : int(lengths[rows[-1]])]  # the last is the longest
        said[rows] = (
            greedy_decode(model, part, length, vocabulary)
            if beam == 1
            else beam_search(model, part, length, vocabulary, beam)[0][:, 0]
        )
        advance(len(rows))
    return said


@torch.no_grad()
def log_probability(
    model: EncoderDecoder, source: torch.Tensor, answers: torch.Tensor, vocabulary: Vocabulary
) -> torch.Tensor:
    """The natural logarithm of the probability the model gives to each answer, end token included.

    Args:
        model: in evaluation mode.
        source: (B, S) int64.
        answers: (B, T) int64, as `greedy_decode` gives them; at most one a source.

    Returns:
        (B,) float64.
    """
    begin = torch.full_like(answers[:, :1], vocabulary.bos_id)
    scores = model(source, torch.cat((begin, answers[:, :-1]), dim=1)).double().log_softmax(dim=-1)
    said = scores.gather(2, answers[..., None]).squeeze(2)
    return said.masked_fill(behind_end(answers, vocabulary.eos_id), 0.0).sum(dim=1)

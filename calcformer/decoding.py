"""From a problem to its answer: the decoder's own words are fed back to it."""

import torch

from calcformer.data import Vocabulary
from calcformer.model import EncoderDecoder

__all__ = ["greedy_decode"]


@torch.no_grad()
def greedy_decode(model: EncoderDecoder, source: torch.Tensor, length: int, vocabulary: Vocabulary) -> torch.Tensor:
    """Answer with the most probable token at each place, until every row has said the end token.

    The source is encoded once.

    Args:
        model: in evaluation mode.
        source: (B, S) int64.
        length: the most tokens to say, end token included.

    Returns:
        (B, length) int64 without the begin token; the places after a row's end token hold padding, or the end
        token where the vocabulary has no padding.
    """
    memory = model.encode(source)
    fill = vocabulary.eos_id if vocabulary.pad_id is None else vocabulary.pad_id
    said = torch.full((source.shape[0], length + 1), fill, dtype=torch.long, device=source.device)
    said[:, 0] = vocabulary.bos_id
    finished = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
    for place in range(length):
        token = model.decode(said[:, :place + 1], memory)[:, -1].argmax(dim=-1)
        said[:, place + 1] = torch.where(finished, fill, token)
        finished |= token == vocabulary.eos_id
        if finished.all():
            break
    return said[:, 1:]

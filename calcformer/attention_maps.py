"""What every head of a trained run attends to while it answers a problem, as pictures and for BertViz."""

import hashlib
import json
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from calcformer.decoding import greedy_decode
from calcformer.errors import InputError
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.weights import attention_weights
from calcformer.plots import can_draw, save_heads, visible
from calcformer.runs.files import write_atomically
from calcformer.solver import Answer, Solver

__all__ = ["AttentionMaps", "attention_maps", "folder_name", "head_view", "save_head_view", "save_maps"]

MOST_TOKENS = 200  # whose pictures can be looked at
LONGEST_NAME = 60  # characters of a folder's name: with the hash at most 249 bytes, and 255 is what a name may have


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of one problem and the model's own greedy answer to it.

    Args:
        answer: that answer, its probability, and what is right.
        source: the S tokens of the problem, where an encoder reads it.
        target: the T tokens the decoder reads: the begin token and the answer, or without an encoder the problem.
        said: the T tokens it says at those places: the answer and the end token, or without an encoder the likeliest;
            none where a model says one token only.
        encoder, decoder, cross: by layer, (1, H, S, S), (1, H, T, T) and (1, H, T, S) on the CPU; rows sum to 1.
    """

    answer: Answer
    source: list[str]
    target: list[str]
    said: list[str]
    encoder: list[torch.Tensor]
    decoder: list[torch.Tensor]
    cross: list[torch.Tensor]


@torch.no_grad()
def attention_maps(solver: Solver, question: str) -> AttentionMaps:
    """Answer one problem and look at the attention weights; InputError where the run was not trained for it."""
    vocabulary = solver.task.vocabulary
    examples = solver.task.ask([solver.task.read_question(question)]).to(solver.device)
    ids = examples.trim(vocabulary.pad_id).inputs[0]
    source, target, said, inputs = [], ids[0].tolist(), [], [ids]
    if isinstance(solver.model, EncoderDecoder):
        source, said = target, greedy_decode(solver.model, ids, solver.task.target_length - 1, vocabulary)[0].tolist()
        if vocabulary.eos_id in said:
            said = said[: said.index(vocabulary.eos_id) + 1]
        target = [vocabulary.bos_id, *said[:-1]]
        inputs.append(torch.tensor([target], device=solver.device))
    elif (scores := solver.model(ids)).dim() == 3:  # (1, T, V)
        said = scores[0].argmax(dim=1).tolist()
    layers = [[layer.cpu() for layer in stack] for stack in attention_weights(solver.model, *inputs)]
    if not any(layers):
        raise InputError(f"{solver.folder}: a {solver.config.model.kind} model has no attention; give a run of another")
    read, known = solver.task.source_vocabulary.name, vocabulary.name
    names = list(map(read, source)), list(map(known, target)), list(map(known, said))
    return AttentionMaps(solver.answers([question])[0], *names, *layers)


def save_maps(maps: AttentionMaps, folder: Path) -> list[Path]:
    """Draw every layer and kind of attention to a PNG of its own, with a panel for each head; returns their names.

    A row of the decoder is named after the token it reads and the one it says: `<bos> → 1`.

    Raises:
        InputError: matplotlib is not installed, or there are too many tokens; nothing is written then.
    """
    if not can_draw():
        raise InputError("pictures need matplotlib; install it with: pip install matplotlib")
    longest = max(len(maps.source), len(maps.target))
    if longest > MOST_TOKENS:
        raise InputError(f"pictures show at most {MOST_TOKENS} tokens, got {longest}; give a shorter text")
    verdict = f" ({maps.answer.verdict})" if maps.answer.verdict else ""
    problem = f"{maps.answer.equation}{verdict}"
    steps = [f"{visible(token)} → {visible(after)}" for token, after in zip(maps.target, maps.said)] or maps.target
    reads, says = "attends to", "token read → said" if maps.said else "token"
    kinds = (
        ("encoder-self", maps.encoder, maps.source, maps.source, ("token", reads)),
        ("decoder-self", maps.decoder, steps, maps.target, (says, reads)),
        ("decoder-cross", maps.cross, steps, maps.source, (says, reads)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, layers, queries, keys, labels in kinds:
        for number, weights in enumerate(layers, start=1):
            title = f"{problem}\n{kind.replace('-', ' ')} attention, layer {number}"
            paths.append(folder / f"{kind}-{number}.png")
            save_heads(weights[0].tolist(), queries, keys, labels, title, paths[-1])
    return paths


def folder_name(question: str) -> str:
    """A problem as the name of a folder; of a long one the beginning and a hash of the whole."""
    name = re.sub(r"[^\w+-]+", "_", question.strip())
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(question.encode('utf-8', 'replace')).hexdigest()[:8]}"


def head_view(run: str | PathLike[str], question: str, device: str = "auto") -> dict[str, Any]:
    """The arguments of BertViz's head_view and model_view: bertviz.head_view(**head_view("runs/formula-1", "12+7")).

    Args:
        run: the folder that training wrote.
        question: such as "649+864".
        device: auto, cpu, cuda or cuda:N.

    Returns:
        encoder_attention, decoder_attention, cross_attention: lists over layers of (1, H, L, S) float32;
        encoder_tokens, decoder_tokens: lists of tokens, the decoder's as it reads them. Without an encoder attention
        and tokens, likewise.
    """
    return head_view_arguments(attention_maps(Solver(run, device), question))


def head_view_arguments(maps: AttentionMaps) -> dict[str, Any]:
    """See `head_view`."""
    if not maps.source:
        return {"attention": maps.decoder, "tokens": maps.target}
    return {
        "encoder_attention": maps.encoder,
        "decoder_attention": maps.decoder,
        "cross_attention": maps.cross,
        "encoder_tokens": maps.source,
        "decoder_tokens": maps.target,
    }


def save_head_view(maps: AttentionMaps, path: Path) -> None:
    """Write the arguments of `head_view` as JSON: each layer as nested lists, to be made a tensor again."""
    content = {
        name: [item.tolist() if isinstance(item, torch.Tensor) else item for item in items]
        for name, items in head_view_arguments(maps).items()
    }
    write_atomically(path, json.dumps(content).encode())

"""`calcformer translate`."""

from __future__ import annotations

import argparse
import sys

from calcformer.config import RunConfig
from calcformer.errors import InputError, say, tell
from calcformer.flags import Commands, add_beam, add_device, add_length_penalty, path, set_length_penalty

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "translate",
        help="translate sentences",
        description=(
            "Translate sentences by a run of the task translate; each becomes a line, an empty line stays one. Where "
            "one cannot be read, such as one that is too long, none is translated."
        ),
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run folder")
    parser.add_argument(
        "sentences", nargs="*", metavar="SENTENCE", help="in quotes (those of standard input, one a line)"
    )
    parser.add_argument("--input", type=path, metavar="FILE", help="file of sentences, one a line; may be .gz")
    parser.add_argument("--output", type=path, metavar="FILE", help="file to write translations to (standard output)")
    add_beam(parser)
    add_length_penalty(parser)
    add_device(parser)
    parser.set_defaults(work=run)


def read_sentences(arguments: argparse.Namespace) -> list[str]:
    """The sentences given, in a file or else at standard input."""
    from calcformer.tasks.language.corpus import read_bytes, read_file

    if arguments.sentences:
        if arguments.input is not None:
            raise InputError("sentences are given and in a file; leave out --input or the sentences")
        return arguments.sentences
    if arguments.input is not None:
        text = read_file(arguments.input)
    else:
        if sys.stdin.isatty():
            tell("Type sentences, one a line, and Ctrl-D to end.")
        text = read_bytes(sys.stdin.buffer.read(), "standard input")
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from calcformer.runs.device import count_cores
    from calcformer.runs.files import write_atomically
    from calcformer.solver import Solver

    sentences = read_sentences(arguments)
    if not any(sentence.strip() for sentence in sentences):
        raise InputError('no sentence was given; give one, such as: calcformer translate RUN "A man is sleeping."')
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise InputError(f"{arguments.output}: there is no folder {arguments.output.parent}; make it, or name another")
    if arguments.output is not None and arguments.output.is_dir():
        raise InputError(f"{arguments.output} is a folder; give --output a file")
    solver = Solver(arguments.run, arguments.device)
    task = solver.task
    if not task.translates:
        raise InputError(
            f"{solver.folder} is a run of {solver.config.data.task}, which translates nothing; give another"
        )
    set_length_penalty(solver, arguments.beam, arguments.length_penalty)
    torch.set_num_threads(min(solver.config.training.threads or 1, count_cores()))
    lines = [number for number, sentence in enumerate(sentences) if sentence.strip()]
    unknown: dict[str, None] = {}
    for number in lines:
        try:
            sentences[number] = task.read_question(sentences[number])
        except InputError as error:
            place = "" if arguments.sentences else f"{arguments.input or 'standard input'}, line {number + 1}: "
            raise InputError(f"{place}{error}") from None
        unknown |= dict.fromkeys(task.unknown_words(sentences[number]))
    if unknown:
        shown = ", ".join(list(unknown)[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        tell(f"words that this run never learned, read as unknown: {shown}")
    tell(f"translated by {solver}")
    examples = task.ask([sentences[number] for number in lines]).to(solver.device)
    with tqdm(total=len(lines), unit="sentence", disable=None, delay=2, leave=False) as bar:
        said = task.answer(solver.model, examples, arguments.beam, advance=bar.update)
    found = [""] * len(sentences)
    for number, ids in zip(lines, said.tolist()):
        found[number] = task.decode_answer(ids)
    if arguments.output is None:
        say("\n".join(found))
    else:
        write_atomically(arguments.output, "".join(f"{line}\n" for line in found).encode())
        tell(f"written to {arguments.output}")
    return 0

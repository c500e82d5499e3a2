"""`calcformer explain`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from calcformer.config import RunConfig
from calcformer.errors import InputError, say, tell
from calcformer.flags import Commands, path, span, whole

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "explain",
        help="a transformer worked by hand, every matrix of it",
        description=(
            "Work a small transformer by hand: every step with its matrices, to calculate along, and held to the "
            "kernels. In brackets stand the defaults."
        ),
    )
    parser.add_argument("sentence", nargs="?", metavar="SENTENCE", help="what the encoder reads (You win, you live!)")
    parser.add_argument("--answer", metavar="SENTENCE", help="what the decoder is to say (you live)")
    for flag, most, text in (
        ("--width", 256, "numbers a word (4)"),
        ("--heads", 32, "heads of each attention (1)"),
        ("--hidden", 1024, "numbers a word within the feed-forward (4)"),
        ("--d-k", 256, "numbers of a head's query and key (width / heads)"),
        ("--d-v", 256, "numbers of a head's value (width / heads)"),
    ):
        parser.add_argument(flag, type=whole(1, most), metavar="N", help=text)
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), metavar="N", help="another one draws other weights (0)")
    parser.add_argument("--run", type=path, metavar="RUN", help="with a run's weights; SENTENCE is a problem then")
    parser.add_argument("--tutorial", action="store_true", help="a tutorial's numbers, what it prints beside ours")
    parser.add_argument("--losses", action="store_true", help="six loss functions side by side instead")
    parser.add_argument("--steps", type=span, metavar="N-M", help="the steps with these numbers only: 4, or 3-6 (all)")
    parser.add_argument("--html", type=path, metavar="FILE", help="write a page for a browser instead of text")
    parser.add_argument("--picture", type=path, metavar="FILE", help="with --losses: draw them to a PNG as well")
    parser.set_defaults(work=run)


def run(arguments: argparse.Namespace) -> int:
    import shutil

    from calcformer import by_hand
    from calcformer.runs.files import write_atomically

    given = vars(arguments)
    drawn = {name: given[name] for name in ("answer", "width", "heads", "hidden", "seed")}
    drawn |= {"key_size": arguments.d_k, "value_size": arguments.d_v}
    page = by_hand.choose_page(arguments.sentence, arguments.run, arguments.tutorial, arguments.losses, drawn)
    if arguments.steps is not None:
        page = replace(page, shown=arguments.steps, closing=())
    if arguments.picture is not None and not arguments.losses:
        raise InputError("--picture is for --losses; leave it out")
    for file in arguments.html, arguments.picture:  # both, before one is written
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}; make it, or name another")
    if arguments.picture is not None:
        by_hand.draw_losses(arguments.picture)
        tell(f"drawn to {arguments.picture}")
    if arguments.html is not None:
        write_atomically(arguments.html, by_hand.write_html(page).encode())
        say(f"written to {arguments.html}")
    else:
        say(by_hand.write_text(page, shutil.get_terminal_size((by_hand.COLUMNS, 24)).columns))
    return 0 if page.agrees else 1

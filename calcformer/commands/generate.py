"""`calcformer generate`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, cast

from calcformer.config import RunConfig
from calcformer.errors import say, tell
from calcformer.flags import Commands, add_device, path, real, whole

if TYPE_CHECKING:
    from calcformer.model.decoder_only import DecoderOnly

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    parser = commands.add_parser(
        "generate",
        help="go on with a text",
        description="Let a language model go on with a text, each token drawn by its probability.",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run folder")
    parser.add_argument("beginning", nargs="?", metavar="BEGINNING", help="what the text begins with (a new line)")
    parser.add_argument("--length", type=whole(1, 1_000_000), default=200, metavar="N", help="tokens to say (200)")
    parser.add_argument(
        "--temperature",
        type=real(0, 1000),
        default=0.8,
        metavar="T",
        help="below 1 for likely tokens, above for others, 0 for the likeliest (0.8)",
    )
    parser.add_argument(
        "--top-k", type=whole(0, 10**9), default=0, metavar="K", help="of the K likeliest tokens only, 0 for all (0)"
    )
    parser.add_argument(
        "--top-p",
        type=real(0, 1),
        default=1.0,
        metavar="P",
        help="of the fewest tokens only whose probabilities sum to P (1)",
    )
    parser.add_argument("--seed", type=whole(0, 2**62), metavar="N", help="one seed, one text (another each time)")
    parser.add_argument("--count", type=whole(1, 10_000), default=1, metavar="N", help="texts (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser)
    parser.set_defaults(work=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from calcformer.sampling import generate
    from calcformer.solver import Solver

    solver = Solver(arguments.run, arguments.device)
    torch.set_num_threads(min(solver.config.training.threads or 1, torch.get_num_threads()))
    ids = solver.task.beginning(arguments.beginning)
    seed = torch.seed() % 2**32 if arguments.seed is None else arguments.seed
    drawn = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")} | {"seed": seed}
    said = generate(cast("DecoderOnly", solver.model), [ids] * arguments.count, arguments.length, **drawn)
    # With what was asked, since a piece of a word may belong to the last of it.
    texts = [solver.task.decode_answer((ids if arguments.beginning else []) + more) for more in said]
    if arguments.json:
        facts = {"run": str(solver.folder), "epoch": solver.epoch, "length": arguments.length}
        say(json.dumps({**facts, "beginning": arguments.beginning, **drawn, "texts": texts}))
    else:
        tell(f"by {solver}, seed {seed}")
        say("\n---\n".join(texts))
    return 0

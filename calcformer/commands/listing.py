"""`calcformer tasks`, `runs` and `info`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from calcformer.config import RunConfig
from calcformer.errors import say
from calcformer.flags import Commands, path

__all__ = ["add"]


def add(commands: Commands, base: RunConfig) -> None:
    tasks = commands.add_parser(
        "tasks",
        help="list what can be learned, and the presets",
        description="List what can be learned, and the presets: settings that have a name.",
    )
    runs = commands.add_parser(
        "runs",
        help="list the runs in a folder",
        description="List the runs in a folder and in those within: how far each is, its best figure, and its age.",
    )
    runs.add_argument("folder", type=path, nargs="?", default=Path("runs"), metavar="FOLDER", help="of runs (runs)")
    info = commands.add_parser(
        "info",
        help="say what is known of a run",
        description="Say what is known of a run: which settings differ from its preset's, how far it is, its figures.",
    )
    info.add_argument("run", type=path, metavar="RUN", help="run folder")
    for parser in tasks, runs, info:
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(work=run)


def run(arguments: argparse.Namespace) -> int:
    from calcformer import listing

    found: Any
    if arguments.command == "tasks":
        found, text = listing.list_tasks(), listing.tasks_text()
    elif arguments.command == "runs":
        found = listing.list_runs(arguments.folder)
        text = listing.runs_text(arguments.folder, found)
    else:
        found = listing.describe_run(arguments.run)
        text = listing.run_text(found)
    say(json.dumps(found) if arguments.json else text)
    return 0

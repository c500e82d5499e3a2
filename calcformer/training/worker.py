"""A process that helps another one train: python -m calcformer.training.worker RUN RANK SIZE SOCKET MEMORY."""

import sys
from pathlib import Path

from calcformer.errors import InputError
from calcformer.training.loop import follow
from calcformer.training.team import TeamLost, join_team


def main(folder: Path, rank: int, size: int, socket_descriptor: int, memory_descriptor: int) -> None:
    """Train the epochs that are left of the run in `folder`, as rank `rank` of `size`."""
    try:
        follow(folder, join_team(rank, size, socket_descriptor, memory_descriptor))
    except (InputError, TeamLost):
        pass  # rank 0 says it, or is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

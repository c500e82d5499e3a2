"""A process that helps another one train: python -m calcformer.training.worker RUN RANK SIZE SOCKET MEMORY."""

import sys
from pathlib import Path

import torch

from calcformer.errors import InputError
from calcformer.training.checkpoint import load_resume_state, read_config
from calcformer.training.loop import Trainer
from calcformer.training.team import TeamLost, join_team


def main(folder: Path, rank: int, size: int, socket_descriptor: int, memory_descriptor: int) -> None:
    """Train the epochs that are left of the run in `folder`, as rank `rank` of `size`."""
    config = read_config(folder)
    torch.set_num_threads(config.training.threads or 1)
    team = join_team(rank, size, socket_descriptor, memory_descriptor)
    trainer = Trainer(config, folder, bar=False, team=team)
    finished = load_resume_state(folder, trainer.model, trainer.optimizer)
    try:
        team.meet()
        for epoch in range(finished + 1, config.training.epochs + 1):
            trainer.epoch(epoch)
    except (InputError, TeamLost):
        pass  # rank 0 says it, or is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

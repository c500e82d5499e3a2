"""Processes that torchrun starts, on one machine or several, a GPU each where there are GPUs, share every step.

Rank 0 trains as it would alone and writes the run folder; the others read that folder and repeat its steps on their own
parts of the same batches. On several machines the folder must be one that all of them see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from calcformer.errors import InputError
from calcformer.training.team import Team, TeamLost, name_lost

__all__ = ["join_torchrun", "lead_torchrun"]

PATIENCE = timedelta(minutes=10)  # longer than rank 0 may take to validate, to save, or to compile


class DistributedTeam(Team):
    """Sums by all_reduce, through NCCL on GPUs and gloo on CPUs.

    The gradient is summed as one vector, after the backward pass. That is what DistributedDataParallel does with one
    bucket. Its wrapper would add a copy into that bucket, since it does not know that the gradient is in one piece.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a float32 vector by its sum over all processes; TeamLost where one ended or is too late."""
        try:
            distributed.all_reduce(tensor)
        except RuntimeError:  # a connection was closed, or timed out
            raise TeamLost from None

    def share(self, name: str) -> str:
        """The name that rank 0 gives."""
        names = [name]
        try:
            distributed.broadcast_object_list(names, src=0, device=torch.device("cpu"))
        except RuntimeError:
            raise TeamLost from None
        return names[0]


@contextmanager
def join_torchrun() -> Iterator[DistributedTeam]:
    """The team of all processes that torchrun has started."""
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the processes that torchrun started cannot meet ({reason})") from None
    yield DistributedTeam()
    distributed.destroy_process_group()  # not after an error: it would wait for what is gone


@contextmanager
def lead_torchrun(folder: Path) -> Iterator[Team]:
    """Rank 0 of the processes that train the run in `folder`, whose checkpoint stands there already.

    Raises:
        InputError: another process ended before its work was done.
    """
    with name_lost(folder), join_torchrun() as team:
        team.share(str(folder))
        team.meet()  # all have read the checkpoint
        yield team

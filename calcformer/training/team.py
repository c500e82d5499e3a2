"""Several processes of one machine that share every step: each takes a part of the batch, and the gradients are summed.

Rank 0 is the process that was started and writes the run folder; it starts the others (calcformer/worker.py).
They read the folder, repeat its steps on their own parts of the same batches, and end when rank 0 does.

Processes and a barrier of torch.multiprocessing sum as fast, but when one process is killed the other waits for ever.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from calcformer.errors import InputError
from calcformer.worker import start_worker

__all__ = ["Team", "TeamLost", "join_team", "name_lost", "start_team"]


class TeamLost(Exception):
    """Another process of the team has ended."""


class Team:
    """The processes that train together; by itself, one process that trains alone."""

    rank = 0
    size = 1

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a float32 tensor by its sum over all processes, which all call this; TeamLost where one has ended."""

    def meet(self) -> None:
        """Wait until every process is here; TeamLost where one has ended."""
        self.sum_(torch.zeros(1))


@contextmanager
def name_lost(folder: Path) -> Iterator[None]:
    """Say in words for users that a process of the team that trains `folder` has ended."""
    try:
        yield
    except TeamLost:
        raise InputError(
            "a training process ended before its time (killed, or out of memory?); "
            f"continue with: calcformer train --resume {folder}"
        ) from None


class SharedMemoryTeam(Team):
    """Processes that put their vectors side by side in memory they share.

    The halves of the memory take turns: who writes into one again has seen everyone arrive with the other, and so leave
    this one. One meeting a sum is then enough.

    Args:
        rank: of this process.
        memory: (2, size, N) float32, shared by all.
        sockets: of rank 0 to each of the others; of another to rank 0.
    """

    def __init__(self, rank: int, memory: torch.Tensor, sockets: list[socket.socket]) -> None:
        self.rank, self.size = rank, memory.shape[1]
        self._memory, self._sockets = memory, sockets
        self._turn = 0

    def meet(self) -> None:
        """Wait, asleep, until every process is here; TeamLost where one has ended."""
        try:
            if self.rank == 0:
                self._hear()
            for other in self._sockets:
                other.send(b"+")
            if self.rank > 0:
                self._hear()
        except OSError:
            raise TeamLost from None

    def _hear(self) -> None:
        if not all(other.recv(1) for other in self._sockets):  # nothing comes from one that has ended
            raise TeamLost

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a float32 tensor by its sum over all processes."""
        room = self._memory.shape[2]
        if tensor.numel() > room:
            for piece in tensor.view(-1).split(room):
                self.sum_(piece)
            return
        parts = self._memory[self._turn, :, : tensor.numel()].view(self.size, *tensor.shape)
        self._turn = 1 - self._turn
        parts[self.rank].copy_(tensor)
        self.meet()
        torch.sum(parts, 0, out=tensor)


def _map_memory(descriptor: int, size: int) -> torch.Tensor:
    """The file as a tensor (2, size, N) float32."""
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.float32).view(2, size, -1)


@contextmanager
def start_team(folder: Path, size: int, length: int) -> Iterator[Team]:
    """Rank 0 of `size` processes that train the run in `folder`, whose checkpoint stands there already.

    Args:
        length: numbers that are summed at once; larger tensors are summed piece by piece.

    Raises:
        InputError: another process ended before its work was done.
    """
    if size == 1:
        yield Team()
        return
    with ExitStack() as stack:
        # A file without a name, in memory where the system has a place for that: nothing is left behind by a kill.
        place = "/dev/shm" if os.path.isdir("/dev/shm") else None
        file = stack.enter_context(tempfile.TemporaryFile(dir=place))
        file.truncate(2 * size * length * torch.float32.itemsize)
        sockets = []
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            sockets.append(stack.enter_context(ours))
            with theirs:
                shared = theirs.fileno(), file.fileno()
                worker = stack.enter_context(
                    start_worker("calcformer.training.loop", folder, rank, size, *shared, pass_fds=shared)
                )
            stack.callback(worker.kill)
        team = SharedMemoryTeam(0, _map_memory(file.fileno(), size), sockets)
        with name_lost(folder):
            team.meet()  # all have read the checkpoint
            yield team


def join_team(rank: int, size: int, socket_descriptor: int, memory_descriptor: int) -> SharedMemoryTeam:
    """The team that `start_team` in another process has made place in for this one."""
    return SharedMemoryTeam(rank, _map_memory(memory_descriptor, size), [socket.socket(fileno=socket_descriptor)])

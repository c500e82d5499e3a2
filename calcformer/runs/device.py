"""Which device a process computes on, with which memory, and how many processes there are and may be."""

import ctypes
import os
from typing import NamedTuple

import torch

from calcformer.errors import InputError
from calcformer.settings import TrainingConfig

__all__ = ["check_cores", "count_cores", "count_processes", "keep_memory", "pick_device", "torchrun_place"]

KEPT = 1 << 30  # bytes


class Place(NamedTuple):
    """rank: of this process among `size`; local_rank: among those of its machine."""

    rank: int
    size: int
    local_rank: int


def torchrun_place() -> Place | None:
    """This process's place among those that torchrun, or what sets the same variables, has started; None without it."""
    try:
        return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except KeyError:
        return None


def pick_device(name: str) -> torch.device:
    """The device called `name`; InputError where there is none. Each process of torchrun has a GPU of its own."""
    place = torchrun_place()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and place is not None:
        name = f"cuda:{place.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not here ({torch.cuda.device_count()} GPUs found); use --device cpu"
            f"{', or fewer processes' if place is not None else ''}"
        )
    return device


def keep_memory() -> None:
    """Let the C library keep up to a gigabyte of what this process frees, for what it asks for next.

    A step of training frees and takes the same memory again and again. What goes back to the system in between is
    cleared by it, page by page, which takes a few per cent of a step's time. Nothing happens without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-1, KEPT)  # M_TRIM_THRESHOLD: free memory above which some is given back
        mallopt(-3, KEPT)  # M_MMAP_THRESHOLD: size from which a block is given back as soon as it is freed


def count_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cores(processes: int, flag: str, threads: int = 1) -> None:
    """InputError where as many processes, of so many threads, would take turns on a core: that only makes all slow."""
    cores = count_cores()
    if processes * threads > cores:
        raise InputError(
            f"this would keep {processes * threads} CPU cores busy and there are {cores}; "
            f"lower {flag}{' or --threads' if threads > 1 else ''}"
        )


def count_processes(config: TrainingConfig, device: torch.device) -> int:
    """How many processes train: as many as torchrun started, else one on a GPU, else as many as the settings say.

    Raises:
        InputError: the settings say more than there are cores for, or than the system can do.
    """
    place, threads = torchrun_place(), config.threads or 1
    if place is not None:
        return place.size
    if device.type == "cuda":
        return 1
    if config.processes > 1 and os.name != "posix":
        raise InputError("several processes share memory as Linux and macOS do it; use --processes 1")
    check_cores(config.processes or 1, "--processes", threads)
    return config.processes or (2 if os.name == "posix" and 2 * threads <= count_cores() else 1)

"""How much memory a run needs, estimated before anything is built, and how much there is."""

import math
import os
from pathlib import Path

import torch

from calcformer.config import RunConfig
from calcformer.data import Task
from calcformer.errors import InputError

__all__ = ["check_memory", "free_memory", "memory_to_answer", "memory_to_train"]

PROCESS = 450 << 20  # bytes of a process that has imported PyTorch and matplotlib
FLOAT = 4  # bytes


def count_parameters(config: RunConfig, task: Task) -> int:
    """Of the model, which is built without memory for its values."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.model.build(task).parameters())


def activations(config: RunConfig, task: Task, problems: int) -> int:
    """Bytes of what a model of these settings keeps of `problems` problems for the backward pass."""
    numbers = config.model.activations(task.source_length, task.target_length, len(task.vocabulary))
    return FLOAT * problems * numbers


def memory_to_train(config: RunConfig, task: Task, processes: int) -> int:
    """Bytes that `processes` processes need together to train a run, roughly.

    Weights, their gradient, which of small ones is there twice, Adam's two moments, and weights and moments twice more
    while they are written; the activations of a batch; the problems, as numbers in Python first where they are a fixed
    list.
    """
    weights = FLOAT * count_parameters(config, task)
    problems = config.data.train_size + config.data.valid_size if task.count is None else task.count
    lists = 0 if task.fresh else 200 * problems
    data = 3 * 8 * (task.source_length + task.target_length) * problems + lists
    tokens = config.training.batch_tokens
    size = max(1, tokens // task.target_length) if tokens else config.training.batch_size
    batch = activations(config, task, math.ceil(min(size, config.data.train_size) / processes))
    shared = 2 * processes * weights if processes > 1 else 0
    return processes * (PROCESS + 11 * weights + batch + data) + shared


def memory_to_answer(config: RunConfig, task: Task, processes: int = 1) -> int:
    """Bytes that `processes` processes need together to load a run and answer problems, roughly."""
    layer = activations(config, task, task.measured_at_once) // config.model.layers
    return processes * (PROCESS + 2 * FLOAT * count_parameters(config, task) + layer)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device: of this machine's memory, or of what a container leaves this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        used = {name: int(value) for name, value in map(str.split, (group / "memory.stat").read_text().splitlines())}
        limit, current = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - current + used["inactive_file"] + used["active_file"])  # which are given back
    except (OSError, ValueError, KeyError, StopIteration):  # not Linux, or no container, or one without a limit
        pass
    return free


def check_memory(needed: int, device: torch.device) -> None:
    """InputError where `needed` bytes are more than a device has free."""
    free = free_memory(device)
    if needed > free:
        raise InputError(
            f"this would take about {needed / 1e9:,.1f} GB of memory and {free / 1e9:,.1f} GB are free; "
            "lower --width, --hidden, the layers, --batch-size, --train-size, --valid-size or the "
            "processes"
        )

"""Every problem that a run was not trained on, answered by several processes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import lru_cache
from typing import Any

import torch
from tqdm import tqdm

from calcformer.errors import InputError
from calcformer.evaluation import Mistake, Tally, find_mistakes, share
from calcformer.memory import check_memory, memory_to_answer
from calcformer.pool import run_jobs
from calcformer.runs.device import check_cores, count_cores
from calcformer.runs.files import write_atomically
from calcformer.solver import Solver

__all__ = ["MISTAKES", "check_exhaustive", "evaluate_all"]

MISTAKES = "mistakes.txt"
MOST_PROBLEMS = 100_000_000
MOST_LISTED = 10_000  # mistakes
CHUNK = 1 << 14  # problems made, answered and counted at once

Chunk = tuple[Tally, list[int], list[list[int]]]  # counts, the numbers of problems answered wrong, the answers to them


def answer_chunk(solver: Solver, numbers: range, beam: int) -> Chunk:
    """Answer those of the problems with these numbers that the run was not trained on."""
    task, tally = solver.task, Tally()
    index = torch.arange(numbers.start, numbers.stop, device=solver.device)
    index = index[~task.trained_on(index)]
    if len(index) == 0:
        return tally, [], []
    examples = task.encode(index)
    said = task.answer(solver.model, examples, beam)
    right = task.is_right(said, examples)
    tally.add(task.groups(examples), right)
    wrong = (~right).nonzero().squeeze(1)[: MOST_LISTED + 1]
    return tally, index[wrong].tolist(), said[wrong].tolist()


load_solver = lru_cache(1)(Solver)  # a worker does many jobs with it


def do_job(numbers: str, run: str, beam: str) -> Chunk:
    """`answer_chunk` in a worker."""
    torch.set_num_threads(1)
    return answer_chunk(load_solver(run, "cpu"), range(*map(int, numbers.split())), int(beam))


def answered_chunks(solver: Solver, beam: int, processes: int) -> Generator[Chunk, None, None]:
    """All problems there are, a chunk at a time, as they are finished."""
    size = solver.task.size or 0
    chunks = [range(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
    if processes == 1 or len(chunks) == 1 or solver.device.type != "cpu":
        yield from (answer_chunk(solver, numbers, beam) for numbers in chunks)
        return
    jobs = [f"{numbers.start} {numbers.stop}" for numbers in chunks]
    with closing(run_jobs("calcformer.exhaustive", [solver.folder, beam], jobs, processes)) as replies:
        for _, reply in replies:
            if isinstance(reply, InputError):
                raise InputError(
                    f"a process that answered problems ended before its time ({reply}); try fewer --processes"
                )
            yield reply


def list_mistakes(solver: Solver, mistakes: list[tuple[int, list[int]]]) -> list[Mistake]:
    """The mistakes, each the number of a problem and what was said to it, in words."""
    index = torch.tensor([number for number, _ in mistakes], dtype=torch.long, device=solver.device)
    examples = solver.task.encode(index)
    said = [words for _, words in mistakes]
    answers = torch.tensor(said, dtype=torch.long, device=solver.device).view_as(examples.labels)
    return list(find_mistakes(solver, examples, answers))


def check_exhaustive(solver: Solver, processes: int | None) -> int:
    """How many processes answer all problems; None stands for as many as the run was trained with.

    Raises:
        InputError: there are too many problems, or fewer cores or less memory than the processes want.
    """
    if solver.task.size is None:
        noun = solver.config.data.noun
        raise InputError(f"--exhaustive is for problems that are numbered, which {noun} are not; leave it out")
    if solver.task.size > MOST_PROBLEMS:
        raise InputError(
            f"--exhaustive answers up to {MOST_PROBLEMS:,} problems, this run has {solver.task.size:,}; leave it out"
        )
    if processes is None:
        processes = min(max(1, solver.config.training.processes), count_cores())
    check_cores(processes, "--processes")
    check_memory(memory_to_answer(solver.config, solver.task, processes), solver.device)
    return processes


def evaluate_all(solver: Solver, beam: int = 1, processes: int | None = None) -> dict[str, Any]:
    """Exact match on all problems there are but those the run may have been trained on, and a list of its mistakes.

    Args:
        beam: width of the search for answers; 1 decodes greedily.
        processes: that share the work on a CPU; None for as many as the run was trained with, if there are the cores.

    Returns:
        n, wrong, exact_match, groups, and mistakes_file, which lists up to 10,000 mistakes or says that there are more.

    Raises:
        InputError: see `check_exhaustive`; or there are no problems that were not trained on.
    """
    processes, size = check_exhaustive(solver, processes), solver.task.size or 0
    tally = Tally()
    mistakes: list[tuple[int, list[int]]] = []
    with (
        closing(answered_chunks(solver, beam, processes)) as chunks,
        tqdm(total=size, unit="ex", unit_scale=True, dynamic_ncols=True, disable=None) as bar,
    ):
        for counts, wrong, said in chunks:
            tally.merge(counts)
            if len(mistakes) <= MOST_LISTED:
                mistakes += zip(wrong, said)
            bar.update(min(CHUNK, size - bar.n))
    if tally.n == 0:
        raise InputError("this run was trained on every problem there is; leave out --exhaustive")
    if len(mistakes) <= MOST_LISTED:
        lines = [str(mistake) for mistake in list_mistakes(solver, sorted(mistakes))]
    else:
        lines = [f"{tally.n - tally.right} of {tally.n} answers are wrong, too many to list"]
    path = solver.folder / MISTAKES
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
    return {**share(tally.right, tally.n), "groups": tally.groups(), "mistakes_file": str(path)}

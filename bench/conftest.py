"""Set-up of the benchmarks: device, seeds, the clock, and what the JSON says of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.accounting import SEED
from bench.timing import clock


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--threads",
        type=int,
        default=1,
        help="CPU threads (1: more of them wait for each other wherever "
        "another program runs); the training benchmark has thread counts of its own",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the benchmarks read the samples' clock. On a GPU a peer's warning may not cost the run its figures."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=clock))
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["bench"] = machine.describe()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The GPU where there is one, else the CPU."""
    from kernels.backend import INTERPRETED

    if INTERPRETED:
        pytest.fail("TRITON_INTERPRET is on: the interpreter has no speed to measure; run pytest bench by itself")
    found = machine.pick_device()
    if found.type == "cpu":
        torch.set_num_threads(pytestconfig.getoption("--threads"))
    return found


@pytest.fixture(autouse=True)
def prepared(device: torch.device) -> Iterator[None]:
    """The same random numbers for each row, and a stream on which a CUDA graph can be captured."""
    torch.manual_seed(SEED)
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

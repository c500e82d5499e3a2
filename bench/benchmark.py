"""What a benchmark file says of itself: its stages on a GPU, with their seconds, and its tables in the README.

A benchmark is one file bench/bench_NAME.py with a BENCHMARK; bench/README.md has an example. `pytest bench` runs its
tests, bench.gpu_first and bench.gpu_second its stages, bench.report makes its tables; none of them has a list of such
files. BENCHMARK is read without importing its file, since the commands that keep the time do without PyTorch. So it
consists of the classes here and of plain values: no name of its file can stand in it.

What a file with stages has beside it, for the GPU:

- `time_stage(stage, context)` writes the rows of one of its stages, most often by bench.record.time_all.
- `launches(stage, context)`, where there is one, gives calls by name, to be made on a device that they are given. They
  launch every kernel of ours that the stage does; all are made before, side by side, to compile those.
- `warm_up(context)`, with `warms_up=True`, has compiled what peers need, at the same time.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import bench

WARM_UP = "warm_up"  # stands where the name of a stage does


class GpuStage(NamedTuple):
    """A part of a GPU run.

    Args:
        need: what is needed more comes earlier: 1 is first.
        seconds: when it is stopped. Where all stages together ask for more than a run has, each gets its share.
    """

    name: str
    need: int
    seconds: int


class Table(NamedTuple):
    """A table of README: the groups that a pattern matches, whose one group is the column; the figure in a cell."""

    title: str
    pattern: str
    figure: str


class Benchmark(NamedTuple):
    """What is done with a benchmark beside `pytest bench`.

    Args:
        first: its stages in bench.gpu_first. second: in bench.gpu_second.
        warms_up: whether its peers need time to compile, by its `warm_up`.
        tables: in this order.
    """

    first: Sequence[GpuStage] = ()
    second: Sequence[GpuStage] = ()
    warms_up: bool = False
    tables: Sequence[Table] = ()


def read_benchmark(path: Path) -> Benchmark:
    """BENCHMARK of a file.

    Raises:
        ValueError: there is none, or not of plain values.
    """
    for node in ast.parse(path.read_text(), path.name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BENCHMARK":
            code = compile(ast.Expression(node.value), path.name, "eval")
            try:
                found = eval(code, {known.__name__: known for known in (Benchmark, GpuStage, Table)})
            except (NameError, TypeError) as error:
                told = "it may consist of Benchmark, GpuStage, Table and plain values, see bench/benchmark.py"
                raise ValueError(f"{path.name}: BENCHMARK cannot be read ({error}); {told}") from None
            if isinstance(found, Benchmark):
                return found
    raise ValueError(f"{path.name} must have a line BENCHMARK = Benchmark(...), see bench/benchmark.py")


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by the name of their file, as "bench_host", in the order of need; those without stages last."""
    paths = [path for folder in bench.__path__ for path in Path(folder).glob("bench_*.py")]
    found = {path.stem: read_benchmark(path) for path in sorted(paths)}

    def first_need(name: str) -> float:
        return min((stage.need for stage in found[name].first), default=float("inf"))

    return {name: found[name] for name in sorted(found, key=first_need)}


def gpu_stages(run: Literal["first", "second"]) -> dict[str, GpuStage]:
    """Stages of bench.gpu_first or bench.gpu_second in the order of need, by file and name: "bench_host::host time"."""
    found = {
        f"{file}::{stage.name}": stage for file, benchmark in benchmarks().items() for stage in getattr(benchmark, run)
    }
    return dict(sorted(found.items(), key=lambda pair: pair[1].need))


def warm_ups() -> tuple[str, ...]:
    """What runs while kernels are compiled, named likewise."""
    return tuple(f"{file}::{WARM_UP}" for file, benchmark in benchmarks().items() if benchmark.warms_up)

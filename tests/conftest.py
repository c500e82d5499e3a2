"""Set-up shared by all tests.

`pytest` runs the Triton kernels in Triton's interpreter, which must be switched on before any of them is imported.
`pytest -m gpu`, where there is a GPU, runs the same kernel tests on it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import interpreter
from tests.tolerances import margins

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic PyTorch wants of cuBLAS
torch.set_num_threads(1)  # the tensors of the tests are small


def runs_on_gpu(config: pytest.Config) -> bool:
    """Whether this session tests on a GPU: asked for, as by `-m gpu` or `-m "gpu and not slow"`, and there."""
    asked = {term.strip(" ()") for term in re.split(r"\band\b", config.option.markexpr)}
    return "gpu" in asked and torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What judges the tests themselves."""
    help = "other random numbers, and in the end the tests that came nearest to failing"
    parser.addoption("--seed", type=int, default=0, help=help)


def pytest_report_header(config: pytest.Config) -> str:
    """What a session on a CPU leaves out."""
    if "gpu" in config.option.markexpr:
        return "" if torch.cuda.is_available() else "no CUDA GPU: what needs one is skipped"
    return "without what needs a CUDA GPU: pytest -m gpu"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With --seed: which comparisons with PyTorch's error passed by the least."""
    nearest = sorted((min(found), test) for test, found in margins.items() if min(found) >= 1)  # others want to fail
    if config.option.seed and nearest:
        terminalreporter.section("allowed over found error, the smallest")
        for margin, test in nearest[:20]:
            terminalreporter.write_line(f"{margin:6.2f}  {test}")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist's own
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All of the tests run in as many processes as there are cores, 8 at most; with -n, as it says.

    In one process: tests that are asked for by file, which are over before others have started, those on a GPU, and
    with --seed and --pdb, which look at this process.
    """
    option = config.option
    everything = [Path(x).resolve() for x in config.args] == [Path(__file__).parent]
    of_one_process = option.seed or option.usepdb or runs_on_gpu(config) or hasattr(config, "workerinput")
    if everything and not of_one_process and getattr(option, "numprocesses", 0) is None:  # 0: without pytest-xdist
        option.numprocesses, option.maxprocesses = "auto", option.maxprocesses or 8
        option.dist = "worksteal" if option.dist == "no" else option.dist


def pytest_configure(config: pytest.Config) -> None:
    """Switch the interpreter on or off, before the tests import any kernel."""
    os.environ["TRITON_INTERPRET"] = "0" if runs_on_gpu(config) else "1"
    if not runs_on_gpu(config):
        interpreter.prepare()


ASKED_FOR = {"long": "takes long", "training": "trains for minutes"}  # what runs only when its mark is asked for
QUICK = 7  # a prime, so that no option of a test falls out


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what was not asked for, with the reason, and leave out what needs a GPU.

    Of a test of many cases every seventh is in the quick tier, the others are slow.
    """
    for item in items:
        for name, reason in ASKED_FOR.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.slow)
                if not re.search(rf"(?<!not )\b{name}\b", config.option.markexpr):
                    item.add_marker(pytest.mark.skip(reason=f"{reason}: pytest -m {name}"))
    if runs_on_gpu(config):
        if hasattr(config, "workerinput"):  # of pytest-xdist: other workers want memory too
            for item in items:
                if item.get_closest_marker("large"):
                    item.add_marker(pytest.mark.skip(reason="takes up to 100 GiB of GPU memory: run it without -n"))
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" in config.option.markexpr:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    elif on_gpu:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=on_gpu)
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for same in cases.values():
        for place, item in enumerate(same if len(same) >= 2 * QUICK else ()):
            if place % QUICK:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where Triton kernels run: interpreted on the CPU, or on a GPU, where a fault shows in the test that made it."""
    yield request.param
    if request.param == "cuda":
        torch.cuda.synchronize()


@pytest.fixture
def as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as users on a CPU have them, not in Triton's interpreter, in the processes that help too."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(20_260_101 + request.config.option.seed)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every freshly allocated tensor with NaN, so that an entry nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def normal(device: str, request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """Standard normal numbers of a shape and dtype, the same in every run."""
    generator = torch.Generator().manual_seed(20 + request.config.option.seed)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype).to(device)


@pytest.fixture
def chunked(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Whether rows of a norm are walked in chunks of 16 columns, as those too long for registers; a shape to try."""
    if not request.param:
        yield 19, 37
        return
    norm_problem = pytest.importorskip("tests.norm_problem", reason="needs triton")
    with norm_problem.tiles(1, 16, chunked=True):
        yield 5, 23

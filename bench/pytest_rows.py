"""A pytest plugin that writes what fails as rows while the tests run, and runs first what failed the last time.

    pytest -p bench.pytest_rows --rows FILE [--last FILE]

Works with pytest-xdist: the process that collects the results writes them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bench.rows import read_rows, write_row

FAULTS = "CUDA error", "illegal memory access", "unspecified launch failure", "device-side assert"
COUNTED = 100  # a row with the counts so far each time that so many tests are done


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--rows", type=Path, metavar="FILE", help="append a row for each failure, and counts")
    group.addoption("--last", type=Path, metavar="FILE", help="rows of an earlier run, whose failures run first")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Failures of the earlier run first, in the same order on all workers."""
    last = config.getoption("--last")
    failed = {row["id"] for row in read_rows(last) if row["kind"] == "test" and row["id"]} if last else set()
    items.sort(key=lambda item: item.nodeid not in failed)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist; the environment says it of what a test starts, too
        config.pluginmanager.register(Worker())
    elif config.getoption("--rows"):
        config.pluginmanager.register(Writer(config.getoption("--rows")))


class Worker:
    """Ends a worker of pytest-xdist after a fault on the GPU, which would fail its other tests; a new one goes on."""

    def __init__(self) -> None:
        self.has_fault = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.has_fault |= report.failed and any(word in report.longreprtext for word in FAULTS)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """The failure has been told by then."""
        if self.has_fault:
            os._exit(1)


class Writer:
    """Appends rows to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            message = report.longreprtext.strip().splitlines() or [""]
            errors = [line for line in message if line.startswith("E ")]
            told = " ".join((errors or message[-1:])[0].removeprefix("E").split())
            write_row(self.path, "test", id=report.nodeid, when=report.when, message=told[:400])
            print(f"\nFAILED {report.nodeid}: {told[:200]}", flush=True)
        if report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] += 1
            if self.counts.total() % COUNTED == 0:
                self.write_counts()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            told = (report.longreprtext.strip().splitlines() or [""])[-1]
            write_row(self.path, "test", id=report.nodeid, when="collect", message=told[:400])

    def pytest_sessionfinish(self) -> None:
        self.write_counts()

    def write_counts(self) -> None:
        write_row(self.path, "test", id="", **self.counts)

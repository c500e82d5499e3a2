"""README's GPU tables are those of the JSON in bench/results; how they are made, on made-up figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.benchmark import benchmarks
from bench.rows import write_row
from tests.pictures import is_picture

pytest.importorskip("matplotlib")
MACHINE = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc"}


Figures = dict[tuple[str, str], dict[str, float]]  # by group and provider


def write(folder: Path, name: str, figures: Figures, **machine: Any) -> None:
    """A result as bench.gpu_first writes it, or as pytest-benchmark does."""
    machine = {**MACHINE, **machine}
    if name.endswith(".jsonl"):
        write_row(folder / name, "machine", **machine)
        for (group, provider), info in figures.items():
            write_row(folder / name, "time", group=group, provider=provider, seconds=1.0, info=info)
        return
    rows = [
        {"group": group, "name": provider, "stats": {"median": 1.0}, "extra_info": {"provider": provider, **info}}
        for (group, provider), info in figures.items()
    ]
    (folder / name).write_text(json.dumps({"machine_info": {"bench": machine}, "benchmarks": rows}))


GROUP = "attention forward B8 H16 S{} D128 causal bf16".format


@pytest.fixture(params=["json", "jsonl"])
def results(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Forward figures of two days, of which the later count, and one of a CPU, which never does."""
    for day, ours in ("2001-01-01", 100.0), ("2001-01-02", 300.0):
        figures = {
            (GROUP(length), provider): {"tflops_per_second": value + length / 1024}
            for provider, value in (("kernels (general)", ours), ("torch cuDNN", 200.0))
            for length in (1024, 2048)
        }
        write(tmp_path, f"a-gpu-{day}-abc.{request.param}", figures)
    figures = {(GROUP(4096), "torch math"): {"tflops_per_second": 1.0}}
    write(tmp_path, f"cpu-2001-01-03-abc.{request.param}", figures, gpu="")
    return tmp_path


def test_readme_and_results_agree() -> None:
    assert report.main(["--check"]) == 0, "run: python -m bench.report"
    readme = (report.ROOT / "README.md").read_text()
    assert (report.NOTHING in readme) == (not report.read_results(report.RESULTS))


def test_the_newest_result_of_a_gpu_counts(results: Path) -> None:
    section = report.make_section(report.read_results(results))
    assert section.splitlines() == [
        "Measured on A GPU, PyTorch 2.0, Triton 3.0, at abc; raw figures in bench/results.",
        "",
        "| Attention forward, D = 128, causal, TFLOP/s by sequence length | 1,024 | 2,048 |",
        "|---|---|---|",
        "| kernels (general) | **301** | **302** |",
        "| torch cuDNN | 201 | 202 |",
    ]


def test_a_newer_result_of_one_group_leaves_the_others(results: Path) -> None:
    """And the last row of a provider counts."""
    figures = {
        (GROUP(1024), provider): {"tflops_per_second": value}
        for provider, value in (("kernels (hopper)", 7.0), ("torch cuDNN", 9.0))
    }
    write(results, "a-gpu-2001-01-04-abd-second.jsonl", figures, commit="abd")
    write_row(
        results / "a-gpu-2001-01-04-abd-second.jsonl",
        "time",
        group=GROUP(1024),
        provider="kernels (hopper)",
        seconds=1.0,
        info={"tflops_per_second": 8.0},
    )
    lines = report.make_section(report.read_results(results)).splitlines()
    assert "at abc and abd" in lines[0]
    assert lines[-7:] == [
        "| kernels (general) | – | **302** |",
        "| torch cuDNN | **9** | 202 |",
        "| kernels (hopper) | 8 | – |",
        "",
        "Where a peer is faster:",
        "",
        "- attention forward B8 H16 S1024 D128 causal bf16: kernels (hopper) has 0.89 of the rate of torch cuDNN",
    ]


def test_readme_says_how_many_times_as_fast(results: Path) -> None:
    """The worst of the shapes, and whose peer that was, to the best; PyTorch's own apart from other peers."""
    figures = {
        (GROUP(length), provider): {"tflops_per_second": value}
        for length, values in ((1024, (90.0, 60.0, 100.0)), (2048, (90.0, 100.0, 80.0)))
        for provider, value in zip(("kernels (hopper)", "torch cuDNN", "FlashAttention-4"), values)
    }
    write(results, "a-gpu-2001-01-05-abe.json", figures)
    lines = report.make_summary(report.read_results(results)).splitlines()
    row = "| Attention forward, D = 128, causal | 0.90 (torch cuDNN) to 1.50 | 0.90 (FlashAttention-4) |"
    assert row in lines and f"![attention in TFLOP/s by sequence length](bench/results/{report.PICTURE})" in lines


def test_pages_are_rewritten_and_a_difference_noticed(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, page = tmp_path / "README.md", tmp_path / report.PAGE
    page.parent.mkdir()
    for path in readme, page:
        path.write_text("before\n{}\nold\n{}\nafter\n".format(*report.MARKS))
    words = ["--results", str(results), "--root", str(tmp_path)]
    assert report.main([*words, "--check"]) == 1 and "old" in readme.read_text()
    assert report.main(words) == 0 and report.main([*words, "--check"]) == 0
    for path, figure in (readme, "1.50 (torch cuDNN)"), (page, "**302**"):
        text = path.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and figure in text
        path.write_text(text.replace(figure, "0"))
        assert report.main([*words, "--check"]) == 1
        path.write_text(text)
    assert is_picture(results / "attention.png")
    capsys.readouterr()
    assert report.main([*words, "--check"]) == 0
    (cpu,) = results.glob("cpu*")
    assert capsys.readouterr().err == f"left out, since no GPU made it: {cpu}\n"


def test_every_group_that_a_benchmark_names_has_a_table_or_none_by_choice() -> None:
    from bench.accounting import attention_cases, norm_cases, short_cases

    directions = ("forward", "backward")
    cases = [*attention_cases(True), *short_cases(True)]
    groups = [f"attention {direction} {case}" for case in cases for direction in directions]
    groups += [case.group(direction) for case in norm_cases(True) for direction in directions]
    groups += ["S1 training step B125 fp32 on GPU"]
    figures = {"tflops_per_second": 1.0, "gb_per_second": 1.0, "examples_per_second": 1.0}
    rows = [report.Row(group, "kernels", figures, 1.0) for group in groups]
    tables = [table for benchmark in benchmarks().values() for table in benchmark.tables]
    assert len(tables) > 20 and all(report.make_table(table, rows) for table in tables)

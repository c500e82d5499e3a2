"""README's GPU tables are those of the JSON in bench/results; how they are made, on made-up figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from tests.pictures import is_picture

pytest.importorskip("matplotlib")
MACHINE = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc"}


def write(folder: Path, name: str, figures: dict[tuple[str, str], dict[str, float]], **machine: Any) -> None:
    rows = [{"group": group, "name": provider, "extra_info": {"provider": provider, **info}}
            for (group, provider), info in figures.items()]  # fmt: skip
    content = {"machine_info": {"bench": {**MACHINE, **machine}}, "benchmarks": rows}
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Forward figures of two days, of which the later count, and one of a CPU, which never does."""
    group = "attention forward B8 H16 S{} D128 causal bf16".format
    for day, ours in ("2001-01-01", 100.0), ("2001-01-02", 300.0):
        figures = {(group(length), provider): {"tflops_per_second": value + length / 1024}
                   for provider, value in (("kernels (general)", ours), ("torch cuDNN", 200.0))
                   for length in (1024, 2048)}
        write(tmp_path, f"a-gpu-{day}-abc-attention-forward.json", figures)
    figures = {(group(4096), "torch math"): {"tflops_per_second": 1.0}}
    write(tmp_path, "cpu-2001-01-03-abc-attention-forward.json", figures, gpu="")
    return tmp_path


def test_readme_and_results_agree() -> None:
    assert report.main(["--check"]) == 0, "run: python -m bench.report"
    readme = (report.ROOT / "README.md").read_text()
    assert (report.NOTHING in readme) == (not report.read_results(report.RESULTS))


def test_the_newest_result_of_a_gpu_counts(results: Path) -> None:
    section = report.make_section(report.read_results(results))
    assert section.splitlines() == [
        "Measured on A GPU, PyTorch 2.0, Triton 3.0, commit abc; raw figures in `bench/results/`.", "",
        "![attention in TFLOP/s by sequence length](bench/results/attention.png)", "",
        "| Attention forward, D = 128, causal, TFLOP/s by sequence length | 1,024 | 2,048 |", "|---|---|---|",
        "| kernels (general) | **301** | **302** |", "| torch cuDNN | 201 | 202 |",
    ]  # fmt: skip


def test_readme_is_rewritten_and_a_difference_noticed(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                      ) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*report.MARKS))
    words = ["--results", str(results), "--readme", str(readme)]
    assert report.main([*words, "--check"]) == 1 and "old" in readme.read_text()
    assert report.main(words) == 0 and report.main([*words, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "**302**" in text
    assert is_picture(results / "attention.png")
    readme.write_text(text.replace("302", "303"))
    assert report.main([*words, "--check"]) == 1


def test_every_group_that_a_benchmark_names_has_a_table_or_none_by_choice() -> None:
    from bench.accounting import attention_cases, norm_cases, short_cases

    directions = ("forward", "backward")
    cases = [*attention_cases(True), *short_cases(True)]
    groups = [f"attention {direction} {case}" for case in cases for direction in directions]
    groups += [case.group(direction) for case in norm_cases(True) for direction in directions]
    groups += ["S1 training step B125 fp32 on GPU"]
    figures = {"tflops_per_second": 1.0, "gb_per_second": 1.0, "examples_per_second": 1.0}
    rows = [report.Row(group, "kernels", figures) for group in groups]
    assert all(report.make_table(table, rows) for table in report.TABLES)

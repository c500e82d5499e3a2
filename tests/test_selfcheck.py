"""python -m kernels, as users run it; its judgement of what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import selfcheck

PACKAGE = Path(kernels.__file__).parent


def run(folder: Path, interpret: str, *arguments: str, device: str = "cpu") -> subprocess.CompletedProcess:
    """The command, of the package that lies in a folder, from within it."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": interpret}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "error", "-m", "kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder that holds the package and neither tests nor benchmarks, as users have it."""
    shutil.copytree(PACKAGE, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_on_a_cpu(copy: Path) -> None:
    done = run(copy, "0", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"machine", "why_not", "checks", "times", "wrong"} and found["wrong"] == []
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["folder"] == str(copy / "kernels")
    assert len(found["why_not"]) == 4 and all(found["why_not"].values())
    assert len(found["checks"]) == 26 and len(found["times"]) == 4
    for check in found["checks"]:
        assert check.keys() == {"name", "kernel", "error", "what_failed"} and 0 < check["error"] < selfcheck.ALLOWED
        assert "PyTorch" in check["kernel"]
    for time in found["times"]:
        assert time.keys() == {"name", "ours_ms", "pytorch_ms", "times_as_fast"} and time["ours_ms"] > 0


@pytest.mark.gpu
def test_on_a_gpu(copy: Path) -> None:
    done = run(copy, "0", "--json", device="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["gpu"].startswith(torch.cuda.get_device_name())
    can_run = {name for name, reason in found["why_not"].items() if not reason}
    assert {check["kernel"] for check in found["checks"]} == can_run


@pytest.mark.slow
def test_interpreted_kernels_and_wrong_ones(copy: Path) -> None:
    """One run: what nothing was done to is right, and what was made wrong is named."""
    pytest.importorskip("triton", reason="needs triton")
    file, kernel = copy / "kernels/attention/short_backward.py", "the Triton kernel for short sequences"
    text = file.read_text()
    assert text.count("acc_k * call.scale") == 1
    file.write_text(text.replace("acc_k * call.scale", "acc_k"))
    done = run(copy, "1")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    judged = [line for line in lines if line.startswith(("  right", "  WRONG"))]
    assert len(judged) == 18
    for line in judged:
        assert line.startswith("  WRONG" if kernel in line else "  right"), done.stdout
    assert lines[-1].startswith("WRONG, 4 of 18: attention of 13 queries") and kernel in lines[-1]
    assert "gradient of key: " in done.stdout and "not measured" in done.stdout


def attend(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.softmax(x["query"] @ x["key"].mT, -1) @ x["key"]


def forgetful(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return attend({**x, "query": x["query"].detach()}) + 0 * x["query"].sum()


def fail(x: dict[str, torch.Tensor]) -> torch.Tensor:
    raise RuntimeError("out of\nregisters")


@pytest.mark.parametrize(
    "ours, said",
    [
        pytest.param(attend, "", id="right"),
        pytest.param(lambda x: attend(x) * (1 + 1e-5), "output: ", id="output"),
        pytest.param(
            lambda x: attend({**x, "query": x["query"].detach()}) + 0 * x["query"].sum(), "query: ", id="grad"
        ),
        pytest.param(
            lambda x: attend(x) * torch.where(x["query"].sum() > 9e9, 1.0, torch.nan), "output: nan", id="NaN"
        ),
        pytest.param(fail, "raised RuntimeError: out of registers", id="an error"),
    ],
)
def test_what_is_wrong_is_named(ours: object, said: str) -> None:
    inputs = {name: torch.randn(2, 7, 5, dtype=torch.float64) for name in ("query", "key")}
    found = selfcheck.check("a call", "a kernel", (ours, attend, attend), inputs, torch.float32, "cpu")
    assert found.name == "a call, float32"
    assert said in found.what_failed and bool(said) == bool(found.what_failed)


def test_every_kernel_has_a_call_that_it_takes() -> None:
    """As a Hopper chip would have it: of the shapes that are to suit a kernel, none goes to another."""
    pytest.importorskip("triton", reason="needs triton")
    from kernels.attention.plan import HOPPER_HEAD_SIZES, KERNELS, forced

    assert tuple(selfcheck.SUITED) == KERNELS and selfcheck.ASKED.keys() == selfcheck.SUITED.keys()
    assert {sizes[5] for sizes in selfcheck.SUITED["hopper"]} <= set(HOPPER_HEAD_SIZES["backward"])
    with pytest.MonkeyPatch.context() as patch, forced(capability=90):
        patch.setenv("KERNELS_HOPPER", "1")
        for name, calls in selfcheck.SUITED.items():
            for sizes in calls:
                assert not selfcheck.why_not(name, sizes, "cpu")
        patch.setenv("KERNELS_HOPPER", "0")
        assert "KERNELS_HOPPER=1" in selfcheck.availability("cpu")["the Gluon kernel for Hopper chips"]

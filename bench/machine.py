"""Which machine, which versions and which commit a figure belongs to."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import subprocess

import torch

from bench.rows import ROOT


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def run_text(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def commit() -> str:
    """The commit that is checked out, with "-dirty" where tracked files differ; "unknown" without git.

    The environment variable BENCH_COMMIT says it for a copy without git.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    found = run_text("git", "rev-parse", "--short=12", "HEAD")
    dirty = found and run_text("git", "status", "--porcelain", "--untracked-files=no")
    return f"{found}-dirty" if dirty else found or "unknown"


@functools.cache
def describe() -> dict[str, str | int]:
    """Everything a reader needs to repeat a figure."""
    triton = ""
    if importlib.util.find_spec("triton"):
        import triton as module

        triton = module.__version__
    on_gpu = torch.cuda.is_available()
    cudnn = torch.backends.cudnn.version() if on_gpu else None
    driver = run_text("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else ""
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "gpu_driver": driver.splitlines()[0] if driver else "",
        "gpu_l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 0,
        "cuda": torch.version.cuda or "",
        "cudnn": str(cudnn or ""),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_count": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "commit": commit(),
    }

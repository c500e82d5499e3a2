"""Which machine, which versions and which commit a figure belongs to."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform

import torch

from bench.rows import commit, run_text
from bench.stages import AGAIN


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def leave_after_fault(device: torch.device) -> None:
    """After a fault, such as a read out of bounds, a process gets nothing done on a GPU: leave it to another one."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print((str(error).strip().splitlines() or ["a fault on the GPU"])[0], flush=True)
        os._exit(AGAIN)  # at once: to tidy up would ask the GPU


PEERS = "liger-kernel", "quack-kernels", "flash-attn-3", "flash-attn-4"  # packages that are timed where they are there


def peers() -> str:
    """The peers that are installed, with their versions."""
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(found)


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
        "peers": peers(),
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_count": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "commit": commit(),
    }

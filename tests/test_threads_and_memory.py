"""Many calls: of threads at the same time, where none may change what another gets, and in a row, where none may keep
memory."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kernels

STATM = Path("/proc/self/statm")  # pages of this process, resident ones second
LEAST = torch.finfo(torch.float32).min
SWITCHES = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
    "cuDNN": torch.backends.cuda.cudnn_sdp_enabled,
    "gradients": torch.is_grad_enabled,
    "dtype": torch.get_default_dtype,
}


def masks() -> dict[str, torch.Tensor | None]:
    """Masks for 2 batch entries, 2 heads, 7 queries and 9 keys."""
    bias = torch.randn(2, 1, 7, 9)
    return {
        "none": None,
        "bool": torch.rand(7, 9) < 0.7,
        "float": bias,
        "rows of the least": bias.index_fill(2, torch.tensor([1, 4]), LEAST),
        "rows of -inf": bias.index_fill(2, torch.tensor([0]), -math.inf),
    }


def solve(seed: int, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Output and gradients of a small call."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator).requires_grad_() for n in (7, 9, 9))
    output = kernels.scaled_dot_product_attention(q, k, v, mask, is_causal=seed % 2 == 0)
    return [output, *torch.autograd.grad(output, (q, k, v), torch.ones_like(output))]


@pytest.mark.usefixtures("as_on_a_cpu")
def test_threads_change_no_result_and_no_switch() -> None:
    before, given = {name: read() for name, read in SWITCHES.items()}, masks()
    alone = {(seed, name): solve(seed, mask) for seed in range(2) for name, mask in given.items()}
    found: list[str] = []
    start = threading.Barrier(8)

    def work(me: int) -> None:
        start.wait()
        calls = list(alone)
        for i in range(200):
            seed, name = calls[(me + i) % len(calls)]
            try:
                results = solve(seed, given[name])
            except Exception as error:  # noqa: BLE001 - or it would end with the thread
                found.append(f"mask {name}: {error}")
                continue
            if not all(torch.equal(a, b) for a, b in zip(results, alone[seed, name])):
                found.append(f"mask {name}: other bits")
        found.extend(f"{name} in a thread: {read()}" for name, read in SWITCHES.items() if read() != before[name])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.extend(f"{name} afterwards: {read()}" for name, read in SWITCHES.items() if read() != before[name])
    assert not found, f"{len(found)}: {sorted(set(found))}"


def memory() -> tuple[float, int]:
    """What this process holds: MiB, and tensors that the garbage collector knows."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * 4096 / 2**20, sum(type(x) is torch.Tensor for x in gc.get_objects())


def attend() -> None:
    q = torch.randn(1, 2, 32, 32, requires_grad=True)
    kernels.scaled_dot_product_attention(q, q, q, torch.randn(32, 32)).sum().backward()


def attend_with_all() -> None:
    """What PyTorch's kernels do not know."""
    q = torch.randn(1, 2, 32, 32, requires_grad=True)
    extras = {"sinks": torch.randn(2).requires_grad_(), "alibi_slopes": torch.rand(2).requires_grad_()}
    result = kernels.scaled_dot_product_attention(q, q, q, **extras, softcap=3.0, window=(3, 1), return_lse=True)
    (result.output.sum() + result.lse.sum()).backward()


def normalise() -> None:
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    kernels.layer_norm(x, (64,), weight).sum().backward()
    kernels.rms_norm(x, (64,), weight).sum().backward()


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("call", "path", "times"),
    [
        (attend, "torch", 1000),
        (attend_with_all, "torch", 500),
        (normalise, "torch", 1000),
        (attend, "interpreted", 3),
        (normalise, "interpreted", 3),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_memory_does_not_grow(call: Callable[[], None], path: str, times: int, request: pytest.FixtureRequest) -> None:
    if path == "torch":
        request.getfixturevalue("as_on_a_cpu")
    for _ in range(max(times // 5, 1)):  # allocators and caches take what they need
        call()
    before = memory()
    for _ in range(times):
        call()
    after = memory()
    assert after[0] - before[0] < 4.0 and after[1] <= before[1]  # one of 8 KiB a call were 4 to 16

"""Set-up shared by all tests.

Without a GPU the Triton kernels run in Triton's interpreter, which must be switched on before any of them is imported.
With a GPU the same tests run on it (mark `gpu`), unless TRITON_INTERPRET=1 is set from outside.
"""

import os

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic PyTorch wants of cuBLAS

torch.set_num_threads(1)  # the tensors of the tests are small


def _round_bfloat16_to_nearest() -> None:
    """Make Triton's interpreter round float32 to bfloat16 to the nearest, as GPUs do; by itself it cuts off bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(x: np.ndarray, source: object, target: object, rounding_mode: object) -> np.ndarray:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, rounding_mode)
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = to_nearest


if not HAS_GPU:
    _round_bfloat16_to_nearest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            id="interpreter",
            marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here; TRITON_INTERPRET=1 interprets them"),
        ),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: interpreted on the CPU, or on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(20_260_101)


@pytest.fixture
def poisoned() -> object:
    """Fill every freshly allocated tensor with NaN, so that an entry nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

"""Where a call runs: on the Triton kernels or through PyTorch's own. One place for that rule."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any, NamedTuple

import numpy
import torch

import kernels.ours  # noqa: F401 - says so where another package replaced kernels/__init__.py

BACKENDS = ("auto", "triton", "torch")
HALF = (torch.float16, torch.bfloat16)
TRITON_DTYPES = (*HALF, torch.float32)


class Choice(NamedTuple):
    """What runs a call (`"triton"` or `"torch"`) and, where Triton does not, the reason."""

    backend: str
    reason: str


# Whether the triton package is installed, and whether its kernels run in its interpreter, on CPU tensors. Triton reads
# TRITON_INTERPRET when a kernel is defined, so neither changes while the process lives.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# The kinds of device that have autocast. Asked once, here: PyTorch 2.11's compiler cannot trace the question.
_KINDS = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "maia", "ipu", "xla", torch._C._get_privateuse1_backend_name())
AUTOCAST_KINDS = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    return device.type in AUTOCAST_KINDS and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off for this kind of device, where it is on."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether the gradient of one of the tensors may be asked for."""
    if torch.is_grad_enabled():
        for x in tensors:  # a third of the time of any()
            if x is not None and x.requires_grad:
                return True
    return False


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which attention takes x, a floating-point tensor: autocast's where it is on, but for float64."""
    return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 and autocasts(x.device) else x.dtype


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, of one device, in the dtype in which attention takes them."""
    if not autocasts(tensors[0].device):
        return tensors
    return tuple(x.to(autocast_dtype(x)) for x in tensors)


def as_number(x: Any) -> Any:
    """The Python number that a NumPy scalar, or a tensor of no dimensions and no gradient, holds; else x as it is."""
    if isinstance(x, numpy.generic) or (isinstance(x, torch.Tensor) and x.ndim == 0 and not x.requires_grad):
        return x.item()
    return x


def check_tensor_types(tensors: dict[str, Any], or_none: bool = False) -> None:
    """Raise TypeError for an argument, by name, that is not a tensor with strides, or a jagged nested one, or None."""
    for name, x in tensors.items():
        if x is None and or_none:
            continue
        if not isinstance(x, torch.Tensor):
            rule = "a tensor or None" if or_none else "a tensor"
            raise TypeError(f"{name} must be {rule}, found {type(x).__name__}; make it one with torch.as_tensor")
        if x.layout not in (torch.strided, torch.jagged):
            raise TypeError(f"{name} must be a dense tensor, found the layout {x.layout}; convert it with .to_dense()")


def shown(x: object) -> str:
    """x as a message shows it: one line, cut where it is long."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    """The reason the Triton kernels cannot take tensors of this device and dtype; empty when they can."""
    if not HAS_TRITON:
        return "the triton package is not installed"
    if dtype not in TRITON_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in TRITON_DTYPES)
        return f"the Triton kernels take {names}, found {str(dtype).removeprefix('torch.')}"
    kind = device.type
    if kind == ("cpu" if INTERPRETED else "cuda"):
        return ""
    if kind == "cpu":
        return "the tensors are on the CPU and TRITON_INTERPRET=1 was not set when kernels was imported"
    if INTERPRETED:
        return f"TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors, found {kind}"
    return f"the Triton kernels run on CUDA devices, found {kind}"


def choose(backend: str, device: torch.device, dtype: torch.dtype, unsupported: str = "") -> Choice:
    """Resolve `backend` for tensors of this device and dtype.

    Args:
        backend: "auto" takes Triton where it can run, else PyTorch; "triton" or "torch" insist.
        device: device of the inputs.
        dtype: dtype of the inputs.
        unsupported: a reason of the caller's own why its Triton kernel cannot take this call, or empty.

    Raises:
        ValueError: the backend is unknown, or "triton" was asked for and cannot run.
    """
    if not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, found {shown(backend)}")
    if backend == "torch":
        return Choice("torch", 'backend="torch" was asked for')
    reason = why_not_triton(device, dtype) or unsupported
    if not reason:
        return Choice("triton", "")
    if backend == "triton":
        raise ValueError(f'backend="triton" cannot run: {reason}; use backend="auto" to let PyTorch take such calls')
    return Choice("torch", reason)

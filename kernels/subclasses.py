"""Tensors that hold others, and calls that record or change what runs: jagged nested tensors, DTensors, torch.fx.

A call on jagged nested tensors or DTensors runs on what they hold, and its results are wrapped as the input is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch

from kernels.autograd import transformed

__all__ = ["PLAIN", "holds_others", "is_dtensor", "is_traced", "offsets_of", "on_shards", "overridden", "wrapped"]

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # types of tensors that hold their own numbers
PLAINLY = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]  # what subclasses inherit
Named = dict[str, Any]  # tensors, or None
Matching = Callable[[str, torch.Tensor, int], int]


def is_traced(x: torch.Tensor) -> bool:
    """Whether x may have no numbers to look at: compiled, transformed, recorded, or of another type."""
    return (
        torch.compiler.is_compiling()
        or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
    )


def overridden(function: Callable[..., Any], tensors: tuple[Any, ...], *args: Any, **options: Any) -> Any:
    """`function(*args, **options)` as a `__torch_function__` of one of the tensors, or a mode of PyTorch, makes it."""
    subclasses = (x for x in tensors if isinstance(x, torch.Tensor) and type(x) not in PLAIN)
    if any(x.is_nested for x in subclasses):  # theirs takes our rms_norm for PyTorch's
        with torch._C.DisableTorchFunction():
            return function(*args, **options)
    own = [type(x) for x in torch.overrides._get_overloaded_args(tensors)]
    changes_nothing = all(getattr(kind.__torch_function__, "__func__", None) is PLAINLY for kind in own)
    if own and changes_nothing and not torch._C._len_torch_function_stack():
        # As PyTorch does it for a subclass that changes nothing, but for named tuples too.
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **options)
        return wrapped(lambda x: x.as_subclass(own[0]), found)
    return torch.overrides.handle_torch_function(function, tensors, *args, **options)


def is_dtensor(x: Any) -> bool:
    """Whether x is a DTensor; torch.distributed is not imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def holds_others(*tensors: torch.Tensor | None) -> bool:
    """Whether one of the tensors is nested or a DTensor."""
    return any(x is not None and (x.is_nested or is_dtensor(x)) for x in tensors)


def on_shards(call: Callable[..., Any], tensors: Named, matching: Matching, divided: Collection[int]) -> Any:
    """`call(*tensors)` on the shards of DTensors that each process has; its results are placed as the first tensor is.

    No process communicates with another.

    Args:
        call: takes plain tensors, or None; each of its results has the dimensions in `divided` of the first tensor,
            in their order, after dimensions that only others brought.
        tensors: by name, for messages; the first is replicated, or sharded along dimensions in `divided`.
        matching: name, tensor and a dimension of the first that is divided: the dimension of the tensor that is divided
            alike, -1 where it is needed whole. The gradient of such a tensor is a partial sum.
        divided: which dimensions of the first may be.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    for name, x in tensors.items():
        if x is not None and not isinstance(x, DTensor):
            raise ValueError(
                f"{name} must be a DTensor like the others, found a plain tensor; pass it through "
                "torch.distributed.tensor.distribute_tensor"
            )
    (first_name, first), *_ = tensors.items()
    mesh, placements = first.device_mesh, first.placements
    for placement in placements:
        if type(placement) is not Replicate and (type(placement) is not Shard or placement.dim not in divided):
            raise ValueError(
                f"{first_name} must be replicated, or sharded along one of its dimensions "
                f"{tuple(divided)}, found {placements}; redistribute it"
            )
    held: list[Any] = []
    for name, x in tensors.items():
        if x is None:
            held.append(None)
            continue
        dims = [-1 if placement.is_replicate() else matching(name, x, placement.dim) for placement in placements]
        for place, (placement, dim) in enumerate(zip(placements, dims)):
            if dim >= 0 and x.shape[dim] != first.shape[placement.dim] and x.shape[dim] % mesh.size(place):
                raise ValueError(
                    f"{name} must have a dimension {dim} that {mesh.size(place)} processes divide evenly, "
                    f"found {x.shape[dim]}; replicate it"
                )
        wanted = tuple(Replicate() if dim < 0 else Shard(dim) for dim in dims)
        if x.device_mesh != mesh or x.placements != wanted:
            raise ValueError(
                f"{name} must be placed as {wanted} on the mesh of {first_name}, found {x.placements}; redistribute it"
            )
        # What is whole here sees one shard of the first: its gradient is one term of a sum.
        terms = [
            own if own.is_shard() or of_first.is_replicate() else Partial() for own, of_first in zip(wanted, placements)
        ]
        held.append(x.to_local(grad_placements=terms))

    def wrap(local: torch.Tensor) -> torch.Tensor:
        lead = broadcast[0].ndim - first.ndim
        places = [Shard(place.dim + lead) if place.is_shard() else place for place in placements]
        shape = list(local.shape)
        for place, of_first in zip(places, placements):
            if place.is_shard():
                shape[place.dim] = first.shape[of_first.dim]
        stride = torch.empty(shape, device="meta", dtype=local.dtype).stride()
        return DTensor.from_local(
            local.contiguous(), mesh, places, run_check=False, shape=torch.Size(shape), stride=stride
        )

    found = call(*held)
    broadcast = found if isinstance(found, tuple) else (found,)
    return wrapped(wrap, found)


def offsets_of(name: str, x: torch.Tensor) -> torch.Tensor:
    """Where the sequences of a nested tensor start and end: int64 (N + 1,).

    Raises:
        ValueError: it is not jagged, or has gaps.
    """
    if x.layout != torch.jagged:
        raise ValueError(f"{name} must have the layout torch.jagged if it is nested, found {x.layout}; convert it")
    if x.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError(f"{name} must have no gaps between its sequences, found lengths; make it contiguous")
    return x.offsets()  # type: ignore[attr-defined]


def wrapped(wrap: Callable[[torch.Tensor], Any], results: Any) -> Any:
    """`wrap` of a result, or of each of several that are not None."""
    if not isinstance(results, tuple):
        return wrap(results)
    each: list[Any] = [None if x is None else wrap(x) for x in results]
    return type(results)(*each) if hasattr(results, "_fields") else tuple(each)

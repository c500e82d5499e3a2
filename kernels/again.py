"""Calls like those before them: what a call launched is launched again, on other tensors that lie in memory likewise.

From a call to its kernels there is much to ask: which kernel, which tile, in which order in memory the results, and
Triton asks what each number specialises a kernel to. The answers depend on shapes, strides, dtypes, the device, on how
pointers are aligned and on what is asked for, not on what stands in the tensors; so they are the same for calls that
agree in these, and most calls of a program do. The first of them goes the whole way, and its launches are noted.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from kernels.autograd import is_followed
from kernels.backend import INTERPRETED
from kernels.launch import LAYOUTS, launch_on
from kernels.subclasses import PLAIN

__all__ = ["Calls", "Known", "copy_into", "is_plain", "layouts", "remember", "run_kernel"]

Tensors = Sequence[torch.Tensor | None]
_noted = threading.local()  # `launches` of the call that is being noted in a thread, where there is one


class Noted(NamedTuple):
    """A launch: the compiled kernel (the kernel itself in the interpreter), its grid, and its arguments in order.

    named: how many of the last ones were given by name, all of them constants.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: int


def run_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), noted where a call is."""
    compiled = kernel[grid](*args, **options)
    launches = getattr(_noted, "launches", None)
    if launches is not None:
        names = kernel.arg_names[len(args) :]
        arguments = (*args, *(options[name] for name in names))
        launches.append(Noted(kernel if INTERPRETED else compiled, (*grid, 1, 1)[:3], arguments, len(names)))


class _Copy:
    """A copy as if it were a kernel."""

    def __getitem__(self, grid: object) -> Callable[[torch.Tensor, torch.Tensor], object]:
        return torch.Tensor.copy_


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """target.copy_(source), noted where a call is."""
    target.copy_(source)
    launches = getattr(_noted, "launches", None)
    if launches is not None:
        launches.append(Noted(_Copy(), (), (target, source), 0))


class Parts(NamedTuple):
    """A tuple in the arguments of a launch that holds tensors, or all of the arguments.

    items: with any things where tensors stand. spots: where those are, and which of a call's tensors, or what there is
    to be filled in.
    """

    make: Callable[[list[Any]], Any]
    items: tuple[Any, ...]
    spots: tuple[tuple[int, Any], ...]

    def fill(self, tensors: Tensors) -> Any:
        items = list(self.items)
        for spot, what in self.spots:
            items[spot] = tensors[what] if type(what) is int else what.fill(tensors)
        return self.make(items)


class Viewed(NamedTuple):
    """A tensor that the interpreter wants as another dtype."""

    place: int
    dtype: torch.dtype

    def fill(self, tensors: Tensors) -> Any:
        return tensors[self.place].view(self.dtype)  # type: ignore[union-attr]


class Described(NamedTuple):
    """A descriptor of a tensor, the values of its other fields by name."""

    place: int
    kind: type
    fields: dict[str, Any]

    def fill(self, tensors: Tensors) -> Any:
        found: Any = object.__new__(self.kind)  # without its checks, which were passed before
        found.__dict__.update(self.fields, base=tensors[self.place])
        return found


class Known(NamedTuple):
    """What a call needs: new tensors, the first ones its results; then launches.

    new: shapes, strides and dtypes; None for a tensor like the call's first one, which takes a third of the time.
    """

    new: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]
    n_results: int
    launches: tuple[tuple[Any, tuple[int, ...], Parts], ...]

    def run(self, inputs: Tensors, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The results of such a call on these tensors."""
        made = [
            torch.empty_like(inputs[0])  # type: ignore[arg-type]
            if layout is None
            else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=device)
            for layout in self.new
        ]
        tensors = (*inputs, *made)
        with launch_on(device):
            for kernel, grid, arguments in self.launches:
                kernel[grid](*arguments.fill(tensors))
        return tuple(made[: self.n_results])


def layouts(tensors: Tensors) -> tuple[Hashable, ...]:
    """How tensors, or None, lie in memory, as far as kernels are compiled for it; and in how many places they begin."""
    places = [0 if x is None else x.data_ptr() for x in tensors]
    found = [None if x is None else (x.shape, x.stride(), x.dtype, place % 16) for x, place in zip(tensors, places)]
    return (*found, len(set(places)))


def remember(known: dict[Hashable, Any], key: Hashable, found: Any) -> None:
    """Keep what was found out for a key, of as many as LAYOUTS."""
    if len(known) >= LAYOUTS:
        known.clear()
    known[key] = found


class Calls:
    """The calls of one kind that are known, by all that they depend on; None for those that are to go the whole way."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Known | None] = {}

    def find(self, inputs: Tensors, asked: Hashable) -> Known | None:
        """What is known of a call, see `run`."""
        return self.known.get((layouts(inputs), inputs[0].device, asked))  # type: ignore[union-attr]

    def run(
        self,
        inputs: Tensors,
        asked: Hashable,
        work: Callable[[], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | None]],
    ) -> tuple[torch.Tensor, ...]:
        """The results of `work()`, or of launches like those of a call before that agrees with this one.

        Args:
            inputs: the call's tensors, on one device; the first is one.
            asked: all else that the launches depend on.
            work: makes the results, and returns them with what other tensors its kernels fill before they read them;
                None instead of those where launches alone do not make the results.
        """
        device = inputs[0].device  # type: ignore[union-attr]
        key = (layouts(inputs), device, asked)
        known = self.known.get(key)
        if known is not None:
            return known.run(inputs, device)
        if key in self.known:
            return tuple(work()[0])
        launches: list[Noted] = []
        _noted.launches = launches
        try:
            results, others = work()
        finally:
            _noted.launches = None
        if all(x.kernel is not None for x in launches):  # one that was only compiled tells nothing
            remember(self.known, key, None if others is None else _learn(inputs, results, others, launches))
        return tuple(results)


def _learn(
    inputs: Tensors, results: Sequence[torch.Tensor], others: Sequence[torch.Tensor], launches: Iterable[Noted]
) -> Known | None:
    """What such calls launch; None where an argument is not understood, or nothing was launched."""
    new = (*results, *others)
    places: dict[int, tuple[int, torch.dtype]] = {}
    for place, x in enumerate((*inputs, *new)):
        if x is not None and x.numel():
            if x.data_ptr() in places:  # which of the two is meant?
                return None
            places[x.data_ptr()] = place, x.dtype
    noted = []
    try:
        for kernel, grid, arguments, named in launches:
            given = len(arguments) - named
            pattern = _pattern(arguments[:given], places, tuple)
            constants = arguments[given:]
            if any(map(_holds_tensor, constants)):
                return None
            noted.append((kernel, grid, Parts(tuple, (*pattern.items, *constants), pattern.spots)))
    except LookupError:
        return None
    if not noted:
        return None
    first = torch.empty_like(inputs[0])  # type: ignore[arg-type]
    like = first.shape, first.stride(), first.dtype
    made = [(x.shape, x.stride(), x.dtype) for x in new]
    return Known(tuple(None if x == like else x for x in made), len(results), tuple(noted))


def _pattern(items: tuple[Any, ...], places: dict[int, tuple[int, torch.dtype]], make: Callable[..., Any]) -> Parts:
    """Arguments with what stands for tensors; LookupError for what is not understood."""
    spots: list[tuple[int, Any]] = []
    for spot, x in enumerate(items):
        base = getattr(x, "base", None)
        if isinstance(x, torch.Tensor):
            place, dtype = places[x.data_ptr()]
            spots.append((spot, Viewed(place, x.dtype) if INTERPRETED and x.dtype != dtype else place))
        elif isinstance(base, torch.Tensor):
            spots.append((spot, Described(places[base.data_ptr()][0], type(x), {**vars(x), "base": None})))
        elif isinstance(x, tuple):
            named = INTERPRETED and hasattr(x, "_make")  # compiled kernels know the parts by their order alone
            inner = _pattern(x, places, type(x)._make if named else tuple)  # type: ignore[attr-defined]
            if inner.spots:
                spots.append((spot, inner))
        elif not isinstance(x, (int, float, type(None))):
            raise LookupError(x)
    taken = {spot for spot, _ in spots}
    return Parts(make, tuple(None if spot in taken else x for spot, x in enumerate(items)), tuple(spots))


def _holds_tensor(x: Any) -> bool:
    """Whether x is a tensor or a tuple that holds one."""
    return any(map(_holds_tensor, x)) if isinstance(x, tuple) else isinstance(x, torch.Tensor)


def is_plain(*tensors: Any) -> bool:
    """Whether no subclass, mode, transform or trace stands between a call and its kernels and must hear of it.

    Then the implementation of an operation can be called as it is. None is plain.
    """
    if is_followed() or torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return False
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN or torch._C._dispatch_keys(x).raw_repr() not in _plain_keys(x.device.type):
            return False
    return True


@functools.cache
def _plain_keys(kind: str) -> tuple[int, ...]:
    """To whom PyTorch's dispatcher brings an operation on plain tensors of a kind of device: who computes it, and who
    differentiates it. Sparse, nested, batched and negative tensors go to others.
    """
    with torch.inference_mode():
        without_gradients = torch.empty(0, device=kind)
    return tuple(torch._C._dispatch_keys(x).raw_repr() for x in (torch.empty(0, device=kind), without_gradients))

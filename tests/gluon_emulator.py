"""Runs the Gluon kernels for Hopper chips on a CPU: their own source, on a small model of the chip.

Gluon has no interpreter. Here PyTorch stands in for its language: shared memory is memory that starts as NaN, and the
warp groups of a program are threads of which one runs at a time. Who goes on and which copy arrives is drawn at random
wherever a group waits: a seed is an order. Things happen as late as the chip may let them:

- a matrix product reads shared memory when it is waited for, not when it is issued;
- a copy between memory and shared memory happens at any time until somebody has waited for it; past the end of a
  tensor it reads zeros and writes nothing;
- what the threads of a group have stored they may load after a barrier of the group; a product may read it after a
  fence; it may be sent after a fence and then a barrier; what was sent may be overwritten after its sending was waited
  for and then a barrier (Mark);
- integers are divided towards zero, and a maximum passes NaN over.

Layouts and registers are not modelled. If nobody can go on, Deadlock is raised.
"""

from __future__ import annotations

import enum
import functools
import inspect
import random
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import kernels
from kernels.attention import arguments, pieces, score

assert arguments  # imported before anything is replaced
MODULES = ("hopper_pieces", "hopper_forward", "hopper_backward")


class Deadlock(Exception):
    """Everyone waits."""


class Tensor(torch.Tensor):
    """What a kernel computes with."""

    type = property(lambda self: types.SimpleNamespace(layout=None))

    def __floordiv__(self, other: Any) -> Any:
        return torch.div(self, other, rounding_mode="trunc")

    def __mod__(self, other: Any) -> Any:
        return torch.fmod(self, other)


def tensor(x: Any) -> Any:
    return (x if isinstance(x, torch.Tensor) else torch.tensor(x)).as_subclass(Tensor)


class Mark(enum.IntEnum):
    """What has become of an element of shared memory."""

    NONE = 0  # nothing that restricts its use
    STORED = 1
    MET = 2  # stored, and after a barrier
    FENCED = 3  # stored, and after a fence
    SENT = 4
    LEFT = 5  # its sending is over; one thread of the group knows


ANY = set(Mark) - {Mark.NONE}
AFTER_FENCE = {Mark.STORED: Mark.FENCED, Mark.MET: Mark.FENCED}
AFTER_BARRIER = {Mark.STORED: Mark.MET, Mark.FENCED: Mark.NONE, Mark.LEFT: Mark.NONE}


class Shared:
    """A view of shared memory, and the marks of its elements."""

    def __init__(self, chip: Chip, memory: torch.Tensor, marks: torch.Tensor) -> None:
        self.chip, self.memory, self.marks, self.dtype = chip, memory, marks, memory.dtype

    def view(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Shared:
        return Shared(self.chip, change(self.memory), change(self.marks))

    def index(self, i: Any) -> Shared:
        return self.view(lambda x: x[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self.view(lambda x: x.narrow(dim, start, length))

    def reshape(self, shape: list[int]) -> Shared:
        return self.view(lambda x: x.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self.view(lambda x: x.permute(order))

    def load(self, layout: object) -> Any:
        self.forbid(Mark.STORED, Mark.FENCED)
        return tensor(self.memory.clone())

    def store(self, x: torch.Tensor) -> None:
        assert x.shape == self.memory.shape and x.dtype == self.dtype
        self.forbid(Mark.SENT, Mark.LEFT)
        self.memory.copy_(x)
        self.mark(Mark.STORED)

    def mark(self, mark: Mark) -> None:
        self.marks.fill_(mark)
        self.chip.current.marked.append(self.marks)

    def forbid(self, *marks: Mark) -> None:
        """None of its elements has one of these marks."""
        for mark in marks:
            assert not (self.marks == mark).any(), mark.name


class Barrier:
    """An mbarrier: its phase completes when `count` have arrived and all bytes that were expected are there."""

    count = arrived = awaited = phase = 0

    def change(self, arrived: int, awaited: int) -> None:
        self.arrived, self.awaited = self.arrived + arrived, self.awaited + awaited
        assert self.arrived <= self.count, "more arrivals than a phase takes"
        if self.arrived == self.count and self.awaited == 0:
            self.arrived, self.phase = 0, self.phase + 1


class Signals(list):
    """Barriers in shared memory."""

    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


class NamedBarrier:
    """Two groups meet; one of them may go on at once."""

    arrived = meeting = 0

    def arrive(self) -> int:
        """Number of the meeting."""
        meeting = self.meeting
        self.arrived += 1
        if self.arrived == 2:
            self.arrived, self.meeting = 0, meeting + 1
        return meeting


class Pointer:
    """A place, or places, in a tensor."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


def as_argument(x: Any) -> Any:
    """An argument of a launch as a kernel gets it."""
    if isinstance(x, tuple):
        return type(x)(*map(as_argument, x))
    return Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else tensor(x) if isinstance(x, int) else x


class Descriptor:
    """What TMA knows of a tensor: boxes of it are copied by the place of their first element."""

    def __init__(self, x: torch.Tensor, shape: list[int], strides: list[int], box: list[int], layout: object) -> None:
        self.x, self.box, self.layout = x, box, layout
        assert list(x.shape) == shape
        assert all(given == own or size == 1 for size, given, own in zip(shape, strides, x.stride()))
        self.block_type = types.SimpleNamespace(nbytes=x.element_size() * torch.Size(box).numel())

    def at(self, place: list[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """The part of the tensor that a box covers, and which part of the box that is."""
        starts = [int(start) for start in place]
        assert min(starts) >= 0
        part = self.x[tuple(slice(start, start + side) for start, side in zip(starts, self.box))]
        return part, tuple(slice(0, side) for side in part.shape)


class Product:
    """A matrix product under way: shared memory is read when it is finished."""

    result: Any = None

    def __init__(self, a: Any, b: Shared, acc: torch.Tensor, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc

    def finish(self) -> None:
        a = self.a.memory if isinstance(self.a, Shared) else self.a
        product = a.float() @ self.b.memory.float()
        self.result = tensor(self.acc + product if self.use_acc else product)


class Group:
    """A warp group: a thread that runs, when it is told to, until it waits."""

    def __init__(self, function: Callable[..., None], args: tuple) -> None:
        self.is_done, self.error = False, None
        self.may_go: Callable[[], bool] = lambda: True
        self.products: list[Product] = []  # issued and not finished, in order
        self.marked: list[torch.Tensor] = []  # marks that it has set
        self.told, self.paused = threading.Semaphore(0), threading.Semaphore(0)

        def body() -> None:
            self.told.acquire()
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever told it to run
                self.error = error
            self.is_done = True
            self.paused.release()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Tell it to run, until it waits or ends."""
        self.told.release()
        self.paused.acquire()
        if self.error:
            raise self.error

    def change_marks(self, changes: dict[Mark, Mark]) -> None:
        for marks in self.marked:
            before = marks.clone()
            for old, new in changes.items():
                marks[before == old] = new
        self.marked = [marks for marks in self.marked if marks.any()]

    def wait(self, may_go: Callable[[], bool]) -> None:
        """Called in its thread: let others run until the condition holds, and for as long as chance has it."""
        self.may_go = may_go
        self.paused.release()
        self.told.acquire()


class Chip:
    """One program at a time: its warp groups, barriers, and the copies under way."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.groups: list[Group] = []
        self.copies: list[tuple[Group | None, Callable[[], None]]] = []  # by the group that waits for its sending

    @property
    def current(self) -> Group:
        return next(group for group in self.groups if group.thread is threading.current_thread())

    def launch(self, kernel: Callable[..., None], grid: tuple[int], args: tuple, options: dict[str, Any]) -> None:
        """Every program, one after the other."""
        given = [as_argument(x) for x in args]
        options = {name: x for name, x in options.items() if name != "num_warps"}
        self.n_programs = grid[0]
        for self.program in range(grid[0]):
            self.named: dict[str, NamedBarrier] = {}
            kernel(*given, **options)

    def specialize(self, parts: list[tuple[Callable[..., None], tuple]], warps: object, registers: object) -> None:
        """Run the warp groups until all have ended and nothing is under way."""
        self.groups = [Group(function, args) for function, args in parts]
        eagerness = {group: self.rng.choice((0.1, 1.0, 10.0)) for group in self.groups}  # some are slow, some fast
        arrival = self.rng.choice((0.1, 1.0, 10.0))
        while True:
            running = [group for group in self.groups if not group.is_done]
            ready: list[Any] = [group for group in running if group.may_go()]
            weights = [eagerness[group] for group in ready] + [arrival] * len(self.copies)
            if not weights:
                if running:
                    raise Deadlock(f"{len(running)} groups wait for one another")
                return
            chosen = self.rng.choices(ready + self.copies, weights)[0]
            if isinstance(chosen, Group):
                chosen.run()
                assert not chosen.is_done or all(group is not chosen for group, _ in self.copies), "ends while it sends"
            else:
                self.finish(chosen)

    def finish(self, copy: tuple[Group | None, Callable[[], None]]) -> None:
        self.copies.remove(copy)
        copy[1]()

    # What the kernels call

    def load_tile(self, desc: Descriptor, place: list[Any], barrier: Barrier, target: Shared) -> None:
        part, inside = desc.at(place)
        target.forbid(*ANY)
        target.memory.fill_(torch.nan)

        def arrive() -> None:
            target.memory.zero_()
            target.memory[inside] = part
            barrier.change(0, -desc.block_type.nbytes)

        self.copies.append((None, arrive))

    def store_tile(self, desc: Descriptor, place: list[Any], source: Shared, adds: bool = False) -> None:
        part, inside = desc.at(place)
        source.forbid(*ANY)
        source.mark(Mark.SENT)
        self.copies.append(
            (self.current, lambda: part.copy_(source.memory[inside] + part if adds else source.memory[inside]))
        )

    def wait_for_stores(self, pending: int) -> None:
        assert pending == 0
        for copy in [copy for copy in self.copies if copy[0] is self.current]:
            self.finish(copy)
        self.current.change_marks({Mark.SENT: Mark.LEFT})

    def fence(self) -> None:
        self.current.change_marks(AFTER_FENCE)

    def meet(self) -> None:
        """A barrier of the threads of a group."""
        self.current.change_marks(AFTER_BARRIER)

    def arrive(self, barrier: Barrier, count: int) -> None:
        self.meet()  # the compiler puts one before
        barrier.change(count, 0)

    def wait(self, barrier: Barrier, parity: Any) -> None:
        self.current.wait(lambda: barrier.phase % 2 != int(parity))

    def multiply(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.forbid(Mark.STORED, Mark.MET)
        self.current.products.append(Product(a, b, acc, use_acc))
        return self.current.products[-1]

    def wait_for_products(self, pending: int, deps: list[Product]) -> Any:
        self.current.wait(lambda: True)
        products = self.current.products
        while len(products) > pending:
            products.pop(0).finish()
        assert deps[0].result is not None, "it is not among those that were waited for"
        return deps[0].result

    def named_barrier(self, verb: str, number: str) -> None:
        self.meet()
        barrier = self.named.setdefault(number, NamedBarrier())
        meeting = barrier.arrive()
        if verb == "sync":
            self.current.wait(lambda: barrier.meeting > meeting)


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    if mask is None:
        return tensor(pointer.memory[int(pointer.offset)])
    return tensor(torch.where(mask, pointer.memory[torch.where(mask, pointer.offset, 0)], other))


def store(pointer: Pointer, x: torch.Tensor, mask: torch.Tensor) -> None:
    pointer.memory[pointer.offset[mask]] = x[mask]


def allocate(chip: Chip, dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if layout == "barriers":
        return Signals(Barrier() for _ in range(shape[0]))
    memory = torch.full(shape, torch.nan if dtype.is_floating_point else -7, dtype=dtype)
    return Shared(chip, memory, torch.zeros(shape, dtype=torch.int8))


def greatest(x: torch.Tensor, axis: int) -> Any:
    return tensor(x.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(axis))


def make_language(chip: Chip) -> types.SimpleNamespace:
    """What the kernels call gl, and tl."""

    def binary(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        return lambda a, b: tensor(function(tensor(a), tensor(b)))

    def layout(*_: object) -> None:
        return None

    return types.SimpleNamespace(
        constexpr=lambda x: x,
        float16=torch.float16,
        bfloat16=torch.bfloat16,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        NVMMADistributedLayout=layout,
        DotOperandLayout=layout,
        SliceLayout=layout,
        BlockedLayout=layout,
        SwizzledSharedLayout=layout,
        NVMMASharedLayout=types.SimpleNamespace(get_default_for=layout),
        static_range=range,
        program_id=lambda axis: tensor(chip.program),
        num_programs=lambda axis: chip.n_programs,
        allocate_shared_memory=functools.partial(allocate, chip),
        load=load,
        store=store,
        warp_specialize=chip.specialize,
        barrier=chip.meet,
        arange=lambda start, end, layout: tensor(torch.arange(start, end)),
        full=lambda shape, x, dtype, layout: tensor(torch.full(shape, x, dtype=dtype)),
        zeros=lambda shape, dtype, layout: tensor(torch.zeros(shape, dtype=dtype)),
        zeros_like=torch.zeros_like,
        exp2=torch.exp2,
        abs=torch.abs,
        convert_layout=lambda x, layout: x,
        where=lambda c, a, b: tensor(torch.where(tensor(c), a, b)),
        minimum=binary(torch.fmin),
        maximum=binary(torch.fmax),
        cdiv=lambda a, b: (tensor(a) + (b - 1)) // b,
        max=greatest,
        min=lambda x, axis: tensor(x.amin(axis)),
        sum=lambda x, axis: tensor(x.sum(axis)),
        _core=types.SimpleNamespace(builtin=lambda function: function),
    )


class Kernel:
    """A function of the language; with a grid, a launch of it."""

    def __init__(self, function: Callable[..., Any], chip: Chip) -> None:
        self.function, self.chip = function, chip
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: self.chip.launch(self.function, grid, args, options)


def emulate(seed: int, change: Callable[[str], str] = lambda source: source) -> types.SimpleNamespace:
    """launch_hopper_forward and launch_hopper_backward, on CPU tensors.

    seed: of the order in which things happen. change: is given the source of each file, and may give another.
    """
    chip = Chip(seed)
    gl = make_language(chip)
    hopper = types.SimpleNamespace(
        fence_async_shared=chip.fence,
        warpgroup_mma=chip.multiply,
        warpgroup_mma_wait=chip.wait_for_products,
        tma=types.SimpleNamespace(
            async_load=chip.load_tile, async_store=chip.store_tile, store_wait=chip.wait_for_stores
        ),
        mbarrier=types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=lambda barrier, count: setattr(barrier, "count", count),
            expect=lambda barrier, nbytes: barrier.change(1, nbytes),
            arrive=chip.arrive,
            wait=chip.wait,
        ),
    )
    gluon = types.SimpleNamespace(jit=lambda function: Kernel(function, chip), language=gl)
    work: dict[str, Any] = {"tl": gl}
    exec(inspect.getsource(getattr(pieces.find_work, "fn", pieces.find_work)).split("\n", 1)[1], work)
    stand_ins: dict[str, Any] = {
        "triton.experimental": types.SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gl,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=Descriptor),
        "kernels.attention.score": types.SimpleNamespace(LOG2_E=score.LOG2_E.value),
        "kernels.attention.pieces": types.SimpleNamespace(**{**vars(pieces), "find_work": work["find_work"]}),
    }
    folder = Path(kernels.__file__).parent / "attention"
    replaced = {
        "named_barrier": chip.named_barrier,
        "add_tile": functools.partial(chip.store_tile, adds=True),
        "add_zeros": lambda x, sums: sums + 0 * x,
        "range": lambda *bounds: (tensor(i) for i in range(*map(int, bounds))),
    }
    with mock.patch.dict(sys.modules, stand_ins):
        for name in MODULES:
            module = types.ModuleType(f"kernels.attention.{name}")
            source = change((folder / f"{name}.py").read_text())
            exec(compile(source, str(folder / f"{name}.py"), "exec"), vars(module))
            vars(module).update(replaced)
            sys.modules[module.__name__] = module
        return types.SimpleNamespace(
            **{
                name: getattr(sys.modules[f"kernels.attention.{name.removeprefix('launch_')}"], name)
                for name in ("launch_hopper_forward", "launch_hopper_backward")
            }
        )

"""Training steps as CUDA graphs: the host starts many kernels with one call, and many steps with one graph.

A step of a small model is some hundred kernels of microseconds each, which a host cannot launch as fast as they run. A
graph holds them with their arguments, the addresses they read and write included. So all a step takes and leaves
behind stays in one place: the epoch's problems, its learning rates and the number of the next step lie on the device,
weights, gradient, Adam's state and running sums always do.

Source: "CUDA semantics", section "CUDA Graphs", of PyTorch's documentation, whose rules are kept here: warm up on the
stream on which is captured, allocate what outlives a step before, wait for the device nowhere within. Random numbers go
on from graph to graph: capture registers torch's generator, and a replay advances it by what the steps drew.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from calcformer.data import Examples

__all__ = ["CudaRecorder", "GraphedSteps", "Recorder"]

TOGETHER = 8  # steps in the longer graph: one launch of some ten microseconds for all of them
WARM_UPS = 3  # steps taken one by one before a graph, as the documentation advises

Work = Callable[[], None]


class Recorder:
    """Where work runs and how it is recorded; this one does without a device, and calls what it was given again."""

    def run(self, work: Work) -> None:
        """Do the work as it is written."""
        work()

    def record(self, work: Work) -> Work:
        """What does the work each time it is called; the work is not done yet."""
        return work


class CudaRecorder(Recorder):
    """Records work as CUDA graphs.

    Everything runs on one stream of its own: gradients flow on the stream of their forward pass, and none of them may
    lead to the default stream while a graph is captured.

    Args:
        optimizer: what steps in the work. It has made its state when work is recorded.
    """

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
        self._device, self._optimizer = device, optimizer
        self._stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """After what the caller's stream was given before, and before what it is given next."""
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield
        callers.wait_stream(self._stream)

    def run(self, work: Work) -> None:
        with self._on_stream():
            work()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Graphs are replayed one after the other and leave nothing in their memory, so they share it.
        pool = self._graphs[0].pool() if self._graphs else None
        with self._on_stream(), _capturable(self._optimizer), _uncollected():
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                work()
        self._graphs.append(graph)
        return partial(self.run, graph.replay)


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the optimiser step in a graph. The fused Adam can; told so for good, it warns at every other step."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection within: to free another graph or kernel is forbidden while a graph is captured."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphedSteps:
    """Takes the steps of an epoch, one by one at first, then by graphs of one step and of several.

    Args:
        step: step(batch, rate), one step of the optimiser, which looks at no value and waits for nothing. `rate` is a
            tensor () on the device.
        batch_size: problems in a step; the last of an epoch may have fewer.
        recorder: records the graphs.
    """

    def __init__(self, step: Callable[[Examples, torch.Tensor], None], batch_size: int, recorder: Recorder) -> None:
        self._step, self._batch_size, self._recorder = step, batch_size, recorder
        self._examples: Examples | None = None
        self._warmed: Counter[int] = Counter()  # steps taken one by one, by the size of their batch
        self._graphs: dict[tuple[int, int], Work] = {}  # by steps and size of the batch

    def __call__(self, examples: Examples, rates: Sequence[float]) -> Iterator[int]:
        """Train on the examples, which stand in the order of the epoch; yields how many problems were trained on.

        Args:
            examples: on the device, in every epoch as many, of the same lengths.
            rates: the learning rate of each step.
        """
        self._fill(examples, rates)
        left = len(examples)
        while left:
            rows = min(left, self._batch_size)
            count = TOGETHER if left >= TOGETHER * self._batch_size else 1
            if self._warmed[rows] < WARM_UPS:
                count = 1
                self._warmed[rows] += 1
                self._recorder.run(partial(self._take, 1, rows))
            else:
                if (count, rows) not in self._graphs:
                    self._graphs[count, rows] = self._recorder.record(partial(self._take, count, rows))
                self._graphs[count, rows]()
            left -= count * rows
            yield count * rows

    def _fill(self, examples: Examples, rates: Sequence[float]) -> None:
        """Put an epoch where the graphs look for it."""
        device = examples.device
        if self._examples is None:
            self._examples = examples.apply(torch.clone)
            self._rates = torch.tensor(rates, device=device)
            self._place = torch.zeros(1, dtype=torch.long, device=device)  # the step that comes next
            self._rows = torch.arange(self._batch_size, device=device)
        for name, tensor in vars(self._examples).items():
            if tensor is not None:
                tensor.copy_(getattr(examples, name))
        self._rates.copy_(torch.tensor(rates))
        self._place.zero_()

    def _take(self, count: int, rows: int) -> None:
        """The next `count` steps, on batches of `rows` problems."""
        assert self._examples is not None
        for _ in range(count):
            batch = self._examples.select(self._place * self._batch_size + self._rows[:rows])
            self._step(batch, self._rates.index_select(0, self._place).squeeze(0))
            self._place += 1

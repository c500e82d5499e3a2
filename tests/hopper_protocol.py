"""A model of who waits for whom in the Gluon kernels for Hopper chips, to be run in many orders on any machine.

The warp groups are generators that yield what they do to shared memory and barriers, in the order of the kernel's
code. A scheduler takes turns among them, and among the copies that are under way, at random. A rule broken raises:

- Race: a copy into a buffer that is read or copied into; a read of a buffer that a copy is filling, or that holds
  another tile than the reader means; a store beside a read, or beside the sending of what was stored before.
- Deadlock: everyone waits.

A step that keeps order has a name. Leaving it out (`without`) must break a rule in some order, or it would not be
needed. Not modelled: the warps of a group, which barriers of their own keep together, and the fences between what
threads store and what TMA and the matrix unit read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SLOTS = 2
ANYTHING = object()  # what a buffer held before does not matter
Step = tuple[Any, ...]
Group = Iterator[tuple[str, Step]]  # the steps of a warp group, with their names where they keep order


class Broken(Exception):
    """A rule was broken."""


class Race(Broken):
    """Two accesses to a buffer that nothing keeps apart, or one of the wrong contents."""


class Deadlock(Broken):
    """Nobody can go on."""


@dataclass
class Barrier:
    """An mbarrier: the phase it is in completes when `count` have arrived and no bytes are awaited."""

    count: int
    arrived: int = 0
    copies: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.arrived == self.count and self.copies == 0:
            self.arrived, self.phase = 0, self.phase + 1

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived > self.count:
            raise Race("more arrivals than a phase takes")
        self.settle()

    def passed(self, parity: int) -> bool:
        """Whether a wait for the phase of this parity goes through, as mbarrier.try_wait.parity decides it."""
        return self.phase % 2 != parity


@dataclass
class Buffer:
    """A tile in shared memory: what it holds, who reads it, whether a copy fills it."""

    holds: Any = None
    readers: int = 0
    filling: bool = False


@dataclass
class Machine:
    """The shared memory and barriers of a program."""

    barriers: dict[Any, Barrier]
    buffers: dict[Any, Buffer]
    turns: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(3)])  # of a consumer: given, taken
    meetings: list[int] = field(default_factory=lambda: [0, 0])  # how often each consumer has come to one
    copies: list[tuple[Any, Any, Any]] = field(default_factory=list)  # under way: barrier, buffer, contents
    sent: list[tuple[int, Any]] = field(default_factory=list)  # under way: consumer, buffer

    def can(self, step: Step) -> bool:
        """Whether a step would not wait."""
        if step[0] == "wait":
            return self.barriers[step[1]].passed(step[2])
        if step[0] == "turn_wait":
            return self.turns[step[1]][0] > self.turns[step[1]][1]
        if step[0] == "met":
            return self.meetings[1 - step[1]] >= self.meetings[step[1]]
        if step[0] == "sent":
            return all(consumer != step[1] for consumer, _ in self.sent)
        return True

    def do(self, step: Step) -> None:
        """Take a step that does not wait."""
        kind, *rest = step
        if kind == "arrive":
            self.barriers[rest[0]].arrive()
        elif kind == "copy":  # a barrier that expects it, a buffer, what it brings
            barrier, name, contents = rest
            buffer = self.buffers[name]
            if buffer.readers or buffer.filling:
                raise Race(f"a copy of {contents} into {name}, which is {'read' if buffer.readers else 'being filled'}")
            buffer.filling = True
            self.barriers[barrier].copies += 1
            self.barriers[barrier].arrive()
            self.copies.append((barrier, name, contents))
        elif kind == "expect":
            self.barriers[rest[0]].copies += 2
            self.barriers[rest[0]].arrive()
        elif kind == "fill":  # a copy that its barrier expects already
            barrier, name, contents = rest
            self.buffers[name].filling = True
            self.copies.append((barrier, name, contents))
        elif kind == "overwrite":  # a part of a buffer: nobody may read it
            if self.buffers[rest[0]].readers:
                raise Race(f"{rest[0]} is overwritten while it is read")
        elif kind == "read":
            self.check_contents(*rest)
            self.buffers[rest[0]].readers += 1
        elif kind == "read_end":
            self.buffers[rest[0]].readers -= 1
        elif kind == "store":
            name, contents, result = rest
            if contents is not ANYTHING:
                self.check_contents(name, contents)
            if self.buffers[name].readers or self.buffers[name].filling:
                raise Race(f"a store to {name}, which is read")
            self.buffers[name].holds = result
        elif kind == "turn_give":
            given, taken = self.turns[rest[0]]
            if given - taken >= 1:
                raise Race(f"the turn of consumer {rest[0]} is given twice")
            self.turns[rest[0]][0] += 1
        elif kind == "turn_wait":
            self.turns[rest[0]][1] += 1
        elif kind == "meet":
            self.meetings[rest[0]] += 1
            if abs(self.meetings[0] - self.meetings[1]) > 1:
                raise Race("one consumer is two meetings ahead")
        elif kind == "send":  # a consumer, a buffer, its contents
            consumer, name, contents = rest
            self.check_contents(name, contents)
            self.buffers[name].readers += 1
            self.sent.append((consumer, name))
        else:
            assert kind in ("wait", "met", "sent"), kind

    def check_contents(self, name: Any, contents: Any) -> None:
        buffer = self.buffers[name]
        if buffer.filling or buffer.holds != contents:
            raise Race(f"{name} is used as {contents}, it holds {'half a copy' if buffer.filling else buffer.holds}")

    def finish_sending(self, which: int) -> None:
        self.buffers[self.sent.pop(which)[1]].readers -= 1

    def finish_copy(self, which: int) -> None:
        barrier, name, contents = self.copies.pop(which)
        self.buffers[name].filling, self.buffers[name].holds = False, contents
        self.barriers[barrier].copies -= 1
        self.barriers[barrier].settle()


@dataclass(frozen=True)
class Work:
    """A tile of queries: how many key tiles it walks over, and which of them, in that order, an edge cuts."""

    tiles: int
    cut: frozenset[int] = frozenset()


def producer(works: list[Work], consumers: int) -> Group:
    """The kernel's producer."""
    count = raw = 0

    def clean(number: int, contents: Any) -> Group:
        slot = number % SLOTS
        yield "producer waits v_raw", ("wait", ("v_raw", 0), raw & 1)
        yield "", ("store", ("v", slot), ("raw", contents), contents)
        yield "producer gives v_full", ("arrive", ("v_full", slot))

    for turn, work in enumerate(works):
        for i in range(consumers):
            yield "producer waits q_empty", ("wait", ("q_empty", i), (turn & 1) ^ 1)
            yield "", ("copy", ("q_full", i), ("q", i), ("q", turn))
        for seen in range(work.tiles):
            slot, phase = count % SLOTS, count // SLOTS & 1
            yield "producer waits k_empty", ("wait", ("k_empty", slot), phase ^ 1)
            yield "", ("copy", ("k_full", slot), ("k", slot), ("k", turn, seen))
            yield "producer waits v_empty", ("wait", ("v_empty", slot), phase ^ 1)
            if seen and seen - 1 in work.cut:
                yield from clean(count - 1, ("v", turn, seen - 1))
                raw += 1
            if seen in work.cut:
                yield "", ("copy", ("v_raw", 0), ("v", slot), ("raw", ("v", turn, seen)))
            else:
                yield "", ("copy", ("v_full", slot), ("v", slot), ("v", turn, seen))
            count += 1
        if work.tiles - 1 in work.cut:
            yield from clean(count - 1, ("v", turn, work.tiles - 1))
            raw += 1


def multiply_values(slot: int, number: int, contents: Any) -> Group:
    yield "consumer waits v_full", ("wait", ("v_full", slot), number // SLOTS & 1)
    yield "", ("read", ("v", slot), contents)


def end_values(slot: int) -> Group:
    yield "", ("read_end", ("v", slot))
    yield "consumer gives v_empty", ("arrive", ("v_empty", slot))


def consumer(index: int, works: list[Work], consumers: int) -> Group:
    """One of the kernel's consumers."""
    following = (index + 1) % consumers
    q = ("q", index)
    if following == 0:
        yield "the last gives the first turn", ("turn_give", following)
    count = 0
    for turn, work in enumerate(works):
        yield "consumer waits q_full", ("wait", ("q_full", index), turn & 1)
        for seen in range(work.tiles):
            slot, before, is_cut = count % SLOTS, (count - 1) % SLOTS, seen in work.cut
            yield "consumer waits its turn", ("turn_wait", index)
            if seen and is_cut:  # one product after the other
                yield from multiply_values(before, count - 1, ("v", turn, seen - 1))
                yield from end_values(before)
            yield "consumer waits k_full", ("wait", ("k_full", slot), count // SLOTS & 1)
            yield "", ("read", q, ("q", turn))
            yield "", ("read", ("k", slot), ("k", turn, seen))
            if seen and not is_cut:
                yield from multiply_values(before, count - 1, ("v", turn, seen - 1))
            yield "consumer gives the turn", ("turn_give", following)
            yield "", ("read_end", q)  # the product is waited for
            yield "", ("read_end", ("k", slot))
            yield "consumer gives k_empty", ("arrive", ("k_empty", slot))
            if seen and not is_cut:
                yield from end_values(before)
            if is_cut:
                yield "consumer waits for the flags", ("wait", ("v_full", slot), count // SLOTS & 1)
                yield "", ("read", ("v", slot), ("v", turn, seen))  # the flags come and go with the values
                yield "", ("read_end", ("v", slot))
            count += 1
        last = (count - 1) % SLOTS
        yield "consumer waits the last v_full", ("wait", ("v_full", last), (count - 1) // SLOTS & 1)
        yield "", ("read", ("v", last), ("v", turn, work.tiles - 1))
        yield "", ("read_end", ("v", last))
        yield "consumer gives the last v_empty", ("arrive", ("v_empty", last))
        yield "", ("store", q, ("q", turn), ("out", turn))
        yield "", ("send", index, q, ("out", turn))
        yield "consumer waits for its sending", ("sent", index)
        yield "consumer gives q_empty", ("arrive", ("q_empty", index))


def forward_machine(consumers: int) -> Machine:
    """The barriers and buffers of hopper_forward.py."""
    one = [(name, i) for name in ("q_full", "q_empty") for i in range(consumers)] + [("v_raw", 0)]
    one += [(name, slot) for name in ("k_full", "v_full") for slot in range(SLOTS)]
    every = [(name, slot) for name in ("k_empty", "v_empty") for slot in range(SLOTS)]
    names = [("q", i) for i in range(consumers)] + [(name, slot) for name in "kv" for slot in range(SLOTS)]
    barriers = {name: Barrier(1) for name in one} | {name: Barrier(consumers) for name in every}
    return Machine(barriers, {name: Buffer() for name in names})


def forward(works: list[Work], consumers: int) -> tuple[Machine, list[Group]]:
    """The forward kernel on a program's share of work."""
    groups = [consumer(index, works, consumers) for index in range(consumers)]
    return forward_machine(consumers), [producer(works, consumers), *groups]


def backward_producer(steps: int, is_guarded: bool) -> Group:
    """The producer of hopper_backward.py."""
    yield "", ("expect", ("kv_full", 0))  # both copies arrive at one barrier
    yield "", ("fill", ("kv_full", 0), ("k", 0), "raw k")
    yield "", ("fill", ("kv_full", 0), ("v", 0), "v")
    if is_guarded:
        yield "producer waits kv_full", ("wait", ("kv_full", 0), 0)
        yield "", ("store", ("k", 0), "raw k", "k")
        yield "producer gives kv_ready", ("arrive", ("kv_ready", 0))
    for count in range(steps):
        slot = count % SLOTS
        yield "producer waits q_empty", ("wait", ("q_empty", slot), (count // SLOTS & 1) ^ 1)
        yield "", ("copy", ("q_full", slot), ("q", slot), ("q", count))
        yield "", ("copy", ("grad_full", slot), ("grad", slot), ("grad", count))


def backward_consumer(index: int, steps: int, is_guarded: bool, has_halves: bool) -> Group:
    """A consumer of hopper_backward.py; has_halves: D = 128, both make half of each dQ, else they take turns."""
    keys = "k" if is_guarded else "raw k"
    ready = ("kv_ready", 0) if is_guarded else ("kv_full", 0)
    yield "consumer waits for the keys", ("wait", ready, 0)
    for count in range(steps):
        slot, turn, phase = count % SLOTS, count % 2, count // SLOTS & 1
        yield "", ("store", ("stats", index), ANYTHING, ("stats", count))
        yield "consumer waits q_full", ("wait", ("q_full", slot), phase)
        yield "", ("read", ("k", 0), keys)
        yield "", ("read", ("q", slot), ("q", count))
        yield "consumer waits grad_full", ("wait", ("grad_full", slot), phase)
        yield "", ("read", ("grad", slot), ("grad", count))
        yield "", ("read", ("v", 0), "v")
        yield "", ("read_end", ("k", 0))
        yield "", ("read_end", ("v", 0))
        yield "", ("read", ("stats", index), ("stats", count))
        yield "", ("read_end", ("stats", index))
        yield "", ("store", ("ds", turn, index), ANYTHING, ("ds", count))
        yield "consumer comes to the meeting", ("meet", index)
        yield "consumer waits at the meeting", ("met", index)
        mine = has_halves or turn == index
        if mine and has_halves:
            yield from read_scores(turn, count, keys)
        yield "", ("read_end", ("grad", slot))
        yield "", ("read_end", ("q", slot))
        yield "consumer gives q_empty", ("arrive", ("q_empty", slot))
        if mine and not has_halves:
            yield from read_scores(turn, count, keys)
        if mine:
            yield "", ("read_end", ("ds", turn, 0))
            yield "", ("read_end", ("ds", turn, 1))
            yield "", ("read_end", ("k", 0))
            yield "consumer waits for its sending", ("sent", index)
            yield "", ("store", ("dq", index), ANYTHING, ("dq", count))
            yield "", ("send", index, ("dq", index), ("dq", count))
    yield "", ("sent", index)
    yield "consumer comes to the meeting", ("meet", index)
    yield "consumer waits at the last but one meeting", ("met", index)
    for name in "k", "v":  # each its half of both
        yield "", ("store", ("out", name, index), ANYTHING, "half")
        yield "", ("overwrite", (name, 0))
    yield "consumer comes to the meeting", ("meet", index)
    yield "consumer waits at the last meeting", ("met", index)
    for half in range(2):  # one sends dK, the other dV
        yield "", ("send", index, ("out", "kv"[index], half), "half")
    yield "", ("sent", index)


def read_scores(turn: int, count: int, keys: str) -> Group:
    yield "", ("read", ("ds", turn, 0), ("ds", count))
    yield "", ("read", ("ds", turn, 1), ("ds", count))
    yield "", ("read", ("k", 0), keys)


def backward(steps: int, is_guarded: bool, has_halves: bool) -> tuple[Machine, list[Group]]:
    """The backward kernel on one program's keys."""
    one = [("kv_full", 0), ("kv_ready", 0)]
    one += [(name, slot) for name in ("q_full", "grad_full") for slot in range(SLOTS)]
    barriers = {name: Barrier(1) for name in one} | {("q_empty", slot): Barrier(2) for slot in range(SLOTS)}
    names = [("k", 0), ("v", 0), ("stats", 0), ("stats", 1)]
    names += [("out", name, half) for name in "kv" for half in range(2)]
    names += [(name, slot) for name in ("q", "grad") for slot in range(SLOTS)]
    names += [("ds", turn, index) for turn in range(2) for index in range(2)] + [("dq", index) for index in range(2)]
    machine = Machine(barriers, {name: Buffer() for name in names})
    consumers = [backward_consumer(index, steps, is_guarded, has_halves) for index in range(2)]
    return machine, [backward_producer(steps, is_guarded), *consumers]


def run(machine: Machine, groups: list[Group], seed: int, without: str = "") -> None:
    """Run warp groups in an order that the seed decides; raises Broken where a rule is broken.

    without: the name of a step that is left out.
    """
    rng = random.Random(seed)
    eagerness = [rng.choice((1.0, 10.0, 0.1)) for _ in range(5)]  # some are slow, some fast: also what is under way

    def following(group: Group) -> Step | None:
        return next((step for name, step in group if not name or name != without), None)

    def advance(k: int) -> None:
        step = steps[k]
        assert step is not None
        machine.do(step)
        steps[k] = following(groups[k])

    steps = [following(group) for group in groups]
    while any(step is not None for step in steps):
        ready = [(advance, k, eagerness[k]) for k, step in enumerate(steps) if step is not None and machine.can(step)]
        ready += [(machine.finish_copy, which, eagerness[4]) for which in range(len(machine.copies))]
        ready += [(machine.finish_sending, which, eagerness[4]) for which in range(len(machine.sent))]
        if not ready:
            raise Deadlock(f"everyone waits: {steps}")
        act, argument, _ = rng.choices(ready, [weight for *_, weight in ready])[0]
        act(argument)

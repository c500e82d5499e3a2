"""Calls that are made again: as right as the first ones, and gone the whole way where they must be."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import kernels  # noqa: E402
from kernels import again  # noqa: E402
from kernels.attention import api as attention_api  # noqa: E402
from kernels.attention import ops as attention_ops  # noqa: E402
from kernels.attention.plan import forced  # noqa: E402
from kernels.layer_norm import api as norm_api  # noqa: E402
from kernels.layer_norm import ops as norm_ops  # noqa: E402

LAUNCHES = (attention_ops.FORWARDS, attention_ops.BACKWARDS, norm_ops.FORWARDS, norm_ops.BACKWARDS)
attend = kernels.scaled_dot_product_attention
Tensors = dict[str, torch.Tensor]
Function = Callable[..., torch.Tensor]


def forget() -> None:
    """Make every call a new one."""
    for calls in LAUNCHES:
        calls.known.clear()
    attention_api.CHECKED.clear()
    norm_api.CHECKED.clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each call whose launches were made again."""
    words: list[str] = []
    run = again.Known.run

    def watched(self: again.Known, inputs: Any, device: torch.device) -> Any:
        words.append("replayed")
        return run(self, inputs, device)

    monkeypatch.setattr(again.Known, "run", watched)
    return words


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_inputs(seed: int, length: int = 5, keys: int = 5, heads: int = 4, own: int = 4, **more: Any) -> Tensors:
    """Query, key and value as one projection leaves them, and what else is asked for."""
    q = randn(2, length, heads, 8, seed=seed).transpose(1, 2)
    k, v = randn(2, 2, keys, own, 8, seed=seed + 100).transpose(2, 3).unbind()
    return {"query": q, "key": k, "value": v, **{name: make(seed) for name, make in more.items()}}


def mask(seed: int) -> torch.Tensor:
    return randn(2, 1, 5, 5, seed=seed) > -1.0


def bias(seed: int) -> torch.Tensor:
    return randn(1, 4, 5, 5, seed=seed)


CALLS: dict[str, tuple[Function, Callable[[int], Tensors], dict[str, Any]]] = {
    "short": (attend, attention_inputs, {}),
    "short causal": (attend, attention_inputs, {"is_causal": True}),
    "short shared": (attend, lambda seed: attention_inputs(seed, own=2), {"enable_gqa": True}),
    "general": (attend, lambda seed: attention_inputs(seed, 17, 20), {}),
    "general causal": (attend, lambda seed: attention_inputs(seed, 17, 20), {"is_causal": True, "scale": 0.3}),
    "bool mask": (attend, lambda seed: attention_inputs(seed, attn_mask=mask), {}),
    "mask of two dimensions": (attend, lambda seed: attention_inputs(seed, attn_mask=lambda s: mask(s)[0, 0]), {}),
    "float mask": (attend, lambda seed: attention_inputs(seed, attn_mask=bias), {}),
    "dropout": (attend, attention_inputs, {"dropout_p": 0.3}),
    "negative scale": (attend, attention_inputs, {"scale": -0.5}),
    "window": (attend, lambda seed: attention_inputs(seed, 17, 20), {"window": (3, 4)}),
    "lengths": (attend, lambda seed: attention_inputs(seed, key_lengths=lambda s: torch.tensor([3, s % 5 + 1])), {}),
    "slopes": (attend, lambda seed: attention_inputs(seed, alibi_slopes=lambda s: randn(4, seed=s).abs()), {}),
    "sinks": (attend, lambda seed: attention_inputs(seed, sinks=lambda s: randn(4, seed=s)), {}),
    "no query": (attend, lambda seed: attention_inputs(seed, 0, 5), {}),
    "no key": (attend, lambda seed: attention_inputs(seed, 5, 0), {}),
    "layer norm": (
        kernels.layer_norm,
        lambda s: {"input": randn(3, 7, 16, seed=s), "weight": randn(16, seed=s + 1), "bias": randn(16, seed=s + 2)},
        {"normalized_shape": 16},
    ),
    "layer norm of views": (
        kernels.layer_norm,
        lambda s: {"input": randn(3, 7, 4, 16, seed=s).transpose(1, 2), "weight": randn(16, seed=s + 1)},
        {"normalized_shape": [16], "eps": 1e-3},
    ),
    "wide rms norm": (
        kernels.rms_norm,
        lambda s: {"input": randn(1, 8200, seed=s), "weight": randn(8200, seed=s + 1)},
        {"normalized_shape": 8200},
    ),
    "residual": (
        kernels.add_layer_norm,
        lambda s: {"input": randn(6, 16, seed=s), "residual": randn(6, 16, seed=s + 1), "weight": randn(16, seed=s)},
        {"dropout_p": 0.2},
    ),
    "no rows": (kernels.layer_norm, lambda s: {"input": randn(0, 16, seed=s)}, {"normalized_shape": 16}),
}
WHOLE = "negative scale", "no query", "no key", "no rows"  # always go the whole way
HALF = ("sinks",)  # the backward does


def run(name: str, seed: int, learns: bool, device: str = "cpu") -> list[torch.Tensor]:
    """Output of a call and, where its tensors learn, all gradients."""
    function, make, options = CALLS[name]
    tensors = {key: x.to(device) for key, x in make(seed).items()}
    leaves = [x.requires_grad_() for x in tensors.values() if learns and x.is_floating_point() and name != "slopes"]
    torch.manual_seed(seed)  # for dropout
    output = function(**tensors, **options)
    if not leaves:
        return [output]
    upstream = randn(*output.shape, dtype=output.dtype, seed=seed + 7).to(device)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("learns", [False, True], ids=["forward", "and backward"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_made_again_gives_what_a_new_one_gives(
    name: str, learns: bool, replayed: list[str], device: str
) -> None:
    new = []
    for seed in 1, 2, 3:
        forget()
        new.append(run(name, seed, learns, device))
    assert replayed == []
    forget()
    for seed in 1, 2, 3:
        found = run(name, seed, learns, device)
        for x, y in zip(found, new[seed - 1]):
            assert torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype
    calls = 0 if name in WHOLE else 1 if not learns or name in HALF or name == "slopes" else 2
    assert len(replayed) == 2 * calls  # the second and the third time


@pytest.mark.gpu
def test_kernels_for_hopper_chips_are_launched_again(replayed: list[str]) -> None:
    """Few enough keys that the gradient of the query is added up in one order."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("there is no Hopper chip")
    found = []
    for seeds in (1,), (1, 2):  # 2 is new, then made again
        for seed in seeds:
            make = [randn(2, 3, 128, 64, dtype=torch.bfloat16, seed=seed + i).cuda() for i in range(4)]
            leaves = [x.requires_grad_() for x in make[:3]]
            with forced(kernel="hopper"):
                output = attend(*leaves, is_causal=True)
                found.append([output, *torch.autograd.grad(output, leaves, make[3])])
    assert len(replayed) == 4
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1]))
    forget()
    with forced(kernel="hopper"):
        output = attend(*leaves, is_causal=True)
        new = [output, *torch.autograd.grad(output, leaves, make[3])]
    assert all(torch.equal(x, y) for x, y in zip(found[2], new))


def test_a_launch_on_the_wrong_tensors_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the test above: key and value exchanged where launches are made again."""
    new = run("short", 2, False)[0]
    forget()
    run("short", 1, False)
    original = again.Known.run

    def exchanged(self: again.Known, inputs: Any, device: torch.device) -> Any:
        query, key, value, *rest = inputs
        return original(self, (query, value, key, *rest), device)

    monkeypatch.setattr(again.Known, "run", exchanged)
    assert not torch.equal(run("short", 2, False)[0], new)


@pytest.mark.parametrize("name", ["short", "general", "layer norm"])
def test_what_is_known_holds_no_tensor(name: str) -> None:
    function, make, options = CALLS[name]
    tensors = make(1)
    gone = [weakref.ref(x.untyped_storage()) for x in (*tensors.values(), function(**tensors, **options))]
    tensors.clear()
    gc.collect()
    assert any(calls.known for calls in LAUNCHES) and all(x() is None for x in gone)


def different(name: str) -> Iterator[tuple[Tensors, dict[str, Any]]]:
    """Calls that differ from "short" in one thing each."""
    for change in ("length", "keys", "heads"):
        more = {change: 6} if change != "heads" else {"heads": 6, "own": 6}
        yield attention_inputs(1, **more), {}
    yield {key: x.contiguous() for key, x in attention_inputs(1).items()}, {}
    yield {key: x.to(torch.float16) for key, x in attention_inputs(1).items()}, {}
    shifted = torch.empty(2 * 5 * 4 * 8 + 1)[1:].view(2, 5, 4, 8).transpose(1, 2)
    yield {**attention_inputs(1), "query": shifted.copy_(attention_inputs(1)["query"])}, {}
    for options in {"is_causal": True}, {"scale": 0.2}, {"deterministic": True}, {"softcap": 3.0}, {"dropout_p": 1.0}:
        yield attention_inputs(1), options


def test_calls_that_differ_are_not_taken_for_each_other() -> None:
    calls = [(attention_inputs(1), {}), *different("short")]
    new = []
    for tensors, options in calls:
        forget()
        new.append(attend(**tensors, **options))
    forget()
    for _ in range(2):
        for (tensors, options), expected in zip(calls, new):
            assert torch.equal(attend(**tensors, **options), expected)
    assert len(attention_ops.FORWARDS.known) == len(calls)


def test_a_wrong_call_is_refused_after_right_ones() -> None:
    """1 is True and 0.0 False to a dictionary, not to the checks."""
    tensors = attention_inputs(1)
    for _ in range(2):
        attend(**tensors, is_causal=True)
        kernels.layer_norm(tensors["query"], 8, eps=1.0)
    for bad in {"is_causal": "yes"}, {"dropout_p": 2.0}, {"scale": "x"}, {"backend": "cuda"}, {"attn_mask": 3}:
        with pytest.raises((TypeError, ValueError)):
            attend(**tensors, **bad)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError)):
        attend(tensors["query"], tensors["key"][..., :4], tensors["value"])
    with pytest.raises((TypeError, ValueError)):
        attend(tensors["query"].to_sparse(), tensors["key"], tensors["value"])
    with pytest.raises((TypeError, ValueError)):
        kernels.layer_norm(tensors["query"], 8, eps="1.0")  # type: ignore[arg-type]


def test_one_tensor_for_query_key_and_value(replayed: list[str]) -> None:
    """Of one tensor nobody knows which of the three it is: such a call goes the whole way, and three others do not."""
    for seed in 1, 2:
        x = randn(2, 4, 5, 8, seed=seed)
        same = attend(x, x, x)
        assert not replayed
        apart = attend(x.clone(), x.clone(), x.clone())
        assert torch.equal(same, apart)
    assert len(replayed) == 1


@pytest.mark.parametrize("negative", ["query", "key", "value"])
def test_a_negative_view(negative: str, replayed: list[str]) -> None:
    """A tensor whose memory holds the numbers with the other sign; made of a conjugate's imaginary part."""
    for seed in 1, 2:
        tensors = attention_inputs(seed)
        expected = attend(**{**tensors, negative: -tensors[negative]})
        view = torch.complex(torch.zeros_like(tensors[negative]), tensors[negative]).conj().imag
        assert view.is_neg()
        torch.testing.assert_close(attend(**{**tensors, negative: view}), expected)


def test_what_is_not_plain() -> None:
    x = torch.randn(2, 3)
    for plain in x, x.mT, x[0], torch.nn.Parameter(x), x.clone().requires_grad_(), None:
        assert again.is_plain(x, plain)
    with torch.inference_mode():
        assert again.is_plain(x, torch.ones(3))
    for other in x.to_sparse(), torch._efficientzerotensor(3), torch.complex(x, x).conj().imag:
        assert not again.is_plain(x, other)
    batched: list[bool] = []
    torch._vmap_internals._vmap(lambda y: (batched.append(again.is_plain(y)), y)[1])(x)  # that of is_grads_batched
    torch.func.vmap(lambda y: (batched.append(again.is_plain(y)), y)[1])(x)
    assert batched == [False, False]


@pytest.mark.filterwarnings("ignore")  # what the profiler misses on a machine without a GPU
def test_modes_hear_of_the_operation() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tensors = attention_inputs(1)
    attend(**tensors)
    with FlopCounterMode(display=False) as counter:
        attend(**tensors)
    assert counter.get_total_flops() == 4 * 2 * 4 * 5 * 5 * 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(**tensors)
        kernels.layer_norm(tensors["query"], 8)
    names = {event.name for event in profile.events()}
    assert {"kernels::attention_forward", "kernels::norm_forward"} <= names


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_no_constant() -> None:
    def attends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(query, key, value)

    one, two = (tuple(attention_inputs(seed).values()) for seed in (1, 2))
    attends(*one)
    traced = torch.jit.trace(attends, one, check_trace=False)  # type: ignore[no-untyped-call]
    assert torch.equal(traced(*two), attends(*two))


def test_what_is_forced_precision_and_determinism_count(replayed: list[str]) -> None:
    tensors = attention_inputs(1)
    attend(**tensors)
    with forced(kernel="general"):
        attend(**tensors)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
        attend(**tensors)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(True)
    try:
        attend(**tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert replayed == [] and len(attention_ops.FORWARDS.known) == 4


def test_gradients_twice_and_second_ones() -> None:
    def second(seed: int) -> torch.Tensor:
        tensors = {name: x.requires_grad_() for name, x in attention_inputs(seed).items()}
        (first,) = torch.autograd.grad(attend(**tensors).square().sum(), tensors["query"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors["key"])[0]

    new = second(2)
    second(1)
    assert torch.equal(second(2), new)


class Adding:
    """A kernel that adds a number to a tensor of two numbers, and waits for another thread before it does."""

    arg_names = ("x", "out", "number")

    def __init__(self, meeting: threading.Barrier) -> None:
        self.meeting = meeting

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def run(x: torch.Tensor, out: torch.Tensor, number: int) -> None:
            self.meeting.wait(10)
            out.copy_(x + number)
            self.meeting.wait(10)

        return run


def test_threads_do_not_hear_of_each_others_launches() -> None:
    meeting = threading.Barrier(2)
    kernel, calls = Adding(meeting), again.Calls()
    found: dict[int, list[torch.Tensor]] = {1: [], 2: []}

    def attend_twice(number: int) -> None:
        for i in range(2):
            x = torch.full((2,), float(i))

            def work() -> tuple[list[torch.Tensor], tuple[()]]:
                out = torch.empty_like(x)
                again.run_kernel(kernel, (1,), x, out, number=number)
                return [out], ()

            found[number] += calls.run([x], number, work)

    threads = [threading.Thread(target=attend_twice, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {number: [x.tolist() for x in tensors] for number, tensors in found.items()} == {
        1: [[1.0, 1.0], [2.0, 2.0]],
        2: [[2.0, 2.0], [3.0, 3.0]],
    }
    assert [len(known.launches) for known in calls.known.values() if known is not None] == [1, 1]


def test_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "LAYOUTS", 3)
    for length in range(1, 9):
        attend(**attention_inputs(1, length))
    assert len(attention_ops.FORWARDS.known) <= 3 and len(attention_api.CHECKED) <= 3

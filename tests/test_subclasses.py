"""The norms on tensors that hold others: DTensors on two processes, and jagged nested tensors."""

import itertools
import os
import socket

import pytest
import torch
from torch import distributed

import kernels

pytest.importorskip("triton")
from tests import interpreter  # noqa: E402
from tests.norm_problem import either_backend, either_norm, ours, torch_warns  # noqa: E402 (it imports Triton)

WITH_RESIDUAL = pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])


# DTensors


def leaves(has_residual: bool, centre: bool) -> list[torch.Tensor | None]:
    """Input and residual (3, 5, 7), weight and bias, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 5, 7), (3, 5, 7) if has_residual else None, (7,), (7,) if centre else None]
    return [None if shape is None else torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def placed(x, mesh, placements):
    """The leaf as a DTensor that is a leaf."""
    from torch.distributed.tensor import distribute_tensor

    return None if x is None else distribute_tensor(x.detach(), mesh, placements).requires_grad_()


def assert_right(mesh, placements, backend, centre, has_residual):
    """Outputs and gradients of DTensors are those of whole tensors; nothing is communicated on the way."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.debug import CommDebugMode

    whole = leaves(has_residual, centre)
    parts = [placed(x, mesh, placements if i < 2 else [Replicate()] * mesh.ndim) for i, x in enumerate(whole)]
    call = ours(centre, backend=backend, **({"prenorm": True} if has_residual else {}))
    upstream = torch.arange(105.0).view(3, 5, 7).cos()
    upstreams = [placed(upstream, mesh, placements).detach()] * (1 + has_residual)
    with CommDebugMode() as communication:
        outputs = call(*parts)
        torch.autograd.backward(outputs, upstreams)
    assert communication.get_total_counts() == 0
    expected = call(*whole)
    torch.autograd.backward(expected, [upstream] * len(expected))
    for found, right in zip(outputs, expected, strict=True):
        assert found.placements == tuple(placements)
        torch.testing.assert_close(found.full_tensor(), right, rtol=1e-5, atol=1e-5)
    for part, x in zip(parts, whole):
        if x is not None:
            torch.testing.assert_close(part.grad.full_tensor(), x.grad, rtol=1e-5, atol=1e-5)


def assert_refused(mesh):
    """Placements that a norm of one process cannot follow."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    x, _, weight, _ = leaves(False, False)
    row, copy, terms = [Shard(0)], [Replicate()], [Partial()]
    sharded = placed(x, mesh, row)
    for call, message in (
        (lambda: kernels.rms_norm(placed(x, mesh, [Shard(2)]), 7), "input must be replicated, or"),
        (lambda: kernels.layer_norm(placed(x, mesh, [Shard(1)]), (5, 7)), "input must be replicated, or"),
        (lambda: kernels.rms_norm(DTensor.from_local(x, mesh, terms), 7), "input must be replicated, or"),
        (lambda: kernels.rms_norm(sharded, 7, weight), "weight must be a DTensor like the others, found a plain"),
        (lambda: kernels.rms_norm(x, 7, placed(weight, mesh, copy)), "input must be a DTensor like the others"),
        (lambda: kernels.rms_norm(sharded, 7, placed(weight, mesh, row)), "weight must be placed as .*Replicate"),
        (lambda: kernels.add_rms_norm(sharded, placed(x, mesh, copy)), "residual must be placed as .*Shard"),
        (lambda: kernels.add_rms_norm(sharded, placed(x[:2], mesh, row)), "residual must have the shape"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def on_two_processes(work):
    """`work()` on each of two processes of gloo; a function that each of them can import."""
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, work), nprocs=2)


def _process(rank, port, work):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TRITON_INTERPRET="1")
    torch.set_num_threads(1)
    interpreter.prepare()
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    work()
    distributed.destroy_process_group()


def assert_all_right():
    """On one of two processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    for backend, centre, has_residual in itertools.product(("triton", "torch"), (True, False), (False, True)):
        for placement in (Shard(0), Shard(1), Replicate()):
            assert_right(mesh, [placement], backend, centre, has_residual)
        assert_right(square, [Shard(0), Shard(1)], backend, centre, has_residual)
        assert_right(square, [Replicate(), Shard(0)], backend, centre, has_residual)
    assert_refused(mesh)
    dropped = kernels.add_rms_norm(*[placed(torch.ones(64, 64), mesh, [Shard(0)])] * 2, dropout_p=0.5, prenorm=True)[1]
    kept = dropped.full_tensor() == 3.0
    assert 0.4 < kept.float().mean() < 0.6 and not torch.equal(kept[:32], kept[32:])


@torch_warns
@pytest.mark.long
def test_dtensors_of_two_processes():
    on_two_processes(assert_all_right)


# Jagged nested tensors


OFFSETS = torch.tensor([0, 3, 5, 12])


def jagged(values, offsets=OFFSETS):
    return torch.nested.nested_tensor_from_jagged(values, offsets)


@either_backend
@either_norm
@WITH_RESIDUAL
def test_jagged_tensors_are_their_values(backend, centre, has_residual):
    """Outputs and gradients, bit for bit; the output goes with the input in other operations."""
    generator = torch.Generator().manual_seed(5)
    x, residual, weight, bias, upstream = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in [(12, 7), (12, 7), (7,), (7,), (12, 7)]
    )
    tensors = [x, residual if has_residual else None, weight, bias if centre else None]
    given = [y for y in tensors if y is not None]
    call = ours(centre, backend=backend, **({"prenorm": True} if has_residual else {}))
    found = call(*(y if y is None else jagged(y) for y in tensors[:2]), *tensors[2:])
    expected = call(*tensors)
    for one, right in zip(found, expected, strict=True):
        assert one.is_nested and torch.equal(one.values(), right)
        assert torch.equal((one + jagged(x)).values(), right + x)
    upstreams = [upstream] * len(expected)
    gradients = torch.autograd.grad([y.values() for y in found], given, upstreams)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected, given, upstreams)))


@either_backend
def test_jagged_tensors_of_more_dimensions(backend):
    values = torch.arange(168.0).view(12, 2, 7).cos()
    right = kernels.rms_norm(values, 7, backend=backend)
    assert torch.equal(kernels.rms_norm(jagged(values), 7, backend=backend).values(), right)
    turned = kernels.rms_norm(jagged(values).transpose(1, 2).transpose(1, 2), 7, backend=backend)
    assert torch.equal(turned.values(), right)
    heads_first = kernels.rms_norm(jagged(values).transpose(1, 2), 7, backend=backend)
    assert torch.equal(heads_first.transpose(1, 2).values(), right)


@torch_warns
@either_backend
def test_jagged_tensors_compile(backend):
    torch._dynamo.reset()
    values = torch.arange(84.0).view(12, 7).cos()
    compiled = torch.compile(
        lambda x: kernels.rms_norm(x, 7, backend=backend).values(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(jagged(values)), kernels.rms_norm(values, 7, backend=backend))


def test_jagged_tensors_under_a_mode_of_torch():
    with torch.device("cpu"):
        assert kernels.nn.RMSNorm(7)(jagged(torch.ones(12, 7))).is_nested


def strided():
    return torch.nested.nested_tensor([torch.ones(3, 7), torch.ones(2, 7)])


NESTED_REFUSED = {
    "strided": (lambda x: kernels.layer_norm(strided(), 7), "input must have the layout torch.jagged if it is nested"),
    "strided residual": (lambda x: kernels.add_layer_norm(x.values(), strided()), "residual must have the layout"),
    "strided weight": (lambda x: kernels.rms_norm(x.values(), 7, strided()), "weight must have the layout torch.jag"),
    "ragged": (lambda x: kernels.layer_norm(x, (12, 7)), "input must not be ragged in what is reduced"),
    "ragged last": (lambda x: kernels.rms_norm(x.transpose(1, 2), 12), "input must not be ragged .*found dimension 2"),
    "holes": (
        lambda x: kernels.rms_norm(
            torch.nested.nested_tensor_from_jagged(x.values(), OFFSETS, torch.tensor([1, 2, 4])), 7
        ),
        "input must have no gaps between its sequences",
    ),
    "plain residual": (lambda x: kernels.add_rms_norm(x, x.values()), "residual must be nested as input is"),
    "plain input": (lambda x: kernels.add_rms_norm(x.values(), x), "residual must be a plain tensor, found a nested"),
    "nested weight": (lambda x: kernels.rms_norm(x, 7, x), "weight must be a plain tensor, found a nested"),
    "other offsets": (lambda x: kernels.add_rms_norm(x, jagged(x.values(), OFFSETS.clone())), "shape and offsets of"),
    "size": (lambda x: kernels.rms_norm(x, 5), "normalized_shape must be the trailing dimensions"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", NESTED_REFUSED)
def test_nested_tensors_that_are_refused(case):
    call, message = NESTED_REFUSED[case]
    with pytest.raises(ValueError, match=message) as raised:
        call(jagged(torch.ones(12, 7)))
    assert "\n" not in str(raised.value)

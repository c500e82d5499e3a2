"""Attention on tensors that hold others: DTensors on two processes, and jagged nested tensors."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch

import kernels
from tests.conformance.formula import attention as formula
from tests.test_subclasses import on_two_processes

PATHS = pytest.mark.parametrize("path", ["triton", "torch"])
attention = functools.partial(kernels.scaled_dot_product_attention, enable_gqa=True)


# DTensors

QUERY, KEY = (2, 4, 7, 8), (2, 2, 9, 8)


def options_of(case: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and other arguments of a call, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    random = functools.partial(torch.randn, generator=generator)
    tensors = {"query": random(QUERY), "key": random(KEY), "value": random(2, 2, 9, 6)}
    own: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "causal": ({}, {"is_causal": True}),
        "float mask": ({"attn_mask": random(4, 7, 9)}, {}),
        "float mask of all": ({"attn_mask": random(2, 1, 7, 9)}, {"return_lse": True}),
        "bool mask": ({"attn_mask": random(7, 9) > 0.0}, {}),
        "rules": (
            {"alibi_slopes": random(4).abs(), "sinks": random(4), "key_lengths": torch.tensor([4, 9])},
            {"softcap": 2.0, "window": (3, 2), "causal_alignment": "bottom_right", "return_lse": True},
        ),
        "weights": ({"alibi_slopes": random(2, 4).abs()}, {"need_weights": True}),
    }
    return {**tensors, **own[case][0]}, own[case][1]


def place(name: str, x: torch.Tensor, batch: Any, heads: Any) -> list[Any]:
    """Where a tensor stands if the query is sharded along its batch or its heads by the mesh's dimensions."""
    from torch.distributed.tensor import Replicate, Shard

    last = {"alibi_slopes": 2, "sinks": 2, "key_lengths": 3}.get(name, 0)
    found: list[Any] = []
    for is_batch, is_heads in zip(batch, heads):
        dim = 0 if is_batch else 1
        own = x.ndim - (4 - dim - last)
        sharded = (is_batch or is_heads) and 0 <= own < x.ndim and x.shape[own] > 1
        found.append(Shard(own) if sharded else Replicate())
    return found


def assert_right(mesh: Any, batch: Any, heads: Any, backend: str, case: str) -> None:
    """Outputs and gradients of DTensors are those of whole tensors; nothing is communicated on the way."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    tensors, options = options_of(case)
    whole = {n: x.requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    parts = {n: distribute_tensor(x.detach(), mesh, place(n, x, batch, heads)) for n, x in whole.items()}
    parts = {n: x.requires_grad_(x.is_floating_point()) for n, x in parts.items()}
    expected = attention(**whole, **options, backend=backend)
    upstream = torch.arange(2 * 4 * 7 * 6.0).view(2, 4, 7, 6).cos()
    upstream_part = distribute_tensor(upstream, mesh, place("query", whole["query"], batch, heads))
    with CommDebugMode() as communication:
        found = attention(**parts, **options, backend=backend)
        output = found.output if isinstance(found, tuple) else found
        torch.autograd.backward(output, upstream_part)
    assert communication.get_total_counts() == 0
    outputs = [found] if isinstance(found, torch.Tensor) else found
    results = [expected] if isinstance(expected, torch.Tensor) else expected
    torch.autograd.backward(results[0], upstream)
    for ours, right in zip(outputs, results, strict=True):
        if right is not None:
            assert list(ours.placements) == place("query", whole["query"], batch, heads)
            torch.testing.assert_close(ours.full_tensor(), right, rtol=1e-5, atol=1e-5)
    for name, x in whole.items():
        if x.requires_grad:
            torch.testing.assert_close(parts[name].grad.full_tensor(), x.grad, rtol=1e-4, atol=1e-5)


def assert_refused(mesh: Any) -> None:
    """Placements that one process cannot follow."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    q, k = torch.randn(QUERY), torch.randn(KEY)
    by_heads = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, k)]
    whole = [distribute_tensor(x, mesh, [Replicate()]) for x in (q, k, k)]
    by_rows = distribute_tensor(q, mesh, [Shard(2)])
    one_head = [distribute_tensor(x[:, :1].contiguous(), mesh, [Shard(1)]) for x in (k, k)]
    three = distribute_tensor(torch.randn(2, 3, 9, 8), mesh, [Shard(1)])
    six = distribute_tensor(torch.randn(2, 6, 7, 8), mesh, [Shard(1)])
    mask = torch.randn(4, 7, 9)
    calls: dict[str, Any] = {
        r"query must be replicated, or sharded along .* \(0, 1\), found": lambda: attention(by_rows, *whole[1:]),
        "query must be replicated, or": lambda: attention(DTensor.from_local(q, mesh, [Partial()]), *whole[1:]),
        "query must be a DTensor like the others": lambda: attention(q, *whole[1:]),
        "key must be a DTensor like the others, found a plain tensor": lambda: attention(by_heads[0], k, k),
        "key must be placed as .*Shard": lambda: attention(by_heads[0], *whole[1:]),
        "key must be placed as .*Replicate": lambda: attention(by_heads[0], *one_head),
        "key must have a dimension 1 that 2 processes divide evenly, found 3": lambda: attention(six, three, three),
        "attn_mask must be a DTensor like": lambda: attention(*by_heads, mask),
        "attn_mask must be placed as": lambda: attention(*by_heads, distribute_tensor(mask, mesh, [Replicate()])),
        "dropout_p must be 0 on DTensors": lambda: attention(*by_heads, dropout_p=0.1),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def assert_all_right() -> None:
    """On one of two processes."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    cases = "causal", "float mask", "float mask of all", "bool mask", "rules", "weights"
    placements: list[Any] = [
        (mesh, (True,), (False,)),
        (mesh, (False,), (True,)),
        (mesh, (False,), (False,)),
        (square, (True, False), (False, True)),
    ]
    for i, case in enumerate(cases):
        for placement in placements:
            assert_right(*placement, "torch", case)
        # What is placed how does not depend on what computes.
        assert_right(*placements[i % len(placements)], "triton", case)
    assert_refused(mesh)


@pytest.mark.long
def test_dtensors_of_two_processes() -> None:
    on_two_processes(assert_all_right)


# Jagged nested tensors


def jagged(values: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(T, H, E) as (N, H, T*, E)."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)


@PATHS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"return_lse": True, "softcap": 2.0, "sinks": torch.tensor([0.5, -0.5, 0.1, 0.2])},
        {"alibi_slopes": torch.ones(3, 4), "window": (2, 1)},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("lengths", [((3, 0, 5), (2, 4, 1)), ((3, 4, 5), (3, 4, 5))], ids=str)
def test_jagged_tensors_are_each_sequence_by_itself(
    lengths: Any, options: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", path == "triton")
    shapes = (sum(lengths[0]), 4, 8), (sum(lengths[1]), 2, 8), (sum(lengths[1]), 2, 6)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    query, key, value = (jagged(x, n) for x, n in zip(leaves, (lengths[0], lengths[1], lengths[1])))
    found = attention(query, key, value, **options)
    output = found.output if isinstance(found, tuple) else found
    assert output.is_nested and output.offsets() is query.offsets()
    expected, exact = [], [x.detach().double().requires_grad_() for x in leaves]
    parts = zip(*(x.split(n) for x, n in zip(exact, (lengths[0], lengths[1], lengths[1]))))
    for i, part in enumerate(parts):
        own = {n: x[i] if n == "alibi_slopes" else x for n, x in options.items() if n != "return_lse"}
        expected.append(formula(*(x.transpose(0, 1)[None] for x in part), **own)[:2])
    right = torch.cat([x[0][0] for x in expected], 1)
    torch.testing.assert_close(output.values(), right.float(), rtol=1e-4, atol=1e-5)
    if "return_lse" in options:
        lse = torch.cat([x[1][0] for x in expected], 1)
        torch.testing.assert_close(found.lse.values(), lse.float(), rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(right)
    theirs = torch.autograd.grad(right, exact, upstream)
    for a, b in zip(torch.autograd.grad(output.values(), leaves, upstream.float()), theirs):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_tensors_as_pytorch_has_them() -> None:
    x = jagged(torch.randn(9, 4, 8), (3, 6))
    theirs = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(attention(x, x, x).values(), theirs.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_that_are_refused() -> None:
    x = jagged(torch.randn(9, 4, 8), (3, 6))
    strided = torch.nested.nested_tensor([torch.ones(4, 3, 8), torch.ones(4, 2, 8)])
    holes = torch.nested.nested_tensor_from_jagged(torch.randn(9, 4, 8), torch.tensor([0, 3, 9]), torch.tensor([2, 4]))
    other = jagged(torch.randn(9, 4, 8), (4, 5))
    calls: dict[str, Any] = {
        "key must be a jagged nested tensor": lambda: attention(x, x.values()[None], x),
        "query must be a jagged nested tensor": lambda: attention(x.values()[None], x, x),
        r"query must be \(N, H, T\*, E\) if it is nested": lambda: attention(x.transpose(1, 2), x, x),
        "value must have the layout torch.jagged": lambda: attention(x, x, strided),
        "query must have the layout torch.jagged": lambda: attention(strided, strided, strided),
        "query must have no gaps between its sequences": lambda: attention(holes.transpose(1, 2), x, x),
        "key and value must have sequences of the same lengths": lambda: attention(x, x, other),
        "nested tensors take no attn_mask; leave it out, or pad": lambda: attention(x, x, x, torch.ones(1, 1)),
        "nested tensors take no need_weights": lambda: attention(x, x, x, need_weights=True),
        "equally long, found 3 and 4": lambda: attention(x, *[jagged(torch.randn(9, 4, 8), (3, 3, 3))] * 2),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    for query in (x, strided):
        with pytest.raises(TypeError, match="explain takes plain tensors, found nested ones"):
            kernels.explain(query, query, query)
    assert math.isfinite(attention(x, x, x).values().sum())

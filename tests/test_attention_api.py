"""The public attention: arguments, errors, backends, graphs. What the kernels compute is in test_attention.py."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.attention.call import Call
from kernels.backend import choose, why_not_triton
from tests.conformance.judge import LEARNED, judge, make

attention = kernels.scaled_dot_product_attention


def inputs(*shape: int, **options: object) -> list[torch.Tensor]:
    """Query, key and value of one shape."""
    return [torch.randn(shape, **options) for _ in range(3)]


@pytest.fixture
def on_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without TRITON_INTERPRET: tensors on the CPU go to PyTorch."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)


def test_positional_arguments_are_those_of_torch() -> None:
    with_torch = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    mask = torch.rand(5, 5) < 0.7
    for arguments in [(), (mask,), (mask, 0.0), (mask, 0.0, False, 0.3), (None, 0.0, True, None, False)]:
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *with_torch, *arguments[:3], **dict(zip(("scale", "enable_gqa"), arguments[3:]))
        )
        torch.testing.assert_close(attention(*with_torch, *arguments), theirs)
    names = list(inspect.signature(attention).parameters)
    assert names[:8] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


ERRORS = {
    "E of query and key differ": (
        ValueError,
        "same last dimension E; found query \\(2, 3, 5, 8\\), key \\(2, 3, 5, 7\\)",
        lambda q, k, v: attention(q, k[..., :7], v),
    ),
    "S of key and value differ": (ValueError, "same length S", lambda q, k, v: attention(q, k, v[:, :, :4])),
    "one dimension": (ValueError, "at least two", lambda q, k, v: attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0])),
    "E is 0": (ValueError, "at least 1", lambda q, k, v: attention(q[..., :0], k[..., :0], v)),
    "heads differ": (ValueError, "pass enable_gqa=True", lambda q, k, v: attention(q, k[:, :2], v[:, :2])),
    "batches differ": (ValueError, "must broadcast", lambda q, k, v: attention(q.repeat(2, 1, 1, 1)[:3], k, v)),
    "heads no multiple": (
        ValueError,
        "multiple of key and value heads",
        lambda q, k, v: attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    ),
    "GQA with key heads unlike value heads": (
        ValueError,
        "multiple of key and value heads",
        lambda q, k, v: attention(q, k, v[:, :1], enable_gqa=True),
    ),
    "GQA without heads": (
        ValueError,
        "needs a dimension of heads",
        lambda q, k, v: attention(q[0, 0], k[0, 0], v[0, 0], enable_gqa=True),
    ),
    "mixed dtypes": (
        TypeError,
        "share a dtype, found torch.float32, torch.float16",
        lambda q, k, v: attention(q, k.half(), v),
    ),
    "integers": (TypeError, "found torch.int64", lambda q, k, v: attention(q.long(), k.long(), v.long())),
    "float8": (TypeError, "float8_e4m3fn", lambda q, k, v: attention(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)))),
    "mask of the wrong shape": (
        ValueError,
        "attn_mask must broadcast to .* = \\(2, 3, 5, 5\\), found \\(2, 5\\)",
        lambda q, k, v: attention(q, k, v, torch.ones(2, 5, dtype=torch.bool)),
    ),
    "mask with too many dimensions": (
        ValueError,
        "attn_mask must broadcast",
        lambda q, k, v: attention(q, k, v, torch.ones(1, 2, 3, 5, 5)),
    ),
    "integer mask": (
        TypeError,
        "attn_mask must be bool",
        lambda q, k, v: attention(q, k, v, torch.ones(5, 5, dtype=torch.int64)),
    ),
    "dropout above 1": (ValueError, "from 0 to 1, found 1.5", lambda q, k, v: attention(q, k, v, None, 1.5)),
    "dropout is NaN": (ValueError, "probability", lambda q, k, v: attention(q, k, v, None, math.nan)),
    "scale is NaN": (ValueError, "number that float32 holds", lambda q, k, v: attention(q, k, v, scale=math.nan)),
    "unknown backend": (
        ValueError,
        "'auto', 'triton', 'torch', found 'cuda'",
        lambda q, k, v: attention(q, k, v, backend="cuda"),
    ),
    "float64 on Triton": (
        ValueError,
        "float16, bfloat16, float32, found float64",
        lambda q, k, v: attention(q.double(), k.double(), v.double(), backend="triton"),
    ),
    "heads too wide for Triton": (
        ValueError,
        "wider than 2048",
        lambda q, k, v: attention(*(torch.randn(2, 3, 5, 2049) for _ in range(3)), backend="triton"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_rule_and_finding_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, pattern, call = ERRORS[case]
    monkeypatch.setattr("kernels.attention.api.differentiable", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr("kernels.attention.cpu.route.attention", lambda *_: pytest.fail("ran"))
    with pytest.raises(error, match=pattern) as caught:
        call(*inputs(2, 3, 5, 8))
    assert "\n" not in str(caught.value)


def test_triton_that_cannot_run_raises_with_the_reason(on_pytorch: None) -> None:
    with pytest.raises(ValueError, match="on the CPU and TRITON_INTERPRET=1 was not set"):
        attention(*inputs(1, 1, 5, 8), backend="triton")


def test_explain_says_which_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1, 1, 5, 8)
    assert str(kernels.explain(q, k, v)) == "The Triton kernel for short sequences runs this call."
    first, *rest = str(kernels.explain(*inputs(1, 1, 65, 8))).split("\n")
    assert first == "The Triton kernel for any shape runs this call." and len(rest) == 2
    assert rest[0].startswith("The Triton kernel for short sequences does not: they take up to 32 queries")
    assert "asked for" in str(kernels.explain(q, k, v, backend="torch"))
    assert kernels.explain(q.double(), k.double(), v.double()).kernel == "PyTorch's scaled_dot_product_attention"
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    text = str(kernels.explain(q, k, v))
    first, second = text.split("\n")
    assert first == "PyTorch's scaled_dot_product_attention runs this call."
    assert second.startswith("The Triton kernel for any shape does not: the tensors are on the CPU")
    formula = kernels.explain(q, k, v, softcap=2.0, sinks=torch.zeros(1), window=(3, 0))
    assert formula.kernel.startswith("the formula in plain PyTorch")
    assert "no way to give sinks and a soft cap" in str(formula)
    with pytest.raises(TypeError, match="windw"):
        kernels.explain(q, k, v, windw=(3, 0))
    with pytest.raises(ValueError, match="same length S"):
        kernels.explain(q, k, v[:, :, :3])
    monkeypatch.setattr("kernels.backend.HAS_TRITON", False)
    assert "not installed" in str(kernels.explain(q, k, v))


def test_reasons_against_triton_name_the_device() -> None:
    assert why_not_triton(torch.device("cpu"), torch.float32) == ""
    assert "found meta" in why_not_triton(torch.device("meta"), torch.float32)
    assert choose("auto", torch.device("cpu"), torch.float32, "too blue").reason == "too blue"


def test_a_float64_call_goes_to_pytorch() -> None:
    q, k, v = inputs(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("mask", ["none", "bool", "float", "1-D"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("gqa", [False, True], ids=["", "gqa"])
def test_the_pytorch_path_follows_the_same_rules(on_pytorch: None, mask: str, is_causal: bool, gqa: bool) -> None:
    masks = {
        "none": None,
        "bool": torch.rand(2, 1, 7, 11) < 0.5,
        "float": torch.randn(1, 4, 7, 11).masked_fill(torch.rand(7, 11) < 0.3, -math.inf),
        "1-D": torch.rand(11) < 0.5,
    }
    sizes = (2, 4, 2 if gqa else 4, 7, 11, 8, 5)
    judge(attention, make(sizes, attn_mask=masks[mask], is_causal=is_causal, learned=LEARNED))


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_short_sequences_on_a_cpu(
    on_pytorch: None, masked: bool, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make((50, 4, 4, 7, 11, 8, 7), is_causal=is_causal)
    if masked:
        p.attn_mask = torch.rand(50, 1, 7, 11) < 0.5
        p.attn_mask[..., 0] = True
    if not (masked and is_causal):  # both at once become one mask, and row 0 one key
        monkeypatch.setattr("kernels.attention.cpu.fused.scaled_dot_product_attention", lambda *_: pytest.fail("fused"))
    judge(attention, p)


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_double_backward_on_a_cpu(on_pytorch: None, masked: bool, is_causal: bool) -> None:
    """PyTorch's fused CPU kernel has no second derivative; ours does, at any size."""
    mask = torch.rand(2, 1, 8, 8) < 0.7
    mask[..., 0] = True
    for heads in (1, 3):
        results = []
        for solve in (attention, torch.nn.functional.scaled_dot_product_attention):
            torch.manual_seed(0)
            leaves = [torch.randn(2, heads, 8, 16, requires_grad=True) for _ in range(3)]
            whole = mask.tril() if is_causal else mask
            options = {"attn_mask": mask, "is_causal": is_causal} if solve is attention else {"attn_mask": whole}
            options = options if masked else {"is_causal": is_causal}
            if solve is not attention:
                solve = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)(solve)
            output = solve(*leaves, **options)
            first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_double_backward_of_short_sequences_on_a_cpu(on_pytorch: None) -> None:
    results = []
    for solve in (attention, torch.nn.functional.scaled_dot_product_attention):
        torch.manual_seed(0)
        leaves = [torch.randn(101, 3, n, e, requires_grad=True) for n, e in ((5, 16), (7, 16), (7, 13))]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = solve(*leaves, is_causal=True)
        grads = torch.autograd.grad(output, leaves, torch.randn(101, 3, 5, 13), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_short_sequences_with_dropout_on_a_cpu(on_pytorch: None) -> None:
    query, key, value = torch.randn(19, 4, 7, 8), torch.randn(19, 4, 11, 8), torch.eye(11).expand(19, 4, 11, 11)
    exact = torch.softmax(query @ key.mT / math.sqrt(8), -1)
    torch.manual_seed(0)
    dropped = attention(query, key, value, dropout_p=0.25)
    torch.manual_seed(0)
    assert torch.equal(dropped, attention(query, key, value, dropout_p=0.25))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], exact[kept] / 0.75)
    assert abs(kept.float().mean().item() - 0.75) < 0.1


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_bad_keys_on_the_pytorch_path_reach_those_who_may_see_them(on_pytorch: None, mask: str) -> None:
    ok = torch.rand(2, 4, 7, 11) < 0.5 if mask != "none" else torch.ones(7, 11, dtype=torch.bool).tril()
    given_mask = {"none": None, "bool": ok, "float": torch.zeros(ok.shape).masked_fill(~ok, -math.inf)}[mask]
    p = make((2, 4, 2, 7, 11, 8, 5), attn_mask=given_mask, is_causal=mask == "none", learned=())
    value = p.value.clone()
    value[:, 1, 3] = math.inf
    clean, dirty = p.run(attention), p.replace(value=value).run(attention)
    sees = ok[..., 3].expand(2, 4, 7).clone()
    sees[:, :2] = False  # the other key head is clean
    assert torch.equal(dirty.isnan().all(-1), sees)
    torch.testing.assert_close(dirty[~sees], clean[~sees])


def compiled(backend: str) -> None:
    """A block of both kernels, in one graph, forward and backward, as eager."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 32, requires_grad=True)
    weight = torch.randn(32, requires_grad=True)
    mask = torch.rand(7, 7) < 0.7

    def block(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = kernels.layer_norm(x, (32,), weight)
        heads = h.unflatten(-1, (4, 8)).transpose(1, 2)
        first = attention(heads, heads, heads, mask, is_causal=True)
        return x + attention(first, heads, heads, scale=0.5).transpose(1, 2).flatten(2)

    grad = torch.randn(2, 7, 32)
    results = []
    for call in (block, torch.compile(block, fullgraph=True, backend=backend)):
        output = call(x, weight, mask)
        results.append((output, *torch.autograd.grad(output, (x, weight), grad)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, inside the compiler
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_compiles_to_one_graph(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", path == "triton")
    torch._dynamo.reset()
    compiled("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor(on_pytorch: None) -> None:
    torch._dynamo.reset()
    compiled("inductor")


LAYOUTS = {
    "compact": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("features", "layout"),
    [
        ("plain", "compact"),
        ("plain", "transposed"),
        ("plain", "expanded"),
        ("all", "transposed"),
        ("packed", "expanded"),
    ],
)
def test_registered_operations_keep_their_promises(layout: str, features: str) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in inputs(2, 2, 5, 8))
    asked = Call(scale=0.3, right=0)
    if features == "all":
        asked = Call(
            torch.randn(1, 2, 5, 5),
            torch.tensor([3, 5], dtype=torch.int32),
            torch.rand(2, 2),
            torch.rand(1, 2),
            scale=0.3,
            softcap=2.0,
            left=3,
            right=1,
            bottom_right=True,
        )
    elif features == "packed":
        q, k, v = q[:1], k[:1], v[:1]
        starts = torch.tensor([0, 2, 5], dtype=torch.int32)
        asked = Call(query_starts=starts, key_starts=starts, scale=0.3, max_queries=3, max_keys=3)
    forward = (q, k, v, *asked)
    torch.library.opcheck(torch.ops.kernels.attention_forward, (*forward, True))
    outputs = torch.ops.kernels.attention_forward(*forward, True)
    upstream = torch.randn_like(outputs[0]), torch.randn_like(outputs[1])
    every = [True, True, True, asked.attn_mask is not None, asked.sinks is not None]
    for output_mask in (every, [False, True, False, False, False]):
        backward = (*upstream, *outputs, *forward, output_mask)
        torch.library.opcheck(torch.ops.kernels.attention_backward, backward)


def test_operations_without_triton_say_so(on_pytorch: None) -> None:
    q, k, v = inputs(1, 1, 5, 8)
    with pytest.raises(NotImplementedError, match="call the public function"):
        torch.ops.kernels.attention_forward(q, k, v, *Call(), False)


def test_flops_are_counted() -> None:
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        attention(q, k, v, backend="triton").sum().backward()
    forward, backward = 2 * 6 * 5 * 7 * (8 + 4), 2 * 6 * 5 * 7 * (3 * 8 + 2 * 4)
    assert counter.get_total_flops() == forward + backward


def test_autocast_sets_the_dtype() -> None:
    q, k, v = inputs(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(q, k, v.bfloat16())
        theirs = attention(q, k, v.bfloat16(), backend="torch")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_kernels_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, kernels\n"
        "q = torch.randn(1, 2, 5, 8)\n"
        "print(kernels.explain(q, q, q)); kernels.scaled_dot_product_attention(q, q, q); kernels.layer_norm(q, (8,))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the triton package is not installed" in done.stdout


def test_calls_on_a_cpu_import_no_kernels() -> None:
    code = (
        "import sys, torch, kernels\n"
        "q = torch.randn(1, 2, 40, 8, requires_grad=True)\n"
        "for mask in None, torch.ones(40, 40, dtype=torch.bool):\n"
        "    x = kernels.scaled_dot_product_attention(q, q, q, mask, is_causal=True)\n"
        "    kernels.add_layer_norm(x, q, q.new_ones(8), dropout_p=0.1).sum().backward()\n"
        "assert not {'kernels.attention.pieces', 'kernels.layer_norm.forward'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_one_graph_serves_all_sizes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr("kernels.backend.INTERPRETED", path == "triton")
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda *x: attention(*x, scale=0.3), fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for batch, length in ((3, 5), (6, 7), (4, 11)):  # unlike each other and the heads: Dynamo unites equal sizes
        q, k, v = inputs(batch, 2, length, 8)
        mask = torch.rand(batch, 1, length, length) < 0.8
        torch.testing.assert_close(call(q, k, v, mask), attention(q, k, v, mask, scale=0.3), rtol=1e-4, atol=1e-5)
        counts.append(graphs.frame_count)
    assert counts == [counts[0]] * 3, "compiled again for other sizes"


def test_a_mask_may_have_the_batch_that_keys_bring() -> None:
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    mask = torch.rand(3, 1, 5, 7) < 0.8
    torch.testing.assert_close(attention(q, k, v, mask), attention(q, k, v, mask, backend="torch"))


def test_precision_set_the_new_way_is_followed() -> None:
    from kernels.attention.arguments import dot_precision

    code = (
        "import torch; from kernels.attention.arguments import dot_precision\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; print(dot_precision(torch.float32))\n"
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'; print(dot_precision(torch.float32))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["tf32", "ieee"], done.stderr
    assert dot_precision(torch.float32) == "ieee"


def test_no_query_gives_zero_gradients() -> None:
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (0, 5, 5))
    output = attention(q, k, v, backend="triton")
    for x, grad in zip((q, k, v), torch.autograd.grad(output, (q, k, v), torch.empty_like(output))):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # PyTorch's own, inside the exporter
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_exports(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", path == "triton")

    class Block(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, is_causal=True, window=(3, None), softcap=2.0)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Block(), tuple(inputs(3, 2, 7, 8)), dynamic_shapes=[{0: batch}] * 3)
    called = {str(node.target) for node in exported.graph.nodes}
    assert ("kernels.attention_forward.default" in called) == (path == "triton")
    other = inputs(5, 2, 7, 8)
    torch.testing.assert_close(exported.module()(*other), Block()(*other))


def test_selective_checkpointing_saves_what_the_policy_names() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    runs = 0
    forward = torch.ops.kernels.attention_forward.default

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: object = None) -> object:
            nonlocal runs
            runs += op is forward
            return op(*args, **(kwargs or {}))

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is forward and save else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q.sin(), k, v, backend="triton").cos()

    found = []
    for save in (True, False):
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in inputs(1, 2, 5, 8)]
        runs = 0
        with Counted():
            output = checkpoint(
                block, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
            )
            output.sum().backward()
        found.append((runs, [x.grad for x in leaves]))
    assert [runs for runs, _ in found] == [1, 2]
    for a, b in zip(found[0][1], found[1][1]):
        assert torch.equal(a, b)

"""`kernels.fuse` on whole models: what is replaced, what is left and why, what comes back, and norms of transformers.

`python -m tests.test_fuse` prints every norm of the installed transformers with its form, as numbers show it.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import kernels
from kernels.integrations import transformers_norms
from kernels.integrations.transformers_norms import CLASSES, FORMS
from tests.tolerances import GRADIENT, assert_as_exact_as_torch

N, EPS = 24, 0.03
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def filled(module: nn.Module) -> nn.Module:
    """The module with random parameters."""
    for x in module.parameters():
        nn.init.normal_(x)
    return module


def encoder(**options: Any) -> nn.TransformerEncoder:
    """Two layers, whose fast path at inference PyTorch takes."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=not options).eval()


def results(model: nn.Module, x: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """The output, and the gradients of all parameters."""
    output = model(x, **options)
    grad = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).sin().view_as(output)
    return [output, *torch.autograd.grad(output, list(model.parameters()), grad)]


def everything(model: nn.Module) -> list[tuple[Any, ...]]:
    """Each module with its class and attributes, in their order."""
    return [(id(x), type(x), [(name, id(value)) for name, value in x.__dict__.items()]) for x in model.modules()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many times each function of ours has run."""
    counted = {"scaled_dot_product_attention": 0, "layer_norm": 0}

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*args: Any, **options: Any) -> Any:
            counted[name] += 1
            return function(*args, **options)

        return counts

    for place, name in (("kernels.attention.module", "scaled_dot_product_attention"), ("kernels.nn", "layer_norm")):
        monkeypatch.setattr(f"{place}.{name}", count(name, getattr(kernels, name)))
    return counted


# Models of PyTorch


@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=["post-norm", "pre-norm"])
def test_an_encoder_computes_the_same_by_ours_in_training_and_at_inference(
    options: dict[str, Any], calls: dict[str, int]
) -> None:
    pytest.importorskip("triton", reason="needs triton")
    model, x = encoder(**options), torch.randn(3, 7, 16)
    padding = torch.arange(7) >= torch.tensor([7, 4, 6])[:, None]
    exact = results(copy.deepcopy(model).double(), x.double(), src_key_padding_mask=padding)
    theirs = results(model, x, src_key_padding_mask=padding)
    kernels.fuse(model)
    assert not sum(calls.values())
    ours = results(model, x, src_key_padding_mask=padding)
    for place, tensors in enumerate(zip(ours, theirs, exact)):
        assert_as_exact_as_torch(*tensors, GRADIENT, f"result {place}")
    assert calls == {"scaled_dot_product_attention": 2, "layer_norm": 5}
    with torch.no_grad():  # where PyTorch has its fast path
        output = model(x, src_key_padding_mask=padding)
    assert calls == {"scaled_dot_product_attention": 4, "layer_norm": 10}
    assert torch.equal(output, ours[0])


def test_the_fast_path_is_what_would_have_gone_past_ours(calls: dict[str, int]) -> None:
    pytest.importorskip("triton", reason="needs triton")
    model = encoder()
    report = kernels.fuse(model, attention=False)
    assert any("fast path at inference is off in 3 " in note for note in report.notes)
    with torch.no_grad():
        model(torch.randn(3, 7, 16))
        assert calls["layer_norm"] == 5
        for layer in model.layers:
            layer.activation_relu_or_gelu = 1
        model(torch.randn(3, 7, 16))
    assert calls["layer_norm"] == 6


def test_unfuse_restores_every_bit() -> None:
    model = nn.ModuleDict({"whole": nn.Transformer(16, 2, 1, 1, 24, batch_first=True), "other": encoder()}).eval()
    ours_before = kernels.nn.LayerNorm(3)
    model["ours"] = ours_before
    before, x = everything(model), torch.randn(2, 5, 16)
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of the nested tensors that the fast path makes
        output = model["other"](x, src_key_padding_mask=padding)
        kernels.fuse(model)
        assert everything(model) != before and isinstance(model["whole"].encoder.norm, kernels.nn.LayerNorm)
        kernels.unfuse(model)
        assert everything(model) == before and type(ours_before) is kernels.nn.LayerNorm
        assert torch.equal(model["other"](x, src_key_padding_mask=padding), output)
    kernels.unfuse(model)
    assert everything(model) == before


def test_what_is_changed_after_fuse_is_left_until_that_is_undone() -> None:
    class Double(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model, x = torch.nn.Sequential(torch.nn.LayerNorm(8)), torch.randn(2, 8)
    kernels.fuse(model)
    parametrize.register_parametrization(model[0], "weight", Double())
    doubled = model(x)
    assert len(kernels.fuse(model).replaced) == 1 and torch.equal(model(x), doubled)
    with pytest.raises(ValueError, match="^0 must have the class that fuse gave it, LayerNorm, found Parametrized"):
        kernels.unfuse(model)
    assert torch.equal(model(x), doubled)
    parametrize.remove_parametrizations(model[0], "weight")
    kernels.unfuse(model)
    assert type(model[0]) is torch.nn.LayerNorm
    torch.testing.assert_close(model(x), doubled)


def test_fuse_is_idempotent_and_says_the_same_again() -> None:
    model = encoder()
    first = kernels.fuse(model)
    once = everything(model)
    assert kernels.fuse(model, strict=True) == first and everything(model) == once
    assert len(first.replaced) == 7 and not first.skipped
    assert len(kernels.fuse(model, norms=False).replaced) == 2


def test_parameters_state_and_functions_stay() -> None:
    model, functions = encoder(), dict(vars(nn.functional))
    parameters, state = list(map(id, model.parameters())), list(model.state_dict())
    kernels.fuse(model)
    assert list(map(id, model.parameters())) == parameters and list(model.state_dict()) == state
    assert dict(vars(nn.functional)) == functions
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention) and isinstance(model.norm, nn.LayerNorm)


def test_each_kind_can_be_left_out() -> None:
    model = encoder()
    assert {x.old for x in kernels.fuse(model, attention=False).replaced} == {nn.LayerNorm}
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    kernels.unfuse(model)
    assert {x.old for x in kernels.fuse(model, norms=False).replaced} == {nn.MultiheadAttention}
    assert type(model.norm) is nn.LayerNorm


def test_copies_and_pickles_are_fused_and_can_be_unfused(as_on_a_cpu: None) -> None:
    model, x = encoder(), torch.randn(2, 3, 16)
    before = [type(module) for module in model.modules()]
    kernels.fuse(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(twin(x), model(x))
        kernels.unfuse(twin)
        assert [type(module) for module in twin.modules()] == before
        assert twin.use_nested_tensor and twin.layers[0].activation_relu_or_gelu == 1
        assert isinstance(model.norm, kernels.nn.LayerNorm)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("has_weight", [True, False])
def test_norms_of_pytorch_are_bitwise_on_a_cpu_and_take_a_residual(
    kind: Any, has_weight: bool, dtype: torch.dtype, as_on_a_cpu: None
) -> None:
    model = filled(kind((3, N), elementwise_affine=has_weight)).to(dtype)
    x = 100.0 + torch.randn(5, 3, N).to(dtype)
    expected = model(x)
    assert kernels.fuse(model).replaced[0].numerics == "bitwise"
    assert torch.equal(model(x), expected)
    output, total = model(x, x, prenorm=True)
    assert output.shape == x.shape and torch.equal(total, x + x)


@pytest.mark.slow
def test_a_fused_model_compiles_whole(as_on_a_cpu: None) -> None:
    model, x = encoder(), torch.randn(2, 3, 16)
    expected = model(x)
    kernels.fuse(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# What is left as it is


class Scaled(nn.LayerNorm):
    """Looks like a layer norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return 2 * super().forward(input)


class OddNorm(nn.Module):
    """Has the name of a norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Anything."""
        return x.sin()


def with_own_forward() -> nn.Module:
    model = nn.LayerNorm(16)
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


def with_hook(where: Callable[[nn.Module], nn.Module], kind: str) -> nn.Module:
    model = nn.MultiheadAttention(16, 2)
    getattr(where(model), kind)(lambda *args: None)
    return model


def parametrised(name: str, module: nn.Module, part: str = "") -> nn.Module:
    nn.utils.parametrize.register_parametrization(module.get_submodule(part), name, nn.Identity())
    return module


def with_out_proj(layer: nn.Module) -> nn.Module:
    model = nn.MultiheadAttention(16, 2)
    model.out_proj = layer  # type: ignore[assignment]
    return model


class Wrapped(torch.Tensor):
    """A weight that is more than its numbers."""


def with_wrapped_weight() -> nn.Module:
    model = nn.RMSNorm(16)
    model.weight = nn.Parameter(torch.ones(16).as_subclass(Wrapped))
    return model


def with_integers() -> nn.Module:
    model = nn.RMSNorm(16)
    model.weight = nn.Parameter(torch.ones(16, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Scaled(16), "a subclass of torch.nn.LayerNorm, which may compute something else"),
        (OddNorm, "its formula is not one that the kernels know"),
        (with_own_forward, "a forward of its own was set on it"),
        (lambda: with_hook(lambda x: x, "register_forward_hook"), "it has hooks"),
        (lambda: with_hook(lambda x: x, "register_forward_pre_hook"), "it has hooks"),
        (lambda: with_hook(lambda x: x, "register_full_backward_hook"), "it has hooks"),
        (lambda: with_hook(lambda x: x.out_proj, "register_full_backward_pre_hook"), "it has hooks of its NonDyn"),
        (lambda: parametrised("weight", nn.LayerNorm(16)), "its weights are parametrised"),
        (lambda: parametrised("weight", nn.MultiheadAttention(16, 2), "out_proj"), "its weights are parametrised of"),
        (lambda: with_out_proj(nn.Linear(16, 16)), "its out_proj is a Linear"),
        (with_wrapped_weight, "its weight is a Wrapped, not a plain tensor"),
        (with_integers, "its weight is quantised: torch.int8"),
    ],
)
def test_what_may_compute_something_else_is_left(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(), nn.LayerNorm(16), nn.Linear(2, 2), nn.GELU())
    before = type(model[0])
    report = kernels.fuse(model)
    assert [x.name for x in report.replaced] == ["1"] and type(model[0]) is before
    ((name, kind, found),) = report.skipped
    assert name == "0" and kind is before and found.startswith(reason)


def test_a_report_is_a_table_with_a_row_for_layers_that_are_alike() -> None:
    model = nn.ModuleList([encoder(), OddNorm()])
    lines = str(kernels.fuse(model)).splitlines()
    assert lines[:4] == [
        "2 x  *.layers.*.self_attn  MultiheadAttention  fused: within rounding",
        "2 x  *.layers.*.norm1      LayerNorm           fused: bitwise",
        "2 x  *.layers.*.norm2      LayerNorm           fused: bitwise",
        "1 x  *.norm                LayerNorm           fused: bitwise",
    ]
    assert lines[4].endswith("OddNorm             left as it is: its formula is not one that the kernels know")
    assert "fast path" in lines[5] and "residual" in lines[6] and len(lines) == 7
    assert str(kernels.fuse(nn.Linear(2, 2))) == "nothing to replace"


def test_what_a_user_does_wrong_gets_one_line() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), Scaled(16))
    assert not kernels.fuse(model).replaced
    with pytest.raises(ValueError, match="^strict=True wants .* none in Sequential; 1 is left as it is: a subclass.*"):
        kernels.fuse(model, strict=True)
    for function in (kernels.fuse, kernels.unfuse):
        with pytest.raises(TypeError, match="^model must be a torch.nn.Module, found 'bert'; pass the module itself$"):
            function("bert")  # type: ignore[arg-type]


# The forms of transformers' norms


def formula(form: str, norm: Any, x: torch.Tensor, wide: torch.dtype = F32) -> torch.Tensor:
    """A form as transformers compute it, with `wide` for float32; of Channels without the permutation."""
    weight, dtype, x_wide = getattr(norm, "weight", None), x.dtype, x.to(wide)
    if form.startswith(("Centred", "Channels")):
        x_wide = x_wide - x_wide.mean(-1, keepdim=True)
    eps = 1e-5 if form == "CentredBare" else getattr(norm, "eps", None) or norm.variance_epsilon
    rstd = (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    found = x_wide * rstd
    if form == "Rounded":
        return weight * found.to(dtype)
    if form == "CentredRounded":
        return weight * found.to(dtype) + norm.bias
    if form == "BareRounded":
        return x * rstd.to(dtype)
    if form == "Channels":
        return (weight.to(wide) * found + norm.bias.to(wide)).to(dtype)
    if form == "Offset":
        return ((1.0 + weight.to(wide)) * found).to(dtype)
    has_weight = form in ("Wide", "Centred") or (form == "Switched" and norm.with_scale)
    return (weight.to(wide) * found if has_weight else found).to(dtype)


def pair(form: str, dtype: torch.dtype, with_scale: bool = True) -> tuple[Any, Any, Any]:
    """A norm of that form: ours, as transformers have it, and in float64, with the same parameters."""

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(N)), EPS
            self.normalized_shape, self.with_scale = (N,), with_scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return formula(form, self, x, torch.promote_types(x.dtype, F32))

    theirs: Any = Theirs().to(dtype)
    ours = copy.deepcopy(theirs)
    ours.__class__ = type("Ours", (getattr(transformers_norms, form), Theirs), {"eps_name": "eps"})
    return ours, theirs, copy.deepcopy(theirs).double()


OVER_ROWS = [form.__name__ for form in CLASSES if form.__name__ != "Channels"]


@pytest.mark.parametrize(
    "weight_dtype, dtype", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("form", [*OVER_ROWS, "Switched off"])
def test_each_form_and_its_gradients(form: str, weight_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("triton", reason="needs triton")
    modules = [x.to(device) for x in pair(form.split()[0], weight_dtype, with_scale=form != "Switched off")]
    x, grad = torch.randn(7, N, device=device).to(dtype), torch.randn(7, N, device=device)
    outputs, found = [], []
    for module, x in zip(modules, (x, x.clone(), x.double())):
        outputs.append(module(x.requires_grad_()))
        grads = torch.autograd.grad(
            outputs[-1], [x, *module.parameters()], grad.to(outputs[0].dtype).to(outputs[-1].dtype), allow_unused=True
        )
        found.append(grads)
    assert_as_exact_as_torch(*outputs)
    for place, (ours, theirs, exact) in enumerate(zip(*found)):
        assert (ours is None) == (theirs is None) == (exact is None)
        if ours is not None:
            assert_as_exact_as_torch(ours, theirs, exact, GRADIENT, f"gradient {place}")


@pytest.mark.parametrize("form", OVER_ROWS)
def test_numerics_are_as_the_form_says(form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton")
    ours, theirs, _ = (x.to(device) for x in pair(form, BF16))
    x = torch.randn(100, N, device=device).to(BF16)
    differ = (ours(x) != theirs(x)).float().mean().item()
    assert differ < 0.005 if ours.numerics == "bitwise" else 0.05 < differ
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    ours, theirs, x = ours.cpu(), theirs.cpu(), x.cpu()
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("wrong", ["Wide", "Offset", "Bare", "Centred"])
def test_another_form_is_told_apart(wrong: str) -> None:
    """Ours of one form in the place of a class of another is refused, before a model has it."""
    for right in ("Wide", "Offset", "Bare", "Centred"):
        _, theirs, _ = pair(right, F32)
        original: Any = type(theirs)
        ours = type("Ours", (getattr(transformers_norms, wrong), original), {"eps_name": "eps"})
        assert transformers_norms.computes_the_same(ours, original) == (right == wrong)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_norms_over_channels(data_format: str) -> None:
    class Theirs(nn.LayerNorm):
        pass

    ours: Any = filled(Theirs(N, eps=EPS))
    ours.__class__ = type("Ours", (transformers_norms.Channels, Theirs), {"eps_name": "eps"})
    ours.data_format = data_format
    x = torch.randn(2, 3, 5, N)
    expected = nn.functional.layer_norm(x, (N,), ours.weight, ours.bias, EPS)
    last = data_format == "channels_last"
    found = ours(x) if last else ours(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected)


# Classes of transformers


def test_the_table_has_each_name_once() -> None:
    names = [name.partition(".")[2] for classes in CLASSES.values() for name in classes.split()]
    assert len(names) == len(set(names)) == len(FORMS) > 200
    assert all(name.isidentifier() for name in names)


@pytest.fixture
def llama() -> Any:
    """A random small model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_llama_by_ours_and_back(llama: Any) -> None:
    ids = torch.arange(9)[None]
    before, expected = everything(llama), llama(ids).logits
    report = kernels.fuse(llama)
    assert [x.name for x in report.replaced][-1] == "model.norm" and len(report.replaced) == 5 and not report.skipped
    assert {x.numerics for x in report.replaced} == {"one rounding less"}
    assert type(llama.model.norm).__name__ == "LlamaRMSNorm"  # transformers looks for it when it makes new weights
    found = llama(ids).logits
    torch.testing.assert_close(found, expected)
    twin = copy.deepcopy(llama)
    kernels.unfuse(llama)
    assert everything(llama) == before and torch.equal(llama(ids).logits, expected)
    assert torch.equal(twin(ids).logits, found) and not torch.equal(found, expected)  # by the kernels


def test_a_class_that_computes_something_else_in_another_version_is_left(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = type(llama.model.norm)
    monkeypatch.delitem(vars(transformers_norms), "LlamaRMSNorm", raising=False)
    monkeypatch.setattr(original, "forward", lambda self, x: (1 + self.weight) * x)
    report = kernels.fuse(llama)
    assert not report.replaced and len(report.skipped) == 5
    assert "LlamaRMSNorm no longer computes what the table in" in report.skipped[0].reason


@pytest.mark.slow
def test_another_process_reads_a_pickle_of_it(llama: Any, tmp_path: Path) -> None:
    ids = torch.arange(9)[None]
    report = kernels.fuse(llama)
    torch.save((llama, llama(ids).logits.detach(), report), tmp_path / "llama.pt")
    code = f"""
import sys, torch, kernels
kernels.fuse(torch.nn.LayerNorm(3))
assert "transformers" not in sys.modules
model, expected, report = torch.load({str(tmp_path / "llama.pt")!r}, weights_only=False)
assert torch.allclose(model(torch.arange(9)[None]).logits, expected, rtol=1e-4, atol=1e-5)
assert kernels.fuse(model) == report and type(model.model.norm) is report.replaced[-1].new
kernels.unfuse(model)
print(type(model.model.norm).__module__)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["transformers.models.llama.modeling_llama"], done.stdout + done.stderr


def norms_of_transformers() -> Iterator[type]:
    """Every class of the installed transformers whose name ends in Norm, and that is a module."""
    spec = importlib.util.find_spec("transformers")
    root = Path(spec.submodule_search_locations[0])  # type: ignore[union-attr, index]
    for path in sorted(root.glob("models/*/modeling_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Norm"):
                module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
                yield getattr(module, node.name)


def made(kind: Callable[..., Any]) -> Any:
    """A random norm of that class over N numbers, None if it takes something else."""
    for args, options in (((N,), {"eps": EPS}), ((), {"eps": EPS}), ((N,), {})):
        try:
            return filled(kind(*args, **options))
        except (TypeError, AttributeError):
            pass
    return None


def form_by_numbers(kind: Callable[..., Any]) -> str | None:
    """The form whose formula gives what a class gives, float32 and bfloat16, by its formula in this file."""
    norm = made(kind)
    if norm is None:
        return None
    x = torch.randn(40, N) + 1.0
    for form in OVER_ROWS:
        for dtype in (F32, BF16):
            norm = norm.to(dtype)
            try:
                found, expected = norm(x.to(dtype)), formula(form, norm, x.to(dtype))
            except (AttributeError, TypeError, ValueError, RuntimeError):
                break
            if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != dtype:
                break
            wrong = (found - expected).abs() > (1e-5 if dtype == F32 else 0.0) * (1.0 + expected.abs())
            if wrong.float().mean() > (0.0 if dtype == F32 else 0.001):
                break
        else:
            return form
    return None


# Of a known form by default, but with settings that make them another.
ANOTHER_BY_SETTING = {"Qwen4ExpTextRMSNorm"}
TABLE_OF = (5, 24)  # the version of transformers that the table was made from


@pytest.mark.long
@torch.no_grad()
def test_every_norm_of_transformers_is_in_the_table_or_of_no_known_form() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    is_version = tuple(map(int, transformers.__version__.split(".")[:2])) == TABLE_OF
    seen, wrong, missing = set(), [], []
    for kind in norms_of_transformers():
        name = kind.__name__
        if transformers_norms.class_for(kind) is None:
            if form_by_numbers(kind) and name not in ANOTHER_BY_SETTING:
                missing.append(name)
            continue
        seen.add(name)
        norm = made(kind)
        for dtype in (F32, BF16, F16):
            norm = norm.to(dtype)
            x = torch.randn(5, 3, 4, N).to(dtype)
            theirs = norm(x)
            in_float64 = formula(FORMS[name][0].__name__, copy.deepcopy(norm).double(), x.double(), torch.float64)
            assert len(kernels.fuse(norm, strict=True).replaced) == 1
            ours = norm(x)
            kernels.unfuse(norm)
            try:
                assert_as_exact_as_torch(ours, theirs, in_float64)
            except AssertionError as error:
                wrong.append(f"{name} {dtype}: {error}")
    assert not wrong
    if is_version:
        assert not missing and seen == FORMS.keys()


@torch.no_grad()
@pytest.mark.parametrize("form", OVER_ROWS)
def test_numbers_tell_the_forms_apart(form: str) -> None:
    """What would make the test above miss a class shows here."""
    theirs = pair(form, F32)[1]
    found = form_by_numbers(lambda *args, **options: theirs)
    assert found == ("Wide" if form == "Switched" else form)


if __name__ == "__main__":
    for kind in norms_of_transformers():
        print(f"{kind.__module__.split('.')[2]}.{kind.__name__}: {form_by_numbers(kind)}")

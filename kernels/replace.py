"""A whole model on the kernels: its modules become ours in place, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize

from kernels import nn
from kernels.attention.checks import as_flag
from kernels.backend import shown, why_not_triton
from kernels.subclasses import PLAIN, is_dtensor

__all__ = ["Replaced", "Report", "Skipped", "fuse", "unfuse"]


class LayerNorm(nn.LayerNorm):
    """What `fuse` makes of `torch.nn.LayerNorm`: ours where the Triton kernels run, else PyTorch's, as before."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None, **options: Any) -> Any:
        """As `kernels.nn.LayerNorm`."""
        if residual is None and why_not_triton(input.device, input.dtype):
            return torch.nn.LayerNorm.forward(self, input)
        return super().forward(input, residual, **options)


class RMSNorm(nn.RMSNorm):
    """What `fuse` makes of `torch.nn.RMSNorm`, likewise."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, **options: Any) -> Any:
        """As `kernels.nn.RMSNorm`."""
        if residual is None and why_not_triton(x.device, x.dtype):
            return torch.nn.RMSNorm.forward(self, x)
        return super().forward(x, residual, **options)


# By PyTorch's class: ours, and how its results differ, as `Replaced.numerics` says.
OURS: dict[type, tuple[type, str]] = {
    torch.nn.LayerNorm: (LayerNorm, "bitwise"),
    torch.nn.RMSNorm: (RMSNorm, "bitwise"),
    torch.nn.MultiheadAttention: (nn.MultiheadAttention, "within rounding"),
}
BEFORE = "_before_fuse"  # the attribute that holds what `unfuse` puts back
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
ALONE = "Norms stay apart from the residual connections before them, which kernels.add_layer_norm would join."
FUNCTIONS = "Attention of transformers' models is a function: kernels.integrations.transformers.register."


class Replaced(NamedTuple):
    """A module that is ours now.

    name: as in `model.named_modules()`. old, new: its class. numerics: its outputs beside the old class's:

    - "bitwise": the same bits on a CPU. On a GPU rounded at the same places, the sums taken in another order;
    - "one rounding less", "two roundings less": the same bits on a CPU. On a GPU, in 16 bits, the old class rounds
      before the weight, ours once in the end;
    - "within rounding": sums in another order everywhere.
    """

    name: str
    old: type
    new: type
    numerics: str


class Skipped(NamedTuple):
    """A module of a kind that could be ours, but is left as it is, with the reason."""

    name: str
    kind: type
    reason: str


@dataclass
class Report:
    """What `fuse` found. `str` of it is a table, in which layers that differ by their number are one row."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(x.name, x.old, f"fused: {x.numerics}") for x in self.replaced]
        rows += [(x.name, x.kind, f"left as it is: {x.reason}") for x in self.skipped]
        counts: dict[tuple[str, str, str], int] = {}
        for name, kind, result in rows:
            row = re.sub(r"\b\d+\b", "*", name) or "(the model)", kind.__name__, result
            counts[row] = counts.get(row, 0) + 1
        table = [(f"{count} x", *row) for row, count in counts.items()]
        widths = [max((len(row[place]) for row in table), default=0) for place in range(3)]
        lines = ["  ".join([*(x.ljust(width) for x, width in zip(row, widths)), row[3]]) for row in table]
        return "\n".join([*(lines or ["nothing to replace"]), *self.notes])


def fuse(model: torch.nn.Module, *, attention: bool = True, norms: bool = True, strict: bool = False) -> Report:
    """Let the kernels compute the norms and the attention of a model, in place; `unfuse` takes it back.

    Modules whose class is exactly `torch.nn.LayerNorm`, `torch.nn.RMSNorm`, `torch.nn.MultiheadAttention`, or a norm of
    Hugging Face transformers whose formula is known (`kernels/integrations/transformers_norms.py`) get a subclass of it
    as their class. Parameters, state_dict, training mode, optimizers and isinstance checks stay; copies and pickles of
    the model are fused too. What might compute something else is left as it is, and the report says why: a subclass, a
    forward or hooks of its own, weights that are quantised or parametrised, an unknown formula. The layers of
    `torch.nn.TransformerEncoder` call their modules at inference too (PyTorch's fast path goes past them). Functions
    that the model calls, as `torch.nn.functional.scaled_dot_product_attention`, are never touched.

    Args:
        model: a module, with all its submodules.
        attention: whether to replace `torch.nn.MultiheadAttention`.
        norms: whether to replace norms.
        strict: raise if nothing is replaced.

    Returns:
        What was replaced, what was not and why; of a model that is fused already, the same again.

    Raises:
        TypeError: `model` is no module, or one of the others is not True or False.
        ValueError: with `strict`, nothing was replaced.
    """
    _check(model)
    attention, norms = as_flag("attention", attention), as_flag("norms", norms)
    strict = as_flag("strict", strict)
    report = Report()
    for name, module in model.named_modules():
        is_attention = isinstance(module, torch.nn.MultiheadAttention)
        if not (attention if is_attention else norms):
            continue
        before = module.__dict__.get(BEFORE, {}).get("__class__")
        kind = before or _unparametrised(module)
        found = _ours_for(kind, module)
        if isinstance(found, tuple) and not before:
            found = _obstacle(module) or found
        if isinstance(found, str):
            report.skipped.append(Skipped(name, type(module), found))
        elif found is not None:
            report.replaced.append(Replaced(name, kind, *found))
            if not before:  # else it is ours, or what has been made of ours since
                _change(module, __class__=found[0])
    if strict and not report.replaced:
        raise ValueError(
            f"strict=True wants a module that can be replaced, found none in {type(model).__name__}"
            + "".join(f"; {x.name or 'the model'} is left as it is: {x.reason}" for x in report.skipped[:1])
            + "; print kernels.fuse(model) for all of them"
        )
    n_layers = sum(map(_leave_fast_path, _encoders(model)))
    if n_layers:
        report.notes.append(f"PyTorch's fast path at inference is off in {n_layers} encoders and layers of encoders.")
    if any(not issubclass(x.old, torch.nn.MultiheadAttention) for x in report.replaced):
        report.notes.append(ALONE)
    if type(model).__module__.startswith("transformers."):
        report.notes.append(FUNCTIONS)
    return report


def unfuse(model: torch.nn.Module) -> None:
    """Undo `fuse`: every module has its class and every attribute that it had before. Others are left as they are.

    Raises:
        TypeError: `model` is no module.
        ValueError: the class of a module was changed after `fuse`, as by a parametrisation.
    """
    _check(model)
    for name, module in model.named_modules():
        before = module.__dict__.get(BEFORE, {}).get("__class__")
        found = _ours_for(before, module) if before else None
        if isinstance(found, tuple) and type(module) is not found[0]:
            raise ValueError(
                f"{name or 'the model'} must have the class that fuse gave it, {found[0].__name__}, found "
                f"{type(module).__name__}; undo that change first"
            )
    for module in model.modules():
        for name, value in module.__dict__.pop(BEFORE, {}).items():
            setattr(module, name, value)


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {shown(model)}; pass the module itself")


def _change(module: torch.nn.Module, **attributes: Any) -> None:
    """Set attributes, and keep for `unfuse` what they were."""
    kept = module.__dict__.setdefault(BEFORE, {})
    for name, value in attributes.items():
        kept.setdefault(name, getattr(module, name))
        setattr(module, name, value)


def _unparametrised(module: torch.nn.Module) -> type:
    """The class of a module, of one with parametrised weights that before it had them."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _ours_for(kind: type, module: torch.nn.Module) -> tuple[type, str] | str | None:
    """Our class for a class and its numerics, or why there is none; None for what is neither norm nor attention."""
    if kind in OURS:
        return OURS[kind]
    if issubclass(kind, (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)):
        return None
    if kind.__module__.startswith("transformers.") and "Norm" in kind.__name__:
        from kernels.integrations import transformers_norms

        try:
            ours = transformers_norms.class_for(kind)
        except ValueError as error:
            return str(error)
        if ours is not None:
            return ours, ours.numerics
    for known in OURS:
        if issubclass(kind, known):
            return f"a subclass of torch.nn.{known.__name__}, which may compute something else"
    if kind.__name__.endswith("Norm") and not any(True for _ in module.children()):
        return "its formula is not one that the kernels know"
    return None


def _obstacle(module: torch.nn.Module) -> str:
    """Why a module of a class that is known must stay what it is; empty if it need not."""
    for part in module.modules():
        where = "" if part is module else f" of its {type(part).__name__}"
        if "forward" in part.__dict__:
            return f"a forward of its own was set on it{where}"
        if any(getattr(part, hooks) for hooks in HOOKS):
            return f"it has hooks{where}"
        if parametrize.is_parametrized(part):
            return f"its weights are parametrised{where}"
    out_proj = getattr(module, "out_proj", None)
    if out_proj is not None and type(out_proj) is not torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return f"its out_proj is a {type(out_proj).__name__}"
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        is_norm = out_proj is None  # which runs on DTensors as it is
        if type(x) not in PLAIN and not (is_norm and is_dtensor(x)):
            return f"its {name} is a {type(x).__name__}, not a plain tensor"
        if not x.is_floating_point():
            return f"its {name} is quantised: {x.dtype}"
    return ""


def _encoders(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Encoders of PyTorch, and their layers, that may go past modules of ours."""
    for module in model.modules():
        if isinstance(module, (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer)):
            if any("__class__" in part.__dict__.get(BEFORE, {}) for part in module.modules()):
                yield module


def _leave_fast_path(module: torch.nn.Module) -> bool:
    """Make an encoder, or a layer of one, call its modules at inference as well; whether it would not have."""
    name = "use_nested_tensor" if isinstance(module, torch.nn.TransformerEncoder) else "activation_relu_or_gelu"
    if name in module.__dict__.get(BEFORE, {}):
        return True
    if not getattr(module, name, False):
        return False
    _change(module, **{name: type(getattr(module, name))()})
    return True

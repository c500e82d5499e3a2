"""What Triton's interpreter needs to compute as a GPU does, and without work that nobody asked for."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import triton.language as tl


def prepare() -> None:
    """Both of what follows, once in a process, before the first call."""
    round_bfloat16_to_nearest()
    spare_work()


def round_bfloat16_to_nearest() -> None:
    """Make it round float32 to bfloat16 to the nearest, as GPUs do; by itself it cuts off bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(x: np.ndarray, source: object, target: object, rounding_mode: object) -> np.ndarray:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, rounding_mode)
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = to_nearest


def spare_work() -> None:
    """Leave out what it does again at each call of a jit function, or for a result that it throws away.

    - It exchanges the functions of triton.language for its own at each call of one jit function by another, not only
      at each launch. That is four tenths of its time.
    - It looks for overflows of integers, and without TRITON_DEBUG drops what it has found: two tenths.
    - It makes the table of numpy's dtypes anew whenever it wants one of them.
    - It describes each block's type and each tuple's anew, which hardly anybody asks for: a seventh.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang
    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # whichever a function inside may know
    interpreter._patch_lang = lambda _: exchange(both)

    def call(self: interpreter.InterpretedFunction, *args: object, **options: object) -> object:
        try:
            return self.rewrite()(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    options = interpreter.interpreter_builder.options
    object.__setattr__(options, "sanitize_overflow", options.debug)
    numpy_dtype, known = interpreter._get_np_dtype, {}

    def remembered(dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered
    describe_once(tl.core)


def describe_once(core: types.ModuleType) -> None:
    """Of triton.language.core: types of blocks are remembered, those of tuples made when they are asked for."""
    block_type, known = core.block_type.__init__, {}

    def block_type_init(self: tl.block_type, element_ty: tl.dtype, shape: Iterable) -> None:
        sizes = [getattr(size, "value", size) for size in shape]
        key = (element_ty.name, getattr(element_ty, "address_space", None), *sizes, *map(type, sizes))
        if key not in known:
            block_type(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    def tuple_init(self: tl.tuple, args: Iterable, type: object = None) -> None:
        self.values = [*args]
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    field = core.tuple.__getattr__

    def tuple_getattr(self: tl.tuple, name: str) -> object:
        if name != "type":
            return field(self, name)
        self.type = core._type_for_tuple_values(self.values)
        return self.type

    core.block_type.__init__ = block_type_init
    core.tuple.__init__, core.tuple.__getattr__ = tuple_init, tuple_getattr

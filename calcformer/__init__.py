"""A transformer that learns to calculate, built on the attention and the layer norm of `kernels`."""

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from calcformer.solver import Solver

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def _check_kernels() -> None:
    """Raise where the package `kernels` has nothing of ours, and warn where `__init__.py` is missing or another's.

    Without importing it, which takes long.
    """
    spec = importlib.util.find_spec("kernels")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    file = spec.origin if spec else None
    if file and b"calcformer" in Path(file).read_bytes():
        return
    said = (  # as kernels/ours.py says it
        f"the package `kernels` of calcformer is not there or damaged, found {file} (Hugging Face's has its name); "
        "`pip uninstall -y kernels` and then, in a checkout of calcformer, `pip install --force-reinstall --no-deps .` "
        "repair it; to use both, install theirs last and import ours by `from calcformer import kernels`"
    )
    if not any((folder / "ours.py").exists() for folder in folders):
        raise ImportError(said)
    warnings.warn(said, stacklevel=2)


_check_kernels()


def load(run: "str | PathLike[str]", device: str = "auto") -> "Solver":
    """A trained run, ready to solve: calcformer.load("runs/formula-1").solve(["12+7"]).

    Args:
        run: the folder that training wrote.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        calcformer.errors.InputError: the folder is missing or damaged, or the device is not there.
    """
    from calcformer.solver import Solver  # not at the top: it imports torch, which --help and --version can do without

    return Solver(run, device)

"""A transformer that learns to calculate, built on the attention and the layer norm of `kernels`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from calcformer.solver import Solver

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


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

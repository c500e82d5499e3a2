"""Importing this module tells whether the package `kernels` is whole and calcformer's.

Hugging Face's distribution `kernels` is installed into a folder of the same name, without a word from pip: what is
installed last replaces `__init__.py`, and what is uninstalled takes it away. All other files have names of their own.
"""

import importlib.metadata
import sys
import warnings

REPAIR = (
    "`pip uninstall -y kernels` and then, in a checkout of calcformer, `pip install --force-reinstall --no-deps .` "
    "repair it; to use both, install theirs last and import ours by `from calcformer import kernels`"
)


def check() -> None:
    """Raise where `kernels/__init__.py` is missing or another package's; warn where theirs is installed as well.

    Raises:
        ImportError: one line, with what happened and how to repair it.
    """
    if "calcformer.kernels" in sys.modules:  # the second name, which needs no __init__.py of ours
        return
    package = sys.modules[__package__]
    if getattr(package, "__distribution__", "") != "calcformer":
        found = getattr(package, "__file__", None)
        what = f"is another package's, {found}" if found else "lacks its __init__.py, as another package leaves it"
        raise ImportError(f"the package `kernels` of calcformer {what} (Hugging Face's has its name); {REPAIR}")
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"Hugging Face's package `kernels` {version} is installed too, and what wants it, such as transformers, finds "
        f"calcformer's and fails; {REPAIR}",
        stacklevel=2,
    )


check()

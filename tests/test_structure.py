"""What keeps the kernels readable, and a rule of attention in few places."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kernels

FOLDER = Path(kernels.__file__).parent / "attention"
SIZES = {"E", "EV", "D", "LOOP", "HEADS", "PACK", "SLOTS", "CONSUMERS"}  # compile-time sizes beside BLOCK_...


def jit_functions() -> dict[str, ast.FunctionDef]:
    """Every function that Triton or Gluon compiles, by file and name."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                found[f"{file.stem}.{node.name}"] = node
    return found


FUNCTIONS = jit_functions()


def test_the_kernels_are_found() -> None:
    assert len([name for name in FUNCTIONS if name.endswith("_kernel")]) == 9


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_compiled_can_be_read_in_one_sitting(name: str) -> None:
    node = FUNCTIONS[name]
    assert node.end_lineno - node.lineno < 150
    if name.endswith("_kernel"):
        asked = [x.arg for x in node.args.args if x.arg not in SIZES and not x.arg.startswith("BLOCK_")]
        assert len(asked) <= 16, asked

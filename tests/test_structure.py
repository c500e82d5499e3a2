"""What keeps the kernels readable, and a rule of attention in few places."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
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


# A new rule: a bias that grows with a key's place. By file, what a line is put before, and the line.
TOY = {
    "call.py": [("    left: int | None = None", "    recency: float | None = None")],
    "score.py": [
        (
            "    if call.alibi_slopes is not None:\n        place",
            """\
    if call.recency is not None:
        scores += call.recency * (where.start_k + where.dj).to(tl.float32)""",
        ),
        (" and not EXACT\n", " and call.recency is None"),
    ],
    "formula.py": [
        (
            "        if call.alibi_slopes is not None:\n            scores",
            """\
        if call.recency is not None:
            scores = scores + call.recency * torch.arange(n_keys, device=query.device)""",
        )
    ],
    "checks.py": [
        ("    softcap: float | None = None,\n", "    recency: float | None = None,"),
        (
            "    softcap, deterministic = as_number",
            """\
    if recency is not None and not isinstance(recency, NUMBERS):
        raise ValueError(f"recency must be a number, found {shown(recency)}")""",
        ),
    ],
    "api.py": [
        ("    softcap: float | None\n", "    recency: float | None"),  # Options
        ("    softcap: float | None = None,\n", "    recency: float | None = None,"),  # the public function; make_call
        ('        "softcap": softcap,\n', '        "recency": recency,'),
        ("        softcap=softcap if", "        recency=recency,"),
    ],
}
TRY_IT = """
import torch, kernels
from kernels.attention.plan import forced
from kernels.attention.tiles import Tile

def results(**options):
    output = kernels.scaled_dot_product_attention(*leaves, **options)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1))]

for kernel, n in (("short", 7), ("general", 40)):
    leaves = [torch.randn(2, 2, n, 8, requires_grad=True) for _ in range(3)]
    mask = (0.3 * torch.arange(n)).expand(n, n)
    expected = results(attn_mask=mask, backend="torch")
    with forced(kernel=kernel, capability=90, tile=Tile(16, 16, 4, 1)):
        for ours in (results(recency=0.3, backend="triton"), results(recency=0.3, backend="torch")):
            for a, b in zip(ours, expected):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results(backend="torch")[0], expected[0])
one = leaves[0][:, :, :1].detach()
keys = leaves[1].detach()
with torch.no_grad():
    a, b = (kernels.scaled_dot_product_attention(one, keys, keys, backend="torch", **x) for x in ({}, {"recency": 0.3}))
assert not torch.allclose(a, b)
offsets = torch.tensor([0, 3, 8])
nested = torch.nested.nested_tensor_from_jagged(torch.randn(2, 8, 8), offsets, jagged_dim=2)
kernels.scaled_dot_product_attention(nested, nested, nested)
try:
    kernels.scaled_dot_product_attention(nested, nested, nested, recency=0.3)
except ValueError as error:
    print(error)
x = torch.empty(1, 1, 256, 64, dtype=torch.bfloat16)
with forced(capability=90):
    assert "knows no recency" in str(kernels.explain(x, x, x, recency=0.3))
try:
    kernels.scaled_dot_product_attention(*leaves, recency="much")
except ValueError as error:
    print(error)
"""


@pytest.mark.long
def test_a_new_rule_touches_five_files(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    shutil.copytree(FOLDER.parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in TOY.items():
        file = tmp_path / "kernels" / "attention" / name
        text = file.read_text()
        for before, line in lines:
            assert before in text, (name, before)
            text = text.replace(before, f"{line}{before}" if line.startswith(" and") else f"{line}\n{before}")
        file.write_text(text)
    assert len(TOY) <= 6
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRY_IT], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "nested tensors take no recency; leave it out, or pad the sequences",
        "recency must be a number, found 'much'",
    ], done.stdout + done.stderr

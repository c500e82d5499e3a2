"""What people read is true: examples run, commands are CI's, links and names lead somewhere, memory is what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for where in ("*.md", "docs/*.md", "*/README.md", "tests/*/README.md")
    for path in sorted(ROOT.glob(where))
    if not path.parent.name.startswith(".")
}
README, CONTRIBUTING = PAGES["README.md"], PAGES["CONTRIBUTING.md"]
EXAMPLES = {
    f"{name}-{place}": code
    for name in ("README.md", "docs/drop-in.md")
    for place, code in enumerate(re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL))
    if "import transformers" not in code or importlib.util.find_spec("transformers")
}
END = "-- the end of an example"


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """What each example prints, one after the other in one process."""
    run = f"import sys\nfor code in eval(sys.stdin.read()):\n    exec(code, {{}})\n    print({END!r}, flush=True)"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", run],
        input=repr(list(EXAMPLES.values())),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(EXAMPLES, (part.splitlines() for part in done.stdout.split(END + "\n")), strict=False))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_and_prints_what_it_says(name: str, printed: dict[str, list[str]]) -> None:
    code = EXAMPLES[name]
    promised = re.findall(r"print\(.*\)  # (.*)", code) + re.findall(r"^# (.*)", code, re.MULTILINE)
    assert printed[name] == promised


def test_two_commands_are_one_line_each_and_those_of_ci() -> None:
    """CI runs both as they stand there, the first with a shorter training, by one flag."""
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    ci = (ROOT / ".ci" / "run").read_text()
    program, shorten = re.search(r"awk .*?'(.*?)'", ci), re.search(r"sed '(.*?)'", ci)
    assert program and shorten
    for place, command in enumerate(commands, 1):
        words = ["awk", "-v", f"wanted={place}", program[1], ROOT / "README.md"]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == command
    short = subprocess.run(["sed", shorten[1]], input=commands[0], capture_output=True, text=True, check=True).stdout
    assert "calcformer train --epochs 2 && " in short and 'calcformer solve "649+864"' in short
    assert commands[1].endswith("pytest\n")


def anchors(page: str) -> set[str]:
    """What a link may name of a page after its #: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            found = (ROOT / name).parent / path if path else ROOT / name
            assert found.exists(), target
            assert not anchor or anchor in anchors(found.read_text()), target


def test_contributing_is_short_and_names_what_is_there() -> None:
    """A name without a folder lies in the folder named before it."""
    assert len(CONTRIBUTING.encode()) <= 6000
    folder, names = ROOT, re.findall(r"`([\w./-]+(?:\.\w+|/))`", CONTRIBUTING)
    for name in names:
        if "NAME" in name:  # for the reader to choose
            continue
        path = ROOT / name if "/" in name else folder / name
        assert path.exists(), name
        folder = path if path.is_dir() else path.parent
    assert len(names) > 50


def test_tests_that_are_named_are_there() -> None:
    tests = {path.stem: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    functions = set(re.findall(r"^def (test_\w+)", "\n".join(tests.values()), re.MULTILINE))
    for page in ("docs/testing.md", "docs/contract.md"):
        named = set(re.findall(r"\btest_\w+", PAGES[page]))
        assert named and not named - functions - tests.keys(), page


class Largest(TorchDispatchMode):
    """Within it `numbers` is how many the largest tensor holds that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


L, S = 67, 71


def learned(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


@pytest.mark.parametrize(
    "options, has_matrix",
    [
        pytest.param({}, False, id="plain"),
        pytest.param({"is_causal": True, "attn_mask": torch.ones(S, dtype=torch.bool)}, False, id="causal and a mask"),
        pytest.param({"attn_mask": learned(torch.zeros(1, 1, 1, S))}, False, id="a mask that learns"),
        pytest.param({"dropout_p": 0.5}, False, id="dropout"),
        pytest.param({"window": (9, 0), "causal_alignment": "bottom_right"}, False, id="window"),
        pytest.param({"softcap": 9.0, "sinks": torch.zeros(2), "return_lse": True}, False, id="soft cap, sinks, lse"),
        pytest.param({"key_lengths": torch.tensor([S - 9])}, False, id="key lengths"),
        pytest.param({"alibi_slopes": torch.ones(2)}, False, id="slopes"),
        pytest.param({"alibi_slopes": learned(torch.ones(2))}, True, id="slopes that learn"),
        pytest.param({"need_weights": True}, True, id="weights"),
    ],
)
def test_where_the_triton_kernels_make_a_matrix_of_l_x_s(
    options: dict[str, Any], has_matrix: bool, device: str
) -> None:
    pytest.importorskip("triton", reason="needs triton")
    options = {
        name: x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in options.items()
    }
    leaves = [torch.randn(1, 2, n, 8, device=device, requires_grad=True) for n in (L, S, S)]
    leaves += [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    with Largest() as largest:
        result = kernels.scaled_dot_product_attention(*leaves[:3], **options, backend="triton")
        output = result if isinstance(result, torch.Tensor) else result.output
        torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert (largest.numbers >= L * S) == has_matrix

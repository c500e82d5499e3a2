"""The README's Python examples run as they stand there, and its commands are the ones CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs_and_prints_what_it_says(number: int) -> None:
    code = EXAMPLES[number]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)  # (.*)", code) + re.findall(r"^# (.*)", code, re.MULTILINE)
    assert done.stdout.splitlines() == promised


def test_there_are_examples_and_two_commands() -> None:
    assert len(EXAMPLES) >= 4
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    assert "calcformer train\n" in commands[0], "CI shortens the training by adding --epochs here"
    assert 'calcformer solve "649+864"' in commands[0]
    assert "pytest" in commands[1]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target

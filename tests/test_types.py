"""What type checkers tell a user: tests/typed_user.py, which has two mistakes in its last lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("typed_user.py")
CHECKERS = {
    "mypy": ["mypy", "--config-file=", "--ignore-missing-imports", "--follow-imports=silent"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_results_have_their_types_and_mistakes_are_found(checker: str) -> None:
    pytest.importorskip(checker)
    done = subprocess.run(
        [sys.executable, "-m", *CHECKERS[checker], str(FILE)], capture_output=True, text=True, cwd=FILE.parents[1]
    )
    found = sorted({int(line) for line in re.findall(rf"{FILE.name}:(\d+):.*error", done.stdout)})
    wrong = [number for number, line in enumerate(FILE.read_text().splitlines(), 1) if "# wrong:" in line]
    assert len(wrong) == 2 and found == wrong, done.stdout + done.stderr

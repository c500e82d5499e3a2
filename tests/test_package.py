"""The distribution: names, versions, and the Hugging Face package whose import name is the same."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import calcformer
import kernels


def test_versions_agree() -> None:
    assert kernels.__version__ == calcformer.__version__ == importlib.metadata.version("calcformer")


def test_the_source_archive_has_both_packages_and_no_tests(tmp_path: Path) -> None:
    """All of tests/ or none of it: setuptools by itself takes the files test_*.py without what they import."""
    pytest.importorskip("setuptools", "77", reason="reads pyproject.toml's licence from 77 on")
    root, copy = Path(__file__).parents[1], tmp_path / "checkout"
    copy.mkdir()
    for name in "pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE":
        shutil.copy(root / name, copy)
    for name in "kernels", "calcformer", "tests":
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "sdist"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with tarfile.open(next(copy.glob("dist/*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    modules = [path for name in ("kernels", "calcformer") for path in (copy / name).rglob("*.py")]
    held_too = {"README.md", "LICENSE", "kernels/py.typed", "calcformer/py.typed"}
    assert held >= held_too | {str(path.relative_to(copy)) for path in modules}
    assert not [name for name in held if name.startswith("tests")]


def test_public_names_exist() -> None:
    for package in (kernels, calcformer):
        for name in package.__all__:
            assert hasattr(package, name), f"{package.__name__}.{name}"


def test_what_runs_stand_on_imports_nothing_that_stands_on_them() -> None:
    paths = list((Path(calcformer.__file__).parent / "runs").glob("*.py"))
    imported = {
        f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".")
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    above = "training", "solver", "sweep", "evaluation", "exhaustive", "comparison", "cli"
    assert "calcformer.runs.files.write_atomically" in imported
    assert not [name for name in imported if name.startswith(tuple(f"calcformer.{module}" for module in above))]


def test_transformers_does_not_take_this_package_for_the_other_kernels() -> None:
    """transformers uses a package `kernels` when its version fits; ours must not, and the import must work."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.utils import import_utils

    assert not import_utils.is_kernels_available()
    wanted = next(r for r in importlib.metadata.requires("transformers") or [] if re.match(r"kernels\b", r))
    major_minor = tuple(int(part) for part in kernels.__version__.split(".")[:2])
    lowest = re.search(r">=\s*(\d+)\.(\d+)", wanted)
    assert lowest, wanted
    assert major_minor < tuple(map(int, lowest.groups())), f"transformers {transformers.__version__} wants {wanted}"


# The versions of Hugging Face's kernels that transformers takes, from and below.
RANGES = {"5.17": ("0.16.0", "0.17"), "5.24": ("0.18.2", "0.19")}


@pytest.mark.parametrize("transformers", RANGES)
def test_our_version_is_outside_the_range_of_transformers(transformers: str) -> None:
    ours, lowest, highest = (
        tuple(map(int, version.split("."))) for version in (kernels.__version__, *RANGES[transformers])
    )
    assert lowest < highest and not lowest <= ours < highest


# Stand-ins for Hugging Face's distribution, which has the same import name.
THEIRS = {
    "kernels/__init__.py": "__version__ = '0.18.2'\n",
    "kernels/hf_hub.py": "",
    "kernels-0.18.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n",
}
REPAIR = "`pip uninstall -y kernels` and then, in a checkout of calcformer, `pip install --force-reinstall --no-deps .`"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that our packages are installed into."""
    for package in (kernels, calcformer):
        folder = Path(package.__file__).parent
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def install_theirs(site: Path, before_ours: bool = False) -> None:
    """As pip does it, which overwrites what is there without a word."""
    for name, text in THEIRS.items():
        if not (before_ours and (site / name).exists()):
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)


def uninstall_theirs(site: Path) -> None:
    """As pip does it, which removes what was recorded as theirs."""
    for name in THEIRS:
        (site / name).unlink()


def said(site: Path, *command: str) -> tuple[int, list[str]]:
    """Exit code of Python with that command, and the lines it wrote to standard error."""
    environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=site)
    return done.returncode, done.stderr.splitlines()


IMPORTS = ["kernels.nn", "kernels.backend", "kernels.attention.api", "kernels.layer_norm.api"]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["theirs installed last", "theirs removed again"])
def test_a_damaged_package_is_noticed_and_has_a_second_name(site: Path, state: str) -> None:
    install_theirs(site)
    found = str(site / "kernels" / "__init__.py")
    if state == "theirs removed again":
        uninstall_theirs(site)
        found = ""
    for name in IMPORTS:
        code, lines = said(site, "-c", f"import {name}")
        assert code == 1 and lines[-1].startswith("ImportError: ") and REPAIR in lines[-1] and found in lines[-1], lines
    code, lines = said(site, "-c", "import calcformer")
    assert code == 0 and REPAIR in lines[0] and (found or "None") in lines[0], lines
    code, lines = said(site, "-m", "kernels")
    assert code == 1 and len(lines) == 1 and REPAIR in lines[0], lines
    use = "import torch\nx = torch.randn(1, 1, 3, 8)\nprint(ours.scaled_dot_product_attention(x, x, x).shape)\nours.nn"
    code, lines = said(site, "-W", "ignore", "-c", f"from calcformer import kernels as ours\n{use}")
    assert code == 0, lines


@pytest.mark.slow
def test_a_package_that_is_not_there_is_noticed(site: Path) -> None:
    shutil.rmtree(site / "kernels")
    install_theirs(site)
    code, lines = said(site, "-c", "import calcformer")
    assert code == 1 and lines[-1].startswith("ImportError: ") and REPAIR in lines[-1], lines


def test_the_second_name_has_all_of_the_first() -> None:
    from calcformer import kernels as second

    for name in kernels.__all__:
        assert getattr(second, name) == getattr(kernels, name), name


@pytest.mark.slow
def test_a_whole_package_beside_the_other_one_says_that_the_other_fails(site: Path) -> None:
    code, lines = said(site, "-W", "error", "-c", "import kernels, calcformer")
    assert code == 0 and not lines
    install_theirs(site, before_ours=True)
    code, lines = said(site, "-c", "import kernels, calcformer; kernels.scaled_dot_product_attention")
    assert code == 0 and "Hugging Face's package `kernels` 0.18.2" in lines[0] and REPAIR in lines[0]


def test_a_transformers_model_runs_beside_this_package() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=53
    )
    model = transformers.BertModel(config)
    assert model(torch.arange(7)[None]).last_hidden_state.shape == (1, 7, 32)

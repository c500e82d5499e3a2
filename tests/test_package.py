"""The distribution: names, versions, and the Hugging Face package whose import name is the same."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest

import calcformer
import kernels


def test_versions_agree() -> None:
    assert kernels.__version__ == calcformer.__version__ == importlib.metadata.version("calcformer")


def test_public_names_exist() -> None:
    for package in (kernels, calcformer):
        for name in package.__all__:
            assert hasattr(package, name), f"{package.__name__}.{name}"


def test_what_runs_stand_on_imports_nothing_that_stands_on_them() -> None:
    paths = list((Path(calcformer.__file__).parent / "runs").glob("*.py"))
    imported = {f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".") for path in paths
                for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names}
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


def test_a_transformers_model_runs_beside_this_package() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=53
    )
    model = transformers.BertModel(config)
    assert model(torch.arange(7)[None]).last_hidden_state.shape == (1, 7, 32)

"""What the package offers under which name."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from importlib.metadata import version
from pathlib import Path

import pytest

import besiege

ROOT = Path(besiege.__file__).parent
MODULES = [
    "besiege",
    *(i.name for i in pkgutil.walk_packages(besiege.__path__, "besiege.") if not i.name.endswith("__main__")),
]


def test_the_version_is_the_installed_one():
    assert besiege.__version__ == version("besiege")


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_imported_and_says_what_it_is(name):
    module = importlib.import_module(name)
    first = (module.__doc__ or "").strip().splitlines()[0]
    assert 0 < len(first) <= 120


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_is_imported_for_others(name):
    """A package that names ``__all__`` names all that it brings in from its own modules, sorted, and nothing else."""
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        return
    brought = {
        alias.asname or alias.name
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("besiege")
        for alias in node.names
    }
    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and inspect.getmodule(value) is module and callable(value)
    }
    assert set(module.__all__) == brought | defined
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, key) for key in module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name):
    module = importlib.import_module(name)
    for key, value in vars(module).items():
        if key.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if value.__module__ != name:
            continue
        doc = inspect.getdoc(value)
        assert doc, f"{name}.{key}"
        assert len(doc.splitlines()[0]) <= 120

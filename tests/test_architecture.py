"""Imports run downhill."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import besiege

ROOT = Path(besiege.__file__).parent
MODULES = {
    ".".join(("besiege", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

DOWNHILL = {
    "core": set(),
    "regions": {"core"},
    "embedded": {"core"},
    "attacks": {"core", "regions"},
    "defenses": {"core", "attacks"},
    "targets": {"core", "embedded", "data", "results"},
    "data": {"core", "embedded"},
    "results": {"core"},
    "report": {"core", "results"},
    "engine": {"core", "regions", "results"},
    "audit": {"core", "regions", "attacks", "engine", "results", "report", "targets", "data"},
    "bench": {"core", "engine", "results", "targets", "data"},
}
"""What each part of the package may import beside itself; ``cli`` may import all, and nothing imports it."""

OPTIONAL = {
    "datasets",
    "httpx2",
    "onnx",
    "onnx2fx",
    "onnxruntime",
    "opacus",
    "pyarrow",
    "ray",
    "timm",
    "torchvision",
    "transformers",
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imported(module: str, *, top: bool = False) -> set[str]:
    """Absolute names of all that a module imports; only what its loading imports, if ``top``."""
    names: set[str] = set()
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not (top and (inner or typing_only)):
            waiting += ast.iter_child_nodes(node)
    return names


def part(name: str) -> str:
    """The part of the package that a dotted name lies in."""
    return name.split(".")[1] if name.startswith("besiege.") else ""


def test_every_part_of_the_package_is_on_the_map():
    parts = {path.parent.relative_to(ROOT).parts[0] for path in MODULES.values() if path.parent != ROOT}
    assert parts - {"cli"} <= set(DOWNHILL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downhill(module):
    here = part(module)
    ours = {part(name) for name in imported(module)} - {"", "__version__"}
    assert here == "cli" or "cli" not in ours
    if here in DOWNHILL:
        assert ours - {here} <= DOWNHILL[here]


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_needed(module):
    packages = {name.split(".")[0] for name in imported(module, top=True)}
    assert packages & OPTIONAL == set()
    if part(module) not in ("targets", "data"):
        assert {name.split(".")[0] for name in imported(module)} & OPTIONAL == set()


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "attacks"])
def test_attacks_build_on_torch_and_on_each_other_without_circles(module):
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imported(waiting.pop()):
            owner = name.rpartition(".")[0]
            if part(name) == "attacks" and owner not in seen:
                seen.add(owner)
                waiting.append(owner)
    assert module not in seen
    outside = {name.split(".")[0] for name in imported(module)} - {"besiege"}
    assert outside - set(sys.stdlib_module_names) <= {"torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "core"])
def test_the_core_needs_torch_alone(module):
    outside = {name.split(".")[0] for name in imported(module)} - {"besiege"}
    assert outside - set(sys.stdlib_module_names) <= {"torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) != "cli"])
def test_only_the_command_line_prints(module):
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    said = {ast.unparse(call.func) for call in calls}
    assert said & {"print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "pprint"} == set()


def loads(*modules: str) -> str:
    """What else a fresh interpreter has loaded after importing ``modules``."""
    script = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout


def test_results_and_reports_load_no_torch():
    modules = [m for m in MODULES if part(m) in ("results", "report")]
    assert len(modules) > 4
    assert "torch" not in loads(*modules).split()


def test_the_command_line_loads_no_torch_before_it_must():
    assert "torch" not in loads("besiege", "besiege.cli").split()

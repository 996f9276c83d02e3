"""Imports run downwards and without cycles; what a page of runs or a help text needs never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import seedbed

ROOT = Path(seedbed.__file__).parent

LAYERS = [
    {"errors", "disk", "findings", "parsing", "streams"},
    {"config"},
    {"runs", "text", "schedule", "lookup"},
    {"sampling", "loss", "optim", "device", "data", "model", "lora", "lowbit", "freeze", "distributed", "parallel"},
    {"checkpoint", "evaluate", "generate", "adapter", "export"},
    {"train", "judge", "sweep"},
    {"api"},
    {"cli"},
    {"__main__"},
]
"""From the ground up. A part may import what is below it and, inside a layer, its neighbours (without cycles)."""

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

WITHOUT_TORCH = ("config", "disk", "findings", "parsing", "runs", "text", "errors", "schedule", "lookup", "sweep")


def modules() -> dict[str, Path]:
    """Dotted name and file of every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, *, at_module_level: bool) -> Iterator[str]:
    """Names imported by a module; those only for type checkers, or inside functions, if that is wanted too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_module_level and (is_function(node) or is_for_type_checkers(node)):
            continue
        else:
            yield from imports(node, at_module_level=at_module_level)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def graph(at_module_level: bool) -> dict[str, set[str]]:
    """Module to the modules of the package that it imports."""
    known = modules()
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = set()
        for imported in imports(tree, at_module_level=at_module_level):
            module = imported if imported in known else imported.rpartition(".")[0]
            if module in known and module != name:
                targets.add(module)
        edges[name] = targets
    return edges


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_parser_sees_the_imports() -> None:
    assert "seedbed.errors" in graph(True)["seedbed.config.resolve"]
    assert "seedbed.checkpoint" not in graph(True)["seedbed.cli.models"]
    assert "seedbed.checkpoint" in graph(False)["seedbed.cli.models"]


def test_every_part_has_a_place_in_the_layers() -> None:
    assert {part_of(module) for module in modules()} - {""} == set(LEVEL)


def test_imports_run_downwards() -> None:
    """Also inside functions: a deferred import is for speed, not a way back up."""
    upward = [
        f"{module} imports {target}"
        for module, targets in graph(False).items()
        for target in targets
        if part_of(module) and part_of(target) and LEVEL[part_of(target)] > LEVEL[part_of(module)]
    ]
    assert not upward, upward


def test_only_the_package_itself_and_the_command_line_reach_its_top() -> None:
    """`from seedbed import ...` would load whatever the public names stand for."""
    reaching = {module for module, targets in graph(False).items() if "seedbed" in targets}
    assert {part_of(module) for module in reaching} <= {"cli"}


@pytest.mark.parametrize("at_module_level", [True, False])
def test_no_module_imports_itself_by_a_detour(at_module_level: bool) -> None:
    edges = {module: set(targets) for module, targets in graph(at_module_level).items() if module != "seedbed"}
    # A package's __init__ gathers names of its modules; that a module needs its own package is no detour.
    for module, targets in edges.items():
        targets -= {target for target in targets if module.startswith(f"{target}.")}
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) >= len(edges)


IMPORT_AND_LOOK = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(",".join(name for name in ("torch", "transformers", "safetensors.torch") if name in sys.modules))
"""


def package_modules(*parts: str) -> list[str]:
    return [module for module in modules() if part_of(module) in parts]


@pytest.mark.parametrize("module", ["seedbed", *package_modules(*WITHOUT_TORCH), "seedbed.data", "seedbed.cli.app"])
def test_importing_this_does_not_import_torch(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_AND_LOOK, module], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_parts_without_torch_do_not_import_it_later_either() -> None:
    for module in package_modules(*WITHOUT_TORCH):
        tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
        assert not any(name.split(".")[0] == "torch" for name in imports(tree, at_module_level=False)), module


FORBIDDEN_MODULES = {"pickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def test_nothing_is_pickled_or_evaluated() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in imports(tree, at_module_level=False)}, module
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN_CALLS, f"{module}: {called}"
                assert called not in ("torch.load", "torch.save", "np.load", "numpy.load"), f"{module}: {called}"
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", module

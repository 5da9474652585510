"""Imports only go down the list of packages, and the heavy libraries stay in theirs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACADE = "shortv"
# Packages from the top down: imports go down this list only. The longest prefix decides where a module belongs.
# The facade hands out names of many packages, so only jobs may use it.
ORDER = (
    "jobs",
    "shortv.cli",
    "shortv.bench",
    "shortv.workers",
    "reports",
    "shortv.evals",
    "shortv.tiny",
    "shortv.sweep",
    "shortv.learned",
    "shortv.layers",
    "shortv.families",
    "shortv",
)
RAY_PACKAGES = {"jobs", "shortv.workers", "shortv.bench"}
TORCH_FREE_PACKAGES = {"reports", "shortv"}
# What modules directly in `shortv` may import: light libraries, so that reading a plan or a manifest stays quick.
LIGHT_LIBRARIES = {*sys.stdlib_module_names, "shortv", "pydantic", "pydantic_core", "PIL", "pyarrow", "rich"}


class Import(NamedTuple):
    """One import statement's target, as a dotted name."""

    module: str
    target: str
    line: int


def package_of(module: str) -> str | None:
    """Return the package in `ORDER` that holds a module of this project, or None for a library."""
    found = [package for package in ORDER if module == package or module.startswith(package + ".")]
    return max(found, key=len) if found else None


def imports_of(root: Path) -> Iterator[Import]:
    """Yield every import below `root`, those inside functions and type-checking blocks included."""
    modules = {_module_name(path, root): path for path in root.rglob("*.py") if _is_ours(path, root)}
    for module, path in sorted(modules.items()):
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in _nodes(ast.parse(path.read_text("utf-8")), skip_types=module == FACADE):
            for target in _targets(node, package):
                # `from a import b` means the module a.b where there is one.
                shorter = target.rpartition(".")[0]
                known = package_of(target) is None or target in modules or target in _packages(modules)
                yield Import(module, target if known else shorter, getattr(node, "lineno", 0))


def violations(root: Path) -> list[str]:
    """Return one line for every import that climbs, crosses to a neighbour, or loads what its floor must not."""
    return [f"{found.module}:{found.line} {why}" for found in imports_of(root) if (why := _why_wrong(found))]


def _why_wrong(found: Import) -> str | None:
    here, there = package_of(found.module), package_of(found.target)
    assert here is not None
    library = found.target.split(".")[0]
    if there is None:
        if library == "ray" and here not in RAY_PACKAGES:
            return "imports ray"
        if library in ("torch", "torchvision") and here in TORCH_FREE_PACKAGES:
            return f"imports {library}"
        if here == "shortv" and library not in LIGHT_LIBRARIES:
            return f"imports {library}, which is not a light library"
        return None
    if found.target == FACADE:
        return None if here == "jobs" else "imports the facade; import the module that defines the name"
    if here == "reports" != there and there != "shortv":
        return f"in reports imports {found.target}; it reads the modules of shortv itself alone"
    if ORDER.index(there) < ORDER.index(here):
        return f"in {here} imports {found.target} of {there}, which is above"
    return None


def _nodes(tree: ast.Module, skip_types: bool) -> Iterator[ast.AST]:
    """Yield all nodes; the facade names every floor for type checkers, and `import shortv` loads none of it."""
    for statement in tree.body:
        guard = getattr(statement, "test", None)
        if not (skip_types and isinstance(guard, ast.Name) and guard.id == "TYPE_CHECKING"):
            yield from ast.walk(statement)


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
        "import_module",
        "__import__",
    ):
        first = node.args[0] if node.args else None
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


def _is_ours(path: Path, root: Path) -> bool:
    return path.relative_to(root).parts[0] in ("shortv", "reports", "jobs")


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _packages(modules: dict[str, Path]) -> set[str]:
    return {module.rpartition(".")[0] for module in modules}


def test_imports_only_go_down() -> None:
    assert violations(ROOT) == []


def test_the_tree_was_read() -> None:
    found = set(imports_of(ROOT))
    assert any(entry.module == "shortv.costs" and entry.target == "shortv.plan" for entry in found)


@pytest.mark.parametrize(
    ("file", "code", "why"),
    [
        ("shortv/costs.py", "import torch", "imports torch"),
        ("shortv/costs.py", "def f():\n    from torch import nn", "imports torch"),
        ("shortv/costs.py", "import numpy as np", "imports numpy, which is not a light library"),
        ("shortv/costs.py", "import pydantic", None),
        ("shortv/costs.py", "from shortv.sweep import ranking", "imports shortv.sweep.ranking"),
        ("shortv/costs.py", "from .sweep.ranking import f", "imports shortv.sweep.ranking"),
        ("shortv/__init__.py", "from shortv.sweep.ranking import f", "imports shortv.sweep.ranking"),
        ("shortv/__init__.py", "if TYPE_CHECKING:\n    from shortv.sweep.ranking import f", None),
        ("shortv/plan.py", "if TYPE_CHECKING:\n    from shortv.sweep.ranking import f", "which is above"),
        ("shortv/families/a.py", "from shortv import sweep", "imports shortv.sweep"),
        ("shortv/families/a.py", "import ray.data", "imports ray"),
        ("shortv/sweep/a.py", "import reports.store", "imports reports.store"),
        ("shortv/layers/a.py", "from ..sweep import ranking", "imports shortv.sweep.ranking"),
        ("shortv/sweep/a.py", "from ..layers import fast", None),
        ("shortv/sweep/a.py", "import importlib\nimportlib.import_module('ray')", "imports ray"),
        ("shortv/sweep/a.py", "from shortv import Plan", "imports the facade"),
        ("reports/a.py", "import torch.nn", "imports torch"),
        ("reports/a.py", "from shortv.layers import fast", "in reports imports shortv.layers"),
        ("shortv/workers/a.py", "from jobs.common import run", "imports jobs.common"),
        ("shortv/workers/a.py", "import ray\nfrom shortv.sweep import ranking\nimport reports.store", None),
        ("shortv/sweep/a.py", "from . import ranking\nfrom shortv.plan import Plan\nimport torch", None),
        ("jobs/a.py", "from shortv import Plan\nfrom jobs.common import run\nimport ray", None),
    ],
)
def test_the_checker_finds_what_is_wrong(file: str, code: str, why: str | None, tmp_path: Path) -> None:
    names = [
        "shortv/plan.py",
        "shortv/families/tokens.py",
        "shortv/sweep/ranking.py",
        "shortv/layers/fast.py",
        "reports/store.py",
    ]
    for name in [*names, "jobs/common.py", file]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(code)
    found = violations(tmp_path)
    assert len(found) == (why is not None), found
    assert why is None or why in found[0]


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import shortv; shortv.Plan; shortv.Mode", {"torch", "ray", "numpy", "transformers", "pyarrow"}),
        ("import shortv.plan, shortv.records, shortv.sample, shortv.costs", {"torch", "ray", "numpy"}),
        ("import shortv.sweep.ranking, shortv.sweep.planning", {"torch", "ray"}),
        ("import reports.store, reports.manifest", {"torch", "ray"}),
    ],
)
def test_what_an_import_loads(code: str, banned: set[str]) -> None:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert banned.isdisjoint(done.stdout.split())


def test_the_facade_hands_out_what_it_lists() -> None:
    import shortv
    from shortv.plan import Plan

    assert shortv.Plan is Plan
    assert set(shortv._HOMES) == set(shortv.__all__)
    light = [name for name, home in shortv._HOMES.items() if package_of(home) == "shortv"]
    assert all(getattr(shortv, name).__name__ == name for name in light)
    assert set(shortv.__all__) <= set(dir(shortv))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shortv.nothing

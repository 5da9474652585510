"""Imports only go down the list of packages, and the heavy libraries stay in theirs."""

import ast
import subprocess
import sys
from pathlib import Path

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


def modules_of(root: Path) -> dict[str, Path]:
    """Return the project's modules by their dotted names, packages included."""
    files = [path for folder in ("shortv", "reports", "jobs") for path in (root / folder).rglob("*.py")]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules_of(ROOT)


def package_of(module: str) -> str | None:
    """Return the package in `ORDER` that holds a module of this project, or None for a library."""
    found = [package for package in ORDER if module == package or module.startswith(package + ".")]
    return max(found, key=len) if found else None


def violations(module: str, code: str) -> list[str]:
    """Return why imports of a module climb, cross to a neighbour, or load what its floor must not."""
    found = []
    for statement in ast.parse(code).body:
        guard = getattr(statement, "test", None)
        # The facade names every floor for type checkers, and `import shortv` loads none of it.
        if not (module == FACADE and isinstance(guard, ast.Name) and guard.id == "TYPE_CHECKING"):
            targets = [target for node in ast.walk(statement) for target in _targets(node)]
            found += [f"{module}: {why}" for target in targets if (why := _why_wrong(module, target))]
    return found


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        # `from a import b` means the module a.b where there is one.
        return [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        return [one.value for one in node.args[:1] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return []


def _why_wrong(module: str, target: str) -> str | None:
    here, there, library = package_of(module), package_of(target), target.split(".")[0]
    assert here is not None
    if target.startswith("."):
        return "imports relatively; name the whole module"
    if there is None:
        if library == "ray" and here not in RAY_PACKAGES:
            return "imports ray"
        if library in ("torch", "torchvision") and here in TORCH_FREE_PACKAGES:
            return f"imports {library}"
        heavy = here == "shortv" and library not in LIGHT_LIBRARIES
        return f"imports {library}, which is not a light library" if heavy else None
    if target == FACADE:
        return None if here == "jobs" else "imports the facade; import the module that defines the name"
    if here == "reports" != there and there != "shortv":
        return f"in reports imports {target}; it reads the modules of shortv itself alone"
    above = ORDER.index(there) < ORDER.index(here)
    return f"in {here} imports {target} of {there}, which is above" if above else None


def test_imports_only_go_down() -> None:
    assert len(MODULES) > 100
    assert [why for module, path in MODULES.items() for why in violations(module, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "code", "why"),
    [
        ("shortv.costs", "def f():\n    from torch import nn", "imports torch"),
        ("shortv.costs", "import numpy as np", "imports numpy, which is not a light library"),
        ("shortv.costs", "import pydantic", None),
        ("shortv.costs", "from shortv.sweep import ranking", "imports shortv.sweep.ranking"),
        ("shortv.costs", "from .sweep.ranking import f", "imports relatively"),
        ("shortv", "if TYPE_CHECKING:\n    from shortv.sweep.ranking import f", None),
        ("shortv.plan", "if TYPE_CHECKING:\n    from shortv.sweep.ranking import f", "which is above"),
        ("shortv.families.a", "import ray.data", "imports ray"),
        ("shortv.sweep.a", "import importlib\nimportlib.import_module('ray')", "imports ray"),
        ("shortv.sweep.a", "from shortv import Plan", "imports the facade"),
        ("reports.a", "from shortv.layers import fast", "in reports imports shortv.layers"),
        ("shortv.workers.a", "from jobs.common import run", "imports jobs.common"),
        ("shortv.workers.a", "import ray\nfrom shortv.sweep import ranking\nimport reports.store", None),
        ("jobs.a", "from shortv import Plan\nfrom jobs.common import run\nimport ray", None),
    ],
)
def test_the_checker_finds_what_is_wrong(module: str, code: str, why: str | None) -> None:
    found = violations(module, code)
    assert len(found) == (why is not None), found
    assert why is None or why in found[0]


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import shortv.costs, shortv.records; shortv.Plan", {"torch", "ray", "numpy", "transformers", "pyarrow"}),
        ("import reports.manifest, shortv.sweep.ranking, shortv.sweep.planning", {"torch", "ray"}),
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

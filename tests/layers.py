"""The layers of the packages: `python -m tests.layers` names imports that point upwards, and circles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (
    "base", "values", "messaging", "control", "transports", "caches", "grants", "links", "transfers",
    "engine", "api", "tools",
)  # fmt: skip
"""Lowest first: rooms, ``values`` (modules beside them), and ``tools``, which use the API."""
TOOLS = {"__main__", "bench", "cli", "diagnosis", "drop_in", "metrics", "testing", "torch_memory"}
PACKAGES = {
    "datadist": ROOT / "datadist",
    **{
        path.parent.name: path.parent
        for parent in ("plugins", "examples")
        for path in sorted(ROOT.glob(f"{parent}/*/datadist_*/__init__.py"))
    },
    "pytest_datadist": ROOT / "integrations" / "pytest" / "pytest_datadist",
}

Imports = Mapping[str, set[str]]


def modules(package: str, folder: Path) -> dict[str, Path]:
    """Files of a package by the names of their modules."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: Mapping[str, Path]) -> Imports:
    """What each module imports of the others, also inside functions and for types only."""
    return {name: set(_imported(path, files)) - {name} for name, path in files.items()}


def _imported(path: Path, files: Mapping[str, Path]) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in files:
                    yield module
                elif node.module in files and not _is_extension(files[node.module], alias.name):
                    yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            given = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from (str(value) for value in given if value in files)


def _name(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def _is_extension(package: Path, name: str) -> bool:
    return package.name == "__init__.py" and (package.parent / f"{name}.pyi").exists()


def layer(module: str) -> str:
    """The layer of a module of core."""
    subpackage = module.split(".")[1] if "." in module else "tools"
    if subpackage in TOOLS:
        return "tools"
    return subpackage if subpackage in LAYERS else "values"


def upward(found: Imports) -> list[str]:
    """Imports of core that point to a higher layer."""
    return [
        f"{module} ({layer(module)}) imports {other} ({layer(other)})"
        for module, others in sorted(found.items())
        for other in sorted(others)
        if LAYERS.index(layer(other)) > LAYERS.index(layer(module))
    ]


def circles(found: Imports) -> list[str]:
    """A circle of imports, if there is one."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return [f"a circle: {' <- '.join(error.args[1])}"]
    return []


def main() -> int:
    """Exit status: 0 when nothing points upwards and nothing is a circle."""
    wrong = []
    for package, folder in PACKAGES.items():
        found = imports(modules(package, folder))
        wrong += circles(found) + (upward(found) if package == "datadist" else [])
    print("\n".join(wrong) or f"{', '.join(PACKAGES)}: no import points upwards, no circle")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

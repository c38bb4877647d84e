"""The package as a whole: its floors, what an import costs, what the wheel holds."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import eblora_hf

ROOT = Path(eblora_hf.__file__).parent
FLOORS = [
    {"metrics", "version"},
    {
        "memory",
        "manifold",
        "adapters",
    },
    {
        "published",
        "config",
        "methods",
    },
    {
        "trainers",
        "analysis",
        "benchmark",
        "cli",
    },
]
MODULES = sorted(str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in ROOT.rglob("*.py"))


def floor_of(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module.split(".")[0] in names)


def imports_of(module: str) -> set[str]:
    """Modules of this package that a module imports, relative to its root."""
    path = ROOT / (module.replace(".", "/") + ".py")
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            targets = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, target]) for target in targets}
        assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eblora_hf")), "use relative"
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_go_downwards_only(module):
    module_floor = floor_of(module)
    for imported in imports_of(module):
        assert floor_of(imported) <= module_floor, f"{module} imports {imported}"


def test_there_are_no_circles():
    graph = {name: {i for i in imports_of(name) if i in MODULES} for name in MODULES if not name.endswith("__init__")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_public_names_exist_and_the_import_is_light():
    code = "import sys, eblora_hf; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    for name in eblora_hf.__all__:
        assert getattr(eblora_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        eblora_hf.Nothing  # noqa: B018
    for module in MODULES:
        importlib.import_module(
            "eblora_hf" if module == "__init__" else f"eblora_hf.{module.removesuffix('.__init__')}"
        )

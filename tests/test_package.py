"""The package as a whole: its wings, what an import costs, its public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import eblora_hf

ROOT = Path(eblora_hf.__file__).parent
# from the roof down: a wing imports from itself and from those below
WINGS = ["cli", "analysis", "benchmark", "trainers", "methods", "published", "memory", "manifold", "adapters", "root"]
ROOMS_OF_ROOT = {"config", "metrics", "tasks", "version"}  # what every wing may import
MODULES = sorted(str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in ROOT.rglob("*.py"))


def wing_of(module: str) -> str:
    first = module.split(".")[0]
    return "root" if first in ROOMS_OF_ROOT else first


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


def test_nothing_else_lies_at_the_root():
    assert {module for module in MODULES if "." not in module} == {"__init__", "cli"} | ROOMS_OF_ROOT
    assert {wing_of(module) for module in MODULES} - {"__init__"} == set(WINGS)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_go_down_the_wings(module):
    for imported in imports_of(module):
        allowed = WINGS[WINGS.index(wing_of(module)) :]
        assert wing_of(imported) in allowed, f"{module} imports {imported}"


def test_a_wing_says_its_job_and_exports_nothing():
    """But for `methods`, whose job is to choose one."""
    for module in MODULES:
        if module.endswith("__init__") and module not in ("__init__", "methods.__init__"):
            body = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
            assert [type(node) for node in body] == [ast.Expr], module


@pytest.mark.parametrize("module", MODULES)
def test_a_file_can_be_read_in_one_go(module):
    assert len((ROOT / (module.replace(".", "/") + ".py")).read_text().splitlines()) <= 350


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

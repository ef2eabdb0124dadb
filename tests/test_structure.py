"""The structure of the code: imports go down, never up and never in a circle."""

import ast
from graphlib import TopologicalSorter

from utils import ROOT

# A room imports from itself and from rooms to the right of its own.
ROOMS = ["tools", "deploy", "analysis", "engine", "datasets", "models", "configs", "references", "kernels", "utils",
         "errors"]


def _imports() -> dict[str, set[str]]:
    """Return the modules of the suite that each module imports, type checking included."""
    files = [path for room in ROOMS for path in [*ROOT.glob(f"{room}.py"), *(ROOT / room).rglob("*.py")]]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else str(node.module) for name in names]
            found[module] |= {name for name in names if name in modules and name != module}
    return found


def test_imports_go_down() -> None:
    for module, imported in _imports().items():
        room = ROOMS.index(module.partition(".")[0])
        for name in imported:
            assert ROOMS.index(name.partition(".")[0]) >= room, f"{module} imports {name}"


def test_no_import_cycle() -> None:
    TopologicalSorter(_imports()).prepare()


def test_no_two_modules_have_the_same_name() -> None:
    """But a command and what it runs: ``tools/train.py`` and ``engine/train.py``."""
    stems: dict[str, list[str]] = {}
    for module in _imports():
        if not module.startswith("tools."):
            stems.setdefault(module.rpartition(".")[2], []).append(module)
    assert {stem: modules for stem, modules in stems.items() if len(modules) > 1} == {}

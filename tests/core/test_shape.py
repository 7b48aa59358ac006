"""The core has no circles: its files can be put into an order in which each imports only earlier ones."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import llmux.core

FOLDER = Path(llmux.core.__file__).parent
FILES, LINES = 24, 4300


def imports(path: Path) -> set[str]:
    """Return the files of the core that a file imports, those for type checking included."""
    names = {file.stem for file in FOLDER.glob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llmux.core":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmux.core."):
            found.add(node.module.removeprefix("llmux.core."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("llmux.core.") for alias in node.names}
    return found & names


def test_no_file_imports_itself_by_way_of_others():
    graph = {path.stem: imports(path) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert order[-1] == "machine"


def test_the_core_stays_small():
    files = list(FOLDER.glob("*.py"))
    assert len(files) <= FILES
    assert sum(len(path.read_text().splitlines()) for path in files) <= LINES

"""Imports point downwards, and the core is pure: the design's picture, held to by reading the source."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docs.pages import ROOT

# Lowest first. A package may import from its own layer and from those below; two packages of one layer may not
# import each other.
LAYERS = (
    {"aiohttp_internals", "errors", "normal_path", "renamed", "version"},
    {"core"},
    {
        "config",
        "control",
        "estimates",
        "extract",
        "plugins",
        "hookrunner",
        "observability",
        "upstream",
        "policies",
        "hooks",
    },
    {"accounts", "runtime", "simulator", "llama_swap", "survey", "targets"},
    {"litellm"},
    {"middleware", "proxy", "admin", "fleet"},
    {"app"},
    {"server"},
    {"process"},
    {"gateway"},
    {"cli", "__main__"},
)
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}

# Of the standard library, the core takes what neither reads a clock nor does I/O nor rolls dice.
PURE = {
    "__future__", "abc", "bisect", "collections", "contextlib", "dataclasses", "enum", "functools", "heapq",
    "itertools", "math", "operator", "types", "typing",
}  # fmt: skip


def modules() -> list[Path]:
    return sorted((ROOT / "llmux").rglob("*.py")) + sorted((ROOT / "policies").glob("*.py"))


def package_of(path: Path) -> str:
    """Return the part of llmux that a file belongs to; empty for llmux/__init__.py, which only re-exports."""
    if path.parent == ROOT / "policies":
        return "policies"
    first, *rest = path.relative_to(ROOT / "llmux").parts
    return first if rest else first.removesuffix(".py").removesuffix("__init__")


def parts_of(node: ast.AST, *, for_types: bool) -> Iterator[ast.AST]:
    """Return all nodes below one; not ``for_types``: without what is there for type checking only."""
    for part in ast.iter_child_nodes(node):
        if for_types or not (isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING"):
            yield part
            yield from parts_of(part, for_types=for_types)


@cache
def imports_of(path: Path, *, for_types: bool = True) -> frozenset[str]:
    """Return the full names of all that a file imports, wherever in the file it does so."""
    found: list[str] = []
    for node in parts_of(ast.parse(path.read_text()), for_types=for_types):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def packages_used(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports_of(path) if name.startswith("llmux.")}
    return {name for name in names if name in HEIGHT}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    package = package_of(path)
    if not package:
        return
    assert package in HEIGHT, f"{package} has no place among the layers"
    assert not {used for used in packages_used(path) if HEIGHT[used] > HEIGHT[package]}


def test_no_file_imports_itself_by_way_of_others():
    """They can be put into an order in which each needs only earlier ones when it runs."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in modules()
    }
    graph = {}
    for name, path in names.items():
        used = {one if one in names else one.rpartition(".")[0] for one in imports_of(path, for_types=False)}
        graph[name] = used & (names.keys() - {name})
    assert sum(map(len, graph.values())) > len(names)
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_all_packages_are_installed():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in modules() if path.name == "__init__.py"}
    assert set(told["packages"]) == {name for name in found if name != "policies"} | {*told["package-dir"]}
    assert {path.parent for path in modules()} == {
        ROOT / told["package-dir"].get(name, name.replace(".", "/"))
        for name in told["packages"]
        if name != "llmux.hooks"
    }


def test_no_two_packages_import_each_other():
    arrows = {
        (package_of(path), used)
        for path in modules()
        if package_of(path)
        for used in packages_used(path)
        if used != package_of(path)
    }
    assert not {arrow for arrow in arrows if arrow[::-1] in arrows}


@pytest.mark.parametrize(
    "path",
    [path for room in ("core", "estimates") for path in sorted((ROOT / "llmux" / room).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_the_core_and_what_it_is_handed_are_pure(path):
    own = ("llmux.core",) if path.parent.name == "core" else ("llmux.core", "llmux.estimates")
    outside = {name for name in imports_of(path) if not name.startswith(own)}
    impure = {name for name in outside if name.split(".")[0] not in PURE}
    # Dice may be handed in; the core names their type only.
    assert not impure - {"random.Random"}
    if "random.Random" in impure:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Random"]


# The pure half of the fleet. Its routes have options, as policies do; a hash of names rolls no dice.
FLEET = {"events", "fleet_view", "routes", "placement"}


@pytest.mark.parametrize("name", sorted(FLEET))
def test_the_placement_is_pure(name):
    used = set(imports_of(ROOT / "llmux/fleet" / f"{name}.py"))
    ours = {name.split(".")[2] for name in used if name.startswith("llmux.fleet.")}
    assert ours <= FLEET
    outside = {name for name in used if not name.startswith(("llmux.core.", "llmux.fleet."))}
    allowed = PURE | {"zlib"} | ({"pydantic"} if name == "routes" else set())
    assert not {name for name in outside if name.split(".")[0] not in allowed}


@pytest.mark.parametrize("path", sorted((ROOT / "policies").glob("*.py")), ids=lambda path: path.name)
def test_a_policy_needs_nothing_that_a_users_own_could_not_import(path):
    ours = {name for name in imports_of(path) if name.split(".")[0] == "llmux"}
    assert not {name for name in ours if not name.startswith(("llmux.core.policy", "llmux.policies"))}


def test_each_python_gets_one_uvloop_and_3_15_one_that_exists_for_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    uvloops = [each for each in map(Requirement, project["dependencies"]) if each.name == "uvloop"]
    machine = {"sys_platform": "linux", "implementation_name": "cpython"}
    assert "3.15" not in named  # it installs there; the tests were not run with it
    for python in (*named, "3.15"):
        taken = [
            one for one in uvloops if one.marker and one.marker.evaluate(machine | {"python_version": python})
        ]
        assert len(taken) == 1, python
        assert ("0.22.1" in taken[0].specifier) is (python != "3.15"), python

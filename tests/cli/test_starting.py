"""What each command imports: how long it takes to start is a benchmark's business (benchmarks/starting.py)."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from llmux.cli import app
from llmux.cli.command_tree import COMMANDS
from tests.cli.invoking import CLEAN
from tests.docs.pages import ROOT
from tests.server.house import HOST

REPORT = """
import json, sys
from llmux.cli import main
try:
    main()
except SystemExit as ended:
    json.dump([ended.code or 0, sorted(sys.modules)], open("modules.json", "w"))
"""
SERVER = ("aiohttp", "structlog", "prometheus_client", "llmux.runtime", "llmux.middleware", "llmux.simulator")
CONFIGURATION = ("llmux.config", "yaml")
TABLES = ("rich",)


async def imported(folder: Path, *words: str, **environ: str) -> set[str]:
    """Run a command to its end; return the names of the modules that it has imported."""
    env = {**os.environ, **CLEAN, **environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", REPORT, *words, cwd=folder, env=env, stdout=asyncio.subprocess.PIPE
    )
    await process.communicate()
    code, modules = json.loads((folder / "modules.json").read_text())
    assert code == 0, words
    return set(modules)


def among(modules: set[str], packages: tuple[str, ...]) -> list[str]:
    return sorted(name for name in modules if any(f"{name}.".startswith(f"{each}.") for each in packages))


async def test_the_version_takes_next_to_nothing(tmp_path):
    modules = await imported(tmp_path, "--version")
    assert not among(modules, (*SERVER, *CONFIGURATION, *TABLES, "pydantic", "asyncio", "llmux.core"))


async def test_the_list_of_commands_imports_none_of_them(tmp_path):
    for environ in ({}, {"_LLMUX_COMPLETE": "complete_bash", "COMP_WORDS": "llmux s", "COMP_CWORD": "1"}):
        words = () if environ else ("--help",)
        modules = await imported(tmp_path, *words, **environ)
        assert not among(modules, (*SERVER, *CONFIGURATION, "asyncio", "llmux.core"))


async def test_a_check_takes_the_configuration_and_its_policy(tmp_path):
    hooks = {"wake": "true", "sleep": "true", "alive": "true"}
    (tmp_path / "config.json").write_text(json.dumps({"models": {"a": {"port": 9, **hooks}}}))
    modules = await imported(tmp_path, "check", "config.json")
    assert {"llmux.config", "llmux.policies.adaptive"} <= modules
    assert not among(modules, (*SERVER, *TABLES, "asyncio", "opentelemetry", "llmux.core.machine"))


@pytest.mark.parametrize("words", [("status",), ("status", "--json"), ("wake", "a"), ("switch", "a")])
async def test_a_command_to_a_running_llmux_takes_no_server_along(house, tmp_path, words):
    await house.open()
    modules = await imported(tmp_path, *words, LLMUX_URL=f"http://{HOST}:{house.port}")
    assert not among(modules, (*SERVER, *CONFIGURATION, "pydantic", "llmux.core"))


def test_serving_takes_neither_fleet_nor_simulator_nor_survey_nor_plots():
    code = "import json, sys, llmux.cli.serve, llmux.cli.command_tree, llmux, llmux.process; llmux.build_app;"
    code += "print(json.dumps(sorted(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    apart = ("llmux.fleet", "llmux.gateway", "llmux.config.gateway", "llmux.simulator", "llmux.survey")
    apart = (*apart, "llmux.llama_swap", "matplotlib", "opentelemetry", "argon2")
    modules = set(json.loads(said))
    assert {"llmux.process", "aiohttp"} <= modules
    assert not among(modules, apart)


def test_the_list_says_what_the_commands_say():
    root = typer.main.get_command(app)
    for name, (_, listed) in COMMANDS.items():
        first = inspect.cleandoc(root.commands[name].help).partition("\n\n")[0]
        assert " ".join(first.split()) == listed
        assert root.get_command(None, name).name == root.commands[name].name == name


ALONE = """
import gc, os, sys
import aiohttp.web, prometheus_client, pydantic, rich.table, structlog, typer, yaml
gc.disable()
failed, names = [], set(sys.argv[1:])

def alone(name):  # import it in a process of its own; return what that has imported then
    reading, writing = os.pipe()
    if not os.fork():
        __import__(name)
        with open(writing, "w") as told:
            told.write(" ".join(sys.modules))
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        modules = told.read().split()
    if os.wait()[1]:
        failed.append(name)
    return modules

# A base is never in the way of what it does not import itself: all of these find it imported, and once.
for base in ("llmux.config", "llmux.runtime", "llmux.app", "llmux.simulator"):
    for name in sorted(names.intersection(alone(base))):
        names.remove(name)
        alone(name)
    __import__(base)
for name in sorted(names):
    alone(name)
sys.exit(" ".join(failed) or 0)
"""


def test_no_module_relies_on_another_having_been_imported_before():
    """Each is imported by a process which has imported nothing that imports it: a circle would show."""
    files = sorted(file for file in (ROOT / "llmux").glob("*.py") if not file.name.startswith("__"))
    files += sorted((ROOT / "llmux").glob("*/__init__.py")) + sorted((ROOT / "llmux/cli").glob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    done = subprocess.run([sys.executable, "-c", ALONE, *names], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

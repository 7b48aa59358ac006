"""What was found, as models that llmux could serve: each with the hook script that wakes and sleeps it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmux.survey.engines import Engine, Served
from llmux.survey.gguf import Gguf
from llmux.survey.machine import Container, Machine

# By preference: the first of these hook scripts that there is.
_SCRIPTS = {
    "llama.cpp": ("llama-cpp",),
    "vLLM": ("vllm-process", "vllm-sleep"),
    "SGLang": ("sglang",),
    "Ollama": ("ollama",),
    "TabbyAPI": ("tabbyapi",),
}
_STAYS = frozenset({"ollama", "llama-cpp-router", "tabbyapi"})
"""Scripts for a server that runs all the time and has many models."""

_KEPT = "the container has to be there after it was stopped (not run with --rm), or be made anew with RUN"
_FOREIGN = (
    "it was not started by the hook, which can therefore not end it: end it once by hand before llmux starts"
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model. ``source`` is what its hook script is told: a file, a name, a container.

    ``port`` is None where any free one will do; ``about`` is for people; ``remark`` is what they have to do.
    """

    name: str
    script: str
    source: str
    about: str
    port: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    remark: str = ""


def candidates(
    models: Iterable[Gguf], engines: Iterable[Engine], machine: Machine, scripts: Collection[str]
) -> tuple[list[Candidate], list[str]]:
    """Return what could be served, engines that run first, and what was found but cannot be.

    ``scripts`` are the names of the hook scripts that there are.
    """
    found: list[Candidate] = []
    left: list[str] = []
    for engine in engines:
        mine = [_running(engine, model, machine, scripts) for model in engine.models]
        known = [one for one in mine if one is not None]
        found += known
        if not known:
            left.append(_why_not(engine))
    told = {one.source for one in found}
    if "llama-cpp" in scripts:
        found += [of_file(model) for model in models if str(model.path) not in told]
    return unique(found), left


def of_file(model: Gguf, name: str = "") -> Candidate:
    """Return a GGUF file as llama-server would serve it, by its own name or another."""
    env = {"ARGS": shlex.join(model.options)} if model.options else {}
    about = f"{gibibytes(model.size)}, {model.path}"
    return Candidate(name or model.name, "llama-cpp", str(model.path), about, env=env)


def unique(found: Iterable[Candidate]) -> list[Candidate]:
    """Give each a name of its own."""
    named: dict[str, Candidate] = {}
    for one in found:
        name, number = one.name, 2
        while name in named:
            name, number = f"{one.name}-{number}", number + 1
        named[name] = one if name == one.name else replace(one, name=name)
    return list(named.values())


def gibibytes(size: int) -> str:
    """Write a size for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _running(engine: Engine, model: Served, machine: Machine, scripts: Collection[str]) -> Candidate | None:
    container = machine.container_at(engine.port)
    script = _script(engine, container, scripts)
    if script is None or (script == "llama-cpp" and not model.source):
        return None
    if container is not None and script == "docker":
        return _contained(engine, model, container)
    name, source, remark = model.name, model.source or model.name, _FOREIGN
    if script in _STAYS:
        source, remark = name, ""
    elif engine.sleeps:  # the script does not start what it is told no source of
        source, remark = "" if container else source, ""
    elif script == "llama-cpp" and "/" in name:
        name = Path(name).stem
    about = f"{engine.kind} on port {engine.port}, which runs now"
    return Candidate(name, script, source, about, port=engine.port, remark=remark)


def _script(engine: Engine, container: Container | None, scripts: Collection[str]) -> str | None:
    """Return the script for an engine that runs, None when there is none."""
    wanted = _SCRIPTS.get(engine.kind, ())
    if engine.router:
        wanted = ("llama-cpp-router",)
    elif engine.sleeps:
        wanted = ("vllm-sleep",)
    elif container is not None and not _STAYS.intersection(wanted):
        wanted = ("docker",)
    return next((name for name in wanted if name in scripts), None)


def _contained(engine: Engine, model: Served, container: Container) -> Candidate:
    about = f"{engine.kind} in the container {container.name} ({container.image}), port {engine.port}"
    env = {"EXPECT": f'"{model.name}"'}
    return Candidate(model.name, "docker", container.name, about, port=engine.port, env=env, remark=_KEPT)


def _why_not(engine: Engine) -> str:
    if engine.kind == "llama-swap":
        return f"{engine.about}; `llmux import llama-swap FILE` makes a configuration of its file"
    if engine.kind == "llmux":
        return f"{engine.about}; one llmux is enough for one GPU"
    if engine.locked or not engine.models:
        return engine.about
    return f"{engine.about}; there is no hook script for it: write your own, or use hooks/process.sh"

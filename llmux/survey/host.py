"""The machine: its GPUs, containers and programs.

Running engines are queried over HTTP, on their default ports.

How each identifies itself was read from its source in November 2026: ``owned_by`` in ``/v1/models``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

HOST = "127.0.0.1"
TIMEOUT = 1.5  # seconds for all requests to one port
MOST_BYTES = 4_000_000

PORTS = {
    8080: "llama-server, llama-swap",
    8000: "vLLM, TensorRT-LLM",
    8001: "a second engine",
    11434: "Ollama",
    30000: "SGLang",
    5000: "TabbyAPI",
    1234: "LM Studio",
    3000: "llmux",
}

_OWNERS = {
    "llamacpp": "llama.cpp",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tabbyapi": "TabbyAPI",
    "tensorrt_llm": "TensorRT-LLM",
    "library": "Ollama",
    "organization_owner": "LM Studio",
    "llama-swap": "llama-swap",
    "llmux": "llmux",
}
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Served:
    """An engine's model. ``source`` is its file or name on Hugging Face, if the engine reports it."""

    name: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine on a port. ``sleeps``: vLLM in sleep mode; ``router``: llama-server with many models."""

    port: int
    kind: str
    models: tuple[Served, ...] = field(default=())
    sleeps: bool = False
    router: bool = False
    locked: bool = False  # it requires a key

    @property
    def about(self) -> str:
        """A short description."""
        names = ", ".join(model.name for model in self.models[:4]) + (", …" if len(self.models) > 4 else "")  # noqa: PLR2004
        what = "something that wants a key" if self.locked else self.kind
        if self.kind == UNKNOWN and not self.locked:
            what = "something that is not an engine known to llmux"
        return f"{what} on port {self.port}" + (f": {names}" if names else "")


async def probe(ports: Iterable[int]) -> list[Engine]:
    """Query all ports at once; return the engines found, by port. Takes no longer than ``TIMEOUT``."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT), trust_env=False) as session:
        found = await asyncio.gather(*(_look(session, port) for port in dict.fromkeys(ports)))
    return sorted((engine for engine in found if engine), key=lambda engine: engine.port)


async def _look(session: aiohttp.ClientSession, port: int) -> Engine | None:
    try:
        async with asyncio.timeout(TIMEOUT):
            return await _ask(_Port(session, port))
    except (TimeoutError, aiohttp.ClientError, OSError):
        return None


class _Port:
    """One port, and its responses."""

    def __init__(self, session: aiohttp.ClientSession, number: int) -> None:
        self.session = session
        self.number = number

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON; None if it is not JSON."""
        async with self.session.get(f"http://{HOST}:{self.number}{path}", allow_redirects=False) as answer:
            body = await answer.content.read(MOST_BYTES)
            try:
                return answer.status, json.loads(body)
            except ValueError:
                return answer.status, None


async def _ask(port: _Port) -> Engine | None:
    status, listed = await port.get("/v1/models")
    if status in (401, 403):
        return Engine(port.number, UNKNOWN, locked=True)
    entries = [entry for entry in _list(listed, "data") if isinstance(entry.get("id"), str)]
    owner = next((str(entry.get("owned_by")).lower() for entry in entries if entry.get("owned_by")), "")
    kind = _OWNERS.get(owner, UNKNOWN)
    models = tuple(Served(entry["id"], _source(entry.get("root"))) for entry in entries)
    if kind == "llama.cpp":
        return await _llama_cpp(port, entries, models)
    if kind in ("Ollama", UNKNOWN):
        return await _ollama(port) or Engine(port.number, kind, models)
    if kind == "vLLM":
        sleeping, _ = await port.get("/is_sleeping")
        return Engine(port.number, kind, models, sleeps=sleeping == 200)  # noqa: PLR2004 (HTTP)
    return Engine(port.number, kind, models)


async def _llama_cpp(port: _Port, entries: list[Mapping[str, Any]], models: tuple[Served, ...]) -> Engine:
    _, props = await port.get("/props")
    said = props if isinstance(props, Mapping) else {}
    if said.get("role") == "router" or any("status" in entry for entry in entries):
        return Engine(port.number, "llama.cpp", models, router=True)
    path = _source(said.get("model_path"))
    if path and len(models) == 1:
        models = (Served(models[0].name, path),)
    return Engine(port.number, "llama.cpp", models)


async def _ollama(port: _Port) -> Engine | None:
    """Query it like Ollama's own clients; others imitate its API, so it comes after the other checks."""
    status, version = await port.get("/api/version")
    if status != 200 or not isinstance(version, Mapping) or "version" not in version:  # noqa: PLR2004 (HTTP)
        return None
    _, tags = await port.get("/api/tags")
    names = [entry["name"] for entry in _list(tags, "models") if isinstance(entry.get("name"), str)]
    return Engine(port.number, "Ollama", tuple(map(Served, names)))


def _source(said: Any) -> str:
    """Return a file, or a name, that a hook script can be given; empty if it is none."""
    try:
        return said if isinstance(said, str) and b"\0" not in os.fsencode(said) else ""
    except UnicodeEncodeError:
        return ""


def _list(answer: Any, key: str) -> list[Mapping[str, Any]]:
    found = answer.get(key) if isinstance(answer, Mapping) else None
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


SECONDS = 5
"""How long one program may take to answer; a hanging driver holds up nvidia-smi for ever."""

PROGRAMS = ("llama-server", "vllm", "sglang", "ollama", "docker", "podman", "nvidia-smi")

_MIB = 2**20
_PUBLISHED = re.compile(r":(\d+)->(\d+)/tcp")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; ``memory`` in bytes."""

    index: str
    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class Container:
    """A running Docker container; ``ports`` are those of this machine that lead to it."""

    name: str
    image: str
    ports: tuple[int, ...]


@dataclass(slots=True)
class Machine:
    """What was found. ``said`` are installed programs that failed, with their output."""

    programs: dict[str, Path] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    ollama_store: Path | None = None
    said: dict[str, str] = field(default_factory=dict)

    def container_at(self, port: int) -> Container | None:
        """Return the container that a port leads to."""
        return next((container for container in self.containers if port in container.ports), None)


def look(environ: Mapping[str, str], home: Path) -> Machine:
    """Look at the machine; takes ``SECONDS`` at most for each program that is run."""
    machine = Machine(ollama_store=_ollama_store(environ, home))
    for name in PROGRAMS:
        path = shutil.which(name, path=environ.get("PATH"))
        if path:
            machine.programs[name] = Path(path)
    machine.gpus = _gpus(machine)
    machine.containers = _containers(machine)
    return machine


def _gpus(machine: Machine) -> list[Gpu]:
    text = _run(machine, "nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
    gpus = []
    for line in text.splitlines():
        index, _, rest = line.partition(",")
        name, _, memory = rest.rpartition(",")
        if memory.strip().isdecimal():  # not so on machines whose CPU and GPU share their memory
            gpus.append(Gpu(index.strip(), name.strip(), int(memory) * _MIB))
    return gpus


def _containers(machine: Machine) -> list[Container]:
    containers = []
    for line in _run(machine, "docker", "ps", "--format", "{{json .}}").splitlines():
        try:
            said = json.loads(line)
            ports = tuple(int(found[1]) for found in _PUBLISHED.finditer(said["Ports"]))
            containers.append(Container(said["Names"].split(",")[0], said["Image"], tuple(dict.fromkeys(ports))))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return containers


def _run(machine: Machine, name: str, *arguments: str) -> str:
    """Return a program's output; empty if it is not installed, fails, or hangs."""
    program = machine.programs.get(name)
    if program is None:
        return ""
    try:
        process = subprocess.Popen(  # noqa: S603 (a program that its user has installed)
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        machine.said[name] = f"cannot be run: {error.strerror}"
        return ""
    try:
        out, complaint = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot even be killed
            process.communicate(timeout=1)
        machine.said[name] = f"did not answer within {SECONDS} s"
        return ""
    if process.returncode:
        lines = (complaint or out).strip().splitlines()
        machine.said[name] = lines[-1][:200] if lines else f"failed with exit code {process.returncode}"
        return ""
    return out


def _ollama_store(environ: Mapping[str, str], home: Path) -> Path | None:
    """Return where Ollama keeps its models: as blobs, whose names carry no information."""
    given = environ.get("OLLAMA_MODELS")
    known = [Path(given)] if given else [home / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    return next((place for place in known if os.access(place / "manifests", os.R_OK)), None)

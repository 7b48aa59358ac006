"""The machine: its GPUs, containers and programs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
    """A Docker container that runs; ``ports`` are those of this machine that lead to it."""

    name: str
    image: str
    ports: tuple[int, ...]


@dataclass(slots=True)
class Machine:
    """What was found. ``said`` are programs that are there but did not answer, with what they said."""

    programs: dict[str, Path] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    ollama_store: Path | None = None
    said: dict[str, str] = field(default_factory=dict)

    def container_at(self, port: int) -> Container | None:
        """Return the container that a port leads to."""
        return next((container for container in self.containers if port in container.ports), None)


def look(environ: Mapping[str, str], home: Path) -> Machine:
    """Look at the machine; it takes ``SECONDS`` at most for each program that is asked."""
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
    """Return what a program prints; empty when it is not there, fails, or hangs."""
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in a driver cannot even be killed
            process.communicate(timeout=1)
        machine.said[name] = f"did not answer within {SECONDS} s"
        return ""
    if process.returncode:
        lines = (complaint or out).strip().splitlines()
        machine.said[name] = lines[-1][:200] if lines else f"failed with exit code {process.returncode}"
        return ""
    return out


def _ollama_store(environ: Mapping[str, str], home: Path) -> Path | None:
    """Return where Ollama keeps its models: as blobs, whose names say nothing."""
    given = environ.get("OLLAMA_MODELS")
    known = [Path(given)] if given else [home / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    return next((place for place in known if os.access(place / "manifests", os.R_OK)), None)

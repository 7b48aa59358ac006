"""Engines that run: asked over HTTP, on the ports that they listen on by default.

What each says of itself was read from its source in November 2026: ``owned_by`` in ``/v1/models``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

HOST = "127.0.0.1"
TIMEOUT = 1.5  # seconds for all that one port is asked
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
    """A model that an engine has. ``source`` is its file or name on Hugging Face, where the engine says so."""

    name: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """What listens on a port. ``sleeps``: vLLM in sleep mode; ``router``: llama-server with many models."""

    port: int
    kind: str
    models: tuple[Served, ...] = field(default=())
    sleeps: bool = False
    router: bool = False
    locked: bool = False  # it wants a key

    @property
    def about(self) -> str:
        """It in a few words."""
        names = ", ".join(model.name for model in self.models[:4]) + (", …" if len(self.models) > 4 else "")  # noqa: PLR2004
        what = "something that wants a key" if self.locked else self.kind
        if self.kind == UNKNOWN and not self.locked:
            what = "something that is no engine that llmux knows"
        return f"{what} on port {self.port}" + (f": {names}" if names else "")


async def probe(ports: Iterable[int]) -> list[Engine]:
    """Ask all ports at once; return what answers, by port. It takes no longer than ``TIMEOUT``."""
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
    """One port, and what it answers."""

    def __init__(self, session: aiohttp.ClientSession, number: int) -> None:
        self.session = session
        self.number = number

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON; None in place of what is no JSON."""
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
    models = tuple(Served(entry["id"], str(entry.get("root") or "")) for entry in entries)
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
    path = said.get("model_path")
    if isinstance(path, str) and len(models) == 1:
        models = (Served(models[0].name, path),)
    return Engine(port.number, "llama.cpp", models)


async def _ollama(port: _Port) -> Engine | None:
    """Ask as Ollama's own clients do; others imitate its API, so this is only asked where nobody else is known."""
    status, version = await port.get("/api/version")
    if status != 200 or not isinstance(version, Mapping) or "version" not in version:  # noqa: PLR2004 (HTTP)
        return None
    _, tags = await port.get("/api/tags")
    names = [entry["name"] for entry in _list(tags, "models") if isinstance(entry.get("name"), str)]
    return Engine(port.number, "Ollama", tuple(map(Served, names)))


def _list(answer: Any, key: str) -> list[Mapping[str, Any]]:
    found = answer.get(key) if isinstance(answer, Mapping) else None
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []

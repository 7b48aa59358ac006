"""A first request to an engine that was just woken, and the name that it answers under."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp

PATIENCE = 120.0  # seconds for one answer
_NOT_SPOKEN = (*range(400, 500), HTTPStatus.NOT_IMPLEMENTED)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came. ``ok`` is None when the engine takes none of our questions."""

    ok: bool | None
    said: str
    names: tuple[str, ...] | None  # that the engine lists; None when it has no list


async def ask(url: str, model: str) -> Answer:
    """Ask for a token, or a vector, in the ways that engines understand."""
    timeout = aiohttp.ClientTimeout(PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        names = await _names(session, url)
        for path, body in _questions(model):
            try:
                async with session.post(f"{url}{path}", json=body) as response:
                    said = await response.text()
                    status = response.status
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return Answer(ok=False, said=f"POST {path}: {error or type(error).__name__}", names=names)
            if status < HTTPStatus.BAD_REQUEST:
                return Answer(ok=True, said=f"POST {path}", names=names)
            if status not in _NOT_SPOKEN:
                return Answer(ok=False, said=f"POST {path} is answered with {status}: {said[:300]}", names=names)
    return Answer(ok=None, said=f"it takes none of OpenAI's requests ({status})", names=names)


def _questions(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    messages = [{"role": "user", "content": "Say yes."}]
    yield "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 1}
    yield "/v1/completions", {"model": model, "prompt": "Say yes.", "max_tokens": 1}
    yield "/v1/embeddings", {"model": model, "input": "yes"}


async def _names(session: aiohttp.ClientSession, url: str) -> tuple[str, ...] | None:
    try:
        async with asyncio.timeout(10), session.get(f"{url}/v1/models") as response:
            if response.status != HTTPStatus.OK:
                return None
            found = await response.json(content_type=None)
        return tuple(str(entry["id"]).removesuffix(":latest") for entry in found["data"])  # Ollama's way to say m
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError):
        return None

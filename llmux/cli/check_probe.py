"""`llmux check --probe`: which dialects engines speak, found out without having them generate anything.

Each path is sent a request that lacks what it must have. An engine which knows the path complains about that (400,
422); one which does not says 404, 405 or 501. A path that no engine knows goes first: one which answers that as it
answers the others, a proxy that asks for credentials for example, cannot be told anything by.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from llmux.cli.terminal import CommandError, say
from llmux.config import Config, ModelConfig
from llmux.config.targets import lacks_a_dialect
from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookRunner

PATIENCE = 10.0  # seconds for one answer

# None of these can be carried out, but if one were it would be one token.
PATHS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"max_tokens": 1}),
    "completions": ("/v1/completions", {"max_tokens": 1}),
    "messages": ("/v1/messages", {"max_tokens": 1}),
    "responses": ("/v1/responses", {"max_output_tokens": 16}),
    "embeddings": ("/v1/embeddings", {}),
    "count_tokens": ("/v1/messages/count_tokens", {}),
}
_NOWHERE = "/v1/llmux-probe"
_UNKNOWN = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED})


@dataclass(frozen=True, slots=True)
class Spoken:
    """What an engine speaks, of ``PATHS``; ``why`` it could not be found out, else "" and the list is complete."""

    apis: tuple[str, ...] = ()
    why: str = ""


async def spoken(url: str) -> Spoken:
    """Ask the engine at ``url`` which dialects it speaks."""
    timeout = aiohttp.ClientTimeout(PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        try:
            nowhere = await _status(session, url + _NOWHERE, {})
            if nowhere not in _UNKNOWN:
                return Spoken(why=f"it answers {nowhere} to a path that no engine knows ({_NOWHERE})")
            found = {api: await _status(session, url + path, body) for api, (path, body) in PATHS.items()}
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Spoken(why=f"{url}: {str(error) or type(error).__name__}")
    return Spoken(tuple(api for api, status in found.items() if status not in _UNKNOWN))


async def _status(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> int:
    async with session.post(url, json=body, allow_redirects=False) as response:
        return response.status


def probe(config: Config, *, wake: bool) -> bool:
    """Ask the engines of a configuration and print what they speak; whether `apis` promise nothing else.

    Those that sleep are asked when the llmux that runs with this configuration wakes them (``wake``).
    """
    return asyncio.run(_Probe(config, wake=wake).run())


class _Probe:
    def __init__(self, config: Config, *, wake: bool) -> None:
        self._config = config
        self._wake = wake
        self._asked: dict[str, Spoken] = {}  # by the engine's address
        self._ids = itertools.count(1)
        self._true = True

    async def run(self) -> bool:
        runner = HookRunner()
        try:
            for name, model in self._config.models.items():
                error = ""
                if not await self._is_awake(runner, name, model):
                    error = await self._woken(name) if self._wake else "asleep, and not asked; --wake wakes it"
                if error:
                    say(f"model {name}: {error}", "yellow")
                else:
                    self._tell(name, model, await self._spoken(model))
        finally:
            await runner.close()
        return self._true

    async def _spoken(self, model: ModelConfig) -> Spoken:
        url = model.address.url
        if url not in self._asked or model.shared_address:  # there, another engine may have come
            self._asked[url] = await spoken(url)
        return self._asked[url]

    async def _is_awake(self, runner: HookRunner, name: str, model: ModelConfig) -> bool:
        address, kind = model.address, HookKind.ALIVE
        job = HookJob(
            id=next(self._ids),
            model=name,
            kind=kind,
            script=model.scripts[kind],
            cwd=self._config.folder or Path(),
            env=model.env,
            url=address.url,
            port=address.port,
        )
        return (await runner.run(job, model.timeouts.alive)).ok

    async def _woken(self, name: str) -> str:
        """Have llmux wake a model; return why it did not."""
        from llmux.cli.client import Remote, connection  # noqa: PLC0415
        from llmux.cli.operate import follow  # noqa: PLC0415 - only for this

        try:
            where = connection(f"http://127.0.0.1:{self._config.port}", None)
            await follow(Remote(where), name, "wake", None)
        except CommandError as error:
            return f"could not be woken: {error}"
        return ""

    def _tell(self, name: str, model: ModelConfig, found: Spoken) -> None:
        if found.why:
            say(f"model {name}: not found out: {found.why}", "yellow")
            return
        missing = [api for api in PATHS if api not in found.apis]
        lacks = f"; not {', '.join(missing)}" if missing else ""
        say(f"model {name} speaks {', '.join(found.apis) or 'none of these dialects'}{lacks}")
        for line, colour in _advice(name, model.apis, found.apis):
            self._true = self._true and colour != "red"
            say(f"  {line}", colour)


def _advice(name: str, stated: Sequence[str] | None, found: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield what to do about it: in red, where `apis` state what is not so."""
    line = f"models.{name}: write `apis: [{', '.join(found)}]`"
    if stated is None:
        if lacks_a_dialect(tuple(found)):
            yield f"{line}, so that llmux translates the others", None
        else:
            yield "nothing to write: what clients send passes through", None
        return
    untrue = [api for api in stated if api not in found]
    unused = [api for api in found if api not in stated]
    if untrue:
        yield f"{line}: its `apis` state {', '.join(untrue)}, which the engine does not speak", "red"
    elif unused:
        yield f"{line}: it speaks more than its `apis` state ({', '.join(unused)})", "yellow"
    else:
        yield "as its `apis` state", None

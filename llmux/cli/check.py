"""``llmux check`` and ``llmux schema``: what a configuration means, and what it may contain.

``--probe`` determines which dialects engines speak, without having them generate anything. Each path is sent a
request without its required fields. An engine which knows the path complains about them (400, 422); one which
does not answers 404, 405 or 501. A path that no engine knows goes first: if its answer is like the others, as from
a proxy that requires credentials, nothing can be concluded.
"""

# ruff: noqa: PLC0415 - each part of a configuration brings along what only configurations with it have a use for

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmux.cli.configuration import is_gateway, load_gateway, located
from llmux.cli.options import DEFAULT_CONFIG
from llmux.cli.terminal import CommandError, Exit, fail, print_error, say
from llmux.config import Config, ConfigErrors, ModelConfig, to_specs
from llmux.config.checks import look, operators
from llmux.config.load import read_document
from llmux.config.problems import dotted, line_of, with_lines
from llmux.config.setting_types import is_loopback
from llmux.config.targets import lacks_a_dialect
from llmux.core.spec import HookKind
from llmux.errors import LLMuxError

if TYPE_CHECKING:
    import aiohttp
    from pydantic import SecretStr


def check(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="Configuration file, YAML or JSON.", show_default="config.yaml")
    ] = None,
    given: Annotated[Path | None, typer.Option("--config", "-c", hidden=True)] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Ask engines that are awake which dialects they speak.")
    ] = False,
    wake: Annotated[
        bool, typer.Option("--wake", help="With --probe: have the running llmux wake the others, too.")
    ] = False,
) -> None:
    """Check a configuration, its policy included; print what it means, or what is wrong with it.

    --probe says which `apis` to write; exit code 6 if some state what an engine does not speak.
    """
    if wake and not probe:
        raise typer.BadParameter("--wake goes with --probe")
    file = file or given or context.obj[0] or DEFAULT_CONFIG
    if is_gateway(file):
        _check_gateway(file, context.obj[1])
        return
    config = _load_all(file, context.obj[1])
    say(f"{file}: fine", "green")
    say(summary(config))
    warn(config)
    if probe and not probe_engines(config, wake=wake):
        raise typer.Exit(Exit.FAILED)


def _check_gateway(file: Path, port: int | None) -> None:
    from llmux.fleet.loading import load_route

    config = load_gateway(file, port)
    try:
        load_route(config.route.use, config.route.options, config.folder)
        _require_store(config.store)
    except LLMuxError as error:
        fail(located(error, file))
    say(f"{file}: fine", "green")
    say(f"a gateway: listens on {config.host}:{config.port}\noperators: {operators(config)}")
    say(f"route {config.route.use}")
    for name, host in config.hosts.items():
        say(f"host {name} at {host.url}{'' if host.key is None else ', with a key'}")
    _print_warnings(config.warnings, file)


def warn(config: Config) -> None:
    """Print the warnings of a configuration from a file, and what is missing on this machine."""
    assert config.file is not None
    _print_warnings(config.warnings, config.file)
    warn_of_missing(config)


def _print_warnings(warnings: Sequence[str], file: Path) -> None:
    lines = read_document(file).lines if warnings else {}
    for warning, line in with_lines(warnings, lines):
        say(f"warning: {'' if line is None else f'line {line}: '}{warning}", "yellow")


def warn_of_missing(config: Config) -> None:
    """Print what a configuration from a file names and this machine lacks, each with its line."""
    assert config.file is not None
    problems = list(look(config))
    lines = read_document(config.file).lines if problems else {}
    for problem in problems:
        where = f"line {line_of(problem.path, lines)}: " if problem.path[:1] in lines else ""  # none for a default
        say(f"warning: {where}{dotted(problem.path)}: {problem.message}", "yellow")


def _load_all(file: Path, port: int | None) -> Config:
    """Read a configuration and load what it names; exit with every error in either."""
    try:
        config = Config.from_file(file)
        config = config if port is None else config.with_port(port)
    except LLMuxError as error:
        print_error(str(error))
        # An error elsewhere does not hide one in the policy
        rest = error.rest if isinstance(error, ConfigErrors) else None
        if isinstance(rest, Config):
            _print_errors_of_parts(rest, file)
            warn_of_missing(rest)
        raise typer.Exit(Exit.USAGE) from None
    if _print_errors_of_parts(config, file):
        raise typer.Exit(Exit.USAGE)
    return config


def _print_errors_of_parts(config: Config, file: Path) -> bool:
    try:
        _load_parts(config)
    except LLMuxError as error:
        print_error(located(error, file))
        return True
    return False


def schema(
    gateway: Annotated[bool, typer.Option("--gateway", help="That of a gateway's configuration.")] = False,
) -> None:
    """Print the JSON schema of the configuration."""
    from llmux.config.reference import gateway_schema, json_schema

    typer.echo(json.dumps(gateway_schema() if gateway else json_schema(), indent=2))


def summary(config: Config) -> str:
    """Summarize in a few lines what a configuration makes llmux do."""
    lines = [
        f"listens on {config.host}:{config.port}{_access(config)}",
        f"operators: {operators(config)}",
        f"policy {config.policy.use}",
    ]
    for name, model in config.models.items():
        also = f" ({', '.join(model.aliases)})" if model.aliases else ""
        spill = f", spills to {model.spill.to}" if model.spill is not None else ""
        lines.append(f"model {name}{also} at {model.address.url}{spill}")
    for name, remote in config.remotes.items():
        key = "" if remote.key is None and remote.key_file is None else ", with a key"
        names = ", ".join(f"{name}/{model}" for model in remote.models)
        lines.append(f"remote {name} at {remote.url}{key}: {names}")
    if config.remotes:
        lines.append(f"may leave this host: {_leaving(config)}")
    return "\n".join(lines)


def _leaving(config: Config) -> str:
    if not config.api_keys:
        return "every request" if config.remotes_for_all else "no request"
    keys = [entry.name or "one without a name" for entry in config.api_keys if config.may_leave(entry)]
    return f"requests with the keys {', '.join(keys)}" if keys else "no request"


def _access(config: Config) -> str:
    keys = len(config.api_keys)
    if not keys:
        return ", for every " + (
            "program on this machine" if is_loopback(config.host) else "client that reaches it"
        )
    return f", for clients that send {'the key' if keys == 1 else f'one of {keys} keys'}"


def _load_parts(config: Config) -> None:
    """Load what a configuration names: policies, OpenTelemetry, the store's client. Nothing else is imported."""
    from llmux.plugins import load_policy

    load_policy(config.policy.use, config.policy.options, config.folder)
    if config.policy.shadow:
        from llmux.runtime.shadow import load_shadows

        load_shadows(config)
    if config.otlp is not None:
        from llmux.observability import require_tracing

        require_tracing()
    if config.fleet is not None:
        _require_store(config.fleet.store)


def _require_store(address: SecretStr | None) -> None:
    if address is not None:
        from llmux.fleet.store import require_store

        require_store(address.get_secret_value())


# ---- which dialects engines speak

PATIENCE = 10.0  # seconds for one answer

# None of these requests is valid; if one were carried out, it would cost one token.
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
    """What an engine speaks, of ``PATHS``; ``why`` it is unknown, else "" and the list is complete."""

    apis: tuple[str, ...] = ()
    why: str = ""


async def spoken(url: str) -> Spoken:
    """Probe which dialects the engine at ``url`` speaks."""
    import aiohttp

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


def probe_engines(config: Config, *, wake: bool) -> bool:
    """Probe a configuration's engines and print what they speak; return whether `apis` claim nothing else.

    Sleeping engines are probed if the llmux that runs with this configuration can wake them (``wake``).
    """
    import asyncio

    return asyncio.run(_Probe(config, wake=wake).run())


class _Probe:
    def __init__(self, config: Config, *, wake: bool) -> None:
        self._config = config
        self._wake = wake
        self._asked: dict[str, Spoken] = {}  # by the engine's address
        self._true = True

    async def run(self) -> bool:
        from llmux.core.effects import RunHook
        from llmux.hookrunner import HookRunner
        from llmux.runtime.switcher import job_for

        runner, alive = HookRunner(), HookKind.ALIVE
        specs = to_specs(self._config)[0]
        try:
            for spec, (name, model) in zip(specs, self._config.models.items(), strict=True):
                error = ""
                job = job_for(RunHook(1, name, alive, spec.definition))
                if not (await runner.run(job, spec.timeouts[alive])).ok:
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
        if url not in self._asked or model.shared_address:  # another engine may be at that address now
            self._asked[url] = await spoken(url)
        return self._asked[url]

    async def _woken(self, name: str) -> str:
        """Let llmux wake a model; return why it failed."""
        from llmux.cli.client import Remote, connection
        from llmux.cli.operate import follow

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
    """Yield what to do about it: in red, if `apis` claim what the engine does not speak."""
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

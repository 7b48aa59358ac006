"""``llmux check`` and ``llmux schema``: what a configuration means, and what it may hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmux.cli.command_tree import DEFAULT_CONFIG
from llmux.cli.terminal import Exit, complain, say
from llmux.config import Config, ConfigErrors
from llmux.config.checks import operators
from llmux.config.setting_types import is_loopback
from llmux.errors import LLMuxError

if TYPE_CHECKING:
    from llmux.config.gateway import GatewayConfig


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
    if _is_gateway(file):
        _check_gateway(file, context.obj[1])
        return
    config = _load_all(file, context.obj[1])
    say(f"{file}: fine", "green")
    say(summary(config))
    warn(config)
    if probe:
        from llmux.cli import check_probe as engines

        if not engines.probe(config, wake=wake):
            raise typer.Exit(Exit.FAILED)


_MODELS = re.compile(rb"(?m)^[\"']?models[\"']?[ \t]*:")  # of a host; a gateway has such deeper in its `prices`


def _is_gateway(file: Path) -> bool:
    """Whether a file configures a gateway. Only what may be one is read for it."""
    try:
        text = file.read_bytes()
        if _MODELS.search(text) or not (b"hosts" in text or b"fleet" in text):
            return False
    except OSError:
        return False
    from llmux.config.gateway import is_gateway

    return is_gateway(file)


def _check_gateway(file: Path, port: int | None) -> None:
    from llmux.fleet.loading import load_route

    config = load_gateway(file, port)
    try:
        load_route(config.route.use, config.route.options, config.folder)
    except LLMuxError as error:
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from None
    say(f"{file}: fine", "green")
    say(f"a gateway: listens on {config.host}:{config.port}\noperators: {operators(config)}")
    say(f"route {config.route.use}")
    for name, host in config.hosts.items():
        say(f"host {name} at {host.url}{'' if host.key is None else ', with a key'}")


def load_gateway(file: Path, port: int | None) -> GatewayConfig:
    """Read a gateway's configuration; exit with a message when it is unusable."""
    from llmux.config.gateway import GatewayConfig

    try:
        config = GatewayConfig.from_file(file)
    except LLMuxError as error:
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from None
    return config if port is None else config.with_port(port)


def warn(config: Config) -> None:
    """Print the warnings of a configuration from a file: what it says, and what this machine lacks for it."""
    for warning in config.warnings:
        say(f"warning: {warning}", "yellow")
    warn_of_missing(config)


def warn_of_missing(config: Config) -> None:
    """Print what this machine lacks of what a configuration from a file names, each with its line."""
    from llmux.config.checks import look
    from llmux.config.load import read_document
    from llmux.config.problems import dotted, line_of

    assert config.file is not None
    problems = list(look(config))
    lines = read_document(config.file).lines if problems else {}
    for problem in problems:
        line = line_of(problem.path, lines)
        say(f"warning: line {line}: {dotted(problem.path)}: {problem.message}", "yellow")


def _load_all(file: Path, port: int | None) -> Config:
    """Read a configuration and load what it names; exit with everything that is wrong with both."""
    try:
        config = Config.from_file(file)
        config = config if port is None else config.with_port(port)
    except LLMuxError as error:
        complain(str(error))
        # A mistake elsewhere does not hide what is wrong with the policy.
        rest = error.rest if isinstance(error, ConfigErrors) else None
        if isinstance(rest, Config):
            _complain_of_parts(rest)
            warn_of_missing(rest)
        raise typer.Exit(Exit.USAGE) from None
    if _complain_of_parts(config):
        raise typer.Exit(Exit.USAGE)
    return config


def _complain_of_parts(config: Config) -> bool:
    try:
        _load_parts(config)
    except LLMuxError as error:
        complain(str(error))
        return True
    return False


def schema(
    gateway: Annotated[bool, typer.Option("--gateway", help="That of a gateway's configuration.")] = False,
) -> None:
    """Print the JSON schema of the configuration."""
    from llmux.config.reference import gateway_schema, json_schema

    typer.echo(json.dumps(gateway_schema() if gateway else json_schema(), indent=2))


def load_config(file: Path, port: int | None) -> Config:
    """Read a configuration, with another port where one is given; exit with a message when it is unusable."""
    if _is_gateway(file):
        complain(f"{file} is the configuration of a gateway; run `llmux gateway -c {file}`")
        raise typer.Exit(Exit.USAGE)
    try:
        config = Config.from_file(file)
        return config if port is None else config.with_port(port)
    except LLMuxError as error:
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from None


def address_of(file: Path, port: int | None) -> str:
    """Return where what runs with a configuration listens; exit with a message where that cannot be said."""
    config = load_gateway(file, port) if _is_gateway(file) else load_config(file, port)
    if config.port == 0:
        complain(f"{file}: llmux listens on any free port (`port: 0`); give its address with --url")
        raise typer.Exit(Exit.USAGE)
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "localhost"}.get(config.host, config.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def summary(config: Config) -> str:
    """Return in a few lines what a configuration makes llmux do."""
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
    """Load what a configuration names: policies, OpenTelemetry. Only what it does name is imported."""
    # ruff: noqa: PLC0415
    from llmux.plugins import load_policy

    load_policy(config.policy.use, config.policy.options, config.folder)
    if config.policy.shadow:
        from llmux.runtime.shadow import load_shadows

        load_shadows(config)
    if config.otlp is not None:
        from llmux.observability import require_tracing

        require_tracing()

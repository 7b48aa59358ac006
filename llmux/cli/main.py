"""``llmux``: serve, check, schema, simulate. Without a command it serves, as llmux 2.x did."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llmux.cli import explain, hooks, imports, init, keys, operating, simulate
from llmux.cli.streams import usable_streams
from llmux.cli.terminal import complain, terminal
from llmux.config import Config
from llmux.config.checks import operators
from llmux.config.json_schema import json_schema
from llmux.errors import LLMuxError
from llmux.observability.log import configure
from llmux.plugins import load_policy
from llmux.process import Process
from llmux.runtime.shadow import load_shadows
from llmux.tracing import require
from llmux.version import __version__

USAGE = 2

app = typer.Typer(
    help="One GPU, many models, one OpenAI- and Anthropic-compatible endpoint.",
    add_completion=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file (default: config.yaml).")
]
PortOption = Annotated[int | None, typer.Option("--port", "-p", min=0, max=65535, help="Listen on this port.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log at debug level.")]
DEFAULT_CONFIG = Path("config.yaml")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmux {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    config: ConfigOption = None,
    port: PortOption = None,
    verbose: VerboseOption = False,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One GPU, many models, one OpenAI- and Anthropic-compatible endpoint."""
    context.obj = (config, port, verbose)
    if context.invoked_subcommand is None:
        _serve(config or DEFAULT_CONFIG, port, verbose=verbose)


@app.command()
def serve(
    context: typer.Context, config: ConfigOption = None, port: PortOption = None, verbose: VerboseOption = False
) -> None:
    """Run llmux until TERM or INT; HUP reads the configuration again."""
    # `llmux -c FILE serve` means the same as `llmux serve -c FILE`.
    file, root_port, root_verbose = context.obj
    _serve(config or file or DEFAULT_CONFIG, root_port if port is None else port, verbose=verbose or root_verbose)


@app.command()
def check(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="Configuration file, YAML or JSON.", show_default="config.yaml")
    ] = None,
    given: Annotated[Path | None, typer.Option("--config", "-c", hidden=True)] = None,
) -> None:
    """Check a configuration, its policy included; say what it means, or what is wrong with it."""
    file = file or given or context.obj[0] or DEFAULT_CONFIG
    config = _load(file, context.obj[1])
    try:
        load_policy(config.policy.use, config.policy.options, config.folder)
        load_shadows(config)
        if config.otlp is not None:
            require()
    except LLMuxError as error:
        _fail(str(error))
    console = terminal()
    console.print(f"{file}: fine", style="green")
    console.print(summary(config))
    for warning in config.warnings:
        console.print(f"warning: {warning}", style="yellow")


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    typer.echo(json.dumps(json_schema(), indent=2))


operating.register(app)
app.command("simulate")(simulate.run)
app.command("explain")(explain.run)
app.command("init")(init.run)
app.add_typer(hooks.app, name="hooks")
app.add_typer(keys.app, name="key")
app.add_typer(imports.app, name="import")


def summary(config: Config) -> str:
    """Say in a few lines what a configuration makes llmux do."""
    lines = [f"listens on {config.host}:{config.port}{_opened_by(config)}", f"operated by {operators(config)}"]
    lines.append(f"policy {config.policy.use}")
    for name, model in config.models.items():
        also = f" (also {', '.join(model.aliases)})" if model.aliases else ""
        lines.append(f"model {name}{also} at {model.address.url}")
    return "\n".join(lines)


def _opened_by(config: Config) -> str:
    keys = len(config.api_keys)
    if not keys:
        return ", for anybody who reaches it"
    return f", for who shows {'the key' if keys == 1 else f'one of {keys} keys'}"


def _load(file: Path, port: int | None) -> Config:
    try:
        config = Config.from_file(file)
        if port is not None:
            config = config.with_port(port)
    except LLMuxError as error:
        _fail(str(error))
    return config


def _fail(message: str) -> None:
    complain(message)
    raise typer.Exit(USAGE)


def _serve(file: Path, port: int | None, *, verbose: bool) -> None:
    config = _load(file, port)
    handler = configure("debug" if verbose else config.log_level, config.log_format)

    def read() -> Config:
        fresh = Config.from_file(file)
        return fresh if port is None else fresh.with_port(port)

    def announce(url: str, config: Config) -> None:
        if sys.stdout.isatty():
            terminal().print(f"llmux {__version__} on {url}\n{summary(config)}")

    async def run() -> None:
        await Process(config, read, announce).run()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())
    except LLMuxError as error:
        handler.flush()
        _fail(str(error))
    finally:
        handler.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    return uvloop.new_event_loop


def main() -> None:
    """Run the command line."""
    if "LLMUX_HOOK" in os.environ:
        os.environ.pop("LLMUX_URL", None)  # in a hook, and in an engine that it has started, this is the engine's
    with usable_streams():
        app(prog_name="llmux")

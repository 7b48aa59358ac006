"""``llmux serve``, which is also ``llmux`` without a command; and ``llmux gateway``, for many hosts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from logging import Handler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmux.cli.check import summary
from llmux.cli.configuration import load_config, load_gateway, located
from llmux.cli.options import DEFAULT_CONFIG, ConfigOption, PortOption, VerboseOption
from llmux.cli.terminal import fail, terminal
from llmux.config import Config
from llmux.errors import LLMuxError
from llmux.observability.log import configure
from llmux.process import Process
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.config.gateway import GatewayConfig

DEFAULT_GATEWAY = Path("gateway.yaml")
GatewayFileOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file (default: gateway.yaml).")
]


def serve(
    context: typer.Context, config: ConfigOption = None, port: PortOption = None, verbose: VerboseOption = False
) -> None:
    """Run llmux until TERM or INT; HUP reads the configuration again."""
    # `llmux -c FILE serve` means the same as `llmux serve -c FILE`.
    file, root_port, root_verbose = context.obj
    run(config or file, root_port if port is None else port, verbose=verbose or root_verbose)


def run(file: Path | None, port: int | None, *, verbose: bool) -> None:
    """Serve a configuration file."""
    file = file or DEFAULT_CONFIG
    config = load_config(file, port)
    handler = configure("debug" if verbose else config.log_level, config.log_format)

    def read() -> Config:
        fresh = Config.from_file(file)
        return fresh if port is None else fresh.with_port(port)

    def announce(url: str, config: Config) -> None:
        if sys.stdout.isatty():
            terminal().print(f"llmux {__version__} on {url}\n{summary(config)}")

    run_process(handler, file, lambda: Process(config, read, announce))


def run_process(handler: Handler, file: Path, make: Callable[[], Process]) -> None:
    """Run a process until it stops; if it cannot start, exit with a message, and its line in ``file``."""

    async def process() -> None:
        await make().run()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(process())
    except LLMuxError as error:
        handler.flush()
        fail(located(error, file))
    finally:
        handler.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not to be had everywhere
    except ImportError:
        return None
    return uvloop.new_event_loop


def gateway(
    context: typer.Context,
    config: GatewayFileOption = None,
    port: PortOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Place requests on many hosts, each an llmux with a GPU of its own, until TERM or INT; HUP reloads."""
    from llmux.config.gateway import GatewayConfig  # noqa: PLC0415 - a host has no use for it
    from llmux.gateway.service import GatewayProcess  # noqa: PLC0415

    given, root_port, root_verbose = context.obj
    file = config or given or DEFAULT_GATEWAY
    own_port = root_port if port is None else port
    settings = load_gateway(file, own_port)
    level = "debug" if verbose or root_verbose else settings.log_level
    handler = configure(level, settings.log_format)

    def read() -> GatewayConfig:
        fresh = GatewayConfig.from_file(file)
        return fresh if own_port is None else fresh.with_port(own_port)

    def announce(url: str, config: GatewayConfig) -> None:
        if sys.stdout.isatty():
            hosts = "\n".join(f"host {name} at {host.url}" for name, host in config.hosts.items())
            terminal().print(f"llmux {__version__}, a gateway, on {url}\n{hosts}")

    run_process(handler, file, lambda: GatewayProcess(settings, read, announce))

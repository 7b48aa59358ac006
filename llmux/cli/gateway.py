"""``llmux gateway``: one endpoint before many hosts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmux.cli.check import load_gateway
from llmux.cli.command_tree import PortOption, VerboseOption
from llmux.cli.serve import run_process
from llmux.cli.terminal import terminal
from llmux.config.gateway import GatewayConfig
from llmux.gateway.service import GatewayProcess
from llmux.observability.log import configure
from llmux.version import __version__

DEFAULT = Path("gateway.yaml")
GatewayFileOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file (default: gateway.yaml).")
]


def gateway(
    context: typer.Context,
    config: GatewayFileOption = None,
    port: PortOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Place requests on many hosts, each an llmux with a GPU of its own, until TERM or INT; HUP reloads."""
    given, root_port, root_verbose = context.obj
    file = config or given or DEFAULT
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

    run_process(handler, lambda: GatewayProcess(settings, read, announce))

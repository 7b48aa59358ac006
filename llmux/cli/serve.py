"""``llmux serve``, which is also ``llmux`` without a command."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from logging import Handler
from pathlib import Path

import typer

from llmux.cli.check import load_config, summary
from llmux.cli.command_tree import DEFAULT_CONFIG, ConfigOption, PortOption, VerboseOption
from llmux.cli.terminal import Exit, complain, terminal
from llmux.config import Config
from llmux.errors import LLMuxError
from llmux.observability.log import configure
from llmux.process import Process
from llmux.version import __version__


def serve(
    context: typer.Context, config: ConfigOption = None, port: PortOption = None, verbose: VerboseOption = False
) -> None:
    """Run llmux until TERM or INT; HUP reads the configuration again."""
    # `llmux -c FILE serve` means the same as `llmux serve -c FILE`.
    file, root_port, root_verbose = context.obj
    run(config or file, root_port if port is None else port, verbose=verbose or root_verbose)


def run(file: Path | None, port: int | None, *, verbose: bool) -> None:
    """Serve what a configuration file says."""
    file = file or DEFAULT_CONFIG
    config = load_config(file, port)
    handler = configure("debug" if verbose else config.log_level, config.log_format)

    def read() -> Config:
        fresh = Config.from_file(file)
        return fresh if port is None else fresh.with_port(port)

    def announce(url: str, config: Config) -> None:
        if sys.stdout.isatty():
            terminal().print(f"llmux {__version__} on {url}\n{summary(config)}")

    run_process(handler, lambda: Process(config, read, announce))


def run_process(handler: Handler, make: Callable[[], Process]) -> None:
    """Run a process until it stops; exit with a message when it cannot start."""

    async def process() -> None:
        await make().run()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(process())
    except LLMuxError as error:
        handler.flush()
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from None
    finally:
        handler.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not to be had everywhere
    except ImportError:
        return None
    return uvloop.new_event_loop

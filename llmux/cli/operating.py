"""The commands that operate a running llmux: one file each."""

from __future__ import annotations

import typer

from llmux.cli import lease, logs, manual, pin, release, reset, sleep, status, switch, top, unpin, wake

COMMANDS = (status, top, logs, switch, wake, sleep, pin, unpin, reset, lease, release, manual)


def register(app: typer.Typer) -> None:
    """Add them, each under the name of its file."""
    for module in COMMANDS:
        app.command(module.__name__.rpartition(".")[2])(module.run)

"""The command line."""

from llmux.cli.commands import app, main

__all__ = ["app", "main"]

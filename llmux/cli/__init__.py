"""The command line."""

from llmux.cli.command_tree import app, main

__all__ = ["app", "main"]

"""The command line."""

from llmux.cli.main import app, main

__all__ = ["app", "main"]

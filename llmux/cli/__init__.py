"""The command line."""

from llmux.cli.main import main

__all__ = ["main"]

"""The exit codes of the commands that talk to a running llmux."""

from __future__ import annotations

import enum

from llmux.errors import LLMuxError


class Exit(enum.IntEnum):
    """How a command ended."""

    DONE = 0
    UNREACHABLE = 1
    USAGE = 2
    NOT_ALLOWED = 3
    NO_SUCH_MODEL = 4
    REFUSED = 5
    FAILED = 6
    TIMED_OUT = 7
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS: dict[Exit, str] = {
    Exit.DONE: "done",
    Exit.UNREACHABLE: "no llmux of this version answers there",
    Exit.USAGE: "the command line, or a value in it, is invalid",
    Exit.NOT_ALLOWED: "the key is missing or wrong, or llmux has no `admin_key` and lets in no command from here",
    Exit.NO_SUCH_MODEL: "no model of that name",
    Exit.REFUSED: "cannot be now: another switch is under way, another model pinned, or the GPU leased",
    Exit.FAILED: "it was tried and failed: the model did not wake, or would not sleep",
    Exit.TIMED_OUT: "not within `--timeout`; a switch goes on by itself, a lease is given back",
    Exit.INTERRUPTED: "Ctrl-C",
    Exit.TERMINATED: "TERM",
}


class CommandError(LLMuxError):
    """A command cannot do what was asked; ``exit`` is its exit code."""

    def __init__(self, exit_code: Exit, message: str) -> None:
        super().__init__(message)
        self.exit = exit_code

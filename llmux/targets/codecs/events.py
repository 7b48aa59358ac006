"""An answer in the neutral form: events in order, the same whether it came whole or in pieces.

::

    Started  (BlockStarted Delta* Signature? BlockEnded)*  Usage*  Finished  Ended
    … or at any point: Failed

Blocks come one after the other, never one within another.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.Enum):
    """What a block holds."""

    TEXT = "text"
    THINKING = "thinking"
    REDACTED = "redacted"
    CALL = "call"
    REFUSAL = "refusal"


class Stop(enum.StrEnum):
    """Why an answer ends."""

    END = "end_turn"
    LENGTH = "max_tokens"
    CALLS = "tool_use"
    SEQUENCE = "stop_sequence"
    REFUSAL = "refusal"
    PAUSE = "pause_turn"
    WINDOW = "model_context_window_exceeded"


class Started(NamedTuple):
    """The answer begins."""

    id: str
    model: str
    created: int = 0


class BlockStarted(NamedTuple):
    """A block begins. ``id`` and ``name`` are those of a call; ``data`` is all of a redacted one."""

    kind: Kind
    id: str = ""
    name: str = ""
    data: str = ""


class Delta(NamedTuple):
    """More of the block: of its text, or of a call's arguments."""

    text: str


class Signature(NamedTuple):
    """What the provider recognizes its thinking by."""

    text: str


class BlockEnded(NamedTuple):
    """The block is complete."""


class Usage(NamedTuple):
    """Tokens so far; None: not told. ``input`` is all of it, that in caches included."""

    input: int | None = None
    output: int | None = None
    cached: int | None = None
    cache_written: int | None = None
    reasoning: int | None = None

    def updated(self, later: Usage) -> Usage:
        """Return it with what was told later."""
        return Usage(*(old if new is None else new for old, new in zip(self, later, strict=True)))


class Finished(NamedTuple):
    """The model has ended, and why."""

    stop: Stop
    sequence: str | None = None


class Ended(NamedTuple):
    """The answer is complete."""


class Failed(NamedTuple):
    """The answer broke off."""

    message: str
    type: str = "api_error"
    code: str | None = None


Event = Started | BlockStarted | Delta | Signature | BlockEnded | Usage | Finished | Ended | Failed

BLOCK_ENDED = BlockEnded()
ENDED = Ended()

"""An answer in the neutral form: events in order, the same whether it came whole or in pieces.

::

    Started  (BlockStarted Delta* Signature? BlockEnded)*  Usage*  Finished  Ended
    … or at any point: Failed

Blocks come one after the other, never nested, though an engine may send pieces of several in turn: ``Blocks`` puts
them in order. A block that begins while another one is open ends that, if that can be complete: a text may always
end, and a call when its arguments are whole. Until then, pieces of later blocks are kept. So the usual stream, one
block after the other, passes without delay, and one with interleaved calls comes out in order.
"""

from __future__ import annotations

import abc
import enum
import json
import math
import re
import secrets
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


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


def identity() -> str:
    """Return a name that nothing else has: clients count and pair what engines name by it."""
    return secrets.token_hex(12)


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
    """The mark by which the provider recognizes its thinking."""

    text: str


class BlockEnded(NamedTuple):
    """The block is complete."""


class Usage(NamedTuple):
    """Tokens so far; None: not reported. ``input`` is all of it, including that in caches."""

    input: int | None = None
    output: int | None = None
    cached: int | None = None
    cache_written: int | None = None
    reasoning: int | None = None

    def updated(self, later: Usage) -> Usage:
        """Return it updated with later values."""
        return Usage(*(old if new is None else new for old, new in zip(self, later, strict=True)))

    def grown(self, later: Usage) -> Usage:
        """Return it with later values that are not less: where counts only grow, 0 may mean that none is told."""
        pairs = zip(self, later, strict=True)
        return Usage(*(new if old is None else old if new is None else max(old, new) for old, new in pairs))


def count(told: Any) -> int | None:
    """Return a number of tokens as an engine tells it; None if it is no such."""
    if isinstance(told, float) and math.isfinite(told):
        return int(told)
    return told if isinstance(told, int) and not isinstance(told, bool) else None


def usage_of(usage: dict[str, Any], given: str, made: str, written: str) -> Usage:
    """Return what a chat completion or a response reports, by its words for tokens read, made, and cached."""
    read, spoken = (usage.get(f"{word}_tokens_details") or {} for word in (given, made))
    places = (read.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cached_tokens"))
    return Usage(
        count(usage.get(f"{given}_tokens")),
        count(usage.get(f"{made}_tokens")),
        next((cached for place in places if (cached := count(place)) is not None), None),
        count(read.get(written)),
        count(spoken.get("reasoning_tokens")),
    )


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


_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_OPEN, _CLOSE = frozenset("{["), frozenset("}]")


@dataclass(slots=True)
class _Block:
    start: BlockStarted
    pieces: list[str] = field(default_factory=list)  # all of a call's; of other blocks those that are kept
    signature: str = ""
    ended: bool = False
    looked: int = 0  # pieces that ``looks_whole`` has seen
    depth: int = 0  # objects and lists that are open there
    quoted: bool = False
    escaped: bool = False

    def looks_whole(self) -> bool:
        """Whether everything opened in its pieces is closed. Each piece is read once."""
        for piece in filter(None, self.pieces[self.looked :]):
            seen = piece[self.escaped :]  # the first half of an escape may have been the end of the last piece
            for mark in _MARKS.findall(seen):
                if mark == '"':
                    self.quoted = not self.quoted
                elif not self.quoted and mark in _OPEN:
                    self.depth += 1
                elif not self.quoted and mark in _CLOSE:
                    self.depth -= 1
            self.escaped = (len(seen) - len(seen.rstrip("\\"))) % 2 == 1
        self.looked = len(self.pieces)
        last = next((piece for piece in reversed(self.pieces) if piece.strip()), "")
        return self.depth == 0 and not self.quoted and last.rstrip().endswith("}")


class Blocks:
    """The blocks of one answer, by keys that the codec chooses. Methods return the events that are due."""

    def __init__(self) -> None:
        self._open: _Block | None = None
        self._key: Hashable = None
        self._waiting: dict[Hashable, _Block] = {}
        self.calls = 0
        """How many calls have begun."""

    def has(self, key: Hashable) -> bool:
        """Whether this block is open, or waits."""
        return key in self._waiting or (self._open is not None and key == self._key)

    def is_whole(self, key: Hashable) -> bool:
        """Whether a block that has begun may be complete."""
        block = self._open if key == self._key else self._waiting.get(key)
        return block is None or _may_end(block)

    def start(self, key: Hashable, start: BlockStarted) -> list[Event]:
        """Begin a block."""
        self.calls += start.kind is Kind.CALL
        self._waiting[key] = _Block(start)
        return self._advance()

    def delta(self, key: Hashable, text: str) -> list[Event]:
        """Add to a block."""
        block = self._open
        if block is None or key != self._key:
            if key in self._waiting:
                self._waiting[key].pieces.append(text)
            return []
        if block.start.kind is not Kind.CALL:
            return [Delta(text)]
        block.pieces.append(text)
        return [Delta(text), *self._advance()] if self._waiting else [Delta(text)]

    def sign(self, key: Hashable, signature: str) -> list[Event]:
        """Add a signature to a block, or more of it."""
        if self._open is not None and key == self._key:
            self._open.signature += signature
        elif key in self._waiting:
            self._waiting[key].signature += signature
        return []

    def end(self, key: Hashable) -> list[Event]:
        """End a block. One that has ended already stays as it is."""
        if self._open is not None and key == self._key:
            return [*self._close(), *self._advance()]
        if key in self._waiting:
            self._waiting[key].ended = True
        return []

    def finish(self) -> list[Event]:
        """End all."""
        found: list[Event] = self._close()
        for block in self._waiting.values():
            block.ended = True
        return found + self._advance()

    def _advance(self) -> list[Event]:
        found: list[Event] = []
        while self._waiting and (self._open is None or _may_end(self._open)):
            found += self._close()
            self._key = next(iter(self._waiting))
            block = self._open = self._waiting.pop(self._key)
            found.append(block.start)
            if any(block.pieces):
                found.append(Delta("".join(block.pieces)))
            if block.ended:
                found += self._close()
        return found

    def _close(self) -> list[Event]:
        block, self._open = self._open, None
        if block is None:
            return []
        if block.start.kind is Kind.CALL and not any(block.pieces):
            return [Delta("{}"), BLOCK_ENDED]  # some engines send nothing for no arguments, but clients parse them
        return [Signature(block.signature), BLOCK_ENDED] if block.signature else [BLOCK_ENDED]


class Decoder(abc.ABC):
    """Reads an answer, in pieces or whole, and returns the events that are due."""

    def __init__(self) -> None:
        self._blocks = Blocks()
        self._started = False
        self._over = False

    def feed(self, name: str, data: str) -> list[Event]:
        """Take one server-sent event."""
        if self._over:
            return []
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return self._fail("the engine sent an event that is not JSON")
        return self._event(document, name) if isinstance(document, dict) else []

    @abc.abstractmethod
    def _event(self, document: dict[str, Any], name: str) -> list[Event]: ...

    @abc.abstractmethod
    def whole(self, document: dict[str, Any]) -> list[Event]:
        """Take a whole answer."""

    def cut(self) -> list[Event]:
        """The engine sends no more."""
        return [] if self._over else self._fail("the engine's answer broke off")

    def _fail(self, message: str, kind: str = "api_error", code: str | None = None) -> list[Event]:
        self._over = True
        return [Failed(message, kind, code)]


def _may_end(block: _Block) -> bool:
    """Whether it may be complete: for a call, whether its arguments are a whole object."""
    if block.start.kind is not Kind.CALL:
        return True
    if not block.looks_whole():
        return False
    try:
        json.loads("".join(block.pieces))
    except (ValueError, RecursionError):
        return False
    return True

"""One request on its way: what is sent where, and the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmux.core.effects import CutReason
from llmux.errors import EngineError
from llmux.proxy.token_usage import BLOCKS, Usage, usage_of
from llmux.upstream import EngineActivity, EngineAddress, EngineRefusedError

if TYPE_CHECKING:
    from llmux.proxy.early_response import EarlyResponse


class RequestBody(Protocol):
    """A buffered request body, in memory or on disk."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    @property
    def single(self) -> bytes | None:
        """The whole body, when it is one piece in memory."""

    def slices(self) -> Iterator[bytes]:
        """Iterate over it from the start; a request that is sent again does so a second time."""


class ExtraFields(NamedTuple):
    """Fields added to a response's head, prepared in advance."""

    lines: bytes  # without the last line's end
    names: frozenset[bytes]  # of the engine's fields that they replace, in lower case

    @classmethod
    def of(cls, fields: Sequence[tuple[str, str]]) -> ExtraFields:
        """Make them from names and values."""
        added = dict(fields)
        lines = b"\r\n".join(f"{name}: {value}".encode() for name, value in added.items())
        names = {name.lower().encode() for name in added}
        names.discard(b"vary")  # a list that both may add to
        return cls(lines, frozenset(names))


ERROR = 400  # the least status that is one


@dataclass(eq=False, slots=True)
class Exchange:
    """One request, for one ``Forwarder.forward``. A request that is sent again gets a new one.

    The fields after ``lost`` are the outcome, for the caller to read when ``forward`` is done, however
    it ended. Times are the loop's.
    """

    address: EngineAddress
    request_id: str
    activity: EngineActivity
    method: bytes | str = b"POST"
    target: bytes = b"/"  # exactly as the client wrote it
    raw_headers: Sequence[tuple[bytes, bytes]] = ()
    body: RequestBody | None = None
    drop_headers: frozenset[bytes] = frozenset()  # in lower case: credentials that were meant for llmux
    extra_headers: Sequence[tuple[str, str]] | ExtraFields = ()  # for the response
    added_headers: Sequence[tuple[bytes, bytes]] = field(default=(), repr=False)  # for the engine; a key, too
    below: bytes = b""  # the client's path before the engine's: /upstream/MODEL
    early: EarlyResponse | None = None  # the client's answer, if it has begun
    anthropic: bool = False  # the client expects Anthropic's events
    fresh_only: bool = False  # do not use a pooled connection: it was returned once before
    counted: bool = False  # the events of a stream are counted, though no reader asked for it
    once: bool = False  # bytes written count as sent, also on a connection that died while it was pooled
    lost: EngineError | None = None  # a pooled connection died with all of it: raised if the next is refused

    status: int | None = field(default=None, init=False)  # the engine's
    first_byte_at: float | None = field(default=None, init=False)  # the response's head went out
    ended_at: float | None = field(default=None, init=False)
    events: int = field(default=0, init=False)  # streamed events, if they are counted
    bytes_out: int = field(default=0, init=False)  # handed to the client's transport, the head included
    broken: str | None = field(default=None, init=False)  # the error code, when the response broke off
    opening: bytes = field(default=b"", init=False, repr=False)  # of an event stream
    tail: list[bytes] = field(default_factory=list, init=False, repr=False)  # ``BLOCKS`` blocks at least

    cut_off: tuple[CutReason, float | None] | None = field(default=None, init=False)
    on_cut: Callable[[CutReason, float | None], None] | None = field(default=None, init=False, repr=False)

    def keep(self, block: bytes) -> None:
        """Add to the last blocks."""
        tail = self.tail
        tail.append(block)
        if len(tail) >= 2 * BLOCKS:
            del tail[:BLOCKS]

    def cut(self, reason: CutReason, retry_after: float | None = None) -> None:
        """End it from outside, in whatever state it is; once it has ended this does nothing."""
        if self.cut_off is not None or self.ended_at is not None:
            return
        self.cut_off = (reason, retry_after)
        if self.on_cut is not None:
            self.on_cut(reason, retry_after)

    @property
    def answered_well(self) -> bool:
        """Whether the engine's answer shows that the model is there: an error may come from a proxy before it."""
        return self.status is not None and self.status < ERROR

    @property
    def usage(self) -> Usage:
        """The tokens that the answer reports at its ends."""
        return usage_of(self.opening, self.tail)

    def blames_engine(self, error: Exception | None) -> bool:
        """Whether its end, with ``error`` or without, suggests that the engine is gone.

        The caller handles an engine to which no connection could be made: nothing was sent.
        """
        if error is not None:
            return isinstance(error, EngineError) and not isinstance(error, EngineRefusedError)
        return self.broken is not None and self.cut_off is None


def path_of(target: bytes) -> bytes:
    """Return a target without the scheme and authority that its absolute form has."""
    if not target.startswith(b"/"):
        _, separator, rest = target.partition(b"://")
        if separator:
            _, slash, path = rest.partition(b"/")
            return slash + path or b"/"
    return target

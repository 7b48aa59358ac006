"""Telling waiting clients their position, if they or the configuration want that.

In the body this works only on paths where the kind of the answer is known beforehand: events, or JSON. Other
clients can ask for informational responses. One timer serves all waiting clients, and runs only while there are
any. Each turn tells the clients that are due; the positions in a model's queue are counted once for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from aiohttp import HttpVersion11, hdrs, web

from llmux.errors import BadRequestError
from llmux.extract import Body
from llmux.extract.body import streams
from llmux.middleware.paths import MESSAGES, Kind, Route
from llmux.proxy import ClientGoneError
from llmux.proxy.early_response import Dialect, EarlyResponse
from llmux.runtime import Switcher, Ticket, wait_estimate

HEADER = "X-LLMux-Progress"
INTERIM = "1xx"
EXPECTED = "X-LLMux-Expected-Seconds"
POSITION = "X-LLMux-Position"
TURN = 1.0  # seconds between two checks of which clients are due, at most

_STREAMED = frozenset(
    {
        "/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion",
        "/v1/responses", "/infill", MESSAGES,
    }
)  # fmt: skip
_JSON = _STREAMED | {
    "/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/v1/reranking", "/reranking",
    "/v2/rerank", "/v1/score", "/score", "/v1/pooling", "/pooling", "/v1/classify", "/classify", "/v1/moderations",
    "/v1/images/generations", "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/apply-template",
}  # fmt: skip


def wanted(request: web.BaseRequest, default: bool) -> str:
    """Return how a client wants to be told: ``on``, ``off`` or ``1xx``. Raises BadRequestError."""
    given = request.headers.get(HEADER)
    word = ("on" if default else "off") if given is None else given.strip().lower()
    if word not in {"on", "off", INTERIM}:
        raise BadRequestError(f"{HEADER} must be on, off or 1xx", param=HEADER)
    return "off" if request.version < HttpVersion11 else word


async def dialect_of(request: web.BaseRequest, route: Route, body: Body | None) -> Dialect | None:
    """Return what the client expects to read, None if that is not known before the engine answers."""
    if (
        route.kind is not Kind.FORWARD
        or route.path not in _JSON
        or body is None
        or request.method != hdrs.METH_POST
    ):
        return None
    match await streams(body):
        case False:
            return Dialect.JSON
        case True if route.path in _STREAMED:
            return Dialect.ANTHROPIC_STREAM if route.path == MESSAGES else Dialect.OPENAI_STREAM
        case _:
            return None


Headers = Callable[[], list[tuple[str, str]]]


class Channel(Protocol):
    """How one client is told."""

    def waiting(self, position: int, seconds: int) -> None:
        """Report its position (from 1 on), and about how many seconds it will wait. Raises ClientGoneError."""

    def working(self) -> None:
        """Report that its engine works on it."""


class InBody:
    """Reports in the body of the answer, which begins with that."""

    def __init__(self, early: EarlyResponse, headers: Headers) -> None:
        self.early = early
        self._headers = headers

    def waiting(self, position: int, seconds: int) -> None:
        """Begin the answer, if it has not begun, and report the position."""
        if not self.early.begun:
            self.early.begin(self._headers())
        self.early.say(f"llmux waiting, position {position}, about {seconds} s")

    def working(self) -> None:
        """Report it, if the answer has begun."""
        self.early.say("llmux waiting for the engine's first byte")


class Interim:
    """Reports by informational responses, before the answer."""

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request

    def waiting(self, position: int, seconds: int) -> None:
        """Send a `102 Processing`."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientGoneError("The client has gone.")
        head = f"HTTP/1.1 102 Processing\r\n{POSITION}: {position}\r\n{EXPECTED}: {seconds}\r\n\r\n"
        transport.write(head.encode("ascii"))

    def working(self) -> None:
        """Do nothing: there is nothing more to report."""


@dataclass(slots=True, eq=False)
class _Listener:
    ticket: Ticket
    channel: Channel
    due: float


class ProgressNotifier:
    """Knows which clients are to be told, and when."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher
        self._listeners: dict[int, _Listener] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.every = 5.0  # seconds

    def add(self, ticket: Ticket, channel: Channel) -> None:
        """Tell a client from now on, first after ``every`` seconds."""
        self._listeners[ticket.id] = _Listener(ticket, channel, self._switcher.now() + self.every)
        self._arm()

    def expected(self, ticket: Ticket) -> int | None:
        """Return about how many seconds a new request will wait; None if it need not."""
        state, now = self._switcher.core.state, self._switcher.now()
        model = state.models[ticket.model]
        if ticket.id not in model.queue:
            return None
        last = next(reversed(model.queue)) == ticket.id  # a new request is the last
        position = len(model.queue) if last else list(model.queue).index(ticket.id) + 1
        return about(wait_estimate.until_awake(state, model, now) + wait_estimate.in_queue(model, position))

    def remove(self, ticket: Ticket) -> None:
        """Tell the client nothing more."""
        self._listeners.pop(ticket.id, None)

    def _arm(self) -> None:
        if self._timer is None and self._listeners:
            self._timer = asyncio.get_running_loop().call_later(min(TURN, self.every), self._turn)

    def _turn(self) -> None:
        self._timer = None
        now = self._switcher.now()
        due: dict[str, list[_Listener]] = {}
        for listener in self._listeners.values():
            if listener.due <= now:
                listener.due = now + self.every
                due.setdefault(listener.ticket.model, []).append(listener)
        self._arm()
        for name, listeners in due.items():
            self._tell(name, listeners, now)

    def _tell(self, name: str, listeners: list[_Listener], now: float) -> None:
        state = self._switcher.core.state
        model = state.models[name]
        positions: Mapping[int, int] = {request: at for at, request in enumerate(model.queue, 1)}
        awake = wait_estimate.until_awake(state, model, now)
        for listener in listeners:
            position = positions.get(listener.ticket.id)
            with contextlib.suppress(ClientGoneError):  # the handler notices
                if position is None:
                    listener.channel.working()
                else:
                    listener.channel.waiting(position, about(awake + wait_estimate.in_queue(model, position)))


def about(seconds: float) -> int:
    """Return seconds as people read them: whole, and at least one."""
    return max(1, math.ceil(seconds))

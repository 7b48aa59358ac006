"""One request and its outcome, on either path; its client's headers about time; and its end."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmux.config.setting_types import parse_duration
from llmux.core.effects import Refusal
from llmux.errors import BadRequestError, EngineError, RequestError
from llmux.middleware.authentication import Holder
from llmux.middleware.paths import Route
from llmux.middleware.progress import Channel, InBody
from llmux.proxy import Exchange
from llmux.proxy.early_response import EarlyResponse
from llmux.proxy.token_usage import NONE as NO_USAGE
from llmux.proxy.token_usage import usage_of
from llmux.runtime import Switcher, Ticket
from llmux.runtime.requests import WITHDRAWN

if TYPE_CHECKING:
    from llmux.accounts.gate import Passed
    from llmux.middleware.rerouting import Spillable
    from llmux.middleware.targeting import Choice
    from llmux.observability.spans import RequestTrace

GONE = 499  # nginx's status for a client that closed its connection; only ever seen in metrics and logs

DEADLINE = "X-LLMux-Deadline"
KEEP_ALIVE = "X-LLMux-Keep-Alive"
QUEUE_SECONDS = "X-LLMux-Queue-Seconds"
REFUSED = "X-LLMux-Refused"
"""Says, with the error's code, that no engine has seen a request: it may be sent to another host."""
_BEFORE_ADMISSION = frozenset(
    {*Refusal, "too_many_connections", "bodies_full", "asleep", "deadline", WITHDRAWN}
) - {
    Refusal.WAITED_TOO_LONG  # it has run out of time on other hosts, too
}

_USABLE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,126}[\x21-\x7e])?")
_ids: list[str] = []  # ready to be used: made one by one they cost three times as much
_AT_ONCE = 256
_DIGITS = 32


def new_id() -> str:
    """Return 32 hexadecimal digits that no other request has."""
    if not _ids:
        digits = os.urandom(_AT_ONCE * _DIGITS // 2).hex()
        _ids.extend([digits[at : at + _DIGITS] for at in range(0, len(digits), _DIGITS)])
    return _ids.pop()


def request_id(given: str | None) -> str:
    """Return ``given`` if it is 1 to 128 printable ASCII characters, else a new random id."""
    if given is not None and _USABLE.fullmatch(given):
        return given
    return new_id()


@dataclass(slots=True)
class Reporting:
    """Where the ends of requests are reported. One for the whole application."""

    switcher: Switcher
    access_log: bool = False


class RequestContext:
    """One request. Whatever ends it calls ``finish`` or ``client_left``, once."""

    __slots__ = (
        "_reporting",
        "asked",
        "began",
        "channel",
        "choice",
        "drop_headers",
        "exchange",
        "first_error",
        "fresh_only",
        "headers",
        "holder",
        "lost",
        "may_leave",
        "model",
        "passed",
        "regions",
        "request_id",
        "rode",
        "route",
        "sent",
        "spillable",
        "ticket",
        "told_to_send",
        "trace",
    )

    def __init__(
        self, reporting: Reporting, request_id: str, route: Route, began: float, *, told_to_send: bool = True
    ) -> None:
        self._reporting = reporting
        self.request_id = request_id
        self.route = route
        self.began = began  # on the switcher's clock
        self.told_to_send = told_to_send  # False: a client that expects `100 Continue` has not got it yet
        self.holder: Holder | None = None  # the holder of its key
        self.drop_headers: frozenset[bytes] = frozenset()  # credentials that were meant for llmux
        self.headers: list[tuple[str, str]] = []  # for the response
        self.asked: str | None = None  # the model as the client named it, if it is a known name
        self.model: str | None = None
        self.passed: Passed | None = None  # the admission by its key's limits and budget
        self.ticket: Ticket | None = None
        self.exchange: Exchange | None = None  # the last one
        self.rode = 0.0  # seconds that it rode along or waited before its ticket: for another target
        self.spillable: Spillable | None = None  # it goes to a remote if it would wait for too long
        self.may_leave = False  # it may still go to another host
        self.regions: frozenset[str] | None = None  # regions of the remotes that may serve it; None: all
        self.sent = 0  # bytes of the request's body
        self.trace: RequestTrace | None = None
        self.channel: Channel | None = None  # how its client gets progress messages
        # What the fast path passes to the model handler when it hands the request over:
        self.first_error: Exception | None = None  # the error that ended the first exchange
        self.fresh_only = False  # that exchange got a connection which had died while it was idle
        self.choice: Choice | None = None  # if the client named neither a model nor an alias: its target
        self.lost: EngineError | None = None  # that error, if the engine may have read the request

    @property
    def counted(self) -> bool:
        """Whether its answer is read for what it costs, and its events are counted without a reader of these."""
        return self.passed is not None or self._reporting.switcher.accounts is not None

    @property
    def early(self) -> EarlyResponse | None:
        """The response, if it began before the engine's."""
        channel = self.channel
        return channel.early if isinstance(channel, InBody) and channel.early.begun else None

    def refused_with(self, error: RequestError) -> str | None:
        """Return the code of an error which says that no engine has seen the request; else None."""
        ticket = self.ticket
        by_core = ticket is not None and ticket.rejection is error
        return error.code if error.code in _BEFORE_ADMISSION and (by_core or self.exchange is None) else None

    def _settle(self, passed: Passed, status: int, failure: str | None, seconds: float) -> None:
        exchange, self.passed, passed.served = self.exchange, None, self.model
        ends: tuple[Any, ...] = (b"", (), 0)
        if exchange is not None:
            ends = exchange.opening, exchange.tail, exchange.events
        whole = failure is None and status != GONE
        passed.ended((self.route.path, status, whole, self.sent, exchange is not None, *ends), seconds)

    @property
    def key(self) -> str:
        """The name of its key, "" without one."""
        holder = self.holder
        return "" if holder is None else holder.name or ""

    @property
    def waited(self) -> float:
        """Seconds in the queue, and riding along."""
        ticket = self.ticket
        return self.rode if ticket is None else self.rode + ticket.rode + ticket.waited

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The headers of its response, including the seconds that it has waited."""
        return [*self.headers, (QUEUE_SECONDS, f"{self.waited:.3f}")]

    def wants_progress(self, default: bool) -> bool:
        """Whether its client gets progress messages if it does not say: by its key, else by the configuration."""
        by_key = None if self.holder is None else self.holder.progress
        return default if by_key is None else by_key

    @contextlib.contextmanager
    def attempted(self, exchange: Exchange) -> Iterator[None]:
        """Trace an attempt at an engine or at a remote, if requests are traced; it carries the trace's headers."""
        trace, now = self.trace, self._reporting.switcher.now
        if trace is None:
            yield
            return
        exchange.drop_headers |= trace.fields
        exchange.added_headers = (*exchange.added_headers, *trace.sending(now()))
        failure = None
        try:
            yield
        except RequestError as error:
            failure = error.code
            raise
        finally:
            trace.sent(now(), exchange.status, exchange.first_byte_at, failure or exchange.broken)

    def leave(self, status: int) -> None:
        """End the request where it is, so that it can start elsewhere: this attempt does not concern the next."""
        ticket, self.ticket, self.exchange = self.ticket, None, None
        self.fresh_only, self.lost = False, None
        if ticket is not None:
            self._reporting.switcher.leave(ticket, status)
            self.rode += ticket.rode + ticket.waited

    def client_left(self) -> None:
        """Finish a request whose client has left before the end of its answer."""
        self._reporting.switcher.log.emit("client_left", model=self.model, request_id=self.request_id)
        self.finish(GONE)

    def finish(self, status: int, failure: str | None = None) -> None:
        """Do everything that is due at the end: leave the core, then the metrics, the trace and the log.

        ``failure`` is the code of the error that the client got.
        """
        switcher, ticket, exchange = self._reporting.switcher, self.ticket, self.exchange
        if ticket is not None:
            switcher.leave(ticket, status, exchange, self.sent)
            waited = self.rode + ticket.rode + ticket.waited
        else:
            waited = self.rode
        now, began = switcher.now(), self.began
        whole = now - began
        holder = None if self.holder is None else self.holder.name
        first, streamed = None, False
        tokens: tuple[int | None, int | None] = NO_USAGE
        accounts = switcher.accounts
        report = None
        if exchange is not None:
            report = None if accounts is None else accounts.told(exchange.tail)
            tokens = usage_of(exchange.opening, exchange.tail) if report is None else report
            first, streamed = exchange.first_byte_at, exchange.opening != b""
            failure = failure or exchange.broken
        if first is not None:
            first -= began
        elif status != GONE:
            first = whole  # llmux's own answer
        number = switcher.requests.add(
            now, self.model, status, waited, first, whole, self.request_id, tokens, failure, holder, streamed,
            self.asked,
        )  # fmt: skip
        switcher.metrics.request_ended(self.model, status, waited, first, whole, tokens)
        seconds = 0.0
        if accounts is not None:
            seconds = accounts.ended(self, number, now, waited, status, failure, holder, report)
        if self.passed is not None:
            self._settle(self.passed, status, failure, seconds)
        if self.trace is not None:
            self._end_trace(status, failure)
        if self._reporting.access_log:
            switcher.log.emit(
                "request_finished",
                model=self.model,
                status=status,
                code=failure,
                waited_secs=round(waited, 3),
                duration_secs=round(whole, 3),
                request_id=self.request_id,
                key=holder,
            )

    def _end_trace(self, status: int, failure: str | None) -> None:
        assert self.trace is not None
        self.trace.ended(
            self._reporting.switcher.now(),
            status,
            failure,
            model=self.model,
            request_id=self.request_id,
            key=None if self.holder is None else self.holder.name,
            queue_seconds=self.waited,
        )


def deadline_of(request: web.BaseRequest, default: float | None) -> float | None:
    """Return how many seconds a request has, None without a limit. Raises BadRequestError.

    The core refuses a request at once if it cannot be answered in its time, so that no switch is made for it.
    """
    given = request.headers.get(DEADLINE)
    if given is None:
        return default
    try:
        return parse_duration(given)
    except ValueError as error:
        raise BadRequestError(f"{DEADLINE}: {error}", param=DEADLINE) from None


def keep_alive_of(request: web.BaseRequest) -> float | None:
    """Return how many idle seconds the model stays awake after a request; negative: it stays awake.

    None if the client does not say. Raises BadRequestError.
    """
    given = request.headers.get(KEEP_ALIVE)
    if given is None:
        return None
    sign, amount = (-1.0, given[1:]) if given.startswith("-") else (1.0, given)
    try:
        return sign * parse_duration(amount)
    except ValueError as error:
        raise BadRequestError(f"{KEEP_ALIVE}: {error}", param=KEEP_ALIVE) from None

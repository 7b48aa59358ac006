"""Serving HTTP as production must, and answering in llmux's way what aiohttp would answer by itself."""

from __future__ import annotations

from typing import Any

from aiohttp import StreamReader, web
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from llmux.app import FRONT
from llmux.errors import BadRequestError, RequestError
from llmux.middleware.identity import request_id
from llmux.middleware.lane_connection import LaneConnection
from llmux.observability.notices import EventLog
from llmux.proxy import error_response

HEADER_LIMIT = 32 * 1024  # bytes of one header field, and of the request line
BACKLOG = 4096
LINGER = 1.0  # seconds to read on after an answer that came before the end of the request's body


class Connection(LaneConnection):
    """One client's connection. It answers what aiohttp would answer by itself in llmux's way."""

    __slots__ = ("_event_log",)

    def __init__(self, *args: Any, event_log: EventLog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._event_log = event_log

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP (400) and mistakes of llmux (500)."""
        error: RequestError
        if isinstance(exc, ConnectionError):  # the client has left; whoever noticed has told it
            raise exc
        if status == BadRequestError.status:
            reason = str(message or "").strip().partition("\n")[0].rstrip(":") or "malformed HTTP"
            self._event_log.emit("malformed_request", client=request.remote, error=reason)
            error = BadRequestError(f"Malformed HTTP: {reason}", code="malformed_request")
        else:
            self._event_log.emit("internal_error", error=repr(exc), exc_info=exc)
            error = RequestError("llmux made a mistake; its log says more.")
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer is under way already")
        headers = [
            ("X-Request-ID", request_id(request.headers.get("X-Request-ID"))),
            ("X-LLMux-Queue-Seconds", "0.000"),
        ]
        response = error_response(error, anthropic=False, headers=headers)
        response.force_close()
        return response

    def data_received(self, data: bytes) -> None:
        """Tell the reader of a body at once when its framing breaks in the middle."""
        before = len(self._messages)
        super().data_received(data)
        if len(self._messages) == before or not isinstance(self._messages[-1][0], _ErrInfo):
            return
        current = self._current_request
        payload = self._messages[-2][1] if before else current.content if current is not None else None
        if isinstance(payload, StreamReader) and not payload.is_eof():
            # The answer to that request says what was wrong, and is the last one on this connection.
            self._messages.pop()
            self._close = True
            payload.set_exception(BadRequestError("The body's framing is broken.", code="incomplete_body"))
            payload.feed_eof()


class Server(web.Server):
    """Makes our connections."""

    def __call__(self) -> RequestHandler:
        """Return the protocol for a new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves the application as production must: clients that leave are noticed, bodies are left as they are."""

    def __init__(self, app: web.Application, log: EventLog) -> None:
        super().__init__(app)
        self._event_log = log
        self._lane = app[FRONT].lane

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        front = self.app.get(FRONT)
        return Server(
            made.request_handler if front is None else front.server_handler(made.request_handler),
            request_factory=made.request_factory,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
            lingering_time=LINGER,
            event_log=self._event_log,
            lane=self._lane,
        )

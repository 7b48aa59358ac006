"""One request between a client and an engine that speak different dialects."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmux.targets.codecs import (
    chat_answer,
    chat_request,
    messages_answer,
    messages_request,
    responses_answer,
    responses_request,
)
from llmux.targets.codecs.answer import BlockStarted, Decoder, Ended, Event, Failed, Started
from llmux.targets.codecs.request import Losses, Request, ToolNames
from llmux.targets.codecs.sse import EventParser


class Dialect(enum.StrEnum):
    """The dialects of clients and engines, for conversations."""

    CHAT = "chat"
    MESSAGES = "messages"
    RESPONSES = "responses"

    @property
    def path(self) -> str:
        """Where engines take requests in it."""
        return _PATHS[self]


_PATHS = {
    Dialect.CHAT: "/v1/chat/completions",
    Dialect.MESSAGES: "/v1/messages",
    Dialect.RESPONSES: "/v1/responses",
}
_REQUESTS: Mapping[Dialect, Any] = {
    Dialect.CHAT: chat_request,
    Dialect.MESSAGES: messages_request,
    Dialect.RESPONSES: responses_request,
}
_ANSWERS: Mapping[Dialect, Any] = {
    Dialect.CHAT: chat_answer,
    Dialect.MESSAGES: messages_answer,
    Dialect.RESPONSES: responses_answer,
}
_BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError)
# What an engine that speaks another dialect means by its status.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Translation:
    """Translates one request, and its answer. ``lossy``: what cannot be translated is dropped."""

    def __init__(self, client: Dialect, engine: Dialect, *, lossy: bool = False) -> None:
        self.client = client
        self.engine = engine
        self._losses = Losses(lossy=lossy)
        self._names = ToolNames()
        self._request = Request("")
        self._asked: dict[str, Any] = {}

    @property
    def dropped(self) -> tuple[str, ...]:
        """The paths of what was dropped from the request."""
        return self._losses.dropped

    @property
    def streams(self) -> bool:
        """Whether the client asked for a stream."""
        return bool(self._request.stream)

    def request(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's request.

        BadRequestError for what is malformed, or has no place in the engine's dialect; ``param`` names it.
        """
        self._asked = document
        self._request = _REQUESTS[self.client].decode(document, self._losses)
        translated: dict[str, Any] = _REQUESTS[self.engine].encode(self._request, self._losses, self._names)
        return translated

    def answer(self, document: Any, model: str | None = None) -> dict[str, Any]:
        """Return the client's answer; ``document`` may be the bytes of a stream.

        ValueError if the engine's is invalid, or reports an error.
        """
        events = self._events(document)
        with self._checked():
            whole: dict[str, Any] = self._encoder(events, model).whole(events)
        return whole

    def stream_of(self, document: Any) -> bytes:
        """Return a whole answer as the stream that the client asked for. ValueError as for ``answer``."""
        events = self._events(document)
        with self._checked():
            encoder = self._encoder(events, None)
            return b"".join([encoder.feed(event) for event in events])

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            raise ValueError(f"the engine's answer is not what {self.engine} have: {error!r}") from error

    def _events(self, document: Any) -> list[Event]:
        with self._checked():
            events = [self._own(event) for event in self._decoded(document)]
        failed = next((event for event in events if isinstance(event, Failed)), None)
        if failed is not None:
            raise ValueError(failed.message)
        return events

    def _decoded(self, document: Any) -> list[Event]:
        decoder = self._decoder()
        if not isinstance(document, bytes):
            return decoder.whole(document)
        told = [decoder.feed(name, data) for name, data in EventParser().feed(document + b"\n\n")]
        return [event for events in (*told, decoder.cut()) for event in events]

    def error(self, status: int, document: Any) -> dict[str, Any]:
        """Return an error of the engine in the client's envelope."""
        if isinstance(document, list) and document:
            document = document[0]
        given = document.get("error", document) if isinstance(document, dict) else document
        message, kind, code = chat_answer.error_of(given)
        if self.client is Dialect.MESSAGES:
            kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")  # noqa: PLR2004
            return messages_answer.error_document(Failed(message, kind, code))
        return chat_answer.error_document(Failed(message, kind, code))

    def stream(self, model: str | None = None) -> StreamTranslator:
        """Return the translator of the engine's stream. ``model``: its name, if it differs from the engine's."""
        return StreamTranslator(self, self._decoder(), model)

    def _decoder(self) -> Decoder:
        decoder: Decoder = _ANSWERS[self.engine].AnswerDecoder()
        return decoder

    def _encoder(self, events: list[Event], model: str | None) -> Any:
        started = next((event for event in events if isinstance(event, Started)), Started("", ""))
        more = {"asked": self._asked} if self.client is Dialect.RESPONSES else {}
        usage = self._request.usage_in_stream
        name = (started.model or self._request.model) if model is None else model
        return _ANSWERS[self.client].AnswerEncoder(name, usage_in_stream=usage, **more)

    def _own(self, event: Event) -> Event:
        """Give a call the name by which the client knows its tool."""
        if type(event) is BlockStarted and event.name:
            return event._replace(name=self._names.back(event.name))
        return event


class StreamTranslator:
    """Translates a stream of server-sent events, however it is cut into pieces."""

    def __init__(self, translation: Translation, decoder: Decoder, model: str | None) -> None:
        self._translation = translation
        self._decoder = decoder
        self._model = model
        self._parser = EventParser()
        self._encoder: Any = None
        self.over = False
        """Whether the client has got the end, or an error."""
        self.failed = False

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the engine, and return those for the client."""
        sent = [self._read(self._decoder.feed, name, text) for name, text in self._parser.feed(data)]
        if self._parser.too_long:
            sent.append(self.fail("the engine sent an event that is too long"))
        return b"".join(sent)

    def end(self) -> bytes:
        """Handle the end of the engine's stream: send what is due, or that the answer broke off."""
        return self._read(self._decoder.cut)

    def _read(self, decode: Callable[..., list[Event]], *data: str) -> bytes:
        sent: list[bytes] = []
        try:
            self._send(sent, decode(*data))
        except _BROKEN as error:
            self._send(sent, [Failed(f"the engine sent what {self._translation.engine} do not have: {error!r}")])
        return b"".join(sent)

    def fail(self, message: str, kind: str = "api_error", code: str | None = None) -> bytes:
        """Tell the client that the answer broke off."""
        sent: list[bytes] = []
        self._send(sent, [Failed(message, kind, code)])
        return b"".join(sent)

    def _send(self, sent: list[bytes], events: list[Event]) -> None:
        for event in events:
            if self.over:
                break
            if self._encoder is None:
                self._encoder = self._translation._encoder(events, self._model)  # noqa: SLF001 - its other half
            sent.append(self._encoder.feed(self._translation._own(event)))  # noqa: SLF001
            kind = type(event)
            self.failed = kind is Failed
            self.over = self.failed or kind is Ended

"""Answers as messages."""

from __future__ import annotations

import json
from typing import Any

from llmux.targets.codecs import sse
from llmux.targets.codecs.answer import (
    ENDED,
    BlockEnded,
    BlockStarted,
    Decoder,
    Delta,
    Ended,
    Event,
    Failed,
    Finished,
    Kind,
    Signature,
    Started,
    Stop,
    Usage,
    count,
    identity,
)

_KINDS = {
    "text": Kind.TEXT,
    "thinking": Kind.THINKING,
    "redacted_thinking": Kind.REDACTED,
    "tool_use": Kind.CALL,
}
_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


class AnswerDecoder(Decoder):
    """Reads an answer, in pieces or whole."""

    def __init__(self) -> None:
        super().__init__()
        self._usage = Usage()
        self._finished: Finished | None = None
        self._inputs: dict[int, dict[str, Any]] = {}  # of calls whose arguments came with their start

    def whole(self, document: dict[str, Any]) -> list[Event]:
        """Take a whole answer."""
        if document.get("type") == "error" or "error" in document:
            return self._event(document, "error")
        if "content" not in document:
            return self._fail("the engine's answer has no content")
        found = self._start(document)
        for index, block in enumerate(document.get("content") or ()):
            found += self._block_started(index, block)
            found += self._block_ended(index)
        self._usage = _usage_of(document.get("usage") or {})
        self._finish(document)
        return [*found, *self._end()]

    def _event(self, document: dict[str, Any], name: str) -> list[Event]:
        match document.get("type") or name or ("error" if document.get("error") else ""):
            case "content_block_delta":
                return self._delta(document["index"], document["delta"])
            case "content_block_start":
                return self._block_started(document["index"], document["content_block"])
            case "content_block_stop":
                return self._block_ended(document["index"])
            case "message_start":
                message = document["message"]
                self._usage = _usage_of(message.get("usage") or {})
                return self._start(message)
            case "message_delta":
                self._usage = self._usage.grown(_usage_of(document.get("usage") or {}, start=self._usage))
                self._finish(document.get("delta") or {})
            case "message_stop":
                return self._end()
            case "error":
                error = document.get("error") or {}
                if not isinstance(error, dict):
                    error = {"message": error}
                return self._fail(str(error.get("message") or "the engine failed"), str(error.get("type") or ""))
        return []

    def _start(self, message: dict[str, Any]) -> list[Event]:
        if self._started:
            return []
        self._started = True
        return [Started(str(message.get("id") or identity()), str(message.get("model") or ""))]

    def _block_started(self, index: int, block: dict[str, Any]) -> list[Event]:
        kind = _KINDS.get(block.get("type") or "")
        if kind is None or self._blocks.has(index):
            return []
        found = self._blocks.start(
            index,
            BlockStarted(kind, str(block.get("id") or ""), str(block.get("name") or ""), block.get("data") or ""),
        )
        if kind is Kind.CALL:
            if block.get("input"):
                self._inputs[index] = block["input"]
        elif kind is not Kind.REDACTED and (begun := block.get("text") or block.get("thinking")):
            found += self._blocks.delta(index, begun)
        if signature := block.get("signature"):
            found += self._blocks.sign(index, signature)
        return found

    def _delta(self, index: int, delta: dict[str, Any]) -> list[Event]:
        kind = delta.get("type")
        if kind == "signature_delta":
            return self._blocks.sign(index, delta.get("signature") or "")
        text = delta.get(_DELTAS.get(kind or "", ""))
        if not text:
            return []
        if kind == "input_json_delta":
            self._inputs.pop(index, None)
        return self._blocks.delta(index, text)

    def _block_ended(self, index: int) -> list[Event]:
        arguments = self._inputs.pop(index, None)
        found: list[Event] = []
        if arguments is not None:
            found = self._blocks.delta(index, json.dumps(arguments, ensure_ascii=False, separators=(",", ":")))
        return [*found, *self._blocks.end(index)]

    def _finish(self, delta: dict[str, Any]) -> None:
        reason = delta.get("stop_reason")
        if reason:
            try:
                stop = Stop(reason)
            except ValueError:
                stop = Stop.END
            self._finished = Finished(stop, delta.get("stop_sequence") if stop is Stop.SEQUENCE else None)

    def _end(self) -> list[Event]:
        self._over = True
        found: list[Event] = [] if self._started else [Started(identity(), "")]
        found += self._blocks.finish()
        if self._usage != Usage():
            found.append(self._usage)
        return [*found, self._finished or Finished(Stop.END), ENDED]


def _usage_of(usage: dict[str, Any], start: Usage | None = None) -> Usage:
    """Return what is told of tokens. What caches held is not part of `input_tokens` there; here it is."""
    cached, written = count(usage.get("cache_read_input_tokens")), count(usage.get("cache_creation_input_tokens"))
    given = count(usage.get("input_tokens"))
    if given is not None:
        known = start or Usage()
        given += (known.cached if cached is None else cached) or 0
        given += (known.cache_written if written is None else written) or 0
    made = usage.get("output_tokens_details") or {}
    reasoning = count(made.get("thinking_tokens", made.get("reasoning_tokens")))
    return Usage(given, count(usage.get("output_tokens")), cached, written, reasoning)


def _usage_document(usage: Usage) -> dict[str, Any]:
    outside = (usage.cached or 0) + (usage.cache_written or 0)
    document: dict[str, Any] = {
        "input_tokens": max(0, (usage.input or 0) - outside),
        "output_tokens": usage.output or 0,
    }
    if usage.cached is not None:
        document["cache_read_input_tokens"] = usage.cached
    if usage.cache_written is not None:
        document["cache_creation_input_tokens"] = usage.cache_written
    return document


class AnswerEncoder:
    """Writes an answer: as server-sent events, or whole."""

    def __init__(self, model: str, *, usage_in_stream: bool = False) -> None:  # noqa: ARG002 - it always is
        self._model = model
        self._index = -1
        self._kind = _DELTA_TYPES[Kind.TEXT]
        self._refused = False
        self._usage = Usage()

    def feed(self, event: Event) -> bytes:
        """Return the server-sent events for an event."""
        match event:
            case Delta():
                return self._block_delta(event.text)
            case BlockStarted():
                return self._block_started(event)
            case BlockEnded():
                return sse.event({"type": "content_block_stop", "index": self._index}, "content_block_stop")
            case Signature():
                return self._delta_event({"type": "signature_delta", "signature": event.text})
            case Usage():
                self._usage = self._usage.updated(event)
                return b""
            case Started():
                return sse.event({"type": "message_start", "message": self._message(event.id)}, "message_start")
            case Finished():
                return self._finished(event)
            case Ended():
                return sse.event({"type": "message_stop"}, "message_stop")
            case Failed():
                return sse.event(error_document(event), "error")

    def _message(self, given: str) -> dict[str, Any]:
        return {
            "id": given if given.startswith("msg_") else f"msg_{given}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }

    def _block_started(self, event: BlockStarted) -> bytes:
        self._index += 1
        self._kind = _DELTA_TYPES[event.kind]
        self._refused = self._refused or event.kind is Kind.REFUSAL
        start = {"type": "content_block_start", "index": self._index, "content_block": _block(event)}
        return sse.event(start, "content_block_start")

    def _block_delta(self, text: str) -> bytes:
        kind, name = self._kind
        return self._delta_event({"type": kind, name: text})

    def _delta_event(self, delta: dict[str, Any]) -> bytes:
        document = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return sse.event(document, "content_block_delta")

    def _finished(self, event: Finished) -> bytes:
        delta = {"stop_reason": _reason(event, refused=self._refused), "stop_sequence": event.sequence}
        document = {"type": "message_delta", "delta": delta, "usage": _usage_document(self._usage)}
        return sse.event(document, "message_delta")

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """Return the whole answer. The events must not hold one that failed."""
        message = self._message("")
        content: list[dict[str, Any]] = message["content"]
        texts: list[str] = []
        refused = False
        usage = Usage()
        for event in events:
            match event:
                case Started():
                    message = {**self._message(event.id), "content": content}
                case BlockStarted():
                    content.append(_block(event))
                    texts = []
                    refused = refused or event.kind is Kind.REFUSAL
                case Delta():
                    texts.append(event.text)
                case Signature():
                    content[-1]["signature"] = event.text
                case BlockEnded():
                    _fill(content[-1], "".join(texts))
                case Usage():
                    usage = usage.updated(event)
                case Finished():
                    message["stop_reason"] = _reason(event, refused=refused)
                    message["stop_sequence"] = event.sequence
        message["usage"] = _usage_document(usage)
        return message


def _reason(event: Finished, *, refused: bool) -> str:
    """Return why the answer ends; a model that refuses says so in other dialects by what it says."""
    return (Stop.REFUSAL if refused and event.stop is Stop.END else event.stop).value


_DELTA_TYPES = {
    Kind.TEXT: ("text_delta", "text"),
    Kind.REFUSAL: ("text_delta", "text"),
    Kind.THINKING: ("thinking_delta", "thinking"),
    Kind.CALL: ("input_json_delta", "partial_json"),
    Kind.REDACTED: ("text_delta", "text"),
}


def _block(event: BlockStarted) -> dict[str, Any]:
    match event.kind:
        case Kind.CALL:
            return {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
        case Kind.THINKING:
            return {"type": "thinking", "thinking": "", "signature": ""}
        case Kind.REDACTED:
            return {"type": "redacted_thinking", "data": event.data}
    return {"type": "text", "text": ""}


def _fill(block: dict[str, Any], text: str) -> None:
    match block["type"]:
        case "tool_use":
            block["input"] = _input(text)
        case "thinking":
            block["thinking"] = text
        case "text":
            block["text"] = text


def _input(text: str) -> Any:
    """Return a call's arguments. A stream would carry whatever the model wrote; here it must be an object."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return {"_raw": text}
    return value if isinstance(value, dict) else {"_raw": text}


_TYPES = {
    "invalid_request_error", "authentication_error", "billing_error", "permission_error", "not_found_error",
    "rate_limit_error", "timeout_error", "api_error", "overloaded_error", "request_too_large",
}  # fmt: skip


def error_document(error: Failed) -> dict[str, Any]:
    """Return an error in its envelope."""
    kind = error.type if error.type in _TYPES else "api_error"
    return {"type": "error", "error": {"type": kind, "message": error.message}}

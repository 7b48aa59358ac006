"""Answers as responses."""

from __future__ import annotations

from collections.abc import Mapping
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
    identity,
    usage_of,
)
from llmux.targets.codecs.responses_request import within

_PARTS = {"output_text": (Kind.TEXT, "text"), "refusal": (Kind.REFUSAL, "refusal")}
_PROSE = {
    "response.output_text.delta": Kind.TEXT,
    "response.refusal.delta": Kind.REFUSAL,
}
_THOUGHTS = {
    "response.reasoning_text.delta": "content_index",
    "response.reasoning_summary_text.delta": "summary_index",
}
_REASONS = {"max_output_tokens": Stop.LENGTH, "content_filter": Stop.REFUSAL}
_INCOMPLETE = {
    Stop.LENGTH: "max_output_tokens",
    Stop.WINDOW: "max_output_tokens",
    Stop.REFUSAL: "content_filter",
}


class AnswerDecoder(Decoder):
    """Reads an answer, in pieces or whole."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[Any] = set()  # blocks that have begun
        self._told: set[Any] = set()  # blocks of which something has arrived
        self._ids: dict[str, int] = {}
        self._thought: dict[int, tuple[str, int]] = {}  # by which event, and which part came last

    def feed(self, name: str, data: str) -> list[Event]:
        """Take one server-sent event."""
        return [] if data.startswith("[DONE]") else super().feed(name, data)

    def whole(self, document: dict[str, Any]) -> list[Event]:
        """Take a whole answer."""
        if document.get("object") != "response" and document.get("error"):
            return self._event(document, "error")
        if "output" not in document and document.get("status") != "failed":
            return self._fail("the engine's answer has no output")
        found = self._start(document)
        for index, item in enumerate(document.get("output") or ()):
            found += self._item_added(index, {**item, "content": None, "arguments": ""})
            found += self._item_done(index, item)
        return [*found, *self._end(document)]

    def _event(self, document: dict[str, Any], name: str) -> list[Event]:
        kind = document.get("type") or name
        prose = _PROSE.get(kind)
        if prose is not None:
            key = self._part(document)
            return [*self._begin(key, BlockStarted(prose)), *self._more(key, document["delta"])]
        if kind in _THOUGHTS:
            return self._thinks(kind, document)
        match kind:
            case "response.function_call_arguments.delta":
                return self._more(self._place(document), document["delta"])
            case "response.output_item.added":
                return self._item_added(self._place(document), document["item"])
            case "response.output_item.done":
                return self._item_done(self._place(document), document["item"])
            case "response.content_part.done":
                return self._blocks.end(self._part(document))
            case "response.created" | "response.in_progress":
                return self._start(document["response"])
            case "response.completed" | "response.incomplete" | "response.failed":
                return self._end(document["response"])
            case "error":
                error = document.get("error") or document
                code = error.get("code")
                message = str(error.get("message") or "the engine failed")
                return self._fail(
                    message, str(error.get("type") or "api_error"), None if code is None else str(code)
                )
        return []

    def _place(self, document: dict[str, Any]) -> int:
        """Return which item an event is about. Some engines send only its ID."""
        place = document.get("output_index")
        if place is not None:
            return int(place)
        given = document.get("item_id") or document["item"]["id"]
        return self._ids.setdefault(given, len(self._ids))

    def _part(self, document: dict[str, Any]) -> tuple[int, int]:
        return self._place(document), document.get("content_index") or 0

    def _start(self, response: dict[str, Any]) -> list[Event]:
        if self._started:
            return []
        self._started = True
        created = response.get("created_at") or 0
        return [Started(str(response.get("id") or identity()), str(response.get("model") or ""), int(created))]

    def _begin(self, key: Any, start: BlockStarted) -> list[Event]:
        if key in self._seen:
            return []
        self._seen.add(key)
        return self._blocks.start(key, start)

    def _more(self, key: Any, text: str) -> list[Event]:
        if not text:
            return []
        self._told.add(key)
        return self._blocks.delta(key, text)

    def _thinks(self, kind: str, document: dict[str, Any]) -> list[Event]:
        index = self._place(document)
        part = document.get(_THOUGHTS[kind]) or 0
        by, last = self._thought.setdefault(index, (kind, part))
        if by != kind:  # the same thoughts, once whole and once as a summary
            return []
        self._thought[index] = (kind, part)
        gap = "\n\n" if part != last else ""
        return [*self._begin(index, BlockStarted(Kind.THINKING)), *self._more(index, gap + document["delta"])]

    def _item_added(self, index: int, item: dict[str, Any]) -> list[Event]:
        if item.get("type") != "function_call":
            return []
        start = BlockStarted(
            Kind.CALL, str(item.get("call_id") or item.get("id") or ""), str(item.get("name") or "")
        )
        return [*self._begin(index, start), *self._more(index, item.get("arguments") or "")]

    def _item_done(self, index: int, item: dict[str, Any]) -> list[Event]:
        match item.get("type"):
            case "function_call":
                found = self._item_added(index, {**item, "arguments": ""})
                if index not in self._told:
                    found += self._more(index, item.get("arguments") or "")
                return [*found, *self._blocks.end(index)]
            case "reasoning":
                return self._thought_done(index, item)
            case "message":
                found = []
                for at, part in enumerate(item.get("content") or ()):
                    kind, name = _PARTS.get(part.get("type") or "", (None, ""))
                    if kind is None:
                        continue
                    found += self._begin((index, at), BlockStarted(kind))
                    if (index, at) not in self._told:
                        found += self._more((index, at), part.get(name) or "")
                    found += self._blocks.end((index, at))
                return found
        return []

    def _thought_done(self, index: int, item: dict[str, Any]) -> list[Event]:
        secret = item.get("encrypted_content") or ""
        texts = [str(part.get("text") or "") for part in item.get("content") or item.get("summary") or ()]
        found: list[Event] = []
        if index not in self._seen and not any(texts):
            if not secret:
                return []
            return [*self._begin(index, BlockStarted(Kind.REDACTED, data=secret)), *self._blocks.end(index)]
        found += self._begin(index, BlockStarted(Kind.THINKING))
        if index not in self._told:
            found += self._more(index, "\n\n".join(texts))
        if secret:
            found += self._blocks.sign(index, secret)
        return [*found, *self._blocks.end(index)]

    def _end(self, response: dict[str, Any]) -> list[Event]:
        if response.get("status") == "failed":
            error = response.get("error") or {}
            return self._fail(str(error.get("message") or "the engine failed"), "api_error", error.get("code"))
        self._over = True
        found = [*self._start(response), *self._blocks.finish()]
        if usage := response.get("usage"):
            found.append(usage_of(usage, "input", "output", "cache_write_tokens"))
        details = response.get("incomplete_details") or {}
        stop = Stop.CALLS if self._blocks.calls else Stop.END
        if response.get("status") == "incomplete":
            stop = _REASONS.get(details.get("reason") or "", Stop.LENGTH)
        return [*found, Finished(stop), ENDED]


def _usage_document(usage: Usage) -> dict[str, Any]:
    given, made = usage.input or 0, usage.output or 0
    details = {"cached_tokens": usage.cached or 0}
    if usage.cache_written is not None:
        details["cache_write_tokens"] = usage.cache_written
    return {
        "input_tokens": given,
        "input_tokens_details": details,
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": given + made,
    }


_ECHOED: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


class AnswerEncoder:
    """Writes an answer: as server-sent events, or whole. ``asked`` is the client's request, which is echoed."""

    def __init__(
        self,
        model: str,
        *,
        usage_in_stream: bool = False,  # noqa: ARG002 - it always is
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._asked = asked or {}
        self._spaced = {  # the tools of namespaces, by the names that the engine knows
            within(space["name"], tool["name"]): {"name": tool["name"], "namespace": space["name"]}
            for space in self._asked.get("tools") or ()
            if space.get("type") == "namespace"
            for tool in space.get("tools") or ()
            if "name" in tool
        }
        self._base: dict[str, Any] = {}
        self._serial = -1
        self._output: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        self._kind = Kind.TEXT
        self._item: dict[str, Any] = {}
        self._place: dict[str, Any] = {}  # of the deltas under way
        self._signature = ""
        self._usage: Usage | None = None
        self._finished = Finished(Stop.END)

    def feed(self, event: Event) -> bytes:
        """Return the server-sent events for an event."""
        match event:
            case Delta():
                self._pieces.append(event.text)
                return self._delta(event.text)
            case BlockStarted():
                return self._block_started(event)
            case BlockEnded():
                return self._block_ended()
            case Signature():
                self._signature = event.text
            case Usage():
                self._usage = (self._usage or Usage()).updated(event)
            case Started():
                return self._begin(event)
            case Finished():
                self._finished = event
            case Ended():
                response = self._response(*_status(self._finished.stop))
                return self._send(f"response.{response['status']}", response=response)
            case Failed():
                return self._failed(event)
        return b""

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """Return the whole answer. The events must not hold one that failed."""
        for event in events:
            self.feed(event)
        return self._response(*_status(self._finished.stop))

    def _begin(self, event: Started) -> bytes:
        given = event.id if event.id.startswith("resp_") else f"resp_{event.id}"
        asked = {name: self._asked.get(name, value) for name, value in _ECHOED.items()}
        self._base = {
            "id": given,
            "object": "response",
            "created_at": event.created,
            "model": self._model,
            "store": False,
            "previous_response_id": None,
            **{name: _ECHOED[name] if value is None else value for name, value in asked.items()},
        }
        response = self._response("in_progress")
        return self._send("response.created", response=response) + self._send(
            "response.in_progress", response=response
        )

    def _response(self, status: str, reason: str | None = None, error: Any = None) -> dict[str, Any]:
        return {
            **self._base,
            "status": status,
            "error": error,
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": list(self._output),
            "usage": None if status == "in_progress" else _usage_document(self._usage or Usage()),
        }

    def _send(self, kind: str, **fields: Any) -> bytes:
        self._serial += 1
        return sse.event({"type": kind, **fields, "sequence_number": self._serial}, kind)

    def _delta(self, text: str) -> bytes:
        self._serial += 1
        document = {**self._place, "delta": text, "sequence_number": self._serial}
        return sse.event(document, self._place["type"])

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._base['id'].removeprefix('resp_')}_{len(self._output)}"

    def _block_started(self, event: BlockStarted) -> bytes:
        self._kind, self._pieces, self._signature = event.kind, [], ""
        place = {"output_index": len(self._output)}
        item: dict[str, Any]
        where: dict[str, Any] = {}
        kind = ""
        match event.kind:
            case Kind.CALL:
                item = {
                    "type": "function_call",
                    "id": self._id("fc"),
                    "call_id": event.id,
                    "name": event.name,
                    "arguments": "",
                    "status": "in_progress",
                    **self._spaced.get(event.name, {}),
                }
                kind = "response.function_call_arguments.delta"
            case Kind.THINKING:
                item = {"type": "reasoning", "id": self._id("rs"), "summary": []}
                kind, where = "response.reasoning_summary_text.delta", {"summary_index": 0}
            case Kind.REDACTED:
                item = {"type": "reasoning", "id": self._id("rs"), "summary": [], "encrypted_content": event.data}
            case _:
                item = {
                    "type": "message",
                    "id": self._id("msg"),
                    "role": "assistant",
                    "status": "in_progress",
                    "content": [],
                }
                refused = event.kind is Kind.REFUSAL
                kind = "response.refusal.delta" if refused else "response.output_text.delta"
                where = {"content_index": 0} if refused else {"content_index": 0, "logprobs": []}
        self._item = item
        self._place = {"type": kind, "item_id": item["id"], **place, **where}
        part = self._send("response.output_item.added", item=item, **place)
        if event.kind is Kind.THINKING:
            part += self._at("response.reasoning_summary_part.added", part={"type": "summary_text", "text": ""})
        elif event.kind in {Kind.TEXT, Kind.REFUSAL}:
            part += self._at("response.content_part.added", part=_part(event.kind, ""))
        return part

    def _at(self, kind: str, **fields: Any) -> bytes:
        place = {name: value for name, value in self._place.items() if name not in {"type", "logprobs"}}
        return self._send(kind, **place, **fields)

    def _block_ended(self) -> bytes:
        text = "".join(self._pieces)
        item: dict[str, Any] = self._item
        sent = b""
        match self._kind:
            case Kind.CALL:
                item = {**item, "arguments": text, "status": "completed"}
                sent = self._at("response.function_call_arguments.done", name=item["name"], arguments=text)
            case Kind.THINKING:
                part = {"type": "summary_text", "text": text}
                item = {**item, "summary": [part]}
                if self._signature:
                    item["encrypted_content"] = self._signature
                sent = self._at("response.reasoning_summary_text.done", text=text)
                sent += self._at("response.reasoning_summary_part.done", part=part)
            case Kind.TEXT | Kind.REFUSAL:
                item = {**item, "content": [_part(self._kind, text)], "status": "completed"}
                if self._kind is Kind.TEXT:
                    sent = self._at("response.output_text.done", text=text, logprobs=[])
                else:
                    sent = self._at("response.refusal.done", refusal=text)
                sent += self._at("response.content_part.done", part=_part(self._kind, text))
        place = {"output_index": len(self._output)}
        self._output.append(item)
        return sent + self._send("response.output_item.done", item=item, **place)

    def _failed(self, error: Failed) -> bytes:
        code = error.code or error.type
        told = {"code": code, "message": error.message}
        sent = b""
        if self._base:
            sent = self._send("response.failed", response=self._response("failed", error=told))
        return sent + self._send("error", **told, param=None, error={**told, "type": error.type, "param": None})


def _part(kind: Kind, text: str) -> dict[str, Any]:
    if kind is Kind.REFUSAL:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(stop: Stop) -> tuple[str, str | None]:
    reason = _INCOMPLETE.get(stop)
    return ("completed", None) if reason is None else ("incomplete", reason)

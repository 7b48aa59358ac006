"""Answers as chat completions."""

from __future__ import annotations

import json
from typing import Any

from llmux.targets.codecs import sse
from llmux.targets.codecs.answer import (
    ENDED,
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
from llmux.targets.codecs.request import TOOL_CALL, seal

_STOPS = {
    "stop": Stop.END,
    "length": Stop.LENGTH,
    "tool_calls": Stop.CALLS,
    "function_call": Stop.CALLS,
    "content_filter": Stop.REFUSAL,
}
_REASONS = {
    Stop.END: "stop",
    Stop.SEQUENCE: "stop",
    Stop.PAUSE: "stop",
    Stop.LENGTH: "length",
    Stop.WINDOW: "length",
    Stop.CALLS: "tool_calls",
    Stop.REFUSAL: "content_filter",
}
_FAILED = frozenset({"error", "abort"})  # of what is said when the engine, not the model, has ended an answer
_PARTS = {
    "text": (Kind.TEXT, "text"),
    "refusal": (Kind.REFUSAL, "refusal"),
    "thinking": (Kind.THINKING, "thinking"),
}
DONE = b"data: [DONE]\n\n"


class AnswerDecoder(Decoder):
    """Reads an answer, in pieces or whole."""

    def __init__(self) -> None:
        super().__init__()
        self._whole = False  # it comes in one piece
        self._prose = ("", 0)  # the block that the next text, thought or refusal continues
        self._thought = ""  # all of the last thought
        self._call = -1  # the last call
        self._places: dict[Any, int] = {}  # the engine's index → ours
        self._ids: dict[int, str] = {}
        self._unnamed: dict[Any, dict[str, Any]] = {}  # calls whose names have not come, by the engine's index
        self._bare = -1  # a call that began with `{}`, which may be all of its arguments, or not
        self._finish: str | None = None
        self._sequence: str | None = None
        self._usage: Usage | None = None

    def feed(self, name: str, data: str) -> list[Event]:
        """Handle one server-sent event."""
        if self._over or not data.startswith("[DONE]"):
            return super().feed(name, data)
        return self._end() if self._started else self._fail("the engine's answer is empty")

    def whole(self, document: dict[str, Any]) -> list[Event]:
        """Handle a whole answer."""
        self._whole = True
        if not document.get("choices") and not document.get("error") and document.get("object") != "error":
            return self._fail("the engine's answer has no choices")
        return [*self._chunk(document, "message"), *self._end()]

    def cut(self) -> list[Event]:
        """The engine sends no more."""
        return self._end() if self._finish and not self._over else super().cut()

    def _event(self, document: dict[str, Any], name: str) -> list[Event]:  # noqa: ARG002 - chat's have no names
        return self._chunk(document, "delta")

    def _chunk(self, document: dict[str, Any], part: str) -> list[Event]:
        if error := document.get("error") or (document if document.get("object") == "error" else None):
            return self._fail(*error_of(error))
        found: list[Event] = []
        choices = document.get("choices") or ()
        # Before the answer itself, Azure's say what they think of the question, under no name.
        if not self._started and (choices or document.get("id")):
            self._started = True
            named = str(document.get("id") or identity())
            found.append(Started(named, str(document.get("model") or ""), document.get("created") or 0))
        # Moonshot's have it in the choice.
        if usage := document.get("usage") or (choices and choices[0].get("usage")):
            self._usage = usage_of(usage, "prompt", "completion", "cache_creation_tokens")
        for choice in choices:
            if not choice.get("index"):
                if delta := choice.get(part):
                    found += self._delta(delta)
                if reason := choice.get("finish_reason"):
                    self._finish = str(reason)
                    stop = choice.get("stop_reason") or choice.get("matched_stop")  # as SGLang's
                    self._sequence = stop if isinstance(stop, str) else None
                if error := choice.get("error"):
                    return found + self._fail(*error_of(error))
        return found

    def _delta(self, delta: dict[str, Any]) -> list[Event]:
        found: list[Event] = []
        content = delta.get("content")
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        details = delta.get("reasoning_details")
        if details:
            if thought and thought != "".join(detail.get("text") or "" for detail in details):
                found += self._say(Kind.THINKING, thought)
                details = [{**detail, "text": None} for detail in details]
            for detail in details:
                found += self._detail(detail)
        elif thought:
            found += self._say(Kind.THINKING, thought)
        if content:
            if isinstance(content, str):
                found += self._say(Kind.TEXT, content)
            else:
                for each in content:
                    found += self._part(each)
        if refusal := delta.get("refusal"):
            found += self._say(Kind.REFUSAL, refusal)
        for at, call in enumerate(delta.get("tool_calls") or ()):
            # In a whole answer each is a call of its own, whatever it is called.
            found += self._tool_call({"index": at, **call} if self._whole else call)
        if call := delta.get("function_call"):
            found += self._tool_call({"index": 0, "function": call})
        return found

    def _part(self, part: dict[str, Any]) -> list[Event]:
        kind = _PARTS.get(part.get("type") or "text")
        said = None if kind is None else part.get(kind[1])
        if isinstance(said, list):  # Mistral's thoughts are parts again
            said = "".join(each.get("text") or "" for each in said)
        return [] if kind is None or not said else self._say(kind[0], said)

    def _detail(self, detail: dict[str, Any]) -> list[Event]:
        """Handle a thought with its provider's mark."""
        blocks, text, signature = self._blocks, detail.get("text") or "", detail.get("signature")
        if detail.get("data"):
            key = self._prose = ("", self._prose[1] + 1)
            return [*blocks.start(key, BlockStarted(Kind.REDACTED, data=seal(detail))), *blocks.end(key)]
        if not signature:
            return self._say(Kind.THINKING, text) if text else []
        found: list[Event] = []
        if self._prose[0] != Kind.THINKING.value or (text and text != self._thought):
            found = [*self._begin(Kind.THINKING), *(blocks.delta(self._prose, text) if text else ())]
        said = {name: value for name, value in detail.items() if name != "text"}
        found += blocks.sign(self._prose, seal(said))
        self._prose = ("", self._prose[1])  # a further thought is another one
        return found

    def _begin(self, kind: Kind) -> list[Event]:
        self._prose = (kind.value, self._prose[1] + 1)
        self._thought = ""
        return [*self._settled(), *self._blocks.start(self._prose, BlockStarted(kind))]

    def _say(self, kind: Kind, text: str) -> list[Event]:
        found = [] if self._prose[0] == kind.value else self._begin(kind)
        if kind is Kind.THINKING:
            self._thought += text
        return [*found, *self._blocks.delta(self._prose, text)]

    def _tool_call(self, call: dict[str, Any]) -> list[Event]:
        function, index = call.get("function") or {}, call.get("index")
        name, given = function.get("name") or "", call.get("id") or ""
        arguments = function.get("arguments") or ""
        told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        place = self._place(index, given, name, told)
        found: list[Event] = []
        if place is None:
            if early := self._unnamed.pop(index, None):
                given, told = given or early["id"], early["function"]["arguments"] + told
            if not name and not (self._whole or self._over):  # it comes with a later piece
                self._unnamed[index] = {"id": given, "index": index, "function": {"arguments": told}}
                return []
            place = self._call = self._call + 1
            self._places[index] = place
            taken = self._ids.values()
            self._ids[place] = f"{given}_{place}" if given in taken else given or f"call_{identity()}"
            self._prose = ("", self._prose[1])
            found = self._settled()
            if extra := call.get("extra_content"):
                mark = seal({"type": TOOL_CALL, "id": self._ids[place], "extra_content": extra})
                found += self._blocks.start(("extra", place), BlockStarted(Kind.REDACTED, data=mark))
                found += self._blocks.end(("extra", place))
            found += self._blocks.start(place, BlockStarted(Kind.CALL, self._ids[place], name))
            if told == "null":  # as models write of tools that take none
                return found
            if told == "{}" and not self._whole:
                self._bare = place
                return found
        elif told and place == self._bare:
            self._bare = -1
        return found + self._blocks.delta(place, told) if told else found

    def _settled(self) -> list[Event]:
        """Return what is due before something else begins."""
        bare, self._bare = self._bare, -1
        return self._blocks.delta(bare, "{}") if bare >= 0 else []

    def _place(self, index: Any, given: str, name: str, told: str) -> int | None:
        """Return which call this continues; None for a new one.

        Some engines number all calls alike, or not at all: then another name and ID begin a new one, and so does a
        name with arguments after a call that is whole.
        """
        place = self._places.get(index)
        if place is None:
            return None
        if given and name and given != self._ids[place] and f"{given}_{place}" != self._ids[place]:
            return next((known for known, id_ in self._ids.items() if id_ == given), None)
        if name and not given:
            whole = place == self._bare or self._blocks.is_whole(place)
            if index is None or (told and whole):
                return None
        return place

    def _end(self) -> list[Event]:
        if self._finish in _FAILED:
            return self._fail(f"the engine ended its answer: {self._finish}")
        self._over = True
        found: list[Event] = [] if self._started else [Started(identity(), "")]
        unnamed, self._unnamed = self._unnamed, {}
        for call in unnamed.values():
            found += self._tool_call(call)
        found += self._blocks.finish()
        if self._usage is not None:
            found.append(self._usage)
        stop = _STOPS.get(self._finish or "stop", Stop.END)
        if stop is Stop.END and self._blocks.calls:
            stop = Stop.CALLS  # engines say "stop" although they call
        elif stop is Stop.CALLS and not self._blocks.calls:
            stop = Stop.END  # or "tool_calls" although they call nothing: an agent would look for a call
        elif stop is Stop.END and self._sequence is not None:
            stop = Stop.SEQUENCE
        return [*found, Finished(stop, self._sequence if stop is Stop.SEQUENCE else None), ENDED]


def usage_document(usage: Usage) -> dict[str, Any]:
    """Return tokens in the form of a chat completion."""
    given, made = usage.input or 0, usage.output or 0
    document: dict[str, Any] = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    if usage.cached is not None or usage.cache_written is not None:
        document["prompt_tokens_details"] = {"cached_tokens": usage.cached or 0}
        if usage.cache_written is not None:
            document["prompt_tokens_details"]["cache_creation_tokens"] = usage.cache_written
    if usage.reasoning is not None:
        document["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return document


def error_of(error: Any) -> tuple[str, str, str | None]:
    """Return message, type and code of an error."""
    if not isinstance(error, dict):
        return str(error), "api_error", None
    code = error.get("code")
    # FastAPI says `detail`, a text or a list of what is wrong; others nest the whole once more.
    said = next((error[name] for name in ("message", "detail", "error") if error.get(name)), "the engine failed")
    if isinstance(said, dict | list):
        said = json.dumps(said, ensure_ascii=False)
    return (
        str(said),
        str(error.get("type") or "api_error"),
        None if code is None else str(code),
    )


class AnswerEncoder:
    """Writes an answer: as server-sent events, or whole."""

    def __init__(self, model: str, *, usage_in_stream: bool = False) -> None:
        self._model = model
        self._usage_in_stream = usage_in_stream
        self._base: dict[str, Any] = {}
        self._kind = Kind.TEXT
        self._thought = ""
        self._calls = -1
        self._usage: Usage | None = None
        self._role: dict[str, Any] = {"role": "assistant"}

    def feed(self, event: Event) -> bytes:
        """Return the server-sent events for an event."""
        match event:
            case Delta():
                return self._chunk(self._said(event.text))
            case BlockStarted():
                return self._started(event)
            case Signature():
                return self._chunk({"reasoning_details": [_signed(self._thought, event.text)]})
            case Usage():
                self._usage = (self._usage or Usage()).updated(event)
            case Started():
                self._begin(event)
            case Finished():
                return self._chunk({}, _REASONS[event.stop])
            case Ended():
                return self._end()
            case Failed():
                return sse.event(error_document(event))
        return b""

    def _begin(self, event: Started) -> None:
        self._base = {
            "id": event.id if event.id.startswith("chatcmpl") else f"chatcmpl-{event.id}",
            "object": "chat.completion.chunk",
            "created": event.created,
            "model": self._model,
        }

    def _said(self, text: str) -> dict[str, Any]:
        kind = self._kind
        if kind is Kind.TEXT:
            return {"content": text}
        if kind is Kind.CALL:
            return {"tool_calls": [{"index": self._calls, "function": {"arguments": text}}]}
        if kind is Kind.REFUSAL:
            return {"refusal": text}
        self._thought += text
        return {"reasoning_content": text}

    def _started(self, event: BlockStarted) -> bytes:
        self._kind = event.kind
        self._thought = ""
        if event.kind is Kind.REDACTED:
            return self._chunk({"reasoning_details": [_encrypted(event.data)]})
        if event.kind is not Kind.CALL:
            return b""
        self._calls += 1
        function = {"name": event.name, "arguments": ""}
        call = {"index": self._calls, "id": event.id, "type": "function", "function": function}
        return self._chunk({"tool_calls": [call]})

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        if self._role:
            delta = {**self._role, **delta}
            if "tool_calls" not in delta:
                delta.setdefault("content", "")
            self._role = {}
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return sse.event({**self._base, "choices": [choice]})

    def _end(self) -> bytes:
        if not self._usage_in_stream:
            return DONE
        return sse.event({**self._base, "choices": [], "usage": usage_document(self._usage or Usage())}) + DONE

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """Return the whole answer. The events must not hold one that failed."""
        message: dict[str, Any] = {"role": "assistant", "content": None}
        calls: list[dict[str, Any]] = []
        details: list[dict[str, Any]] = []
        usage, finish = Usage(), Finished(Stop.END)
        kind, thought = Kind.TEXT, ""
        for event in events:
            match event:
                case Started():
                    self._begin(event)
                case BlockStarted(kind=Kind.CALL):
                    kind = Kind.CALL
                    function = {"name": event.name, "arguments": ""}
                    calls.append({"id": event.id, "type": "function", "function": function})
                case BlockStarted(kind=Kind.REDACTED):
                    details.append(_encrypted(event.data))
                case BlockStarted():
                    kind, thought = event.kind, ""
                case Delta() if kind is Kind.CALL:
                    calls[-1]["function"]["arguments"] += event.text
                case Delta():
                    name = next(iter(_PROSE[kind]))
                    message[name] = (message.get(name) or "") + event.text
                    thought += event.text if kind is Kind.THINKING else ""
                case Signature():
                    details.append(_signed(thought, event.text))
                case Usage():
                    usage = usage.updated(event)
                case Finished():
                    finish = event
        if calls:
            message["tool_calls"] = calls
        if details:
            message["reasoning_details"] = details
        choice = {"index": 0, "message": message, "finish_reason": _REASONS[finish.stop]}
        base = {**self._base, "object": "chat.completion"}
        return {**base, "choices": [choice], "usage": usage_document(usage)}


_PROSE = {Kind.TEXT: ("content",), Kind.THINKING: ("reasoning_content",), Kind.REFUSAL: ("refusal",)}


def _signed(thought: str, signature: str) -> dict[str, Any]:
    document: dict[str, Any] = {"type": "reasoning.text", "signature": signature}
    return {**document, "text": thought} if thought else document


def _encrypted(data: str) -> dict[str, Any]:
    return {"type": "reasoning.encrypted", "data": data}


def error_document(error: Failed) -> dict[str, Any]:
    """Return an error in its envelope."""
    return {"error": {"message": error.message, "type": error.type, "code": error.code, "param": None}}

"""Requests and answers in each dialect, for the tests of the codecs."""

from __future__ import annotations

import json
from typing import Any

from llmux.targets.codecs import Dialect, Translation

CHAT, MESSAGES, RESPONSES = Dialect.CHAT, Dialect.MESSAGES, Dialect.RESPONSES
ASKED: dict[Dialect, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    MESSAGES: {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stream": True},
    RESPONSES: {"model": "m", "input": "hi", "stream": True},
}


def wire(*documents: Any, named: bool = False, done: bool = False) -> bytes:
    """Write server-sent events."""
    sent = b""
    for document in documents:
        if named:
            sent += f"event: {document['type']}\n".encode()
        sent += b"data: " + json.dumps(document).encode() + b"\n\n"
    return sent + b"data: [DONE]\n\n" * done


def read(sent: bytes) -> list[dict[str, Any]]:
    """Read server-sent events, and hold that names and types agree."""
    found = []
    for block in sent.decode().split("\n\n"):
        if not block:
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if fields["data"] == "[DONE]":
            found.append({"type": "[DONE]"})
            continue
        document = json.loads(fields["data"])
        assert fields.get("event", document.get("type")) == document.get("type")
        found.append(document)
    return found


def translate(
    client: Dialect, engine: Dialect, sent: bytes, *, asked: dict[str, Any] | None = None, piece: int = 0
) -> list[dict[str, Any]]:
    """Have an engine's stream translated for a client: whole, or in pieces of so many bytes."""
    translation = Translation(client, engine, lossy=True)
    translation.request(ASKED[client] | (asked or {}))
    stream = translation.stream("m")
    step = piece or max(1, len(sent))
    got = b"".join(stream.feed(sent[start : start + step]) for start in range(0, len(sent), step))
    return read(got + stream.end())


def requested(
    client: Dialect, engine: Dialect, *, lossy: bool = False, **fields: Any
) -> tuple[dict[str, Any], Translation]:
    """Have a request translated."""
    translation = Translation(client, engine, lossy=lossy)
    return translation.request(ASKED[client] | fields), translation


# ---- an engine that speaks chat


def chunk(delta: Any = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {
        "id": "chatcmpl-7",
        "object": "chat.completion.chunk",
        "model": "e",
        "created": 5,
        "choices": choices,
        **more,
    }


def call(index: Any, id_: str | None = None, name: str | None = None, arguments: Any = None) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fields = {"index": index, "id": id_, "type": "function" if id_ else None, "function": function}
    return {"tool_calls": [{key: value for key, value in fields.items() if value is not None}]}


# ---- an engine that speaks messages


def message_start(**usage: Any) -> dict[str, Any]:
    message = {"id": "msg_7", "type": "message", "role": "assistant", "model": "e", "content": []}
    return {
        "type": "message_start",
        "message": {**message, "usage": {"input_tokens": 0, "output_tokens": 0, **usage}},
    }


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def message_end(reason: str = "end_turn", sequence: str | None = None, **usage: Any) -> list[dict[str, Any]]:
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return [
        {"type": "message_delta", "delta": delta, "usage": usage or {"output_tokens": 3}},
        {"type": "message_stop"},
    ]


def told(documents: list[dict[str, Any]]) -> list[Any]:
    """Return the content of a stream of messages as it stands at its end; hold that its order is right."""
    content: list[dict[str, Any]] = []
    opened: int | None = None
    for document in documents:
        match document["type"]:
            case "content_block_start":
                assert opened is None, "a block begins within another"
                assert document["index"] == len(content)
                opened = document["index"]
                content.append({**document["content_block"], "_json": ""})
            case "content_block_delta":
                assert document["index"] == opened
                _more(content[-1], document["delta"])
            case "content_block_stop":
                assert document["index"] == opened, "an end without a beginning"
                opened = None
    assert opened is None
    assert [document["type"] for document in documents].count("message_start") == 1
    for each in content:
        text = each.pop("_json")
        if text:
            each["input"] = json.loads(text)
    return content


def _more(content: dict[str, Any], delta: dict[str, Any]) -> None:
    match delta["type"]:
        case "text_delta":
            content["text"] += delta["text"]
        case "thinking_delta":
            content["thinking"] += delta["thinking"]
        case "signature_delta":
            content["signature"] = delta["signature"]
        case "input_json_delta":
            content["_json"] += delta["partial_json"]

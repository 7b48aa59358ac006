"""Which conversation a request belongs to, and where that was served last.

A client names it in ``X-LLMux-Conversation``. Without that, it is a hash of what every request of a conversation
begins with: the system prompt and the first turn of the user. Cache marks are ignored, as clients move them from
turn to turn.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from hashlib import blake2b
from typing import Any

from llmux.errors import BadRequestError
from llmux.extract import Body
from llmux.targets.field_scanner import scan
from llmux.targets.resolution import Target

HEADER = "X-LLMux-Conversation"
MOST = 10_000  # conversations that are remembered
WINDOW = 64 * 1024  # bytes of the messages in which the first turn is looked for

_SYSTEM = ("system", "instructions")
_TURNS = ("messages", "input", "prompt")
_decoder = json.JSONDecoder()
_encoder = json.JSONEncoder(sort_keys=True)


async def conversation_of(given: str | None, body: Body | None) -> str | None:
    """Return the name of a conversation, from a client's header or from the body; None if there is none.

    It yields to other tasks. BadRequestError for an invalid header.
    """
    if given is not None:
        if not given.isprintable() or not 0 < len(given) <= 256:  # noqa: PLR2004
            raise BadRequestError(f"{HEADER} must be 1 to 256 printable characters", param=HEADER)
        return f"={given}"
    if body is None or body.form or body.compressed:
        return None
    try:
        found = await scan(body, 0, body.received, (*_SYSTEM, *_TURNS))
    except BadRequestError:  # the engine judges that
        return None
    digest = blake2b(digest_size=16)
    any_turn = False
    for member in found.found:
        begin = b"".join(body.part(member.start, min(member.end, member.start + WINDOW)))
        turn = member.name in _TURNS
        any_turn = any_turn or turn
        digest.update(member.name.encode())
        digest.update(_first_turn(begin) if turn else _canonical(begin))
    return digest.hexdigest() if any_turn else None


def _first_turn(text: bytes) -> bytes:
    """Return the beginning of an array of messages, up to the first turn of the user."""
    if not text.startswith(b"["):
        return _canonical(text)
    turns: list[Any] = []
    shown = text.decode(errors="replace")
    pos = 1
    while True:
        pos = _after_blanks(shown, pos)
        try:
            turn, pos = _decoder.raw_decode(shown, pos)
        except (ValueError, RecursionError):  # its end is beyond the window, or there are no more messages
            break
        turns.append(turn)
        if not isinstance(turn, dict) or turn.get("role") == "user":
            return _of_turns(turns, text)
        pos = _after_blanks(shown, pos)
        if shown[pos : pos + 1] != ",":
            return _of_turns(turns, text)
        pos += 1
    return text


def _of_turns(turns: list[Any], text: bytes) -> bytes:
    """Return what these have in common in all requests; ``text``, as it was sent, if it is nested too deeply."""
    try:
        return _text(_plain(turns))
    except RecursionError:
        return text


def _after_blanks(text: str, pos: int) -> int:
    while text[pos : pos + 1] in {" ", "\n", "\r", "\t"}:
        pos += 1
    return pos


def _canonical(text: bytes) -> bytes:
    try:
        return _text(_plain(json.loads(text)))
    except (ValueError, RecursionError):
        return text


def _text(value: Any) -> bytes:
    return _encoder.encode(value).encode()


def _plain(value: Any) -> Any:
    """Return a message without its cache marks, and with a lone text as the list that some clients send."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items() if key != "cache_control"}
        if isinstance(plain.get("content"), str):
            plain["content"] = [{"type": "text", "text": plain["content"]}]
        return plain
    return value


class Conversations:
    """Where the last conversations were served, by virtual model, key and conversation."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, str | None, str], Target] = OrderedDict()

    def get(self, asked: str, key: str | None, conversation: str | None) -> Target | None:
        """Return where it was served last."""
        return None if conversation is None else self._last.get((asked, key, conversation))

    def keep(self, asked: str, key: str | None, conversation: str | None, target: Target) -> None:
        """Record where it is served."""
        if conversation is None:
            return
        place = (asked, key, conversation)
        self._last[place] = target
        self._last.move_to_end(place)
        if len(self._last) > MOST:
            self._last.popitem(last=False)

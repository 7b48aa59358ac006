"""Server-sent events: from bytes in any pieces, and to bytes."""

from __future__ import annotations

import json
from typing import Any

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_BOM = b"\xef\xbb\xbf"
MOST = 64 * 2**20
"""Bytes of an event that are kept; one that is longer is none."""


class EventParser:
    """Takes a stream apart into events, each its name ("" for none) and its data."""

    def __init__(self) -> None:
        self.too_long = False
        """Whether an event was, which ends the stream."""
        self._rest: list[bytes] = []  # of a line that has not ended
        self._held = 0  # bytes of it, and of the event
        self._name = ""
        self._data: list[str] = []
        self._first = True
        self._after_return = False

    def feed(self, data: bytes) -> list[tuple[str, str]]:
        """Return the events that are complete with these bytes."""
        if not data:
            return []
        if self._first:
            data = b"".join([*self._rest, data])
            self._rest = []
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._rest = [data]
                return []
            self._first = False
            data = data.removeprefix(_BOM)
        if b"\r" in data or self._after_return:
            data = self._with_newlines(data)
        if b"\n" not in data:
            self._hold(data)
            return []
        *lines, rest = b"".join([*self._rest, data]).split(b"\n")
        self._rest, self._held = [], sum(map(len, self._data))
        found = self._lines(lines)
        self._hold(rest)
        return found

    def _hold(self, rest: bytes) -> None:
        if rest:
            self._rest.append(rest)
            self._held += len(rest)
        if self._held > MOST:
            self.too_long = True
            self._rest, self._data = [], []

    def _lines(self, lines: list[bytes]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for line in lines:
            if not line:
                if any(self._data):  # one without data is none: some servers keep a connection open with them
                    found.append((self._name, "\n".join(self._data)))
                self._data, self._held = [], 0
                self._name = ""
                continue
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" ").decode(errors="replace"))
                self._held += len(value)
            elif field == b"event":
                self._name = value.removeprefix(b" ").decode(errors="replace")
        return found

    def _with_newlines(self, data: bytes) -> bytes:
        """Return the bytes with line feeds only; a return at their end may be half of a pair."""
        if self._after_return:
            data = data.removeprefix(b"\n")
        self._after_return = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def event(document: Any, name: str = "") -> bytes:
    """Return one event."""
    try:
        data = _encode(document).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which some engines cut an emoji into
        data = json.dumps(document).encode()
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data) if name else b"data: %b\n\n" % data

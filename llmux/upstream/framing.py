"""How a response's body is delimited (RFC 9112, section 6.3), and a tracker of chunked bodies.

The tracker never takes a body apart: it walks along the bytes, which pass through as they are, and knows
where the body ends and whether the stream stands *between* two chunks, the only place where a chunk of
another one may be put in.
"""

from __future__ import annotations

import enum
import re

_CRLF = b"\r\n"
_CR = 0x0D
_LF = 0x0A

# A size line: hexadecimal size, then perhaps extensions, which are not used and must be skipped.
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
# What a size line that has not arrived whole may look like.
_PART_OF_SIZE_LINE = re.compile(rb"[0-9A-Fa-f]{1,15}[ \t]*(?:;[^\r\n]*)?\r?")

# The usual size lines of events, up to 4 KiB.
_USUAL = {b"%x" % size: size for size in range(1, 4096)}

MAX_SIZE_LINE = 4096
MAX_TRAILERS = 65536


class Framing(enum.Enum):
    """What ends a body."""

    NONE = "none"  # there is none: HEAD, 204, 304
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until_close"
    TUNNEL = "tunnel"  # 101: no HTTP any more, in either direction


class ChunkError(Exception):
    """The body is not chunked as it should be. The bytes before ``offset`` were sound."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def is_one_chunk(data: bytes) -> bool:
    """Whether these bytes, which begin with a size line, are exactly one chunk as they usually are.

    Quick; False means nothing.
    """
    line = data[: data.find(_CRLF, 1, 5)]
    size = _USUAL.get(line)
    return size is not None and len(line) + size + 4 == len(data) and data[-2:] == _CRLF


class ChunkTracker:
    """Follows one chunked body."""

    __slots__ = ("_left", "_line", "_trailers")

    def __init__(self) -> None:
        self._left = 0  # bytes of the current chunk still to come, its CRLF included; 0: a size line is next
        self._line = b""  # the part of a size line, or of the trailers, that has come so far
        self._trailers = False  # the last chunk has been seen

    @property
    def between_chunks(self) -> bool:
        """Whether the next byte would be the first of a size line."""
        return not (self._left or self._line or self._trailers)

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:  # noqa: C901, the innermost loop
        """Walk along ``data``. Return where in it the body ends, or -1.

        With ``payload``, the chunks' contents are appended to it.
        """
        shift = 0
        if self._line:
            # A line was split between two reads: look at it whole. Rare enough to copy.
            shift = len(self._line)
            data = self._line + data
        left = self._left
        position = 0
        length = len(data)
        while True:
            if left:
                available = length - position
                if payload is not None and left > len(_CRLF):
                    payload.append(data[position : position + min(available, left - len(_CRLF))])
                if available < left:
                    left -= available
                    if left == 1 and data[-1] != _CR:
                        raise self._error("a chunk is longer than its size says", length - 1 - shift)
                    break
                position += left
                if data[position - 1] != _LF or (left > 1 and data[position - 2] != _CR):
                    raise self._error("a chunk is longer than its size says", position - min(left, 2) - shift)
                left = 0
            if self._trailers:
                return self._in_trailers(data, position, shift)
            if position == length:
                self._line = b""
                break
            match = _SIZE_LINE.match(data, position)
            if match is None:
                self._split_line(data, position, shift)
                break
            position = match.end()
            size = int(match[1], 16)
            if size:
                self._line = b""
                left = size + len(_CRLF)
            else:
                self._trailers = True
        self._left = left
        return -1

    def _split_line(self, data: bytes, position: int, shift: int) -> None:
        line = data[position:]
        if len(line) > MAX_SIZE_LINE or _PART_OF_SIZE_LINE.fullmatch(line) is None:
            # Between chunks all the same, unless the line's beginning has been passed on before.
            raise self._error("a chunk's size line cannot be read", position - shift, between=position >= shift)
        self._line = line

    def _in_trailers(self, data: bytes, position: int, shift: int) -> int:
        if data.startswith(_CRLF, position):
            return position + len(_CRLF) - shift
        end = data.find(b"\r\n\r\n", position)
        if end >= 0:
            return end + 4 - shift
        self._left = 0
        self._line = data[position:]
        if len(self._line) > MAX_TRAILERS:
            raise self._error("the trailers are too long", position - shift)
        return -1

    def _error(self, message: str, offset: int, *, between: bool = False) -> ChunkError:
        self._line = b""
        self._left = 0 if between else 1
        return ChunkError(message, max(offset, 0))

"""The ``model`` field of a multipart/form-data body (audio) that arrives in slices.

The scanner keeps what it has not understood yet: at most a part's headers or the model's value; of any other
content only as many bytes as may begin the next boundary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from llmux.errors import BadRequestError
from llmux.extract.model_field import MAX_NAME, ModelField, ambiguous, checked_name, name_too_long

MAX_HEADERS = 8 * 1024
"""Bytes: the most that the headers of one part may take."""

MAX_PARTS = 1000
"""Parts of one body. Real forms have a dozen; each costs some microseconds."""

_CRLF = b"\r\n"
_PADDING = re.compile(rb"[ \t]*")
_MAX_PADDING = 64
_PARAMETER = re.compile(r"""\s*;\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))""", re.DOTALL)
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_QUOTED_PAIR = re.compile(r'\\(["\\])')


class MultipartScanner:
    """Finds the form field named ``model``. The last one counts.

    ``feed`` and ``finish`` raise BadRequestError; after that the scanner is of no use.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = _CRLF + b"--" + boundary
        # The first delimiter may stand at the very start, as if a line had ended before it.
        self._rest = _CRLF
        self._offset = -len(_CRLF)  # of the rest, in the body
        self._state: Callable[[bytes, int], int] = self._content
        self._is_model = False
        self.alike = False
        """Whether a field's name differs from ``model`` in case only."""
        self._parts = 0
        self._model: bytes | None = None
        self._at = (0, 0)

    def feed(self, data: bytes) -> None:
        """Take the next slice of the body, at most ``SLICE`` bytes for a bounded time."""
        text = self._rest + data if self._rest else data
        pos = 0
        while (step := self._state(text, pos)) >= 0:
            pos = step
        pos = -step - 1
        self._rest = text[pos:]
        self._offset += pos

    def finish(self) -> ModelField | None:
        """Say what was found, after the last slice: None when the form has no field ``model``."""
        if self._state != self._epilogue:
            raise _malformed("the final boundary is missing")
        if self._model is None:
            return None
        if self.alike:
            raise ambiguous("the form")
        try:
            name = self._model.decode()
        except UnicodeDecodeError:
            raise BadRequestError("model is not valid UTF-8", param="model") from None
        return ModelField(checked_name(name), *self._at)

    # The states. Each returns the position where the next one goes on, or, when it needs more bytes,
    # _wait_from() the first one that it has not done with.

    def _content(self, text: bytes, pos: int) -> int:
        found = text.find(self._delimiter, pos)
        if found < 0:
            found = len(text)
            if self._is_model and found - pos > MAX_NAME + len(self._delimiter):
                raise name_too_long()
            # The value is short and kept whole; of other content, what may begin the boundary.
            kept = pos if self._is_model else max(pos, found - len(self._delimiter) + 1)
            return _wait_from(kept)
        if self._is_model:
            if found - pos > MAX_NAME:
                raise name_too_long()
            self._model = text[pos:found]
            self._at = (self._offset + pos, self._offset + found)
        self._state = self._after_delimiter
        return found + len(self._delimiter)

    def _after_delimiter(self, text: bytes, pos: int) -> int:
        if text.startswith(b"--", pos):
            self._state = self._epilogue
            return pos + 2
        padded = _PADDING.match(text, pos)
        end = padded.end() if padded else pos
        if end - pos > _MAX_PADDING:
            raise _malformed("a boundary is not followed by a line's end")
        if text.startswith(_CRLF, end):
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise _malformed(f"it has more than {MAX_PARTS} parts")
            self._state = self._headers
            return end  # with the line's end, so that a part without headers looks like any other
        if text[end:] in (b"", b"\r") or text[pos:] == b"-":
            return _wait_from(pos)
        raise _malformed("a boundary is not followed by a line's end")

    def _headers(self, text: bytes, pos: int) -> int:
        end = text.find(b"\r\n\r\n", pos, pos + MAX_HEADERS)
        if end < 0:
            if len(text) - pos >= MAX_HEADERS:
                raise _malformed(f"the headers of a part are longer than {MAX_HEADERS} bytes")
            return _wait_from(pos)
        name = _field_name(text[pos:end])
        self._is_model = name == "model"
        self.alike = self.alike or (not self._is_model and name.lower() == "model")
        self._state = self._content
        return end + 4

    def _epilogue(self, text: bytes, _pos: int) -> int:
        return _wait_from(len(text))


def boundary_of(content_type: str) -> bytes:
    """Return the boundary in a Content-Type header; BadRequestError when there is none or it is not valid."""
    for key, value in _parameters(content_type):
        if key == "boundary":
            if not _BOUNDARY.fullmatch(value):
                raise _malformed("the boundary in Content-Type is not valid")
            return value.encode()
    raise _malformed("Content-Type names no boundary")


def _wait_from(pos: int) -> int:
    return -pos - 1


def _malformed(why: str) -> BadRequestError:
    return BadRequestError(f"the body is not a valid form: {why}", code="invalid_form")


def _field_name(headers: bytes) -> str:
    """Return the name of the form field that a part is; empty for a file, or what has no name."""
    for line in headers.split(_CRLF):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            text = value.decode("latin-1")
            parameters = dict(_parameters(text))
            is_form_data = text.partition(";")[0].strip().lower() == "form-data"
            return parameters.get("name", "") if is_form_data and "filename" not in parameters else ""
    return ""


def _parameters(value: str) -> Iterator[tuple[str, str]]:
    """Return the parameters of a header's value, in order; keys in lower case. Stops at what is malformed."""
    pos = value.find(";")
    while pos >= 0 and (found := _PARAMETER.match(value, pos)):
        key, quoted, token = found.groups()
        yield key.lower(), token if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
        pos = found.end()

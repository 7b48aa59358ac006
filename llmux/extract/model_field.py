"""The name of a request's model: in its query or a form, and which names are valid; for JSON see ``json_scan``.

A form is a multipart/form-data body (audio) that arrives in slices. Its scanner keeps what it has not processed
yet: at most a part's headers or the model's value; of other content only bytes that may begin the next
boundary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote_plus

from llmux.errors import BadRequestError

SLICE = 64 * 1024
"""Bytes: the most that a scanner is fed at once, and the most that a body is written or sent at once."""

MAX_NAME = 1024
"""Bytes: the longest model name, in UTF-8."""


@dataclass(frozen=True, slots=True)
class ModelField:
    """The model that a body names, and where.

    ``start`` and ``end`` are byte offsets in the body: of the JSON literal with its quotes, or of the
    content of the form field. The bytes between them can be replaced; every other byte stays.
    """

    name: str
    start: int
    end: int


def json_literal(name: str) -> bytes:
    """Return ``name`` as a JSON string, in UTF-8."""
    return json.dumps(name, ensure_ascii=False).encode()


def checked_name(name: str) -> str:
    """Return ``name``, or raise BadRequestError if it is empty, too long, or not valid Unicode."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        raise BadRequestError("model is not valid Unicode", param="model") from None
    if not size:
        raise BadRequestError("model is empty", param="model")
    if size > MAX_NAME:
        raise name_too_long()
    return name


def ambiguous(where: str) -> BadRequestError:
    """Return the error for a request that names its model twice, with keys that differ only in case."""
    return BadRequestError(
        f"{where} names the model twice, under keys that differ in case only, as model and Model; engines that"
        " do not tell them apart would serve another model than the one that was asked for: send one",
        code="ambiguous_model",
        param="model",
    )


def name_too_long() -> BadRequestError:
    """Return the error for a name of more than ``MAX_NAME`` bytes."""
    return BadRequestError(f"model is longer than {MAX_NAME} bytes", param="model")


def model_in_query(query: str) -> str | None:
    """Return the last value of ``model`` in a raw query string; None if it is absent or blank.

    ``query`` is what follows the ``?`` on the wire, still percent-encoded. Raises BadRequestError for a name
    that is not UTF-8 or too long, and for keys that differ only in case.
    """
    value = ""
    seen = alike = False
    for pair in query.split("&"):
        key, _, text = pair.partition("=")
        if "%" in key:
            key = unquote_plus(key)
        if key == "model":
            seen, value = True, text
        elif key.lower() == "model":
            alike = True
    if seen and alike:
        raise ambiguous("the query")
    try:
        name = unquote_plus(value, errors="strict")
    except UnicodeDecodeError:
        raise BadRequestError("model in the query is not valid UTF-8", param="model") from None
    return checked_name(name) if name.strip() else None


# ---- in a form

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

    ``feed`` and ``finish`` raise BadRequestError; after that the scanner cannot be used.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = _CRLF + b"--" + boundary
        # The first delimiter may be at the very start, as if a line had ended before it.
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
        """Read the next slice of the body, at most ``SLICE`` bytes for a bounded time."""
        text = self._rest + data if self._rest else data
        pos = 0
        while (step := self._state(text, pos)) >= 0:
            pos = step
        pos = -step - 1
        self._rest = text[pos:]
        self._offset += pos

    def finish(self) -> ModelField | None:
        """Return the result, after the last slice: None if the form has no field ``model``."""
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

    # The states. Each returns the position where the next one continues or, if it needs more bytes,
    # _wait_from() the first position that it has not processed.

    def _content(self, text: bytes, pos: int) -> int:
        found = text.find(self._delimiter, pos)
        if found < 0:
            found = len(text)
            if self._is_model and found - pos > MAX_NAME + len(self._delimiter):
                raise name_too_long()
            # The value is short and kept whole; of other content, the bytes that may begin the boundary.
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
            return end  # includes the line's end, so that a part without headers looks like any other
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
    """Return the boundary in a Content-Type header; BadRequestError if there is none or it is invalid."""
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
    """Return the name of the form field of a part; empty for a file, or a part without a name."""
    for line in headers.split(_CRLF):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            text = value.decode("latin-1")
            parameters = dict(_parameters(text))
            is_form_data = text.partition(";")[0].strip().lower() == "form-data"
            return parameters.get("name", "") if is_form_data and "filename" not in parameters else ""
    return ""


def _parameters(value: str) -> Iterator[tuple[str, str]]:
    """Yield the parameters of a header's value, in order; keys in lower case. Stops at malformed ones."""
    pos = value.find(";")
    while pos >= 0 and (found := _PARAMETER.match(value, pos)):
        key, quoted, token = found.groups()
        yield key.lower(), token if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
        pos = found.end()

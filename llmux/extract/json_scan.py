r"""The top-level ``"model"`` of a JSON object that arrives in slices.

Theory of operation. The scanner sees each slice once and keeps no more of it than a key, a scalar or the
model's literal. At the top level it is a state machine: a state is a method that takes a position in the
slice and returns the next one. Everything below is skipped at the speed of ``bytes`` methods and patterns:

1. ``\\`` and ``\"`` are overwritten, in a copy of the slice, so that every remaining quote is a delimiter and
   positions stay. Other escapes do not matter for finding the end of a string.
2. A string is skipped with one ``find``; runs of short members with one pattern.
3. In a nested value only the brackets are examined (``Brackets``), once a slice, without a Python loop over its
   bytes.

Nested values are not validated: the engine does that. Whatever determines the model's name is.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate, compress, count, repeat
from operator import mul

from llmux.errors import BadRequestError
from llmux.extract.model_field import MAX_NAME, ModelField, ambiguous, checked_name, name_too_long

_BRACKETS = b"{}[]"
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_AS_BRACES = bytes.maketrans(b"[]", b"{}")
_AS_STEPS = bytes.maketrans(b"{}", b"\x01\xff")  # +1 and -1 as signed bytes
_ARE_BRACKETS = bytes(byte in _BRACKETS for byte in range(256))
_BRACKET = re.compile(rb"[\[\]{}]")

_CANCEL_ROUNDS = 4  # deeper nesting inside a slice is examined exactly
_DENSE = 6  # bytes per bracket: below, examining every byte is cheaper than a search per bracket


class Brackets:
    """The brackets of ``text`` from ``pos`` on. Square and curly brackets count the same."""

    def __init__(self, text: bytes, pos: int) -> None:
        self._pos = pos
        self._length = len(text) - pos
        self._parts = text[pos:].split(b'"')  # outside, string, outside, string, ...
        self._braces = b"".join(self._parts[::2]).translate(_AS_BRACES, _NOT_BRACKETS)
        self._positions: list[int] | None = None
        self._levels: list[int] = []
        self.quoted = len(self._parts) % 2 == 0
        """Whether the text ends inside a string."""
        self.net = 2 * self._braces.count(b"{") - len(self._braces)
        """Opening less closing brackets."""

    def may_close(self, depth: int) -> bool:
        """Return whether ``depth`` brackets that were open before the text may be closed in it.

        Cheap; may wrongly return True, never wrongly False.
        """
        rest = self._braces
        for _ in range(_CANCEL_ROUNDS):
            if rest.count(b"}") < depth:
                return False
            rest = rest.replace(b"{}", b"")
        return rest.count(b"}") >= depth

    def close(self, pos: int, depth: int) -> tuple[int, int]:
        """Follow the brackets from ``pos``, where ``depth`` of them are open, until all of these are closed.

        Returns the position after the last of them and 0, or -1 and the number still open at the text's end.
        """
        if self._positions is None:
            self._positions = self._find()
            self._levels = list(accumulate(array("b", self._braces.translate(_AS_STEPS))))
        first = bisect_left(self._positions, pos)
        before = self._levels[first - 1] if first else 0
        try:
            found = self._levels.index(before - depth, first)
        except ValueError:
            return -1, depth + self.net - before
        return self._positions[found] + 1, 0

    def _find(self) -> list[int]:
        """Return the positions of the brackets outside of strings, in the text."""
        # Strings are overwritten, not deleted, so that positions stay.
        strings = map(mul, repeat(b"_"), map(len, self._parts[1::2]))
        self._parts[1::2] = list(strings)
        plain = b'"'.join(self._parts)
        if len(self._braces) * _DENSE > self._length:
            return list(compress(count(self._pos), plain.translate(_ARE_BRACKETS)))
        return [self._pos + found.start() for found in _BRACKET.finditer(plain)]


_BOM = b"\xef\xbb\xbf"
_BLANKS = re.compile(rb"[ \t\r\n]*")
_SCALAR_BYTES = re.compile(rb"[-+.0-9A-Za-z]*")
_NUMBER = rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_SCALAR = re.compile(rb"true|false|null|NaN|-?Infinity|" + _NUMBER)
# A small array or object without a nested one; bounded for the same reason as the members.
_FLAT = rb'[\[{][^\[\]{}"]*(?:"[^"]*"[^\[\]{}"]*){0,20}[\]}]'
_ESCAPE = len(r"\u0000")  # no character of a key takes more
_LONGEST_LITERAL = MAX_NAME * len(r"\u0000")
_LONGEST_SCALAR = 4096

_QUOTE, _COLON, _COMMA, _OPEN, _CLOSE, _LIST = b'":,{}['


def members_but(key: bytes) -> re.Pattern[bytes]:
    """Return a pattern for many whole members, none of which has this key in any case. Bounded, for the stack."""
    return re.compile(
        rb'(?:[ \t\r\n]*"(?!(?i:' + key + rb')")[^"\\]*"[ \t\r\n]*:[ \t\r\n]*'
        rb'(?:"[^"]*"|true|false|null|' + _NUMBER + rb"|" + _FLAT + rb")[ \t\r\n]*,){1,200}"
    )


class ModelScanner:
    """Finds the value of the top-level ``"model"`` of one JSON object.

    The last duplicate counts, and keys compare after unescaping. ``feed`` and ``finish`` raise
    BadRequestError; after that the scanner cannot be used. To engines written in Go, ``"Model"`` is the same key:
    beside ``"model"`` it is an error. A body that is blank or whose first non-blank byte is not ``{`` is no
    object: it is not scanned, and names no model.
    """

    _wanted = b"model"
    _members = members_but(_wanted)

    def __init__(self) -> None:
        self.is_object: bool | None = None
        """Whether the body is an object; None while it was blank so far."""
        self._offset = 0  # of the slice within the body
        self._bom = 0  # bytes of a byte order mark at the body's start
        self._slice = b""
        self._text = b""  # the slice with its escapes blanked
        self._brackets: Brackets | None = None  # of the slice, made when needed
        self._escaped = False  # the last slice ended after a backslash
        self._state: Callable[[int], int] = self._start
        self._first = True  # no member yet: the object may still be empty
        self._token = bytearray()  # a key, the model's literal or a scalar, as far as it has been read
        self._is_wanted = False  # the current member is the wanted one
        self._depth = 0  # open brackets below the top level
        self._quoted = False  # in a string below the top level
        self._model: bytes | None = None  # between its quotes; None: absent or no string
        self._seen = False
        self.alike = False
        """Whether a top-level key differs from the wanted one in case only."""
        self._at = (0, 0)

    def feed(self, data: bytes) -> None:
        """Read the next slice of the body, at most ``SLICE`` bytes for a bounded time."""
        self._slice = data
        self._text = self._blank_escapes(data)
        self._brackets = None
        pos, end = 0, len(data)
        while pos < end:
            pos = self._state(pos)
        self._offset += end
        self._slice = self._text = b""

    def finish(self) -> ModelField | None:
        """Return the result, after the last slice: None if the object has no ``"model"``."""
        if not self.is_object:
            return None
        if self._state != self._finished:
            raise BadRequestError("the body is not valid JSON: it ends too early", code="invalid_json")
        if not self._seen:
            return None
        if self.alike:
            raise ambiguous("the body")
        if self._model is None:
            raise BadRequestError("model is not a string", param="model")
        try:
            name = json.loads(b'"%b"' % self._model)
        except UnicodeDecodeError:
            raise BadRequestError("model is not valid UTF-8", param="model") from None
        except ValueError:
            raise BadRequestError("model is not a valid JSON string", param="model") from None
        return ModelField(checked_name(name), *self._at)

    def _blank_escapes(self, data: bytes) -> bytes:
        if self._escaped and data:
            data = b"_" + data[1:]
            self._escaped = False
        if b"\\" not in data:
            return data
        # Backslashes pair up from the left of each run of them, as in replace().
        data = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._escaped = data.endswith(b"\\")
        return data

    def _skip_blanks(self, pos: int) -> int:
        found = _BLANKS.match(self._text, pos)
        return found.end() if found else pos

    def _malformed(self, pos: int, wanted: str) -> BadRequestError:
        where = self._offset + pos
        return BadRequestError(f"the body is not valid JSON: byte {where} is not {wanted}", code="invalid_json")

    # The states. Each gets a position before the slice's end.

    def _start(self, pos: int) -> int:
        while self._offset + pos == self._bom and self._text[pos : pos + 1] == _BOM[self._bom :][:1] != b"":
            self._bom += 1
            pos += 1
        pos = self._skip_blanks(pos)
        if pos == len(self._text):
            return pos
        self.is_object = self._text[pos] == _OPEN
        self._state = self._member if self.is_object else self._ignore
        return pos + 1

    def _ignore(self, _pos: int) -> int:
        return len(self._text)

    def _member(self, pos: int) -> int:
        if found := self._members.match(self._text, pos):
            self._first = False
            return found.end()
        pos = self._skip_blanks(pos)
        if pos == len(self._text):
            return pos
        byte = self._text[pos]
        if byte == _QUOTE:
            self._token.clear()
            self._state = self._key
        elif byte == _CLOSE and self._first:
            self._state = self._finished
        else:
            raise self._malformed(pos, "the start of a key")
        self._first = False
        return pos + 1

    def _key(self, pos: int) -> int:
        end = self._take_string(pos, len(self._wanted) * _ESCAPE)
        if end < 0:
            return len(self._text)
        key = _unescaped(self._token)
        self._is_wanted = key == self._wanted
        self.alike = self.alike or (not self._is_wanted and key.lower() == self._wanted)
        self._state = self._colon
        return end

    def _colon(self, pos: int) -> int:
        pos = self._skip_blanks(pos)
        if pos == len(self._text):
            return pos
        if self._text[pos] != _COLON:
            raise self._malformed(pos, "a colon")
        self._state = self._value
        return pos + 1

    def _value(self, pos: int) -> int:
        pos = self._skip_blanks(pos)
        if pos == len(self._text):
            return pos
        byte = self._text[pos]
        self._token.clear()
        if self._is_wanted:
            self._seen = True
            self._model = None
        if byte == _QUOTE:
            self._state = self._model_string if self._is_wanted else self._string
            self._at = (self._offset + pos, 0) if self._is_wanted else self._at
        elif byte in (_OPEN, _LIST):
            self._depth = 1
            self._state = self._nested
        else:
            self._state = self._scalar
            return pos
        return pos + 1

    def _string(self, pos: int) -> int:
        end = self._text.find(b'"', pos)
        if end < 0:
            return len(self._text)
        self._state = self._after
        return end + 1

    def _model_string(self, pos: int) -> int:
        end = self._take_string(pos, _LONGEST_LITERAL)
        if len(self._token) > _LONGEST_LITERAL:
            raise name_too_long()
        if end < 0:
            return len(self._text)
        self._model = bytes(self._token)
        self._at = (self._at[0], self._offset + end)
        self._state = self._after
        return end

    def _scalar(self, pos: int) -> int:
        found = _SCALAR_BYTES.match(self._text, pos)
        end = found.end() if found else pos
        if len(self._token) <= _LONGEST_SCALAR:  # a longer one is a number, and the engine's to check
            self._token += self._text[pos:end]
        if end == len(self._text):
            return end
        if len(self._token) <= _LONGEST_SCALAR and not _SCALAR.fullmatch(self._token):
            raise self._malformed(pos, "a value")
        self._state = self._after
        return end

    def _nested(self, pos: int) -> int:
        if self._quoted:
            end = self._text.find(b'"', pos)
            if end < 0:
                return len(self._text)
            self._quoted = False
            return end + 1
        if self._brackets is None:
            brackets = Brackets(self._text, pos)
            if not brackets.may_close(self._depth):
                self._depth += brackets.net
                self._quoted = brackets.quoted
                return len(self._text)
            self._brackets = brackets
        end, self._depth = self._brackets.close(pos, self._depth)
        if end < 0:
            self._quoted = self._brackets.quoted
            return len(self._text)
        self._state = self._after
        return end

    def _after(self, pos: int) -> int:
        pos = self._skip_blanks(pos)
        if pos == len(self._text):
            return pos
        byte = self._text[pos]
        if byte == _COMMA:
            self._state = self._member
        elif byte == _CLOSE:
            self._state = self._finished
        else:
            raise self._malformed(pos, "a comma or the object's end")
        return pos + 1

    def _finished(self, pos: int) -> int:
        pos = self._skip_blanks(pos)
        if pos < len(self._text):
            raise self._malformed(pos, "blank, after the object's end")
        return pos

    def _take_string(self, pos: int, most: int) -> int:
        """Add to the token, up to one byte more than ``most``; return the position after the end quote, or -1."""
        end = self._text.find(b'"', pos)
        stop = len(self._text) if end < 0 else end
        room = most + 1 - len(self._token)
        self._token += self._slice[pos : min(stop, pos + room)]
        return end + 1 if end >= 0 else -1


def _unescaped(key: bytes | bytearray) -> bytes:
    if b"\\" not in key:
        return bytes(key)
    try:
        return str(json.loads(b'"%b"' % bytes(key))).encode("utf-8", "surrogatepass")
    except ValueError:  # the engine rejects it
        return b""

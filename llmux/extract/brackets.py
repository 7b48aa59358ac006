"""The brackets of a slice of JSON text, found without a Python loop over its bytes.

The text has had its escapes blanked: every ``"`` in it opens or closes a string. It starts outside of one.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from itertools import accumulate, compress, count, repeat
from operator import mul

_BRACKETS = b"{}[]"
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_AS_BRACES = bytes.maketrans(b"[]", b"{}")
_AS_STEPS = bytes.maketrans(b"{}", b"\x01\xff")  # +1 and -1 as signed bytes
_ARE_BRACKETS = bytes(byte in _BRACKETS for byte in range(256))
_BRACKET = re.compile(rb"[\[\]{}]")

_CANCEL_ROUNDS = 4  # deeper nesting than that inside a slice is looked at exactly
_DENSE = 6  # bytes per bracket: below, looking at every byte is cheaper than a search per bracket


class Brackets:
    """The brackets of ``text`` from ``pos`` on. Square and curly ones count alike."""

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
        """Whether ``depth`` brackets that were open before the text may be closed in it.

        Cheap; the answer may be wrongly yes, never wrongly no.
        """
        rest = self._braces
        for _ in range(_CANCEL_ROUNDS):
            if rest.count(b"}") < depth:
                return False
            rest = rest.replace(b"{}", b"")
        return rest.count(b"}") >= depth

    def close(self, pos: int, depth: int) -> tuple[int, int]:
        """Follow the brackets from ``pos``, where ``depth`` of them are open, until all of these are closed.

        Returns the position after the last of them and 0, or -1 and how many are open at the text's end.
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

"""llama-swap's expressions for models that may run together: ``(a | b) & c`` means [a, c] and [b, c]."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product

MOST = 500  # sets that one expression may come to

Set = frozenset[str]

_TOKEN = re.compile(r"\s*(?:([&|()])|\+([\w.-]+)|([\w.-]+))")


def expand(sets: Mapping[str, str], model_of: Callable[[str], str]) -> dict[str, list[Set]]:
    """Return the sets of models that each expression comes to, without repetitions.

    ``model_of`` turns a name of the expressions into that of a model, and raises ValueError for a strange one.

    Raises:
        ExpressionError: an expression cannot be read; its ``name`` says which.

    """
    return {name: _Expression(name, sets, model_of).sets() for name in sets}


class ExpressionError(ValueError):
    """An expression cannot be read."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class _Expression:
    """One expression: alternatives of combinations of names, references and parentheses."""

    def __init__(
        self, name: str, all_sets: Mapping[str, str], model_of: Callable[[str], str], within: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.all = all_sets
        self.model_of = model_of
        self.within = (*within, name)
        self.tokens = list(self._tokens(all_sets[name]))

    def sets(self) -> list[Set]:
        found = self._alternatives()
        if self.tokens:
            raise self._wrong(f"{self.tokens[0][0]!r} is not expected there")
        return found

    def _tokens(self, text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._wrong(f"cannot read {text[at:].strip()[:20]!r}; use names, &, |, ( ) and +SET")
            sign, reference, name = match.groups()
            yield (sign, "sign") if sign else (reference, "set") if reference else (name, "model")
            at = match.end()

    def _alternatives(self) -> list[Set]:
        found = self._together()
        while self.tokens[:1] == [("|", "sign")]:
            self.tokens.pop(0)
            found = self._few([*found, *self._together()])
        return found

    def _together(self) -> list[Set]:
        found = self._one()
        while self.tokens[:1] == [("&", "sign")]:
            self.tokens.pop(0)
            other = self._one()
            if len(found) * len(other) > MOST:
                raise self._wrong(f"comes to more than {MOST} sets")
            found = self._few(left | right for left, right in product(found, other))
        return found

    def _one(self) -> list[Set]:
        if not self.tokens:
            raise self._wrong("ends too early; a name is missing")
        text, kind = self.tokens.pop(0)
        if kind == "model":
            try:
                return [frozenset({self.model_of(text)})]
            except ValueError as error:
                raise self._wrong(str(error)) from None
        if kind == "set":
            return self._other(text)
        if text != "(":
            raise self._wrong(f"{text!r} is not expected there")
        found = self._alternatives()
        if self.tokens[:1] != [(")", "sign")]:
            raise self._wrong("a parenthesis is never closed")
        self.tokens.pop(0)
        return found

    def _other(self, name: str) -> list[Set]:
        if name not in self.all:
            raise self._wrong(f"+{name} is none of the sets: {', '.join(self.all)}")
        if name in self.within:
            raise self._wrong(f"+{name} leads back to itself")
        return _Expression(name, self.all, self.model_of, self.within).sets()

    def _few(self, sets: Iterable[Set]) -> list[Set]:
        return list(dict.fromkeys(sets))

    def _wrong(self, message: str) -> ExpressionError:
        return ExpressionError(self.within[0], message)


def in_pairs(sets: Iterable[Set]) -> tuple[set[Set], set[Set]]:
    """Split sets into those that can be said of two models at a time, and those left over.

    Groups let models be awake together pair by pair. Where that would allow more than the sets do, as ``a & b``,
    ``b & c`` and ``a & c`` would all three, a set is left over: too few awake is slow, too many does not fit.
    """
    wanted = {one: None for one in sets if len(one) > 1}
    # What is inside another set adds nothing.
    largest = [one for one in wanted if not any(one < other for other in wanted)]
    if _only(largest, _pairs(largest)):
        return set(largest), set()
    kept: list[Set] = []
    for one in largest:
        if _only(largest, _pairs([*kept, one])):
            kept.append(one)
    return set(kept), set(largest) - set(kept)


def _pairs(sets: Iterable[Set]) -> dict[str, set[str]]:
    """Return for each model with whom a set has it awake."""
    beside: dict[str, set[str]] = defaultdict(set)
    for one in sets:
        for name in one:
            beside[name] |= one - {name}
    return beside


def _only(sets: list[Set], beside: Mapping[str, set[str]]) -> bool:
    """Whether models that are beside each other, pair by pair, always are within one of the sets."""
    exact = set(sets)
    return all(clique in exact or any(clique <= one for one in sets) for clique in _cliques(beside))


def _cliques(beside: Mapping[str, set[str]]) -> Iterator[Set]:
    """Yield the largest sets of models that are beside each other, pair by pair (Bron and Kerbosch)."""

    def grow(clique: Set, more: set[str], done: set[str]) -> Iterator[Set]:
        if not more and not done:
            yield clique
            return
        pivot = max(more | done, key=lambda name: len(beside[name] & more))
        for name in sorted(more - beside[pivot]):
            yield from grow(clique | {name}, more & beside[name], done & beside[name])
            more = more - {name}
            done = done | {name}

    yield from grow(frozenset(), set(beside), set())

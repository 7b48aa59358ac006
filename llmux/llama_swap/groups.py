"""Which models may run together: llama-swap's groups, or its matrix, as llmux's groups.

llama-swap's expressions for models that may run together: ``(a | b) & c`` means [a, c] and [b, c].
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any

from llmux.config.load import literal
from llmux.config.problems import Path, Problem
from llmux.llama_swap.source import Group, LlamaSwap, Matrix, Note

MOST = 500  # maximum number of sets of one expression

Set = frozenset[str]

_TOKEN = re.compile(r"\s*(?:([&|()])|\+([\w.-]+)|([\w.-]+))")


def expand(sets: Mapping[str, str], model_of: Callable[[str], str]) -> dict[str, list[Set]]:
    """Return the sets of models of each expression, without repetitions.

    ``model_of`` maps a name in the expressions to a model's, and raises ValueError for an unknown one.

    Raises:
        ExpressionError: an expression is invalid; its ``name`` says which.

    """
    return {name: _Expression(name, sets, model_of).sets() for name in sets}


class ExpressionError(ValueError):
    """An expression is invalid."""

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
            raise self._wrong(f"+{name} is not one of the sets: {', '.join(self.all)}")
        if name in self.within:
            raise self._wrong(f"+{name} leads back to itself")
        return _Expression(name, self.all, self.model_of, self.within).sets()

    def _few(self, sets: Iterable[Set]) -> list[Set]:
        return list(dict.fromkeys(sets))

    def _wrong(self, message: str) -> ExpressionError:
        return ExpressionError(self.within[0], message)


def in_pairs(sets: Iterable[Set]) -> tuple[set[Set], set[Set]]:
    """Split sets into those that pairs of models can express, and the rest.

    Groups let models be awake together in pairs. If that would allow more than the sets do, as for ``a & b``,
    ``b & c`` and ``a & c``, a set is left over: too few awake is slow, too many does not fit.
    """
    wanted = {one: None for one in sets if len(one) > 1}
    # A subset of another set adds nothing.
    largest = [one for one in wanted if not any(one < other for other in wanted)]
    if _only(largest, _pairs(largest)):
        return set(largest), set()
    kept: list[Set] = []
    for one in largest:
        if _only(largest, _pairs([*kept, one])):
            kept.append(one)
    return set(kept), set(largest) - set(kept)


def _pairs(sets: Iterable[Set]) -> dict[str, set[str]]:
    """Return for each model the models that share a set with it."""
    beside: dict[str, set[str]] = defaultdict(set)
    for one in sets:
        for name in one:
            beside[name] |= one - {name}
    return beside


def _only(sets: list[Set], beside: Mapping[str, set[str]]) -> bool:
    """Return whether models that are pairwise together are always within one of the sets."""
    exact = set(sets)
    return all(clique in exact or any(clique <= one for one in sets) for clique in _cliques(beside))


def _cliques(beside: Mapping[str, set[str]]) -> Iterator[Set]:
    """Yield the largest sets of models that are pairwise together (Bron and Kerbosch)."""

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


Groups = dict[str, dict[str, Any]]

_ROUTER = ("routing", "router")
_TOO_MUCH = (
    "would be awake together, but groups say it of two models at a time, and with the other sets they would then"
    " allow more than the matrix does; state the models' `memory` and a `capacity` instead"
)


class Residency:
    """The resulting groups of models that may be awake together; ``notes`` and ``problems`` hold the rest."""

    def __init__(self, config: LlamaSwap, known: Mapping[str, str]) -> None:
        """Read ``config``; ``known`` maps every name of a model that is carried over to the model."""
        self.known = known
        self.notes: list[Note] = []
        self.problems: list[Problem] = []
        self.groups: Groups = {}
        old = [(name,) for name in ("groups", "matrix") if getattr(config, name)]
        router, settings = config.routing.router, config.routing.router.settings
        if len(old) > 1:
            self.problems.append(Problem(("matrix",), "is there beside `groups`; keep one of them"))
        elif old and (router.use or settings.groups or settings.matrix):
            self.problems.append(Problem(old[0], "is there beside `routing.router`; keep one of them"))
        elif old or not (settings.groups or settings.matrix):
            self._read(config.groups, config.matrix, ())
        elif router.use == "matrix":
            self._read({}, settings.matrix, (*_ROUTER, "settings"))
            if settings.matrix is None:
                self.problems.append(Problem((*_ROUTER, "use"), "is matrix, but `settings.matrix` is not there"))
        else:
            self._read(settings.groups, None, (*_ROUTER, "settings"))

    def _read(self, groups: Mapping[str, Group], matrix: Matrix | None, at: Path) -> None:
        if matrix is not None:
            self._matrix(matrix, (*at, "matrix"))
        else:
            self._groups(groups, (*at, "groups"))

    # ---- groups

    def _groups(self, groups: Mapping[str, Group], at: Path) -> None:
        owner: dict[str, str] = {}
        for name, group in groups.items():
            members = []
            for index, member in enumerate(group.members):
                place = (*at, name, "members", index)
                if member in owner:
                    other = "" if owner[member] == name else f" in the group {owner[member]}"
                    self.problems.append(Problem(place, f"{member!r} is there already{other}; keep one of them"))
                elif member in self.known.values():
                    owner[member] = name
                    members.append(member)
                else:
                    self.notes.append(Note(place, f"{member!r} is not one of the models"))
            if members:
                self.groups[name] = _group(members, group)
        self.notes += self._asymmetric(groups, at)

    def _asymmetric(self, groups: Mapping[str, Group], at: Path) -> Iterator[Note]:
        """Note where llama-swap's result depends on which model comes first. Here it never does."""
        grouped = {member for group in self.groups.values() for member in group["models"]}
        alone = set(self.known.values()) - grouped
        strict = [name for name in self.groups if groups[name].exclusive and not groups[name].persistent]
        for name in self.groups:
            group = groups[name]
            if not group.exclusive and not group.persistent and (strict or alone):
                yield Note(
                    (*at, name, "exclusive"),
                    "there, its models may be loaded beside a running one of an exclusive group, though not the"
                    " other way round; here they are never awake together (`persistent: true` would allow both)",
                    lost=False,
                )
            if group.exclusive and group.persistent and len(self.groups) + len(alone) > 1:
                yield Note(
                    (*at, name, "persistent"),
                    "there, loading one of its models unloads those of other groups, which may then be loaded"
                    " beside it; here they may be awake together at any time",
                    lost=False,
                )

    # ---- matrix

    def _matrix(self, matrix: Matrix, at: Path) -> None:
        def model_of(name: str) -> str:
            return matrix.vars.get(name, name)

        try:
            expanded = expand(matrix.sets, model_of)
        except ExpressionError as error:
            self.problems.append(Problem((*at, "sets", error.name), str(error)))
            return
        models = set(self.known.values())
        strange = {name: sorted(set().union(*sets) - models) for name, sets in expanded.items()}
        for name, missing in strange.items():
            for model in missing:
                self.notes.append(Note((*at, "sets", name), f"{model!r} is not one of the models"))
        allowed = {name: list(dict.fromkeys(one & models for one in sets)) for name, sets in expanded.items()}
        kept, left = in_pairs(one for sets in allowed.values() for one in sets)
        for name, sets in allowed.items():
            mine = [one for one in sets if one in kept]
            kept -= set(mine)  # the same set with a second name adds nothing
            for number, one in enumerate(mine, 1):
                label = name if len(mine) == 1 else f"{name}-{number}"
                self.groups[label] = {"models": [literal(name) for name in sorted(one)], "together": True}
            for one in left.intersection(sets):
                left.discard(one)
                self.notes.append(Note((*at, "sets", name), f"{' and '.join(sorted(one))} {_TOO_MUCH}"))
        if matrix.evict_costs:
            self.notes.append(
                Note(
                    (*at, "evict_costs"), "what a switch costs is measured; until then `cost: {wake: 90s}` says it"
                )
            )


def _group(members: list[str], group: Group) -> dict[str, Any]:
    settings: dict[str, Any] = {"models": [literal(member) for member in members]}
    if not group.swap:
        settings["together"] = True
    if not group.exclusive:
        settings["exclusive"] = False
    if group.persistent:
        settings["persistent"] = True
    return settings

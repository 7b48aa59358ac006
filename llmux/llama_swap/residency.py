"""Who may run beside whom: llama-swap's groups, or its matrix, as llmux's groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmux.config.interpolate import literal
from llmux.config.problems import Path, Problem
from llmux.llama_swap.matrix import ExpressionError, expand, in_pairs
from llmux.llama_swap.notes import Note
from llmux.llama_swap.schema import Group, LlamaSwap, Matrix

Groups = dict[str, dict[str, Any]]

_ROUTER = ("routing", "router")
_TOO_MUCH = (
    "would be awake together, but groups say it of two models at a time, and with the other sets they would then"
    " allow more than the matrix does; state the models' `memory` and a `capacity` instead"
)


class Residency:
    """What the result says about who may be awake together; ``notes`` and ``problems`` say what it does not."""

    def __init__(self, config: LlamaSwap, known: Mapping[str, str]) -> None:
        """Read ``config``; ``known`` leads from every name of a model that is carried over to the model."""
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
                    self.notes.append(Note(place, f"{member!r} is none of the models"))
            if members:
                self.groups[name] = _group(members, group)
        self.notes += self._asymmetric(groups, at)

    def _asymmetric(self, groups: Mapping[str, Group], at: Path) -> Iterator[Note]:
        """Note where it matters there who comes first. Here it never does."""
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
                self.notes.append(Note((*at, "sets", name), f"{model!r} is none of the models"))
        allowed = {name: list(dict.fromkeys(one & models for one in sets)) for name, sets in expanded.items()}
        kept, left = in_pairs(one for sets in allowed.values() for one in sets)
        for name, sets in allowed.items():
            mine = [one for one in sets if one in kept]
            kept -= set(mine)  # the same set under a second name adds nothing
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

"""What a switch costs: seconds from the end of the drain to ready, for each direction.

Read from one duration for all (``10s``), a YAML or JSON file, or llmux's own state file. A file is one of:

- ``{FROM: {TO: duration}}``;
- ``{sleep: {MODEL: duration}, wake: {MODEL: duration}}``: a switch costs one model's sleep and the other's wake;
- ``{models: [A, B], costs: [[0, 5s], [9s, 0]]}``: a row for each model that is put to sleep;
- a list of ``{from: A, to: B, seconds: 5}``, as ``switch_costs`` in ``/llmux/status``;
- the state file, whose averages are used.

A sleep or wake may be given by level, as ``{wake: {MODEL: {ram: 1s, disk: 12s}}}``, and the same file may have
``prefetch: {MODEL: duration}``: how long a prefetch takes, and by how much a wake is shorter after it.
``default: duration`` may be added to the mappings; without it a missing direction is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llmux.config.setting_types import is_file, parse_duration
from llmux.estimates.costs import SwitchCosts
from llmux.observability.state_file import load_costs
from llmux.simulator.trace import TraceError, read_yaml

Pairs = Mapping[tuple[str, str], float]
Key = TypeVar("Key")
HALVES = frozenset({"sleep", "wake", "prefetch"})


@dataclass(frozen=True, slots=True)
class CostMatrix:
    """Seconds for each (from, to); for other directions the sum of sleep and wake, else ``default``."""

    default: float | None = None
    pairs: Pairs = field(default_factory=dict)
    sleeps: Mapping[str, float] = field(default_factory=dict)
    wakes: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[tuple[str, str, str], float] = field(default_factory=dict)  # (sleep or wake, model, level)
    prefetches: Mapping[str, float] = field(default_factory=dict)

    def scaled(self, factor: float) -> CostMatrix:
        """Return the same costs, ``factor`` times as large."""

        def times(known: Mapping[Key, float]) -> dict[Key, float]:
            return {key: seconds * factor for key, seconds in known.items()}

        return CostMatrix(
            None if self.default is None else self.default * factor,
            times(self.pairs),
            times(self.sleeps),
            times(self.wakes),
            times(self.levels),
            times(self.prefetches),
        )

    def of(self, source: str, target: str) -> float:
        """Return the seconds of a switch from ``source`` to ``target``.

        Raises:
            TraceError: its cost is unknown.

        """
        known = self.pairs.get((source, target))
        if known is not None:
            return known
        if source in self.sleeps and target in self.wakes:
            return self.sleeps[source] + self.wakes[target]
        if self.default is None:
            raise TraceError(f"no cost is given for a switch from {source!r} to {target!r}; add it, or `default:`")
        return self.default

    def cold(self, target: str) -> float:
        """Return the seconds of a wake when no model has to leave; 0 if unknown."""
        return self.wakes.get(target, 0.0)

    def check(self, models: Iterable[str]) -> None:
        """Raise TraceError unless every direction between ``models`` has a cost."""
        names = list(models)
        for source in names:
            for target in names:
                if source != target:
                    self.of(source, target)


def parse_costs(text: str) -> CostMatrix:
    """Read ``--cost``: a duration, or the name of a file.

    Raises:
        TraceError: it is neither, or the file is not a valid file of costs.

    """
    path = Path(text)
    if path.suffix.lower() in (".yaml", ".yml", ".json") or is_file(path):
        return read_costs(path)
    return CostMatrix(default=_seconds(text, "--cost"))


def read_costs(path: Path) -> CostMatrix:
    """Read a file of costs; its formats are described at the top of this module."""
    data = read_yaml(path)
    if isinstance(data, list):
        return CostMatrix(pairs=dict(_row(path, row) for row in data if _has_source(row)))
    if not isinstance(data, Mapping):
        raise TraceError(f"{path}: has no costs; write {{FROM: {{TO: 10s}}}}")
    if "version" in data and "costs" in data:
        return _from_state(path, data["costs"])
    return _from_mapping(path, dict(data))


def _from_mapping(path: Path, data: dict[Any, Any]) -> CostMatrix:
    default = _seconds(data.pop("default"), f"{path}: default") if "default" in data else None
    if {"models", "costs"} == data.keys():
        return CostMatrix(default, _grid(path, data["models"], data["costs"]))
    if data and data.keys() <= HALVES:
        levels: dict[tuple[str, str, str], float] = {}
        sleeps, wakes, prefetches = (
            _halves(path, half, data.get(half, {}), levels) for half in ("sleep", "wake", "prefetch")
        )
        return CostMatrix(default, {}, sleeps, wakes, levels, prefetches)
    pairs: dict[tuple[str, str], float] = {}
    for source, row in data.items():
        if not isinstance(row, Mapping):
            raise TraceError(f"{path}: {source}: must be a mapping of TO to a duration")
        for target, value in row.items():
            pairs[str(source), str(target)] = _seconds(value, f"{path}: {source}.{target}")
    return CostMatrix(default, pairs)


def _grid(path: Path, models: Any, rows: Any) -> Pairs:
    square = isinstance(models, list) and isinstance(rows, list) and len(rows) == len(models)
    if not square or any(not isinstance(row, list) or len(row) != len(models) for row in rows):
        raise TraceError(f"{path}: costs: must have one row and one column for each of `models`")
    return {
        (str(source), str(target)): _seconds(value, f"{path}: costs, {source} to {target}")
        for source, row in zip(models, rows, strict=True)
        for target, value in zip(models, row, strict=True)
    }


def _halves(path: Path, half: str, data: Any, levels: dict[tuple[str, str, str], float]) -> dict[str, float]:
    """Return the seconds by model, the least for one that gives them by level; the others go into ``levels``."""
    if not isinstance(data, Mapping):
        raise TraceError(f"{path}: {half}: must be a mapping of models to durations")
    found: dict[str, float] = {}
    for model, value in data.items():
        where = f"{path}: {half}.{model}"
        if not isinstance(value, Mapping):
            found[str(model)] = _seconds(value, where)
            continue
        if half == "prefetch" or not value:
            raise TraceError(
                f"{where}: must be a duration{'' if half == 'prefetch' else ', or one for each level'}"
            )
        by_level = {str(level): _seconds(seconds, f"{where}.{level}") for level, seconds in value.items()}
        levels.update({(half, str(model), level): seconds for level, seconds in by_level.items()})
        found[str(model)] = min(by_level.values())
    return found


def _has_source(row: object) -> bool:
    return not isinstance(row, Mapping) or row.get("from") not in (None, "idle", "several")


def _row(path: Path, row: Any) -> tuple[tuple[str, str], float]:
    if not isinstance(row, Mapping) or not {"from", "to", "seconds"} <= row.keys():
        raise TraceError(f"{path}: each row needs from, to and seconds")
    return (str(row["from"]), str(row["to"])), _seconds(row["seconds"], f"{path}: {row['from']} to {row['to']}")


def _from_state(path: Path, data: Any) -> CostMatrix:
    costs = SwitchCosts()
    try:
        load_costs(costs, data)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise TraceError(f"{path}: is a state file without usable costs") from None
    return measured(costs)


def measured(costs: SwitchCosts) -> CostMatrix:
    """Return the measured costs of switches; ``default`` is None if nothing was measured."""
    pairs = {
        (source, target): average.seconds
        for (source, target), average in costs.pairs.items()
        if source is not None
    }
    mean = sum(pairs.values()) / len(pairs) if pairs else None
    sleeps = {name: average.seconds for name, average in costs.sleeps.items()}
    wakes = {name: average.seconds for name, average in costs.wakes.items()}
    levels: dict[tuple[str, str, str], float] = {}
    for (half, name, level), average in costs.levels.items():
        levels[half, name, level] = seconds = average.seconds
        known = wakes if half == "wake" else sleeps
        known[name] = min(seconds, known.get(name, seconds))  # the lightest sleep, which is the usual one
    return CostMatrix(mean, pairs, sleeps, wakes, levels)


def _seconds(value: Any, where: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from None

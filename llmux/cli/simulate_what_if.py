"""``llmux simulate --what-if``: the effect of another setting, or a cheaper switch, on this traffic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from llmux.config import Config, to_specs
from llmux.config.setting_types import format_size, is_file
from llmux.core.policy import Policy
from llmux.core.spec import Rules
from llmux.errors import ConfigError
from llmux.simulator.configured import HookSeconds, simulate_specs
from llmux.simulator.cost_matrix import CostMatrix, read_costs
from llmux.simulator.engine_model import Engines
from llmux.simulator.run import Misjudged, Outcome, Run, Scene
from llmux.simulator.simulation import simulate
from llmux.simulator.spilling import Spill
from llmux.simulator.statistics import Statistics, compare, paired_waits
from llmux.simulator.trace import Trace, TraceError

COST = "cost"
FACTOR = re.compile(r"\s*([÷/*\u00d7])\s*(\d+(?:\.\d+)?)\s*\Z")
HOW = "write capacity=32GiB, or any other setting as policy.min_active=30s, or cost=÷3 (cost=/3, cost=*3)"
SURE = 0.95
MakePolicy = Callable[[Config | None], Policy]
"""Makes a policy anew, for each column its own; ``use`` of the configuration where that decides."""
SLIGHT = 0.02  # share: a smaller gain is no reason to buy anything


@dataclass(frozen=True, slots=True)
class Change:
    """A change: settings of the configuration by their paths, and a factor for costs."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    spill: Spill | None = None


NONE = Change("")


def parse_change(text: str, models: Iterable[str] = ()) -> Change:
    """Parse ``capacity=32GiB,cost=÷3``. Names of ``models`` may have ``=`` and ``,`` in them.

    Raises:
        TraceError: it is invalid; the message says what to write.

    """
    settings: dict[str, Any] = {}
    factor = 1.0
    for key, value in _pairs(text, models):
        if key != COST:
            settings[key] = parse_value(value)
            continue
        found = FACTOR.match(value)
        number = float(found[2]) if found else 0.0
        if found is None or number <= 0.0:
            raise TraceError(
                f"--what-if {text}: cost must be multiplied or divided, as cost=÷3, cost=/3 or cost=*2"
            )
        factor *= 1.0 / number if found[1] in "÷/" else number
    return Change(text, settings, factor)


def _pairs(text: str, models: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the settings and their values. A comma ends a value if a setting follows: lists have commas, too."""
    known = "|".join(rf"models\.{re.escape(name)}\." for name in sorted(models, key=len, reverse=True))
    pair = re.compile(rf"((?:{known})?[^=]*)=(.*?)(?:\Z|,(?=(?:{known})?[\w.\- ]+=))", re.DOTALL)
    at = 0
    while at < len(text) or not at:
        found = pair.match(text, at)
        if found is None or not found[1].strip() or not found[2].strip():
            raise TraceError(f"--what-if {text}: {text[at:]!r} is not KEY=VALUE; {HOW}")
        at = found.end()
        yield found[1].strip(), found[2]


def parse_value(text: str) -> Any:
    """Parse a value as YAML; what is not YAML is text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


@dataclass(frozen=True, slots=True)
class Columns:
    """The results by column name; ``changed`` says which are another column with a change."""

    outcomes: Mapping[str, Outcome]
    changed: Mapping[str, tuple[str, Change]]

    def verdicts(self, results: Mapping[str, Statistics]) -> list[str]:
        """Return in words what each change brings."""
        return [
            verdict(column, self.outcomes[name], self.outcomes[column], (results[name], results[column]))
            for column, (name, _) in self.changed.items()
        ]

    def document(self, results: Mapping[str, Statistics]) -> dict[str, Any]:
        """Return everything as JSON values."""
        policies = {name: each.as_json() for name, each in results.items() if name not in self.changed}
        if not self.changed:
            return {"policies": policies}
        pairs = zip(self.changed.items(), self.verdicts(results), strict=True)
        changes = [
            {"policy": name, "change": change.text, **results[column].as_json(), "verdict": words}
            for (column, (name, change)), words in pairs
        ]
        return {"policies": policies, "what_if": changes}


@dataclass(frozen=True, slots=True)
class Bench:
    """What every column of the table has in common; a column is a policy, with or without a change."""

    traffic: Trace
    engines: Engines
    horizon: float | None
    costs: CostMatrix
    rules: Rules
    scene: Scene | None
    misjudge: float = 1.0
    config: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the configuration, from other options

    def run(
        self,
        make: MakePolicy,
        change: Change = NONE,
        progress: Callable[[float], None] | None = None,
        prepare: Callable[[Run], None] | None = None,
    ) -> Outcome:
        """Simulate one column; ``prepare`` is called with the run before it begins.

        Raises:
            TraceError: the change is impossible; the message says why.

        """
        config = None if self.config is None else self.configuration(change)
        policy = make(config)
        if self.misjudge != 1.0:
            policy = Misjudged(policy, self.misjudge)
        if config is not None:
            return simulate_specs(
                self.traffic,
                *to_specs(config),
                policy,
                HookSeconds.of(config, self.costs, change.factor),
                self.engines,
                horizon=self.horizon,
                progress=progress,
                spill=change.spill,
                prepare=prepare,
            )
        if change.settings:
            raise TraceError(
                f"--what-if {change.text}: {next(iter(change.settings))} is a setting of a configuration; name"
                " that, too: --config FILE"
            )
        return simulate(
            self.traffic,
            policy,
            self.costs.scaled(change.factor),
            engine=self.engines,
            rules=self.rules,
            horizon=self.horizon,
            progress=progress,
            scene=self.scene,
            spill=change.spill,
            prepare=prepare,
        )

    def columns(
        self,
        policies: Mapping[str, MakePolicy],
        changes: Sequence[Change],
        begin: Callable[[str], Callable[[float], None] | None],
    ) -> Columns:
        """Simulate every policy as it is, and with each change. ``begin`` is called for each column."""
        outcomes: dict[str, Outcome] = {}
        changed: dict[str, tuple[str, Change]] = {}
        for name, make in policies.items():
            outcomes[name] = self.run(make, progress=begin(name))
            for change in changes:
                column = change.text if len(policies) == 1 else f"{name}, {change.text}"
                changed[column] = name, change
                outcomes[column] = self.run(make, change, begin(column))
        return Columns(outcomes, changed)

    def configuration(self, change: Change = NONE) -> Config:
        """Return the configuration with a change.

        Raises:
            ConfigError: it is invalid as it is.
            TraceError: a changed setting is unknown, has an invalid value, or does not go with the others.

        """
        assert self.config is not None
        plain = Config.from_file(self.config)
        try:
            changed = {_path(key, plain): value for key, value in {**self.settings, **change.settings}.items()}
            return Config.from_file(self.config, changed=changed) if changed else plain
        except ConfigError as error:
            raise TraceError(f"--what-if {change.text}: {error}") from None


def _path(key: str, config: Config) -> tuple[str | int, ...]:
    """Return the path of a setting; names of models may contain dots."""
    first, _, rest = key.partition(".")
    if first != "models" or not rest:
        return tuple(key.split("."))
    names = [name for name in config.models if rest.startswith(f"{name}.")]
    if not names:
        known = ", ".join(config.models)
        raise ConfigError(f"{key!r} names no setting of a model; write models.NAME.SETTING, NAME one of {known}")
    name = max(names, key=len)
    return first, name, *rest[len(name) + 1 :].split(".")


def verdict(change: str, plain: Outcome, other: Outcome, results: tuple[Statistics, Statistics]) -> str:
    """Return in words what a change brings, and whether that is more than chance."""
    before, after = results
    found = compare(*paired_waits(plain, other))
    text = (
        f"{change}: a request waits {after.mean_wait:.1f} s on average instead of {before.mean_wait:.1f} s"
        f"{_share(after.mean_wait, before.mean_wait)}, at the 99th percentile {after.p99_wait:.1f} s instead of"
        f" {before.p99_wait:.1f} s{_share(after.p99_wait, before.p99_wait)}; {after.switches} switches instead of"
        f" {before.switches}.{_spilled(after)}"
    )
    if abs(found.gain) < SLIGHT or before.mean_wait == after.mean_wait:
        return f"{text} It makes no difference to speak of."
    if found.sure >= SURE:
        return f"{text} It helps."
    if found.sure <= 1.0 - SURE:
        return f"{text} It does harm."
    return f"{text} This traffic is too short, or too uneven, to say that this is more than chance."


def _spilled(after: Statistics) -> str:
    """Return in words what went to the remote, and for how much."""
    if not after.spilled:
        return ""
    cost = "" if after.spill_cost is None else f", for {after.spill_cost:.4g} by --spill-price"
    return f" {after.spilled} requests ({after.spilled / after.requests:.0%}) go to the remote{cost}."


def _share(after: float, before: float) -> str:
    return f" ({after / before - 1.0:+.0%})" if before > 0.0 and round(after / before, 2) != 1.0 else ""


# ---- from a configuration


def known_costs(config: Config) -> CostMatrix | None:
    """Return the costs of switches in a configuration's state file; None if it has none."""
    try:
        path = config.state_path
    except ConfigError:
        return None
    if path is None or not is_file(path):
        return None
    costs = read_costs(path)
    return costs if costs.pairs or costs.wakes else None


def onto(traffic: Trace, config: Config | None, *, generated: bool) -> Trace:
    """Return the traffic mapped to the models of a configuration; unchanged without one.

    A trace may name models or their aliases; in generated traffic the first model is the configuration's first.

    Raises:
        TraceError: a name is not one of the configuration's, or there are more names than models.

    """
    if config is None:
        return traffic
    names: Mapping[str, str] = config.names
    if generated:
        made = sorted(traffic.models, key=lambda name: (len(name), name))
        if len(made) > len(config.models):
            raise TraceError(
                f"{traffic.name}: asks for {len(made)} models, the configuration has {len(config.models)};"
                f" write models={len(config.models)}"
            )
        names = dict(zip(made, config.models, strict=False))
    stray = sorted({job.model for job in traffic.jobs} - set(names))
    if stray:
        raise TraceError(
            f"{traffic.name}: asks for {', '.join(map(repr, stray[:5]))}, which the configuration does not have;"
            f" add {'it as a model or an alias' if len(stray) == 1 else 'them as models or aliases'}"
        )
    return replace(traffic, jobs=[replace(job, model=names[job.model]) for job in traffic.jobs])


def residency(config: Config) -> str:
    """Return in words which models may be awake together."""
    if config.gpus is not None:
        return "GPUs of " + ", ".join(format_size(size) for size in config.gpus.values())
    if config.capacity is not None:
        return f"capacity {format_size(config.capacity)}"
    return "groups" if config.groups else "one model at a time"

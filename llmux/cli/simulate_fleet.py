"""``llmux simulate … --hosts N --route …``: the same traffic over many hosts under several routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import typer

from llmux.cli.simulate_tables import ABREAST, side_by_side
from llmux.cli.terminal import terminal
from llmux.config.setting_types import parse_duration
from llmux.core.policy import Policy
from llmux.core.spec import Rules
from llmux.fleet.loading import load_route
from llmux.fleet.routes import Route
from llmux.fleet.simulation import (
    CLAIRVOYANT,
    Deaths,
    FleetStatistics,
    Setting,
    simulate_fleet,
    statistics_of_fleet,
)
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Engines
from llmux.simulator.trace import Trace, TraceError

MOST = 10_000
ROUTES = ("least_wait", "affinity", "least_in_flight", CLAIRVOYANT)
FLOOR = 0.05  # seconds: added to both sides, so that a ratio of two tiny waits is near 1
ROWS: tuple[tuple[str, Callable[[FleetStatistics], str]], ...] = (
    ("mean wait", lambda each: f"{each.mean_wait:.2f}"),
    ("p50", lambda each: f"{each.p50_wait:.2f}"),
    ("p95", lambda each: f"{each.p95_wait:.1f}"),
    ("p99", lambda each: f"{each.p99_wait:.1f}"),
    ("max", lambda each: f"{each.max_wait:.1f}"),
    ("switches per host and hour", lambda each: f"{each.switches_per_hour:.0f}"),
    ("came to a sleeping model", lambda each: f"{each.cold:.1%}"),
    ("wakes that were doubled", lambda each: f"{each.duplicates:.1%}"),
    ("doubled by two gateways", lambda each: f"{each.crossed:.1%}"),
    ("Jain's index of the hosts' work", lambda each: f"{each.jain:.2f}"),
    ("moved while waiting", lambda each: f"{each.moved}"),
    ("completed", lambda each: f"{each.completed}/{each.requests}"),
)
OF_DEATHS: tuple[tuple[str, Callable[[FleetStatistics], str]], ...] = (
    ("sent again", lambda each: f"{each.retried}"),
    ("lost with their host", lambda each: f"{each.lost}"),
    ("rejected", lambda each: f"{each.rejected}"),
)


class Fleet(NamedTuple):
    """The options of a fleet."""

    hosts: int
    routes: Mapping[str, Callable[[], Route] | None]  # None: the clairvoyant
    stale: float
    gateways: int
    deaths: Deaths | None


def asked(
    hosts: int | None, routes: Sequence[str] | None, stale: str | None, gateways: int | None, die: str | None
) -> Fleet | None:
    """Read the options of a fleet; None without ``--hosts``. Raises TraceError."""
    if hosts is None:
        given = {"--route": routes, "--stale": stale, "--gateways": gateways, "--die": die}
        useless = [name for name, value in given.items() if value]
        if useless:
            raise TraceError(f"{useless[0]} is about a fleet; add --hosts, as --hosts 16")
        return None
    try:
        seconds = 1.0 if stale is None else parse_duration(stale)
    except ValueError as error:
        raise TraceError(f"--stale: {error}") from None
    makers = {
        text: None if text == CLAIRVOYANT else partial(load_route, text, {}, Path()) for text in routes or ROUTES
    }
    for make in filter(None, makers.values()):
        make()  # errors in a route are reported before anything runs
    return Fleet(hosts, makers, seconds, gateways or 1, parse_deaths(die))


def refuse(**options: object) -> None:
    """Raise TraceError for options that do not apply to a fleet."""
    policies = options.pop("policies")
    if isinstance(policies, list) and len(policies) > 1:
        raise TraceError(
            "--hosts: all hosts have one policy; give --policy once, and --route as often as you like"
        )
    for name, value in options.items():
        if value:
            raise TraceError(f"--{name.replace('_', '-')} cannot be combined with --hosts")


def setting_of(
    fleet: Fleet,
    traffic: Trace,
    engines: Engines,
    costs: CostMatrix,
    rules: Rules,
    make_policy: Callable[[], Policy],
    until: float | None,
    misjudge: float,
    seed: int,
) -> Setting:
    """Return the settings common to all routes. Raises TraceError for a policy that looks back."""
    if hasattr(make_policy(), "makers"):
        raise TraceError("--policy auto chooses among policies for one host by its record; name one of them")
    return Setting(
        traffic,
        fleet.hosts,
        costs,
        engines,
        make_policy,
        fleet.stale,
        fleet.gateways,
        until,
        misjudge,
        fleet.deaths,
        rules,
        seed,
    )


def parse_deaths(text: str | None) -> Deaths | None:
    """Parse ``--die``: ``2@10m`` or ``2@10m:90s``, hosts at a time and for how long. Raises TraceError."""
    if text is None:
        return None
    count, _, rest = text.partition("@")
    at, _, back = rest.partition(":")
    try:
        found = Deaths(int(count), parse_duration(at), *([parse_duration(back)] if back else []))
    except ValueError:
        found = Deaths(0, 0.0)
    if found.count < 1:
        raise TraceError(
            f"--die {text}: write HOSTS@TIME[:BACK], as 2@10m:60s: two die after ten minutes, for one"
        )
    return found


def compare(
    setting: Setting,
    routes: Mapping[str, Callable[[], Route] | None],
    begin: Callable[[str], Callable[[float], None] | None],
) -> dict[str, FleetStatistics]:
    """Run all routes."""
    results: dict[str, FleetStatistics] = {}
    console = terminal(stderr=True, soft_wrap=True)
    for name, make in routes.items():
        outcome = simulate_fleet(setting, make, begin(name))
        for complaint in outcome.overruled:
            console.print(f"warning: {name} {complaint}; treated as least_in_flight", style="yellow")
        results[name] = statistics_of_fleet(outcome)
    return results


def show(setting: Setting, policy: str, results: Mapping[str, FleetStatistics], *, as_json: bool) -> None:
    """Print the results."""
    if as_json:
        document = {
            "trace": setting.trace.name,
            "hosts": setting.hosts,
            "gateways": setting.gateways,
            "stale": setting.stale,
            "policy": policy,
            "routes": {name: asdict(each) for name, each in results.items()},
        }
        typer.echo(json.dumps(document, indent=2))
        return
    console = terminal()
    console.print(_of_what(setting, policy))
    side_by_side(console, results, ROWS if setting.deaths is None else (*ROWS, *OF_DEATHS), ABREAST)
    console.print(verdict(results))


def _of_what(setting: Setting, policy: str) -> str:
    trace, hosts = setting.trace, setting.hosts
    seconds = setting.horizon or max((job.arrival or 0.0 for job in trace.jobs), default=0.0)
    line = f"{trace.name}: {len(trace.jobs)} requests, {len(trace.models)} models, {seconds:.0f} s;"
    line += f" {hosts} hosts with policy {policy}, reports {setting.stale:g} s old"
    if setting.gateways > 1:
        line += f", {setting.gateways} gateways"
    if not trace.closed_loop:
        line += f"; {setting.engines.load(trace.jobs, seconds) / hosts:.0%} of what the engines could serve"
    return line


def verdict(results: Mapping[str, FleetStatistics]) -> str:
    """Return in words which route to use."""
    real = {name: each for name, each in results.items() if name != CLAIRVOYANT} or dict(results)
    best = min(real, key=lambda name: real[name].mean_wait)
    others = [
        f"{(each.mean_wait + FLOOR) / (real[best].mean_wait + FLOOR):.1f} times as long with {name}"
        for name, each in results.items()
        if name != best
    ]
    return f"{best} waits least" + (f": {', '.join(others)}" if others else "")

"""``llmux simulate``: the same traffic under several policies, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.progress import Progress, TextColumn

from llmux.cli import simulate_fleet, simulate_keys, simulate_tables
from llmux.cli import simulate_what_if as what_ifs
from llmux.cli.options import duration
from llmux.cli.simulate_tables import Given, Shown, show, tell_overruled
from llmux.cli.terminal import fail, terminal
from llmux.config import Config
from llmux.core.policy import Policy
from llmux.core.spec import Rules
from llmux.errors import LLMuxError
from llmux.plugins import load_policy
from llmux.simulator.cost_matrix import parse_costs
from llmux.simulator.engine_model import EngineModel, Fit, parse_engines
from llmux.simulator.recorded import UNUSABLE, Recorded, read_recorded, unusable
from llmux.simulator.spilling import Spill, parse_price
from llmux.simulator.statistics import SLO, plot, statistics_of
from llmux.simulator.synthetic import (
    Agents,
    Closed,
    Load,
    OnOff,
    Poisson,
    generate,
    models_of,
    parse_closed,
    parse_load,
    with_closed,
)
from llmux.simulator.trace import Trace, TraceError, is_record, read_trace

COMPARED = ("fifo", "idle", "adaptive")
COST = "10s"
GENERATED = 2400.0  # seconds of synthetic traffic


def _positive(value: float) -> float:
    if not 0.0 < value < float("inf"):
        raise typer.BadParameter("must be greater than 0")
    return value


def _not_negative(value: float) -> float:
    if not 0.0 <= value < float("inf"):
        raise typer.BadParameter("must be 0 or greater")
    return value


def _factor(name: str, what: str) -> Any:
    return typer.Option(name, help=what, callback=_positive)


TraceArgument = Annotated[
    Path | None,
    typer.Argument(
        help="CSV or JSON lines (arrival_s, model, prompt_tokens, output_tokens), BurstGPT, a record of llmux; .gz"
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option("--policy", "-p", metavar="NAME[:k=v,…]", help="A policy and its options; may be repeated."),
]
PoissonOption = Annotated[
    str | None, typer.Option("--poisson", metavar="models=4,rate=0.5,skew=1", help="Independent arrivals.")
]
OnOffOption = Annotated[
    str | None, typer.Option("--onoff", metavar="models=4,rate=0.5,on=60,off=180", help="Bursts of each model.")
]
AgentsOption = Annotated[
    str | None,
    typer.Option(
        "--agents", metavar="agents=1,think=1,background=0,models=2", help="Clients that alternate two models."
    ),
]
ClosedOption = Annotated[
    str | None,
    typer.Option(
        "--closed",
        metavar="users=8,think=20s,models=3,stay=0",
        help="Users that wait for each answer, think, and ask another model; alone or beside other traffic.",
    ),
]


def run(
    trace: TraceArgument = None,
    policy: PolicyOption = None,
    *,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Replay a record as it was; are the switches the recorded ones?"),
    ] = False,
    cost: Annotated[
        str | None,
        typer.Option(
            "--cost",
            metavar="DURATION|FILE",
            help="Cost of a switch, or a file of costs.",
            show_default="10s, or what a record has",
        ),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Requests an engine serves at once.")] = 16,
    decode: Annotated[float, _factor("--decode", "Tokens/s of one stream.")] = 60.0,
    prefill: Annotated[float, _factor("--prefill", "Prompt tokens/s.")] = 6000.0,
    slowdown: Annotated[
        float,
        typer.Option(
            "--slowdown", help="What each further stream costs the others, as a share.", callback=_not_negative
        ),
    ] = 0.03,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="MODEL:slots=4,…|FILE",
            help="The engine of one model: slots, decode, prefill, slowdown, speed; or a file of them. May be"
            " repeated; what is not said is as for all, or as a record shows.",
        ),
    ] = None,
    stretch: Annotated[
        float, _factor("--stretch", "Multiply the trace's times: 8 is an eighth of the load.")
    ] = 1.0,
    start: Annotated[str, typer.Option("--start", help="Begin the (stretched) trace here.")] = "0s",
    horizon: Annotated[
        str | None, typer.Option("--horizon", help="Stop here; without it, when everything is answered.")
    ] = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="Only the busiest models.")] = None,
    max_wait: Annotated[
        str | None,
        typer.Option(
            "--max-wait", help="The guard rail over every policy.", show_default="10m, or what a record has"
        ),
    ] = None,
    anticipate: Annotated[
        bool, typer.Option("--anticipate", help="Let policies wake what is likely to be asked next.")
    ] = False,
    slo: Annotated[str, typer.Option("--slo", help="Objective for the time to the first token.")] = f"{SLO:g}s",
    poisson: PoissonOption = None,
    onoff: OnOffOption = None,
    agents: AgentsOption = None,
    closed: ClosedOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Of llmux: capacity, GPUs, groups, levels, policy and each model's settings are this file's.",
        ),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="capacity=32GiB|cost=÷3|…",
            help="A column with this setting of the configuration, or with dearer or cheaper switches; may be"
            " repeated.",
        ),
    ] = None,
    spill: Annotated[
        list[str] | None,
        typer.Option(
            "--spill",
            metavar="DURATION",
            help="A column in which requests that would wait longer than this go to a remote; may be repeated.",
        ),
    ] = None,
    spill_price: Annotated[
        str | None,
        typer.Option(
            "--spill-price",
            metavar="input=0.25,output=2",
            help="What a million tokens cost there, in any currency.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the generated traffic.")] = 1,
    misjudge: Annotated[
        float,
        _factor("--misjudge", "Show the policies estimates that are wrong by this factor."),
    ] = 1.0,
    hosts: Annotated[
        int | None,
        typer.Option("--hosts", min=1, max=simulate_fleet.MOST, help="A fleet of so many, to compare routes."),
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(
            "--route",
            "-r",
            metavar="NAME",
            help="How a gateway chooses the host: a shipped name, module:Class or ./file.py:Class, or clairvoyant;"
            " may be repeated.",
            show_default=", ".join(simulate_fleet.ROUTES),
        ),
    ] = None,
    stale: Annotated[
        str | None, typer.Option("--stale", help="How old the hosts' reports are.", show_default="1s")
    ] = None,
    gateways: Annotated[
        int | None, typer.Option("--gateways", min=1, max=64, help="Gateways side by side.", show_default="1")
    ] = None,
    die: Annotated[
        str | None, typer.Option("--die", metavar="HOSTS@TIME[:BACK]", help="Hosts that die, as 2@10m:60s.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="KEY=5/month|config",
            help="What a key (* for each) may spend, perhaps with ,soft=0.8,then=awake_only; or what the keys of"
            " --config may: waits, switches and money of each key, without and with it. May be repeated.",
        ),
    ] = None,
    fair: Annotated[
        str | None,
        typer.Option(
            "--fair",
            metavar="key[,alice=3,…]",
            help="Serve the key first that has had least, perhaps by weights: waits, switches and money of each"
            " key, without and with it.",
        ),
    ] = None,
    gpu_hour: Annotated[
        float | None,
        typer.Option("--gpu-hour", help="What an hour of the GPU costs.", show_default="that of --config"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw waits and visits into this file.")] = None,
) -> None:
    """Replay traffic under several policies in virtual time, and recommend one."""
    until = None if horizon is None else duration(horizon)
    if until is None and trace is None:
        until = GENERATED
    recorded: Recorded | None = None
    loads: dict[type[Load], str | None] = {Poisson: poisson, OnOff: onoff, Agents: agents}
    try:
        recorded = read_recorded(trace) if trace is not None and is_record(trace) else None
        if exact:
            raise typer.Exit(simulate_tables.exact(trace, recorded, policy, as_json=as_json))
        fits = recorded.fits() if recorded else None
        plan = Config.from_file(config) if config else None
        traffic, users = _traffic(trace, loads, until, seed, recorded, fits, closed)
        traffic = traffic and _part(traffic, stretch, top, duration(start), until)
        traffic = traffic and what_ifs.onto(traffic, plan, generated=trace is None)
        asked = _asked(users, traffic, plan)
        usual = EngineModel(slots, decode, prefill, slowdown)
        fitted = None if fits is None else {name: each.engine for name, each in fits.items()}
        engines = parse_engines(engine or [], usual, {*(traffic.models if traffic else ()), *asked}, fitted)
        if users is not None:
            until = until or _last(traffic) or GENERATED
            traffic = with_closed(traffic, users, until, seed, engines, asked)
        assert traffic is not None
        given = _given(recorded, plan, cost, max_wait)
        fleet = simulate_fleet.asked(hosts, route, stale, gateways, die)
        if fleet is not None:
            simulate_fleet.refuse(config=config, what_if=what_if, plot=picture, policies=policy)
            name, make = next(iter(_policies(policy or ["adaptive"], recorded, plan, one=True).items()))
            setting = simulate_fleet.setting_of(
                fleet, traffic, engines, given.costs, given.rules, lambda: make(None), until, misjudge, seed
            )
            with _Bar(traffic, until, show=not as_json) as bar:
                found = simulate_fleet.compare(setting, fleet.routes, bar.begin)
            simulate_fleet.show(setting, name, found, as_json=as_json)
            return
        settings = {"policy.max_wait": max_wait, "policy.anticipate": anticipate or None}
        bench = what_ifs.Bench(
            traffic,
            engines,
            until,
            given.costs,
            replace(given.rules, anticipate=given.rules.anticipate or anticipate),
            given.scene,
            misjudge,
            config,
            {key: value for key, value in settings.items() if value is not None},
        )
        if keyed := simulate_keys.asked(
            budget,
            fair,
            gpu_hour,
            traffic,
            plan,
            float(recorded.start.get("time") or 0.0) if recorded else 0.0,  # a budget is for a day or a month
            policies=policy,
            what_if=what_if,
            plot=picture,
            spill=spill,
        ):
            _by_key(keyed, bench, _policies(policy, recorded, plan, one=True), as_json=as_json)
            return
        changes = list(_changes(what_if or (), plan, spill or (), spill_price))
        policies = _policies(policy, recorded, plan, one=bool(changes))
        with _Bar(traffic, until, show=not as_json) as bar:
            columns = bench.columns(policies, changes, bar.begin)
        if picture is not None:
            plot(columns.outcomes, picture)
    except (LLMuxError, *UNUSABLE) as error:
        fail(_in_words(error, recorded))
    tell_overruled(columns.outcomes)
    results = {name: statistics_of(outcome, duration(slo)) for name, outcome in columns.outcomes.items()}
    if as_json:
        typer.echo(json.dumps(columns.document(results), indent=2))
    else:
        show(
            Shown(traffic, columns.outcomes, results, engines, fits, duration(slo), plan, given),
            columns.verdicts(results),
        )


def _changes(
    what_if: Sequence[str], plan: Config | None, spills: Sequence[str], price: str | None
) -> Iterator[what_ifs.Change]:
    """Yield a change for each --what-if, and for each --spill."""
    for text in what_if:
        yield what_ifs.parse_change(text, () if plan is None else plan.models)
    if price is not None and not spills:
        raise TraceError("--spill-price goes with --spill")
    for text in spills:
        spill = Spill(duration(text), None if price is None else parse_price(price))
        yield what_ifs.Change(f"spill {text}", spill=spill)


def _by_key(
    keyed: simulate_keys.Keyed, bench: what_ifs.Bench, makers: Mapping[str, what_ifs.MakePolicy], *, as_json: bool
) -> None:
    """Print each key's results under the first policy, without and with the options."""
    name, make = next(iter(makers.items()))
    with _Bar(bench.traffic, bench.horizon, show=not as_json) as bar:
        found = simulate_keys.compare(
            keyed, lambda prepare: bench.run(make, progress=bar.begin(name), prepare=prepare)
        )
    simulate_keys.show(keyed, name, found, as_json=as_json)


def _in_words(error: Exception, recorded: Recorded | None) -> Exception:
    if isinstance(error, LLMuxError):
        return error
    if recorded is None:
        raise error
    return unusable(recorded.name, error)


def _given(recorded: Recorded | None, plan: Config | None, cost: str | None, max_wait: str | None) -> Given:
    rules, scene = Rules(), None
    costs, costs_from = None, f"--cost {cost or COST}"
    if recorded is not None:
        rules, scene = recorded.rules, recorded.scene()
        if cost is None and (costs := recorded.costs) is not None:
            costs_from = "measured, as recorded"
    elif plan is not None and cost is None and (costs := what_ifs.known_costs(plan)) is not None:
        costs_from = f"measured, {plan.state_path}"
    if costs is None:
        costs = parse_costs(cost or COST)
    elif costs.default is None:
        costs = replace(costs, default=duration(COST))
    if max_wait is not None:
        rules = replace(rules, max_wait=duration(max_wait))
    return Given(costs, costs_from, rules, scene)


def _asked(users: Closed | None, beside: Trace | None, plan: Config | None) -> list[str]:
    """Return the models that users ask for."""
    if users is None:
        return []
    if plan is None or beside is not None:
        return models_of(users, beside)
    names = list(plan.models)
    if (users.models or 0) > len(names):
        raise TraceError(f"--closed: models={users.models}, but the configuration has only {len(names)}")
    return names[: users.models]


def _last(traffic: Trace | None) -> float:
    """Return when the last request that does not wait for an answer arrives; 0 if there is none."""
    return max((job.arrival for job in traffic.jobs if job.arrival is not None), default=0.0) if traffic else 0.0


def _part(traffic: Trace, stretch: float, top: int | None, start: float, until: float | None) -> Trace:
    if stretch != 1.0:
        traffic = traffic.stretched(stretch)
    if top is not None:
        traffic = traffic.busiest(top)
    if start:
        traffic = traffic.sliced(start, float("inf"))
    return traffic if until is None or traffic.closed_loop else traffic.sliced(0.0, until)


def _traffic(
    trace: Path | None,
    loads: Mapping[type[Load], str | None],
    until: float | None,
    seed: int,
    recorded: Recorded | None,
    fits: Mapping[str, Fit] | None,
    closed: str | None,
) -> tuple[Trace | None, Closed | None]:
    """Return the open-loop traffic, and the users that wait for their answers."""
    users = None if closed is None else parse_closed(closed)
    wanted = [(kind, text) for kind, text in loads.items() if text is not None]
    given = (trace is not None) + len(wanted)
    if given > 1 or (users is None and not given):
        raise TraceError("give a trace, or one of --poisson, --onoff, --agents and --closed")
    if not given:
        return None, users
    if recorded is not None:
        return recorded.fitted_trace(fits or {}), users
    if trace is not None:
        return read_trace(trace), users
    return generate(parse_load(*wanted[0]), until or GENERATED, seed), users


def _policies(
    texts: list[str] | None, recorded: Recorded | None, plan: Config | None, *, one: bool
) -> dict[str, what_ifs.MakePolicy]:
    """Return factories of the policies; their keys are names, or the whole text if a name comes twice.

    Without ``texts``: that of the configuration or the record, and, unless ``one`` is enough, the usual ones.
    """
    makers: dict[str, what_ifs.MakePolicy] = {}
    if not texts and plan is not None:
        makers[labelled(plan.policy.use, plan.policy.options)] = _configured_policy
    elif not texts and recorded is not None:
        used = recorded.start["policy"]
        makers[labelled(used["use"], used["options"])] = partial(_load, used["use"], used["options"])
    if texts:
        wanted = texts
    elif one:
        wanted = [] if makers else ["adaptive"]
    else:
        wanted = list(COMPARED)
    split = [_split(text) for text in wanted]
    names = [name for name, _ in split]
    for text, (name, options) in zip(wanted, split, strict=True):
        label = name if names.count(name) == 1 else text
        makers.setdefault(label, partial(_load, name, options))
        _load(name, options, None)  # errors in loading are reported before anything runs
    return makers


def labelled(use: str, options: Mapping[str, Any]) -> str:
    """Return the name of a policy with its options in a table."""
    return f"{use}:{','.join(f'{key}={value}' for key, value in options.items())}" if options else use


def _load(name: str, options: Mapping[str, Any], _config: Config | None) -> Policy:
    return load_policy(name, options, Path())


def _configured_policy(config: Config | None) -> Policy:
    assert config is not None
    return load_policy(config.policy.use, config.policy.options, config.folder)


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``NAME[:key=value,…]``; NAME may itself contain a colon, as in ./file.py:Class."""
    name, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        return text, {}
    options: dict[str, Any] = {}
    for word in filter(None, rest.split(",")):
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise TraceError(f"--policy {text}: {word!r} is not KEY=VALUE")
        options[key.strip()] = what_ifs.parse_value(value)
    return name, options


@dataclass(slots=True)
class _Bar:
    """A progress bar on a terminal; elsewhere nothing."""

    traffic: Trace
    until: float | None
    show: bool
    progress: Progress | None = None

    def __enter__(self) -> Self:
        if self.show and sys.stderr.isatty():
            columns = TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:]
            self.progress = Progress(*columns, console=terminal(stderr=True), transient=True)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def begin(self, name: str) -> Callable[[float], None] | None:
        """Return a function that takes the virtual time of a run."""
        if self.progress is None:
            return None
        bar, task = self.progress, self.progress.add_task(name, total=self.until or _last(self.traffic))
        return lambda time: bar.update(task, completed=time)

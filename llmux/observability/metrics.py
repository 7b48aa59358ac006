"""The metrics: counted in plain Python, collected on request.

``prometheus_client`` names and renders them, but does not count: its counters take a lock and look labels up,
and some of its settings hold for the whole process. Here every app has a registry of its own, and a request
costs a few dictionary look-ups. Only models that have been declared become label values; everything else is
counted under ``unknown``. All of it belongs to the event loop's thread.

Labels: ``from`` is ``idle`` when nothing had to leave, the model, or ``several``; ``other`` once there are
``PAIRS`` pairs with series of their own. ``to`` is ``none`` when models only went to sleep.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmux.core.effects import (
    BackoffStarted,
    CancelRequests,
    Effect,
    ModelDeactivated,
    ModelLost,
    ModelRemoved,
    PolicyOverruled,
    Reject,
    SwitchDrained,
    SwitchEnded,
)
from llmux.core.phases import Phase
from llmux.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN = "unknown"
OTHER = "other"
PAIRS = 500  # of models that have series of their own: with hundreds of models there are as many as switches

_MINUTES = (60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
_WAIT = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, *_MINUTES)
_FIRST_BYTE = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, *_MINUTES)
_SWITCH = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, *_MINUTES)
_ACTIVE = (1.0, 5.0, 15.0, 30.0, *_MINUTES, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0)

HELP: dict[str, str] = {
    "llmux_switch_total": "Switches that ended, by result: success, failure or abandoned.",
    "llmux_switch_duration_seconds": "How long successful switches took, drain included.",
    "llmux_switch_drain_duration_seconds": "How long those that had to leave took to finish their requests.",
    "llmux_model_active_duration_seconds": "How long models were awake at a stretch.",
    "llmux_switch_cost_ema_seconds": "Estimated cost of a switch: from the end of the drain to ready.",
    "llmux_request_queue_depth": "Requests that wait for their model.",
    "llmux_request_queue_wait_seconds": "How long requests waited for their model; 0 for those that did not.",
    "llmux_model_in_flight": "Requests that their engine is working on.",
    "llmux_requests_total": "Requests that were answered, by HTTP status (499: the client left first).",
    "llmux_request_duration_seconds": "Time from a request's arrival to the first byte of its answer.",
    "llmux_request_full_duration_seconds": "Time from a request's arrival to the last byte of its answer.",
    "llmux_tokens_total": "Tokens that engines reported in `usage`, by kind: input, output.",
    "llmux_hook_duration_seconds": "How long hooks ran.",
    "llmux_hook_failures_total": "Hooks that failed or ran past their timeout.",
    "llmux_requests_cut_total": "Requests in flight that were ended: drain_deadline, stopping or cancelled.",
    "llmux_requests_rejected_total": "Requests that llmux refused, by the error's code.",
    "llmux_model_phase": "1 for the phase that the model is in, 0 for the others.",
    "llmux_model_pinned": "1 while the model is pinned, else 0.",
    "llmux_leased": "1 while the GPU is leased to another job, else 0.",
    "llmux_manual": "1 while only operators switch, else 0.",
    "llmux_model_lost_total": "Engines that were found gone.",
    "llmux_model_backoffs_total": "Backoffs begun after a failed wake or sleep.",
    "llmux_policy_overruled_total": "Answers of the policy that could not be followed.",
    "llmux_shadow_decisions_total": "Answers of shadow policies, and whether the policy did the same.",
    "llmux_policy_choice": "Of the policies that `use: auto` chooses among: 1 for the one that decides.",
    "llmux_policy_looks_total": "Looks back of `use: auto`, by result: adopted, kept or failed.",
    "llmux_policy_look_cpu_seconds_total": "CPU time that these looks took, of processes beside llmux.",
    "llmux_targets_total": "Requests for a variant, a virtual or a remote model, by the chosen target, and why.",
    "llmux_audit_lines_lost_total": "Lines that the audit could not keep until its file could be written.",
    "llmux_captures_total": "Requests that were captured (with `captures`).",
    "llmux_captures_lost_total": "Captures that could not be written, or did not fit into memory.",
    "llmux_remote_state": "1 for the state of a remote's breaker, else 0: closed, open, half_open, resting.",
    "llmux_remote_in_flight": "Requests that a remote is working on.",
    "llmux_remote_requests_total": "Requests to a remote, by outcome: ok, failed, refused (4xx), left.",
    "llmux_build_info": "1, with the version as label.",
}


class GaugeRow(NamedTuple):
    """What one model looks like at this moment."""

    model: str
    queued: int
    in_flight: int
    phase: str
    pinned: bool = False


class Modes(NamedTuple):
    """What operators have asked for at this moment."""

    leased: bool = False
    manual: bool = False


class RemoteRow(NamedTuple):
    """What one remote looks like at this moment."""

    remote: str
    states: Mapping[str, bool]
    in_flight: int
    counts: Mapping[str, int]


class Looks(NamedTuple):
    """What ``use: auto`` has done: which candidate decides, its looks by result, and their seconds of CPU."""

    chosen: Mapping[str, bool] = MappingProxyType({})
    results: Mapping[str, int] = MappingProxyType({})
    cpu: float = 0.0


class _Collected(CollectorRegistry):
    """What has been collected already."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        seen, out = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            out.append((bound, float(seen)))
        return out


class _Status:
    """The requests of one model that got one HTTP status."""

    __slots__ = ("count", "duration", "whole")

    def __init__(self) -> None:
        self.count = 0
        self.duration = _Histogram(_FIRST_BYTE)
        self.whole = _Histogram(_FIRST_BYTE)


class _Model:
    """Everything that is counted per model."""

    __slots__ = (
        "active",
        "backoffs",
        "cut",
        "failures",
        "hooks",
        "lost",
        "rejected",
        "statuses",
        "tokens",
        "wait",
    )

    def __init__(self) -> None:
        self.statuses: dict[int, _Status] = {}
        self.wait = _Histogram(_WAIT)
        self.active = _Histogram(_ACTIVE)
        self.hooks: dict[str, _Histogram] = {}
        self.failures: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.rejected: dict[str, int] = {}
        self.backoffs: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.lost = 0


class Metrics(Collector):
    """The metrics of one app."""

    def __init__(
        self,
        gauges: Callable[[], Iterable[GaugeRow]] = tuple,
        *,
        shadows: Callable[[], Iterable[tuple[str, Mapping[tuple[str, bool], int]]]] = tuple,
        modes: Callable[[], Modes] = Modes,
        auto: Callable[[], Looks] = Looks,
        models: Iterable[str] = (),
        process: bool = True,
    ) -> None:
        """``gauges``, ``shadows`` (names and counts), ``modes`` and ``auto`` are asked at a scrape.

        ``process`` adds those of process and Python.
        """
        self._gauges = gauges
        self._modes = modes
        self._shadows = shadows
        self._auto = auto
        self.remotes: Callable[[], Iterable[RemoteRow]] = tuple
        """Asked at a scrape, too."""
        self._models: dict[str | None, _Model] = {}
        self._unknown = _Model()
        self._switches: dict[tuple[str, str, str], int] = {}
        self._durations: dict[tuple[str, str], _Histogram] = {}
        self._drains: dict[tuple[str, str], _Histogram] = {}
        self._costs: dict[tuple[str, str], float] = {}
        self._pairs: set[tuple[str, str]] = set()  # that have series of their own
        self._targets: dict[tuple[str, str, str], int] = {}
        self._overruled = 0
        self.declare(models)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        if process:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)

    # ---- what happens

    def declare(self, models: Iterable[str]) -> None:
        """Make names known: from now on they are label values."""
        for model in models:
            if model not in self._models:  # a gateway is told them with each report
                self._models[model] = _Model()

    def forget(self, model: str) -> None:
        """Drop everything about a model that has been removed."""
        self._models.pop(model, None)
        self._pairs = {pair for pair in self._pairs if model not in pair}
        for pairs in (self._durations, self._drains, self._costs):
            for pair in [pair for pair in pairs if model in pair]:
                del pairs[pair]
        self._switches = {key: count for key, count in self._switches.items() if model not in key[:2]}

    def request_ended(
        self,
        model: str | None,
        status: int,
        waited: float,
        first_byte: float | None,
        whole: float | None = None,
        tokens: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """Count one request: its status, its wait in the queue, when its first byte went out, when it had ended.

        ``first_byte`` and ``whole`` are seconds from its arrival (None: never); ``tokens`` are those of its input
        and of its output (None: not told).
        """
        entry = self._models.get(model) or self._unknown
        child = entry.statuses.get(status)
        if child is None:
            child = self._status(entry, status)
        child.count += 1
        if first_byte is not None:  # observed in line, as it is done with each request
            took = child.duration
            took.counts[bisect_left(took.bounds, first_byte)] += 1
            took.total += first_byte
        if waited:
            entry.wait.observe(waited)
        else:  # most do not wait
            entry.wait.counts[0] += 1
        if whole is not None:
            took = child.whole
            took.counts[bisect_left(took.bounds, whole)] += 1
            took.total += whole
        read, written = tokens
        if read is not None:
            entry.tokens["input"] = entry.tokens.get("input", 0) + read
        if written is not None:
            entry.tokens["output"] = entry.tokens.get("output", 0) + written

    def hook_ended(self, model: str, hook: str, seconds: float, ok: bool) -> None:
        """Count one run of a hook."""
        entry = self._models.get(model) or self._unknown
        histogram = entry.hooks.get(hook)
        if histogram is None:
            histogram = entry.hooks[hook] = _Histogram(_SWITCH)
            entry.failures.setdefault(hook, 0)
        histogram.observe(seconds)
        if not ok:
            entry.failures[hook] += 1

    def request_rejected(self, model: str | None, code: str) -> None:
        """Count a refusal; ``code`` is the error's. Those of the core come by ``effect``."""
        _add((self._models.get(model) or self._unknown).rejected, code)

    def request_cut(self, model: str, reason: str) -> None:
        """Count a request in flight that was ended by itself. Those of the core come by ``effect``."""
        _add((self._models.get(model) or self._unknown).cut, str(reason))

    def target_chosen(self, asked: str, target: str, reason: str) -> None:
        """Count a choice; ``asked`` and ``target`` are configured names."""
        key = (asked, target, reason)
        self._targets[key] = self._targets.get(key, 0) + 1

    def cost_estimated(self, sources: tuple[str, ...], to: str | None, seconds: float) -> None:
        """Show an estimate, as those that were stored by the last llmux."""
        self._estimated(self._pair(sources, to), seconds)

    def effect(self, effect: Effect) -> None:
        """Count what an effect of the core tells; the others are ignored."""
        match effect:
            case Reject():
                self.request_rejected(effect.model, str(effect.refusal))
            case CancelRequests():
                entry = self._models.get(effect.model) or self._unknown
                _add(entry.cut, str(effect.reason), len(effect.requests))
            case SwitchDrained() if effect.sources:
                self._drains.setdefault(self._pair(effect.sources, effect.to), _Histogram(_SWITCH)).observe(
                    effect.drain
                )
            case SwitchEnded():
                self._switch_ended(effect)
            case ModelDeactivated():
                (self._models.get(effect.model) or self._unknown).active.observe(effect.active)
            case ModelLost():
                (self._models.get(effect.model) or self._unknown).lost += 1
            case BackoffStarted():
                _add((self._models.get(effect.model) or self._unknown).backoffs, str(effect.kind))
            case PolicyOverruled():
                self._overruled += 1
            case ModelRemoved():
                self.forget(effect.model)

    def _switch_ended(self, effect: SwitchEnded) -> None:
        pair = self._pair(effect.sources, effect.to)
        key = (*pair, effect.result)
        self._switches[key] = self._switches.get(key, 0) + 1
        if effect.result == "success":
            self._durations.setdefault(pair, _Histogram(_SWITCH)).observe(effect.duration)
        if effect.estimate is not None:
            self._estimated(pair, effect.estimate)

    def _estimated(self, pair: tuple[str, str], seconds: float) -> None:
        if pair in self._pairs:  # those of many are no one's
            self._costs[pair] = seconds

    def _pair(self, sources: tuple[str, ...], to: str | None) -> tuple[str, str]:
        source = "several" if len(sources) > 1 else sources[0] if sources else "idle"
        if len(sources) == 1 and source not in self._models:
            source = UNKNOWN
        pair = source, "none" if to is None else to if to in self._models else UNKNOWN
        if pair not in self._pairs:
            if len(self._pairs) >= PAIRS:
                return OTHER, pair[1]
            self._pairs.add(pair)
        return pair

    @staticmethod
    def _status(entry: _Model, status: int) -> _Status:
        # Engines may invent statuses: what is none must not grow the number of series.
        key = status if 100 <= status <= 599 else 0  # noqa: PLR2004
        return entry.statuses.setdefault(key, _Status())

    # ---- what is asked

    def render(self) -> tuple[bytes, str]:
        """Return the text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE

    async def text(self) -> bytes:
        """Return the text format without holding up the loop: with hundreds of models it takes a while.

        Families are collected one in each turn of the loop, and a thread writes them.
        """
        families = []
        for family in self.registry.collect():
            families.append(family)
            await asyncio.sleep(0)
        return await asyncio.to_thread(generate_latest, _Collected(families))

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called by the registry."""
        yield from self._switch_metrics()
        yield from self._request_metrics()
        yield from self._model_metrics()
        yield from self._gauge_metrics()
        yield _counter("llmux_policy_overruled_total", (), [((), self._overruled)])
        answers = [
            ((name, kind, str(agrees).lower()), count)
            for name, counts in self._shadows()
            for (kind, agrees), count in counts.items()
        ]
        yield _counter("llmux_shadow_decisions_total", ("policy", "decision", "agrees"), answers)
        yield _counter("llmux_targets_total", ("model", "target", "reason"), self._targets.items())
        yield from self._remote_metrics()
        looks = self._auto()
        yield _gauge(
            "llmux_policy_choice", ("policy",), [((name,), int(one)) for name, one in looks.chosen.items()]
        )
        yield _counter("llmux_policy_looks_total", ("result",), [((key,), n) for key, n in looks.results.items()])
        yield _counter("llmux_policy_look_cpu_seconds_total", (), [((), looks.cpu)])
        yield _gauge("llmux_build_info", ("version",), [((__version__,), 1)])

    def _all(self) -> list[tuple[str, _Model]]:
        return [(str(name), model) for name, model in self._models.items()] + [(UNKNOWN, self._unknown)]

    def _switch_metrics(self) -> Iterator[Metric]:
        labels = ("from", "to")
        yield _counter("llmux_switch_total", (*labels, "result"), self._switches.items())
        yield _histogram("llmux_switch_duration_seconds", labels, self._durations.items())
        yield _histogram("llmux_switch_drain_duration_seconds", labels, self._drains.items())
        yield _gauge("llmux_switch_cost_ema_seconds", labels, self._costs.items())

    def _request_metrics(self) -> Iterator[Metric]:
        rows = [
            ((name, str(status) if status else "other"), child)
            for name, model in self._all()
            for status, child in model.statuses.items()
        ]
        labels = ("model", "status")
        yield _counter("llmux_requests_total", labels, [(key, child.count) for key, child in rows])
        durations = [(key, child.duration) for key, child in rows]
        yield _histogram("llmux_request_duration_seconds", labels, durations)
        whole = [(key, child.whole) for key, child in rows]
        yield _histogram("llmux_request_full_duration_seconds", labels, whole)
        waits = [((name,), model.wait) for name, model in self._all() if model.statuses]
        yield _histogram("llmux_request_queue_wait_seconds", ("model",), waits)

    def _model_metrics(self) -> Iterator[Metric]:
        everything = self._all()
        active = [((name,), model.active) for name, model in everything if any(model.active.counts)]
        yield _histogram("llmux_model_active_duration_seconds", ("model",), active)
        hooks = [((name, hook), one) for name, model in everything for hook, one in model.hooks.items()]
        yield _histogram("llmux_hook_duration_seconds", ("model", "hook"), hooks)
        for metric, label, attribute in (
            ("llmux_hook_failures_total", "hook", "failures"),
            ("llmux_requests_cut_total", "reason", "cut"),
            ("llmux_requests_rejected_total", "code", "rejected"),
            ("llmux_model_backoffs_total", "hook", "backoffs"),
            ("llmux_tokens_total", "kind", "tokens"),
        ):
            counts = [
                ((name, value), count)
                for name, model in everything
                for value, count in getattr(model, attribute).items()
            ]
            yield _counter(metric, ("model", label), counts)
        lost = [((str(name),), model.lost) for name, model in self._models.items()]
        yield _counter("llmux_model_lost_total", ("model",), lost)

    def _gauge_metrics(self) -> Iterator[Metric]:
        rows = list(self._gauges())
        yield _gauge("llmux_request_queue_depth", ("model",), [((row.model,), row.queued) for row in rows])
        yield _gauge("llmux_model_in_flight", ("model",), [((row.model,), row.in_flight) for row in rows])
        phases = [((row.model, phase), int(row.phase == phase)) for row in rows for phase in Phase]
        yield _gauge("llmux_model_phase", ("model", "phase"), phases)
        yield _gauge("llmux_model_pinned", ("model",), [((row.model,), int(row.pinned)) for row in rows])
        modes = self._modes()
        yield _gauge("llmux_leased", (), [((), int(modes.leased))])
        yield _gauge("llmux_manual", (), [((), int(modes.manual))])

    def _remote_metrics(self) -> Iterator[Metric]:
        rows = list(self.remotes())
        states = [((row.remote, state), int(on)) for row in rows for state, on in row.states.items()]
        yield _gauge("llmux_remote_state", ("remote", "state"), states)
        yield _gauge("llmux_remote_in_flight", ("remote",), [((row.remote,), row.in_flight) for row in rows])
        counts = [((row.remote, outcome), n) for row in rows for outcome, n in row.counts.items()]
        yield _counter("llmux_remote_requests_total", ("remote", "outcome"), counts)


Samples = Iterable[tuple[tuple[str, ...], float]]


def _add(counts: dict[str, int], key: str, number: int = 1) -> None:
    counts[key] = counts.get(key, 0) + number


def filled(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    meaning: str,
    labels: tuple[str, ...],
    samples: Samples,
) -> Metric:
    """Return a metric with its samples: the labels' values, and the number."""
    family = kind(name, meaning, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    return filled(CounterMetricFamily, name, HELP[name], labels, samples)


def _gauge(name: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    return filled(GaugeMetricFamily, name, HELP[name], labels, samples)


def _histogram(
    name: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], _Histogram]]
) -> Metric:
    family = HistogramMetricFamily(name, HELP[name], labels=labels)
    for values, histogram in samples:
        family.add_metric(values, histogram.buckets(), histogram.total)
    return family

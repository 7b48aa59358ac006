"""llmux's own record as a trace: what was asked for and when, how long it took, and what switches cost.

An exact replay takes how long an answer took as it was. To compare policies, an engine is fitted to what the
record shows of each model, and an answer takes what it would have taken alone, longer with others beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmux.core.spec import HookKind, Level, ModelSpec, Rules
from llmux.observability.record import RecordedRun, RecordError, read_record
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import Fit, Service, fit
from llmux.simulator.run import UNBOUNDED, Scene
from llmux.simulator.trace import Job, Trace, TraceError

Line = Mapping[str, Any]
BYTES = 4  # of a request or an answer, for a token: about

# What a record raises that was changed by hand, or written by another version, wherever it is made use of.
SENSELESS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True, slots=True)
class Recorded:
    """The last llmux that wrote into a record, from where the file has it."""

    name: str
    start: Line
    requests: list[Line]  # by arrival
    switches: list[Line]  # by their beginning
    decisions: list[Line]
    events: list[Line]
    deepenings: list[Line]  # the hooks that put sleeping models deeper
    reloads: int
    lost: int  # lines that are missing

    def trace(self, *, refused: bool = False) -> Trace:
        """Return the requests as jobs; those that were ``refused`` only on demand."""
        means = _means((line["model"], line["service_s"]) for line in self.requests)
        jobs = [_job(line, means) for line in self.requests if refused or line["outcome"] != "refused"]
        return self._trace(jobs)

    def fits(self) -> Mapping[str, Fit]:
        """Fit an engine to each model that has answered something."""
        services: dict[str, list[Service]] = defaultdict(list)
        for line in filter(_served, self.requests):
            services[line["model"]].append(_service(line))
        limits = {model["name"]: model["max_in_flight"] for model in self.start["models"]}
        return {model: fit(each, limits.get(model)) for model, each in services.items()}

    def fitted_trace(self, fits: Mapping[str, Fit]) -> Trace:
        """Return the requests as jobs for the engines in ``fits``; nothing is refused."""
        known = {model: zip(each.alone, each.first, strict=True) for model, each in fits.items()}
        means = {model: sum(each.alone) / len(each.alone) for model, each in fits.items()}
        jobs = []
        for line in self.requests:
            if line["outcome"] == "refused":
                continue
            job = _job(line, {})
            if _served(line):
                alone, first = next(known[line["model"]])
                job = replace(job, service=None, alone=alone, first=first)
            elif line["outcome"] != "held":
                job = replace(job, service=None, alone=means.get(line["model"], 0.0))
            jobs.append(job)
        return self._trace(jobs)

    def _trace(self, jobs: list[Job]) -> Trace:
        if not jobs:
            raise TraceError(f"{self.name}: holds no requests")
        return Trace(self.name, jobs)

    def scene(self) -> Scene:
        """Return the models for comparing policies: as configured, but no request is rejected."""
        specs = [_spec(model, hooks=False) for model in self.start["models"]]
        return Scene(specs, self.awake)

    def exact_specs(self) -> list[ModelSpec]:
        """Return the models as they were."""
        return [_spec(model, hooks=True) for model in self.start["models"]]

    @property
    def awake(self) -> frozenset[str]:
        """Which models were awake as the record begins."""
        return frozenset(model["name"] for model in self.start["models"] if model["phase"] == "awake")

    @property
    def levels(self) -> Mapping[str, str]:
        """At which levels models slept as the record begins."""
        return {model["name"]: model["level"] for model in self.start["models"] if model.get("level") is not None}

    @property
    def rules(self) -> Rules:
        """The guard rails, but for those that end what is in flight: recorded services have that in them."""
        rules = self.start["rules"]
        return Rules(
            request_timeout=rules["request_timeout"],
            max_wait=float("inf") if rules["max_wait"] is None else rules["max_wait"],
            min_active=rules["min_active"],
            drain_timeout=None,
            alive_every=0.0,
            capacity=rules["capacity"],
            host_memory=rules.get("host_memory"),
            default_model=rules.get("default_model"),
            default_after=float(rules.get("default_after", 0.0)),
        )

    @property
    def costs(self) -> CostMatrix | None:
        """The mean cost of each direction, None where no switch succeeded."""
        done = [line for line in self.switches if line["result"] == "success" and line["to"] is not None]
        if not done:
            return None
        pairs = _means(((line["from"][0], line["to"]), line["cost_s"]) for line in done if len(line["from"]) == 1)
        hooks = [hook for line in self.switches for hook in line["hooks"] if hook["ok"]]
        sleeps, wakes = (
            _means((hook["model"], hook["seconds"]) for hook in hooks if hook["hook"] == kind)
            for kind in ("sleep", "wake")
        )
        return CostMatrix(sum(line["cost_s"] for line in done) / len(done), pairs, sleeps, wakes)

    @property
    def end(self) -> float:
        """When the last thing in it happened."""
        ends = [line["arrival_s"] + line["wait_s"] + (line["service_s"] or 0.0) for line in self.requests]
        ends += [line["decided_s"] + line["duration_s"] for line in self.switches]
        latest: float = max([*ends, *(line["at"] for line in self.events), self.start["at"]])
        return latest


def read_recorded(path: Path) -> Recorded:
    """Read a record.

    Raises:
        RecordError: it cannot be read.
        TraceError: a line of it lacks what it should have.

    """
    return recorded_from(path.name, read_record(path))


def recorded_from(name: str, runs: list[RecordedRun]) -> Recorded:
    """Take the last llmux of these runs; a reload goes on with the one before."""
    first = max(index for index, run in enumerate(runs) if index == 0 or run.start.get("because") != "reload")
    parts = runs[first:]

    def all_of(kind: Callable[[RecordedRun], list[Line]]) -> list[Line]:
        return [line for part in parts for line in kind(part)]

    begun = sum(run.start.get("because") != "reload" for run in runs)
    recorded = Recorded(
        f"{name} (the last of {begun} runs)" if begun > 1 else name,
        parts[0].start,
        all_of(lambda run: run.requests),
        all_of(lambda run: run.switches),
        all_of(lambda run: run.decisions),
        [line for line in all_of(lambda run: run.others) if line.get("type") in ("event", "tick", "stop")],
        [line for line in all_of(lambda run: run.others) if line.get("type") == "hook"],
        len(parts) - 1,
        sum(part.lost for part in parts),
    )
    try:
        recorded.requests.sort(key=lambda line: (float(line["arrival_s"]), int(line["id"])))
        recorded.switches.sort(key=lambda line: int(line["id"]))
        _ = recorded.end, recorded.costs, recorded.exact_specs(), recorded.rules
        for line in recorded.requests:
            _job(line, {})
    except SENSELESS as error:
        raise senseless(name, error) from None
    return recorded


def senseless(name: str, error: Exception) -> RecordError:
    """Return what to raise for a record that was changed by hand, or by another version."""
    return RecordError(f"{name}: a line lacks what a record's has, or has an invalid value: {error!r}")


def _served(line: Line) -> bool:
    """Say whether an engine worked on it for a known time."""
    return line["service_s"] is not None and line["outcome"] not in ("held", "refused")


def _service(line: Line) -> Service:
    arrived, wait, first = float(line["arrival_s"]), float(line["wait_s"]), line["first_byte_s"]
    admitted, seconds = arrived + wait, float(line["service_s"])
    began = admitted + seconds if first is None else min(max(arrived + float(first), admitted), admitted + seconds)
    return Service(
        admitted, admitted + seconds, began, int(line["prompt_bytes"] or 0), int(line["answer_bytes"] or 0)
    )


def _job(line: Line, means: Mapping[Any, float]) -> Job:
    service, wait = line["service_s"], float(line["wait_s"])
    left = line["outcome"] == "left" and service is None
    first = line["first_byte_s"]
    return Job(
        float(line["arrival_s"]),
        str(line["model"]),
        0,
        0,
        key=str(line.get("key", "")),
        service=means.get(line["model"], 0.0) if service is None else float(service),
        first=0.0 if first is None else max(0.0, first - wait),
        patience=wait if left else None,
        tokens=_tokens(line),
        keep=None if line.get("keep_s") is None else float(line["keep_s"]),
    )


def _tokens(line: Line) -> tuple[int, int]:
    """Return the tokens that were told of, else what its bytes are about."""
    told = line.get("tokens") or (None, None)
    given, made = (None if each is None else int(each) for each in told)
    guessed = (int(line[name] or 0) // BYTES for name in ("prompt_bytes", "answer_bytes"))
    asked, answered = guessed
    return asked if given is None else given, answered if made is None else made


def _spec(model: Line, *, hooks: bool) -> ModelSpec:
    companions = model["companions"]
    return ModelSpec(
        model["name"],
        hooks=frozenset(HookKind(kind) for kind in model["hooks"]) if hooks else ModelSpec("").hooks,
        max_in_flight=model["max_in_flight"],
        max_queued=model["max_queued"] if hooks else UNBOUNDED,
        memory=model["memory"],
        companions=None if companions is None else frozenset(companions),
        shared_address=model["shared_address"],
        idle_sleep=model["idle_sleep"],
        preload=bool(model["preload"]),
        keep_awake=bool(model.get("keep_awake")),
        levels=tuple(Level(str(name), int(need)) for name, need in model.get("levels", ()) if hooks),
    )


def _means(samples: Iterable[tuple[Any, float | None]]) -> dict[Any, float]:
    found: dict[Any, list[float]] = defaultdict(list)
    for key, seconds in samples:
        if seconds is not None:
            found[key].append(seconds)
    return {key: sum(each) / len(each) for key, each in found.items()}

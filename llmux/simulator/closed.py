"""Closed loops: users that wait for each answer before they ask again. Deterministic for a seed.

What every user asks, how long the answers are and how long it thinks after each is drawn before a run, from dice
of its own. So all policies are compared on the same requests; only when these come depends on the answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmux.config.setting_types import parse_duration
from llmux.simulator.engine_model import Engines
from llmux.simulator.synthetic import model_name, tokens
from llmux.simulator.trace import Job, Trace, TraceError

WORDS = "users=8,think=20s,models=3,stay=0"
MODELS = 3
MOST = 1_000_000  # requests: more than that in one run is a slip


@dataclass(frozen=True, slots=True)
class Closed:
    """``users`` closed loops. Each thinks for ``think`` seconds (exponential) after an answer, then asks again."""

    users: int = 8
    think: float = 20.0  # seconds, on average
    models: int | None = None  # how many models they ask; None: all of the other traffic, else MODELS
    stay: float = 0.0  # share of the requests that go to the same model as the one before; the others alternate


def parse_closed(text: str) -> Closed:
    """Read ``users=8,think=20s,models=3,stay=0.2``.

    Raises:
        TraceError: a word is unknown, or its value out of range; the message says what to write.

    """
    readers: dict[str, Callable[[str], float]] = {
        "users": _whole, "think": parse_duration, "models": _whole, "stay": _share,
    }  # fmt: skip
    values: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        key, sign, value = word.partition("=")
        if not sign or key not in readers:
            raise TraceError(f"--closed {text}: {word!r} is unknown; write {WORDS}")
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise TraceError(f"--closed {text}: {key}: {error}") from None
    return Closed(**values)  # type: ignore[arg-type]


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"must be a whole number > 0, not {text!r}")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"must be from 0 to 1, not {text!r}")
    return number


def models_of(load: Closed, beside: Trace | None) -> list[str]:
    """Return the models that the users ask: those of the other traffic that are asked most, else made-up ones.

    Raises TraceError when there are not so many.
    """
    if beside is None:
        return [model_name(number) for number in range(load.models or MODELS)]
    counts: dict[str, int] = {}
    for job in filter(_sized, beside.jobs):
        counts[job.model] = counts.get(job.model, 0) + 1
    if load.models is not None and load.models > len(counts):
        raise TraceError(f"--closed: models={load.models}, but {beside.name} has only {len(counts)}")
    names = sorted(counts, key=lambda name: (-counts[name], name))
    return names[: load.models]


def with_closed(
    beside: Trace | None,
    load: Closed,
    horizon: float,
    seed: int,
    engines: Engines,
    names: Sequence[str] | None = None,
) -> Trace:
    """Return the other traffic and the users' requests, for the models ``names``, in one trace.

    There are enough of them for ``horizon`` seconds even if none ever waits. Their sizes are drawn from those of
    the other traffic for the same model; without any they are like chat traffic.

    Raises:
        TraceError: there are not so many models, or far too many requests.

    """
    names = names or models_of(load, beside)
    sizes = _sizes(beside, names)
    jobs = list(beside.jobs) if beside is not None else []
    for user in range(load.users):
        dice = random.Random(f"{seed}/{user}")  # noqa: S311 - a simulation, no secret
        first = _think(dice, load)
        chain: list[Job] = []
        for job, least in _steps(dice, load, names, sizes, engines):
            chain.append(replace(job, arrival=None if chain else first))
            first += least + job.think
            if first > horizon:
                break
            if len(jobs) + len(chain) > MOST:
                raise TraceError(
                    f"--closed: more than {MOST:,} requests in {horizon:g} s; write a longer `think`, or fewer"
                    " users"
                )
        last = len(chain) - 1
        begin = len(jobs)
        jobs += [
            replace(job, successor=None if place == last else begin + place + 1) for place, job in enumerate(chain)
        ]
    name = f"{load.users} closed loops, seed {seed}"
    return Trace(name if beside is None else f"{beside.name} + {name}", jobs)


def _sized(job: Job) -> bool:
    """Say whether it is known how much work it is; of a guard that was held only the seconds are."""
    return job.service is None


def _think(dice: random.Random, load: Closed) -> float:
    return dice.expovariate(1.0 / load.think) if load.think > 0 else 0.0


def _steps(
    dice: random.Random,
    load: Closed,
    names: Sequence[str],
    sizes: Callable[[random.Random, str], Job],
    engines: Engines,
) -> Iterator[tuple[Job, float]]:
    """Yield a user's requests, each with the seconds that its answer takes at least."""
    model = dice.choice(names)
    while True:
        job = replace(sizes(dice, model), think=_think(dice, load))
        yield job, engines.of(model).least(job)
        others = [name for name in names if name != model]
        if others and dice.random() >= load.stay:
            model = dice.choice(others)


def _sizes(beside: Trace | None, names: Sequence[str]) -> Callable[[random.Random, str], Job]:
    if beside is None:
        return lambda dice, model: Job(None, model, *tokens(dice))
    known: dict[str, list[Job]] = {name: [] for name in names}
    for job in filter(_sized, beside.jobs):
        if job.model in known:
            known[job.model].append(replace(job, arrival=None, successor=None, patience=None))
    return lambda dice, model: dice.choice(known[model])

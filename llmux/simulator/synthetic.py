"""Generated traffic: Poisson, on/off, agents that wait for each answer, closed loops. Deterministic for a seed.

In a closed loop, each user's requests, the lengths of the answers and the pauses after them are drawn before a
run, from a random generator of its own. So all policies are compared on the same requests; only their arrivals
depend on the answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from llmux.config.setting_types import parse_duration
from llmux.simulator.engine_model import Engines
from llmux.simulator.trace import Job, Trace, TraceError

# Log-normal token counts, the shape of chat traffic: median 400 in, 120 out, with long tails.
PROMPT = (6.0, 1.0, 0, 8000)  # mean and deviation of the logarithm, least, most
OUTPUT = (4.8, 0.9, 4, 2000)
STEPS = (4, 20)  # steps of an agent's task
REST = 30.0  # seconds between two tasks of an agent, on average


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals, ``rate`` a second in all; model k gets a share like 1/k^skew (0: all alike)."""

    models: int = 4
    rate: float = 0.5
    skew: float = 1.0


@dataclass(frozen=True, slots=True)
class OnOff:
    """Each model is on for ``on`` seconds (exponential) with ``rate`` arrivals a second, then off for ``off``."""

    models: int = 4
    rate: float = 0.5
    on: float = 60.0
    off: float = 180.0


@dataclass(frozen=True, slots=True)
class Agents:
    """Closed loops: each agent's tasks alternate between two models, ``think`` seconds after each answer.

    ``background`` adds Poisson arrivals, in requests a second over ``models`` models.
    """

    agents: int = 1
    think: float = 1.0
    background: float = 0.0
    models: int = 2


Load = Poisson | OnOff | Agents


def parse_load(kind: type[Load], text: str) -> Load:
    """Read ``models=4,rate=0.5``.

    Raises:
        TraceError: a word is not a ``key=number`` of this load, or the number is out of range.

    """
    known = {field.name: field for field in fields(kind)}
    values: dict[str, float] = {}
    option = f"--{kind.__name__.lower()}"
    for word in filter(None, text.split(",")):
        key, sign, value = word.partition("=")
        if not sign or key not in known:
            raise TraceError(f"{option} {text}: write KEY=NUMBER,… with {', '.join(known)}")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        whole = known[key].type == "int"
        if not 0.0 <= number < math.inf or (whole and (number != int(number) or number < 1)):
            raise TraceError(f"{option} {text}: {key} must be {'a whole number > 0' if whole else 'a number ≥ 0'}")
        values[key] = int(number) if whole else number
    return kind(**values)  # type: ignore[arg-type]


def generate(load: Load, horizon: float, seed: int) -> Trace:
    """Generate the arrivals within ``horizon`` seconds."""
    dice = random.Random(seed)  # noqa: S311 - a simulation, no secret
    match load:
        case Poisson():
            jobs = _poisson(load, horizon, dice)
        case OnOff():
            jobs = _on_off(load, horizon, dice)
        case Agents():
            jobs = _agents(load, horizon, dice)
            if load.background > 0:
                poisson = Poisson(load.models, load.background)
                jobs += _poisson(poisson, horizon, random.Random(seed + 99))  # noqa: S311
    return Trace(f"{type(load).__name__.lower()}, seed {seed}", jobs)


def tokens(dice: random.Random) -> tuple[int, int]:
    """Draw the tokens of a prompt and of its answer."""

    def draw(mean: float, deviation: float, least: int, most: int) -> int:
        return min(most, max(least, int(math.exp(dice.gauss(mean, deviation)))))

    return draw(*PROMPT), draw(*OUTPUT)


def _exponential(dice: random.Random, mean: float) -> float:
    return dice.expovariate(1.0 / mean) if mean > 0 else 0.0


def model_name(model: int) -> str:
    """Return the name of the model with this number."""
    return f"m{model}"


def _poisson(load: Poisson, horizon: float, dice: random.Random) -> list[Job]:
    weights = [1.0 / (model + 1) ** load.skew for model in range(load.models)]
    return [
        Job(time, model_name(dice.choices(range(load.models), weights)[0]), *tokens(dice))
        for time in _times(dice, 0.0, horizon, load.rate)
    ]


def _times(dice: random.Random, start: float, end: float, rate: float) -> list[float]:
    times: list[float] = []
    time = start + (dice.expovariate(rate) if rate > 0 else math.inf)
    while time < end:
        times.append(time)
        time += dice.expovariate(rate)
    return times


def _on_off(load: OnOff, horizon: float, dice: random.Random) -> list[Job]:
    jobs: list[Job] = []
    for model in range(load.models):
        time = dice.uniform(0.0, load.off)
        while time < horizon:
            end = time + max(_exponential(dice, load.on), 1e-3)
            jobs += [
                Job(arrival, model_name(model), *tokens(dice))
                for arrival in _times(dice, time, min(end, horizon), load.rate)
            ]
            time = end + _exponential(dice, load.off)
    return jobs


def _agents(load: Agents, horizon: float, dice: random.Random) -> list[Job]:
    jobs: list[Job] = []
    for _ in range(load.agents):
        first, tasks = dice.uniform(0.0, REST), 0.0
        chain: list[tuple[int, float]] = []  # (model, pause after its answer)
        while tasks < horizon:
            steps = dice.randint(*STEPS)
            chain += [
                (step % 2, dice.expovariate(1.0 / load.think) if load.think else 0.0) for step in range(steps)
            ]
            chain[-1] = (chain[-1][0], dice.expovariate(1.0 / REST))
            tasks += 3.0 * steps  # no step of a task is faster than that, so there are always enough tasks
        begin = len(jobs)
        for place, (model, think) in enumerate(chain):
            last = place == len(chain) - 1
            arrival = first if place == 0 else None
            jobs.append(Job(arrival, model_name(model), *tokens(dice), None if last else begin + place + 1, think))
    return jobs


WORDS = "users=8,think=20s,models=3,stay=0"
MODELS = 3
MOST = 1_000_000  # requests: more in one run is a mistake


@dataclass(frozen=True, slots=True)
class Closed:
    """``users`` closed loops. Each thinks for ``think`` seconds (exponential) after an answer, then asks again."""

    users: int = 8
    think: float = 20.0  # seconds, on average
    models: int | None = None  # how many models they use; None: all of the other traffic, else MODELS
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
    """Return the models that the users use: the most requested of the other traffic, else invented ones.

    Raises TraceError if there are too few.
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

    They are enough for ``horizon`` seconds even if none ever waits. Their sizes are drawn from those of the other
    traffic for the same model; without any they are like chat traffic.

    Raises:
        TraceError: there are too few models, or far too many requests.

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
    """Return whether its amount of work is known; of a held guard only the seconds are."""
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

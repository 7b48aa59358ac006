"""Generated traffic: Poisson, on/off, and agents that wait for each answer. Deterministic for a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields

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
        TraceError: a word is no ``key=number`` of this load, or the number is out of range.

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
    """Make what arrives within ``horizon`` seconds."""
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
    """Return what the model with this number is called."""
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
        chain: list[tuple[int, float]] = []  # (model, think after its answer)
        while tasks < horizon:
            steps = dice.randint(*STEPS)
            chain += [
                (step % 2, dice.expovariate(1.0 / load.think) if load.think else 0.0) for step in range(steps)
            ]
            chain[-1] = (chain[-1][0], dice.expovariate(1.0 / REST))
            tasks += 3.0 * steps  # no step of a task is faster than that, so there are always enough of them
        begin = len(jobs)
        for place, (model, think) in enumerate(chain):
            last = place == len(chain) - 1
            arrival = first if place == 0 else None
            jobs.append(Job(arrival, model_name(model), *tokens(dice), None if last else begin + place + 1, think))
    return jobs

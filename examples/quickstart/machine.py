"""What this machine can do: how fast each chat model answers here, and what a switch between them costs.

The demo's load follows from it, so that it tells the same story on one slow core and on a workstation.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from clients import Clients
from rich.console import Console

CHAT = ("quill", "atlas")
AT_ONCE = 2  # max_in_flight of each chat model
SAMPLE = 24  # tokens of the first measured answer
MEASURED = 0.6  # seconds that the next should take
WARM_UP = 4
ANSWER = 0.4  # seconds that an answer should take
FEWEST, MOST = 8, 400  # tokens
BUSY = 0.65  # share of the time for which the engines would have work if switches took none: queues form, but end
LONGEST = 13.0  # seconds until a plan is answered, about
VISIT = 6.0  # requests that a switch serves, about
OVERHEAD = 3.0  # seconds for llmux to start and to stop
FEW, MANY = 20, 80  # requests


@dataclass(frozen=True)
class Engine:
    """Tokens a second of one answer: when it is alone, and when another one runs beside it."""

    alone: float
    beside: float

    def tokens(self) -> int:
        """Return how many tokens make an answer of the wanted length, when another one runs beside it."""
        return round(min(MOST, max(FEWEST, ANSWER * self.beside)))

    def seconds(self) -> float:
        """Return how long such an answer takes then."""
        return self.tokens() / self.beside


@dataclass(frozen=True)
class Machine:
    """The engines by model, and the mean seconds of a switch."""

    engines: Mapping[str, Engine]
    switch: float

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens of an answer, by model."""
        return {name: engine.tokens() for name, engine in self.engines.items()}

    @property
    def rate(self) -> float:
        """Requests a second that keep the engines busy for the wanted share of the time."""
        return BUSY * AT_ONCE / statistics.fmean(engine.seconds() for engine in self.engines.values())

    def requests(self, seconds_left: float) -> int:
        """Return how many requests can be answered in time, twice."""
        longest = min(LONGEST, seconds_left / 2.0 - OVERHEAD)
        seconds = statistics.fmean(engine.seconds() for engine in self.engines.values())
        return round(min(MANY, max(FEW, longest / (self.switch / VISIT + seconds / AT_ONCE))))

    def words(self) -> str:
        """Say what was measured, and what follows."""
        speeds = ", ".join(
            f"{name} {engine.alone:,.0f} tokens/s alone and {engine.beside:,.0f} with another beside it"
            for name, engine in self.engines.items()
        )
        answers = " and ".join(f"{count} tokens from {name}" for name, count in self.tokens.items())
        return (
            f"Measured here: {speeds}; a switch {self.switch:.2f} s.\n"
            f"So the load: answers of about {answers}, and to compare, {self.rate:.1f} requests/s."
        )


async def measure(clients: Clients, costs: Callable[[], Awaitable[list[float]]], console: Console) -> Machine:
    """Wake the chat models and time their answers; ``costs`` returns what llmux found that switches took."""
    engines = {}
    for name in CHAT:
        await clients.stream(name, name, WARM_UP)
        first = await _speed(clients, name, SAMPLE, 1)
        tokens = round(min(MOST, max(FEWEST, MEASURED * first)))
        alone, beside = [await _speed(clients, name, tokens, at_once) for at_once in (1, AT_ONCE)]
        engines[name] = Engine(alone, min(alone, beside))
    await clients.stream(CHAT[0], CHAT[0], WARM_UP)
    known = await costs()
    machine = Machine(engines, statistics.fmean(known) if known else 1.0)
    console.print(machine.words())
    return machine


async def _speed(clients: Clients, name: str, tokens: int, at_once: int) -> float:
    """Return the tokens a second of each of so many answers at once."""
    began = time.monotonic()
    await asyncio.gather(*(clients.stream(name, name, tokens) for _ in range(at_once)))
    return tokens / max(time.monotonic() - began, 1e-3)

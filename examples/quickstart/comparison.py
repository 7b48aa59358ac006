"""The demo's second act: the same requests at the same times, once for each of two policies."""

from __future__ import annotations

import asyncio
import random
import statistics
from dataclasses import dataclass

from clients import Answer, Clients
from rich.console import Console
from rich.table import Table

POLICIES = ("adaptive", "fifo")  # the default, and the simplest
RATE = 8.0  # requests a second


@dataclass(frozen=True)
class Planned:
    """One request: seconds from the start, the model, how many tokens it asks for."""

    at: float
    model: str
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What became of the plan under one policy."""

    policy: str
    answers: list[Answer]
    switches: int
    seconds: float


def plan(seconds: float, seed: int = 7) -> list[Planned]:
    """Return requests for the two chat models, at random but the same each time."""
    chance = random.Random(seed)
    at, planned = 0.0, []
    while (at := at + chance.expovariate(RATE)) < seconds:
        planned.append(Planned(at, chance.choice(["quill", "atlas"]), chance.randint(20, 120)))
    return planned


async def send(clients: Clients, planned: list[Planned]) -> list[Answer]:
    """Send them, each at its time, whether or not those before have been answered."""
    began = asyncio.get_running_loop().time()

    async def one(request: Planned) -> Answer:
        await asyncio.sleep(began + request.at - asyncio.get_running_loop().time())
        return await clients.stream(request.model, request.model, request.tokens)

    return await asyncio.gather(*map(one, planned))


def show(console: Console, outcomes: list[Outcome]) -> None:
    """Print what they made of it."""
    console.print(f"\nThe same {len(outcomes[0].answers)} requests for the chat models, at the same times")
    table = Table()
    for column in ("policy", "mean wait", "95 % wait less than", "longest wait", "switches", "all answered after"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for outcome in outcomes:
        waits = sorted(answer.waited for answer in outcome.answers)
        table.add_row(
            outcome.policy,
            f"{statistics.fmean(waits):.2f} s",
            f"{waits[int(0.95 * len(waits))]:.2f} s",
            f"{waits[-1]:.2f} s",
            str(outcome.switches),
            f"{outcome.seconds:.1f} s",
        )
    console.print(table)

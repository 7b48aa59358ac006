"""The demo's second act: the same requests at the same times, once for each of two policies."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from clients import Answer, Clients
from machine import Machine
from rich.console import Console
from rich.table import Table

POLICIES = ("adaptive", "fifo")  # the default, and the simplest
SPREAD = (0.5, 1.5)  # times the usual tokens
UNLIKE = 1.7  # times: what two at once take longer than one, about; more has other reasons
SLIGHT = 0.15  # share: a difference that another run might turn round


@dataclass(frozen=True)
class Planned:
    """One request: seconds from the start, the model, how many tokens it asks for."""

    at: float
    model: str
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What became of the plan under one policy. Seconds; those of ``switching`` and ``draining`` are sums."""

    policy: str
    waits: Sequence[float]
    switches: int
    switching: float
    draining: float
    seconds: float
    answer: float  # the engines' time for an answer, on average

    @property
    def mean(self) -> float:
        """The mean wait."""
        return statistics.fmean(self.waits)

    @property
    def p95(self) -> float:
        """The wait that 95 % are below."""
        return sorted(self.waits)[int(0.95 * len(self.waits))]


def plan(machine: Machine, seconds_left: float, seed: int = 7) -> list[Planned]:
    """Return requests for the two chat models, at random but the same each time for the same machine."""
    chance = random.Random(seed)
    at, planned = 0.0, []
    for _ in range(machine.requests(seconds_left)):
        at += chance.expovariate(machine.rate)
        model = chance.choice(list(machine.engines))
        planned.append(Planned(at, model, max(1, round(machine.tokens[model] * chance.uniform(*SPREAD)))))
    return planned


async def send(clients: Clients, planned: list[Planned]) -> list[Answer]:
    """Send them, each at its time, whether or not those before have been answered."""
    began = asyncio.get_running_loop().time()

    async def one(request: Planned) -> Answer:
        await asyncio.sleep(began + request.at - asyncio.get_running_loop().time())
        return await clients.stream(request.model, request.model, request.tokens)

    return await asyncio.gather(*map(one, planned))


def show(console: Console, outcomes: list[Outcome]) -> None:
    """Print what they made of it, and why."""
    console.print(f"\nThe same {len(outcomes[0].waits)} requests for the chat models, at the same times")
    table = Table()
    for column in (
        "policy",
        "mean wait",
        "95 % wait less than",
        "switches",
        "draining",
        "switching",
        "all answered after",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.policy,
            f"{outcome.mean:.2f} s",
            f"{outcome.p95:.2f} s",
            str(outcome.switches),
            f"{outcome.draining:.1f} s",
            f"{outcome.switching:.1f} s",
            f"{outcome.seconds:.1f} s",
        )
    console.print(table)
    console.print(verdict(*outcomes))


def verdict(one: Outcome, other: Outcome) -> str:
    """Say which waited less and why, as far as the figures show it."""
    slow, quick = sorted((one, other), key=lambda outcome: -outcome.answer)
    if slow.answer > UNLIKE * quick.answer:
        return (
            f"The engines took {slow.answer:.2f} s for an answer during {slow.policy}'s run, {quick.answer:.2f} s"
            f" during {quick.policy}'s: this machine was busy with other things, so the two runs do not compare."
        )
    better, worse = sorted((one, other), key=lambda outcome: outcome.mean)
    if worse.mean <= 0.0 or better.mean > (1.0 - SLIGHT) * worse.mean:
        return (
            f"The mean waits differ by less than {SLIGHT:.0%} ({better.mean:.2f} s with {better.policy},"
            f" {worse.mean:.2f} s with {worse.policy}): this run does not tell the two apart."
        )
    text = (
        f"With {better.policy} requests waited {1.0 - better.mean / worse.mean:.0%} less on average"
        f" ({better.mean:.2f} s instead of {worse.mean:.2f} s): {_why(better, worse)}."
    )
    if better.p95 > worse.p95:
        text += (
            f" The slowest twentieth waited longer with it, though: {better.p95:.2f} s or more,"
            f" instead of {worse.p95:.2f} s."
        )
    if better.policy != POLICIES[0]:
        text += f" {POLICIES[0]} is the default all the same: on most traffic it waits less."
    return text


def _why(better: Outcome, worse: Outcome) -> str:
    spent, lost = better.draining + better.switching, worse.draining + worse.switching
    fewer = worse.switches - better.switches
    if fewer > 0 and spent < lost:
        return (
            f"it switched {better.switches} times instead of {worse.switches}, so that {spent:.1f} s instead of"
            f" {lost:.1f} s went by while a model drained or was being woken"
        )
    if spent < lost:
        return f"{spent:.1f} s instead of {lost:.1f} s went by while a model drained or was being woken"
    return (
        f"it switched {better.switches} times, {worse.policy} {worse.switches}, and lost {spent:.1f} s instead of"
        f" {lost:.1f} s by that, so that here it was the order in which the models were served that mattered"
    )

"""``llmux top``: what happens on the GPU at this moment, live."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from llmux.cli.api_models import Gpu, SeenGpus, SeenStatus
from llmux.cli.client import Remote, speak
from llmux.cli.command_tree import DEFAULT_URL, KeyFileOption, UrlOption
from llmux.cli.status import head, models, pace
from llmux.cli.terminal import CommandError, Exit, terminal

SHORTEST = 0.1  # seconds between two looks that give a rate
AGAIN = 1.0  # seconds until llmux is sought again
GIB = 2**30


def top(
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    every: Annotated[float, typer.Option("--every", min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print one picture, and end.")] = False,
) -> None:
    """Show what each model does now: answers and tokens a second, queues, the GPUs' memory and load."""

    async def act(remote: Remote) -> None:
        pictures = _pictures(remote, every)
        shown = await anext(pictures)
        console = terminal()
        if once:
            console.print(await anext(pictures))
        elif console.is_terminal:
            with Live(shown, console=console, screen=True, auto_refresh=False) as live:
                async for picture in _for_ever(remote, pictures, every):
                    live.update(picture, refresh=True)
        else:
            async for picture in pictures:
                console.print(picture)

    speak(url, key_file, act)


async def _for_ever(
    remote: Remote, pictures: AsyncIterator[RenderableType], every: float
) -> AsyncIterator[RenderableType]:
    """Go on when llmux is gone for a while."""
    while True:
        try:
            async for picture in pictures:
                yield picture
        except CommandError as error:
            if error.exit is not Exit.UNREACHABLE:
                raise
            yield Text(str(error), "red")
        await asyncio.sleep(AGAIN)
        pictures = _pictures(remote, every)


async def _pictures(remote: Remote, every: float) -> AsyncIterator[RenderableType]:
    """Yield a picture whenever llmux tells its status."""
    gpus: SeenGpus | None = None
    before: _Counts | None = None
    async with remote.events(f"?every={every}s") as events:
        async for name, fields in events:
            if name == "gpus":
                gpus = remote.read(SeenGpus, fields)
            if name != "status":
                continue
            status = remote.read(SeenStatus, fields)
            now = _Counts.of(status, await remote.text("/metrics"))
            figures = {} if before is None else now.rates(before)
            if before is None or now.time - before.time >= SHORTEST:
                before = now
                yield Group(*head(remote.url, status), *_gpus(gpus), models(status, figures))
    raise CommandError(Exit.UNREACHABLE, f"{remote.url}: llmux stopped, or the connection broke")


@dataclass(frozen=True, slots=True)
class _Counts:
    """What had been answered and streamed by a moment, by model."""

    time: float  # monotonic
    answers: Mapping[str, float]
    streamed: Mapping[str, float]

    @classmethod
    def of(cls, status: SeenStatus, metrics: str) -> _Counts:
        answers: Counter[str] = Counter()
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                if sample.name == "llmux_requests_total":
                    answers[sample.labels["model"]] += sample.value  # type: ignore[assignment] # it is a float
        streamed = {name: float(model.streamed or 0) for name, model in status.models.items()}
        return cls(time.monotonic(), answers, streamed)

    def rates(self, before: _Counts) -> dict[str, dict[str, str]]:
        """Return the columns of what came since."""
        seconds = max(SHORTEST, self.time - before.time)

        def column(now: Mapping[str, float], then: Mapping[str, float]) -> dict[str, str]:
            more = {name: (count - then.get(name, 0)) / seconds for name, count in now.items()}
            return {name: pace(rate) for name, rate in more.items() if rate > 0}

        return {
            "answers/s": column(self.answers, before.answers),
            "≈ tokens/s": column(self.streamed, before.streamed),
        }


def _gpus(seen: SeenGpus | None) -> Iterator[Text]:
    """Yield a line for each GPU that is known."""
    for gpu in seen.gpus if seen is not None else ():
        yield Text(f"GPU {gpu.index} {gpu.name}: {', '.join(_figures(gpu))}")


def _figures(gpu: Gpu) -> Iterator[str]:
    if gpu.memory_used is not None and gpu.memory_total is not None:
        yield f"{gpu.memory_used / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB"
    if gpu.load is not None:
        yield f"{gpu.load:.0%} busy"
    if gpu.temperature is not None:
        yield f"{gpu.temperature:.0f} °C"
    if gpu.power is not None:
        yield f"{gpu.power:.0f} W"

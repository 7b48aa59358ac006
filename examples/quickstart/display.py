"""What the demo shows: which model holds the "GPU" and what waits, as it happens, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from clients import Ledger
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

COLOURS = ("cyan", "magenta", "green")
BAR = 20


class Display:
    """A line for each change of hands; on a terminal also the queues, live."""

    def __init__(self, console: Console, models: list[str], ledger: Ledger) -> None:
        self.console = console
        self.ledger = ledger
        self.colours = dict(zip(models, COLOURS, strict=True))
        self.started = time.monotonic()
        self.last: object = None
        self.left: set[str] = set()  # models that have had to make room
        self.live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        """Take the lower part of the terminal, if it is one."""
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self.live.stop()

    def show(self, status: Mapping[str, Any]) -> None:
        """Show what ``/llmux/status`` said."""
        switch = status["switch"]
        now = switch["id"] if switch else tuple(status["awake"])
        if now != self.last:
            self.last = now
            self.console.print(self.line(status))
        if self.console.is_terminal:
            self.live.update(self.board(status))

    def name(self, model: str | None) -> str:
        """Return a model's name in its colour."""
        return f"[{self.colours[model]}]{model}[/]" if model in self.colours else "none"

    def line(self, status: Mapping[str, Any]) -> Text:
        """Return one line: when, which model holds the GPU, how many requests wait for each."""
        switch = status["switch"]
        if switch:
            self.left.update(switch["from"])
            leaving = " and ".join(map(self.name, switch["from"])) or "none"
            holder = f"{leaving} → {self.name(switch['to'])}"
        else:
            holder = f"[bold]{' and '.join(map(self.name, status['awake'])) or 'none'}[/]"
        waiting = ", ".join(
            f"{model['queued']} for {self.name(name)}"
            for name, model in status["models"].items()
            if model["queued"]
        )
        line = Text.from_markup(f"{time.monotonic() - self.started:6.1f} s  GPU: {holder}")
        line.append(" " * max(2, 38 - len(line)))
        line.append_text(Text.from_markup(f"waiting: {waiting or 'none'}"))
        return line

    def board(self, status: Mapping[str, Any]) -> RenderableType:
        """Return the live view: a row for each model."""
        table = Table.grid(padding=(0, 2))
        for name, model in status["models"].items():
            queue = "■" * min(model["queued"], BAR)
            flight = "▶" * min(model["in_flight"], BAR)
            table.add_row(self.name(name), model["phase"], f"[{self.colours[name]}]{flight}[/][dim]{queue}[/]")
        return Group(
            Text(),
            table,
            Text(f"▶ in flight  ■ queued   {len(self.ledger.answers)} answered", style="dim"),
        )

    def summary(self, status: Mapping[str, Any], switches: int, seconds: float) -> None:
        """Print the tables at the end."""
        self.console.print("\nRequests, by the model that was asked for")
        table = Table()
        for column in ("model", "answered", "by another engine", "tokens", "longest wait"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for model in self.colours:
            mine = [answer for answer in self.ledger.answers if answer.expected == model]
            wrong = sum(answer.model != model for answer in mine)
            longest = max((answer.waited for answer in mine), default=0.0)
            tokens = sum(answer.tokens for answer in mine)
            table.add_row(self.name(model), str(len(mine)), str(wrong), f"{tokens:,}", f"{longest:.2f} s")
        self.console.print(table)

        self.console.print("\nWhat a switch costs, as measured, without the time until running answers had ended")
        costs = Table()
        for column in ("from", "to", "seconds", "times"):
            costs.add_column(column, justify="right" if column in ("seconds", "times") else "left")
        for cost in status["switch_costs"]:
            if cost["samples"]:
                row = (self.name(cost["from"]), self.name(cost["to"]), f"{cost['seconds']:.2f}")
                costs.add_row(*row, str(cost["samples"]))
        self.console.print(costs)

        answers = self.ledger.answers
        longest = max((answer.waited for answer in answers), default=0.0)
        tokens = sum(answer.tokens for answer in answers)
        self.console.print(
            f"\n{len(answers)} requests, {tokens:,} tokens and {switches} switches in {seconds:.0f} s; "
            f"the longest wait was {longest:.2f} s."
        )
        self.console.print(self.residents())
        for failure in self.ledger.failures:
            self.console.print(f"failed: {failure}", style="red", markup=False)
        if self.ledger.misrouted:
            self.console.print(f"{len(self.ledger.misrouted)} answers came from the wrong engine.", style="red")
        elif answers and not self.ledger.failures:
            self.console.print("Every answer came from the engine that was asked for; none failed.", style="green")

    def residents(self) -> str:
        """Say how often the models that never made room were asked, and how often requests waited for them."""
        told = []
        for model in self.colours:
            mine = [answer for answer in self.ledger.answers if answer.expected == model]
            late = sum(answer.waited > 0 for answer in mine)
            if model not in self.left and len(mine) > late:
                told.append(
                    f"{self.name(model)} stayed awake beside the others: "
                    f"{len(mine) - late} of its {len(mine)} requests did not wait at all."
                )
        return "\n".join(told) or "No request found a model awake that stayed so throughout."

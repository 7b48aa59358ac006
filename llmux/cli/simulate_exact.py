"""``llmux simulate RECORD --exact``: whether the record explains its own switches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from llmux.cli.terminal import terminal
from llmux.core.policy import Policy
from llmux.plugins import load_policy
from llmux.simulator.recorded import Recorded
from llmux.simulator.replay import Begun, Comparison, replay
from llmux.simulator.trace import TraceError

DIFFERENT = 1
SHOWN = 5  # switches around the first that differs


def run(file: Path | None, recorded: Recorded | None, policies: Sequence[str] | None, *, as_json: bool) -> int:
    """Replay, print, and return the exit code. Raises LLMuxError."""
    if file is None or recorded is None:
        raise TraceError("--exact replays a record of llmux (`record: FILE` in its configuration); give one")
    if policies:
        raise TraceError("--exact replays the recorded policy; leave --policy out")
    found = replay(recorded, folder=file.parent)
    if as_json:
        typer.echo(json.dumps(_document(found), indent=2))
    else:
        _print(recorded, found)
    return 0 if found.exact else DIFFERENT


def labelled(use: str, options: Mapping[str, Any]) -> str:
    """Return what a policy with its options is called in a table."""
    return f"{use}:{','.join(f'{key}={value}' for key, value in options.items())}" if options else use


def recorded_policy(recorded: Recorded) -> tuple[str, Callable[[], Policy]]:
    """Return what loads the policy that was in force when the record was written, and what that is called."""
    used = recorded.start["policy"]
    use, options = used["use"], used["options"]
    return labelled(use, options), lambda: load_policy(use, options, Path())


def _document(found: Comparison) -> dict[str, object]:
    difference = None
    if not found.exact:
        difference = {"switch": found.same + 1, **dict(_ways(found, found.same))}
    return {
        "exact": found.exact,
        "recorded": len(found.recorded),
        "replayed": len(found.replayed),
        "same": found.same,
        "seconds_apart": found.apart,
        "first_difference": difference,
        "limits": found.limits,
    }


def _ways(found: Comparison, index: int) -> list[tuple[str, str | None]]:
    return [
        (name, each[index].way if index < len(each) else None)
        for name, each in (("recorded", found.recorded), ("replayed", found.replayed))
    ]


def _print(recorded: Recorded, found: Comparison) -> None:
    console = terminal()
    use = recorded.start["policy"]["use"]
    if found.exact:
        text = (
            f"{recorded.name}: {found.same} of {found.same} switches are the recorded ones under {use},"
            f" at most {found.apart * 1000:.1f} ms apart"
        )
        console.print(text, style="green")
    else:
        text = (
            f"{recorded.name}: the first {found.same} switches are the recorded ones under {use}, then they differ"
        )
        console.print(text, style="red")
        table = Table("switch", "recorded", "at s", "replayed", "at s")
        start = max(0, found.same - 1)
        for index in range(start, min(start + SHOWN, max(len(found.recorded), len(found.replayed)))):
            table.add_row(str(index + 1), *_cells(found.recorded, index), *_cells(found.replayed, index))
        console.print(table)
    for limit in found.limits:
        console.print(f"note: {limit}")


def _cells(switches: Sequence[Begun], index: int) -> tuple[str, str]:
    return (switches[index].way, f"{switches[index].time:.3f}") if index < len(switches) else ("-", "-")

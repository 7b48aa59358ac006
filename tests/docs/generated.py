"""The parts of the pages in llmux/ which are made from the code; run it to write them anew."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from llmux import errors
from llmux.accounts.key_metrics import HELP as KEY_HELP
from llmux.cli.terminal import MEANINGS
from llmux.config.gateway import GatewayConfig
from llmux.config.reference import settings_table
from llmux.core.deciding import LADDER, STOPPING, Rule
from llmux.core.effects import Refusal
from llmux.core.phases import PHASES, STAGES, STEPS, Phase, Stage, Step
from llmux.gateway.views import HELP as FLEET_HELP
from llmux.observability.log import CATALOGUE
from llmux.observability.metrics import HELP

PAGES = sorted((Path(__file__).parents[2] / "llmux").glob("*.md"))
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->\n)", re.DOTALL)


def diagram(table: Mapping[tuple[StrEnum, StrEnum], tuple[StrEnum, str]], first: StrEnum) -> str:
    """Return a table as a Mermaid state diagram that begins in ``first``; what has no row of its own ends it."""
    lines = ["stateDiagram-v2", f"    [*] --> {first.name}"]
    lines += [f"    {source.name} --> {target.name}: {why}" for (source, _), (target, why) in table.items()]
    sources, targets = {source for source, _ in table}, [target for target, _ in table.values()]
    lines += [f"    {target.name} --> [*]" for target in dict.fromkeys(targets) if target not in sources]
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines)


def _errors() -> str:
    classes = [
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.RequestError) and value is not errors.RequestError
    ]
    rows = [
        [str(kind.status), f"`{kind.code}`", f"`{kind.__name__}`", kind.__doc__.splitlines()[0]]
        for kind in classes
    ]
    rows += [["404" if r is Refusal.UNKNOWN_MODEL else "", f"`{r.value}`", "", _REFUSALS[r]] for r in Refusal]
    return _table(["status", "code", "class", "when"], sorted(rows, key=lambda row: (row[0] or "503", row[1])))


_REFUSALS = {
    Refusal.UNKNOWN_MODEL: "No such model, or it was removed while the request waited.",
    Refusal.QUEUE_FULL: "429: `max_queued` requests wait for the model.",
    Refusal.WAKE_FAILED: "503: its wake hook failed while the request waited.",
    Refusal.SLEEP_FAILED: "503: what holds the GPU would not go to sleep.",
    Refusal.BACKING_OFF: "503: its wake failed a moment ago; `Retry-After` says when it is tried again.",
    Refusal.FAULTED: "503: it is unknown which model holds the GPU.",
    Refusal.PINNED: "503: another model is pinned.",
    Refusal.LEASED: "503: the GPU is leased to another job.",
    Refusal.STOPPING: "503: llmux is stopping.",
    Refusal.DEADLINE: "503: it cannot be answered within its deadline.",
    Refusal.WAITED_TOO_LONG: "504: it waited longer than `request_timeout`.",
}


def _ladder() -> str:
    lines = []
    for number, rule in enumerate(LADDER, 1):
        name = rule.apply.__name__.removeprefix("_")
        lines.append(f"{number}. `{name}`{' (whenever something waits)' * rule.for_waiters}: {_words(rule)}\n")
    return "".join([*lines, f"\nAt the end there is one rule: {_words(STOPPING[0])}\n"])


def _words(rule: Rule) -> str:
    words = str(rule.apply.__doc__).replace("``", "`")
    return words[0].lower() + words[1:]


def blocks() -> dict[str, str]:
    """Return the text of every generated block."""
    return {
        "diagram": f"```mermaid\n{diagram(PHASES, Phase.UNKNOWN)}```\n",
        "stages": f"```mermaid\n{diagram(STAGES, Stage.DRAINING)}```\n",
        "steps": f"```mermaid\n{diagram(STEPS, Step.SLEEP)}```\n",
        "ladder": _ladder(),
        "settings": settings_table().strip() + "\n",
        "gateway": settings_table(GatewayConfig).strip() + "\n",
        "metrics": _table(
            ["metric", "meaning"], [[f"`{name}`", text] for name, text in (HELP | KEY_HELP | FLEET_HELP).items()]
        ),
        "events": _table(["event", "meaning"], [[f"`{name}`", text] for name, (_, text) in CATALOGUE.items()]),
        "errors": _errors(),
        "exits": _table(["exit code", "means"], [[f"{code:d}", text] for code, text in MEANINGS.items()]),
    }


def renewed(text: str) -> str:
    """Return the page with every generated block as the code has it now."""
    made = blocks()
    return BLOCK.sub(lambda found: f"{found[1]}{made[found[2]]}{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text()))

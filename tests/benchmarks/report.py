"""The benchmark's results as text, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

# What is said of a proxy: the column's title, and how to find the figure in one of its rounds.
COLUMNS: tuple[tuple[str, Callable[[Figures], float | None]], ...] = (
    ("JSON, µs CPU per request", lambda it: it.get("json_cpu_us")),
    ("100 KB, µs CPU per request", lambda it: it.get("long_cpu_us")),
    ("SSE, s CPU per 100,000 events", lambda it: it.get("sse_cpu_s_per_100k")),
    ("added p50 at 200/s, ms", lambda it: it.get("added_p50")),
    ("added p99 at 200/s, ms", lambda it: it.get("added_p99")),
    ("one by one p95, ms", lambda it: it["one_by_one"]["p95"]),
    ("first byte p99, ms", lambda it: (it["first_byte"] or {}).get("p99")),
    ("event delay p50, ms", lambda it: it["event_delay"]["p50"]),
    ("event delay p99, ms", lambda it: it["event_delay"]["p99"]),
    ("RSS growth, MB", lambda it: it.get("rss_growth_mb")),
)
RATIOS = ("nginx", "go", "rust")
COSTS = COLUMNS[:3]


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page, in place of what stands there."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(before + begin + text + end + rest.partition(end)[2])


def brief(figures: Figures) -> str:
    """Return one round in a line."""
    parts = [f"{figures['json_per_second']:.0f} requests/s", f"p50 {figures['latency']['p50']:.3f} ms"]
    if "json_cpu_us" in figures:
        parts.append(f"{figures['json_cpu_us']:.1f} us/request")
        parts.append(f"{figures['sse_cpu_s_per_100k']:.2f} s/100k events")
        parts.append(f"{figures['rss_growth_mb']:.1f} MB")
    if figures["first_byte"]:
        parts.append(f"first byte p99 {figures['first_byte']['p99']:.2f} ms")
    return ", ".join([*parts, f"{figures['errors']} errors"])


def medians(results: Figures) -> dict[str, dict[str, float]]:
    """Return, per proxy and column, the median over the rounds."""
    rounds = results["rounds"]
    for number, direct in enumerate(rounds.get("direct", ())):
        for figures in (them[number] for name, them in rounds.items() if name != "direct"):
            for part in ("p50", "p99"):
                figures[f"added_{part}"] = figures["latency"][part] - direct["latency"][part]
    table: dict[str, dict[str, float]] = {}
    for name, them in rounds.items():
        table[name] = {}
        for title, figure in COLUMNS:
            values = [value for each in them if (value := figure(each)) is not None]
            if values:
                table[name][title] = statistics.median(values)
    return table


def ratios(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return, per proxy, what it costs in terms of nginx, of the Go proxy and of the original."""
    found: dict[str, dict[str, float]] = {}
    for name, figures in table.items():
        for title, _ in COSTS:
            for other in RATIOS:
                if title in figures and title in table.get(other, {}):
                    row = found.setdefault(name, {})
                    row[f"{title.partition(',')[0]} to {other}"] = figures[title] / table[other][title]
    return found


def markdown(results: Figures) -> str:
    """Return all of it as Markdown."""
    table = medians(results)
    machine, load = results["machine"], results["load"]
    count = len(next(iter(results["rounds"].values())))
    where = f"{machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}"
    lines = [
        f"Medians of {count} rounds, {machine['date']}, {where}; {load['streams']} streams.",
        "",
        *_rows([title for title, _ in COLUMNS], table),
    ]
    compared = ratios(table)
    if compared:
        titles = list(next(iter(compared.values())))
        lines += ["", *_rows(titles, compared)]
    lines += ["", *(f"- {line}" for line in _others(results)), ""]
    return "\n".join(lines)


def _rows(titles: list[str], table: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, figures in table.items():
        cells = [_short(figures[title]) if title in figures else "" for title in titles]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _others(results: Figures) -> list[str]:
    errors = {name: sum(each["errors"] for each in them) for name, them in results["rounds"].items()}
    lines = [f"errors: {sum(errors.values())}" + "".join(f", {k} {v}" for k, v in errors.items() if v)]
    for name, stalls in results["stalls"].items():
        told = ", ".join(f"{kind} {value:.2f}" for kind, value in stalls.items())
        lines.append(f"{name}: longest stretch of the loop without a turn, a body of 20 MB, in ms: {told}")
    for name, them in results["crowds"].items():
        for kind in ("streams_at_once", "waiting"):
            rows = [each[kind] for each in them]
            told = ", ".join(
                f"{key} {_short(statistics.median(row[key] for row in rows))}"
                for key in rows[0]
                if key != "clients"
            )
            lines.append(f"{name}: {rows[0]['clients']} {kind.replace('_', ' ')}: {told}")
    return lines


def picture(results: Figures, file: Path) -> None:
    """Draw what requests and an event cost, one bar a proxy. Without matplotlib nothing is drawn."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        return
    table = {name: row for name, row in medians(results).items() if name != "direct"}
    names = sorted(table, key=lambda name: table[name].get(COSTS[0][0], 0.0), reverse=True)
    figure = Figure(figsize=(9.6, 0.8 + 0.28 * len(names)), layout="constrained")
    for axes, (title, _) in zip(figure.subplots(1, len(COSTS), sharey=True), COSTS, strict=True):
        values = [table[name].get(title, 0.0) for name in names]
        colours = ["#2f6fb3" if name.startswith("llmux") else "#b8b8b8" for name in names]
        bars = axes.barh(names, values, color=colours, height=0.7)
        axes.bar_label(bars, labels=[_short(value) for value in values], padding=3, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.margins(x=0.16)
        axes.tick_params(labelsize=8, length=0)
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
    figure.savefig(file, dpi=110)

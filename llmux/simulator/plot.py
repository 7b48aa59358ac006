"""A picture of runs: how long requests waited, when each model had the GPU. Needs matplotlib (``llmux[plot]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmux.simulator.run import Outcome
from llmux.simulator.statistics import waits_of
from llmux.simulator.trace import TraceError

DRAIN_ALPHA = 0.45
PALETTE = 20  # colours; more models share them
SWITCH_COLOUR = "#333333"


def plot(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Draw the waits as cumulative distributions, and a strip per policy of which model was awake.

    Raises:
        TraceError: matplotlib is not installed, or the file cannot be written.

    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise TraceError("--plot needs matplotlib: pip install 'llmux[plot]'") from None
    row = 1.0 if any(outcome.residency for outcome in outcomes.values()) else 0.6  # inches
    figure: Any = Figure(figsize=(10, 4 + row * len(outcomes)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[4, 1 + row * len(outcomes)])
    _waits(upper, outcomes)
    _strips(lower, outcomes)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {error}") from None


def _waits(axes: Any, outcomes: Mapping[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        waits = sorted(waits_of(outcome))
        axes.plot(
            waits, [(rank + 1) / len(waits) for rank in range(len(waits))], label=name, drawstyle="steps-post"
        )
    axes.set_xlabel("wait, seconds")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.01)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _strips(axes: Any, outcomes: Mapping[str, Outcome]) -> None:
    from matplotlib import colormaps  # noqa: PLC0415 - an extra
    from matplotlib.patches import Patch  # noqa: PLC0415

    models = sorted({model for outcome in outcomes.values() for model in outcome.trace.models})
    palette = colormaps["tab20"]
    colours = {model: palette(number % PALETTE) for number, model in enumerate(models)}
    for row, outcome in enumerate(outcomes.values()):
        if outcome.residency:
            _several(axes, row, outcome, models, colours)
            continue
        for what, alpha in (("awake", 1.0), ("drain", DRAIN_ALPHA), ("switch", 1.0)):
            spans = [visit for visit in outcome.visits if visit.what == what and visit.model]
            axes.broken_barh(
                [(visit.start, visit.end - visit.start) for visit in spans],
                (row - 0.4, 0.8),
                facecolors=[SWITCH_COLOUR if what == "switch" else colours[visit.model] for visit in spans],
                alpha=alpha,
            )
    axes.set_yticks(range(len(outcomes)), list(outcomes))
    axes.invert_yaxis()
    several = any(outcome.residency for outcome in outcomes.values())
    axes.set_xlabel(
        "seconds; a line for each model, dark: waking" if several else "seconds; pale: draining, dark: switching"
    )
    axes.set_xlim(0, max(outcome.end for outcome in outcomes.values()))
    handles = [Patch(color=colours[model], label=model) for model in models[:12]]
    axes.legend(handles=handles, ncols=6, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.35))


def _several(axes: Any, row: int, outcome: Outcome, models: Sequence[str], colours: Mapping[str, Any]) -> None:
    """Draw a line for each model: when it was awake, beside which others, and when it was being woken."""
    height = 0.84 / len(models)
    for place, model in enumerate(models):
        spans = [visit for visit in outcome.residency if visit.model == model]
        axes.broken_barh(
            [(visit.start, visit.end - visit.start) for visit in spans],
            (row - 0.42 + place * height, height * 0.9),
            facecolors=[SWITCH_COLOUR if visit.what == "switch" else colours[model] for visit in spans],
        )

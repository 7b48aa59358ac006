"""Whole runs: a trace under a policy, which looks back at times if it is one that chooses among others."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmux.core.policy import Policy
from llmux.core.spec import Rules
from llmux.simulator.choosing import Again, look_back
from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import EngineModel, Engines
from llmux.simulator.run import Outcome, Run, Scene
from llmux.simulator.trace import Trace

if TYPE_CHECKING:
    from llmux.simulator.spilling import Spill


def simulate(
    trace: Trace,
    policy: Policy,
    costs: CostMatrix,
    *,
    engine: EngineModel | Engines | None = None,
    rules: Rules | None = None,
    horizon: float | None = None,
    progress: Callable[[float], None] | None = None,
    scene: Scene | None = None,
    spill: Spill | None = None,
    prepare: Callable[[Run], None] | None = None,
) -> Outcome:
    """Run ``trace`` under ``policy`` until ``horizon`` (seconds), or until everything is answered.

    ``progress`` is called now and then with the virtual time. ``spill`` says when a remote serves instead. Without
    a ``scene`` the models are those of the trace, each admits as many requests as its engine has slots, and the
    model of the first request is awake. ``prepare`` is called with the run before it begins.
    """
    engines = engine if isinstance(engine, Engines) else Engines(engine or EngineModel())
    scene = scene or Scene.of(trace, engines)
    costs.check(trace.models)
    rules, specs = _without_probes(rules or Rules()), scene.specs
    return carry_out(
        Run(trace, policy, costs, engines, rules, horizon, scene),
        policy,
        lambda t, p, c, e, awake: Run(t, p, c, e, rules, None, Scene(specs, awake)).go(None),
        progress,
        spill,
        prepare,
    )


def carry_out(
    run: Run,
    policy: Policy,
    again: Again,
    progress: Callable[[float], None] | None,
    spill: Spill | None,
    prepare: Callable[[Run], None] | None,
) -> Outcome:
    """Run to the end; ``again`` is for a policy that chooses among others, and looks back for that."""
    run.spill(spill)
    if prepare is not None:
        prepare(run)
    if hasattr(policy, "makers"):
        look_back(run, policy, again)
    with undisturbed():
        return run.go(progress)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Disable the garbage collector: a run makes no cycles, but many lasting objects, which slow it down."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _without_probes(rules: Rules) -> Rules:
    # Engines do not die in here: probes would only cost time.
    return Rules(
        request_timeout=None,
        max_wait=rules.max_wait,
        min_active=rules.min_active,
        anticipate=rules.anticipate,
        capacity=rules.capacity,
        drain_timeout=None,
        alive_every=0.0,
    )

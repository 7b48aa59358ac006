"""Policies under load, in virtual time: what must not happen again, whatever is tuned."""

from functools import cache

import pytest

from llmux.core.spec import Rules
from llmux.plugins import known_policies
from llmux.simulator import CostMatrix, EngineModel, Statistics, Trace, simulate, statistics_of
from llmux.simulator.run import Misjudged
from llmux.simulator.synthetic import Agents, OnOff, Poisson, generate
from tests.policies.views import policy

COSTS = CostMatrix(default=20.0)
ENGINE = EngineModel(slots=2)
HORIZON = 2400.0


@cache
def heavy() -> Trace:
    """Return what keeps each model's backlog longer than its slots at every visit."""
    return generate(Poisson(4, 0.3), HORIZON, 1)


def under(which, trace, costs=COSTS, engine=ENGINE, rules=None) -> Statistics:
    return statistics_of(simulate(trace, which, costs, engine=engine, rules=rules, horizon=HORIZON))


@cache
def fifo() -> Statistics:
    return under(policy("fifo"), heavy())


def test_a_staleness_bound_without_a_gate_collapses():
    """Once everybody is stale, each visit ends as soon as it has begun: the GPU does nothing but switch."""
    ungated = under(policy("exhaustive", gate=False), heavy())
    gated = under(policy("exhaustive"), heavy())
    assert ungated.p99_wait > 5 * fifo().p99_wait
    assert ungated.completed < fifo().completed / 2
    assert gated.p99_wait < 1.1 * fifo().p99_wait


@pytest.mark.parametrize("name", sorted(set(known_policies()) - {"priority"}))
def test_no_shipped_policy_collapses(name):
    # Each visit must clear a round's backlog; what is enough for that, only the user of k_limited can know.
    options = {"k": 64} if name == "k_limited" else {}
    found = under(policy(name, **options), heavy())
    assert found.p99_wait < 1.5 * fifo().p99_wait
    assert found.completed > 0.9 * fifo().completed


@pytest.mark.parametrize("load", [Poisson(2, 0.5), Poisson(6, 0.4), OnOff(4), Agents(3, background=0.1)])
def test_the_default_is_better_than_fifo(load):
    trace = generate(load, HORIZON, 3)
    mine, theirs = (
        under(policy(name), trace, CostMatrix(default=10.0), EngineModel()) for name in ("adaptive", "fifo")
    )
    assert mine.mean_wait < 0.95 * theirs.mean_wait
    assert mine.p99_wait < 1.12 * theirs.p99_wait


@pytest.mark.parametrize("wrong", [3.0, 1 / 3])
def test_wrong_estimates_do_little_harm(wrong):
    trace = generate(Poisson(4, 0.5), HORIZON, 3)
    right = under(policy("adaptive"), trace, engine=EngineModel())
    misled = under(Misjudged(policy("adaptive"), wrong), trace, engine=EngineModel())
    assert misled.mean_wait < 1.15 * right.mean_wait
    assert misled.p99_wait < 1.2 * right.p99_wait


@pytest.mark.parametrize("name", known_policies())
def test_max_wait_holds_over_every_policy(name):
    """Invariant 6: with n models overdue, max_wait + the switch under way + n times a drain and a switch."""
    models, bound, slots = 3, 30.0, 16
    trace = generate(Poisson(models, 0.3), 900.0, 4)
    engine = EngineModel(slots=slots)
    outcome = simulate(trace, policy(name), CostMatrix(default=5.0), engine=engine, rules=Rules(max_wait=bound))
    longest = max(map(engine.work, trace.jobs)) / engine.rates()[-1]
    limit = bound + (models + 1) * (longest + 5.0)
    assert statistics_of(outcome).max_wait <= limit

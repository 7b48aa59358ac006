"""Engines whose nature is known are seen at work; the fit finds it out again."""

from dataclasses import replace

import pytest

from llmux.core.spec import ModelSpec, Rules
from llmux.simulator import CostMatrix, EngineModel, simulate, statistics_of
from llmux.simulator.engine_model import UNSEEN, Engines, Service, _unexplained, fit
from llmux.simulator.run import Scene
from llmux.simulator.synthetic import Poisson, generate
from tests.policies.views import policy

TEN = CostMatrix(default=10.0)


def observe(engine, rate, *, limit=None, streamed=True, models=1, seconds=900.0):
    """Return what is seen of an engine, with as much in it as ``limit`` lets in."""
    trace = generate(Poisson(models, rate), seconds, 3)
    specs = [ModelSpec(name, max_in_flight=limit, max_queued=1 << 30) for name in trace.models]
    outcome = simulate(
        trace, policy("idle"), TEN, engine=engine, rules=Rules(), scene=Scene(specs, frozenset(trace.models[:1]))
    )
    return outcome, [
        Service(
            outcome.admitted[index],
            outcome.finished[index],
            outcome.first_token[index] if streamed else outcome.finished[index],
            5 * job.prompt_tokens,
            200 * job.output_tokens,
        )
        for index, job in enumerate(trace.jobs)
    ]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("slots", "slowdown"), [(2, 0.9), (4, 0.0), (8, 0.3), (16, 0.1)])
def test_a_full_engine_shows_how_many_it_serves_and_how_they_slow_each_other_down(slots, slowdown, streamed):
    engine = EngineModel(slots, 60.0, 6000.0, slowdown)
    full = slots * engine.rate(slots) / 200.0  # answers a second, of some 190 tokens
    _, seen = observe(engine, 0.95 * full, streamed=streamed, seconds=1800.0 / slots)
    found = fit(seen, None)
    assert found.most > slots
    assert found.engine.slots == slots
    assert found.engine.slowdown == pytest.approx(slowdown, abs=0.05)
    assert found.error < 0.05


def test_an_engine_that_was_never_full_takes_what_it_is_given():
    engine = EngineModel(64, 60.0, 6000.0, 0.2)
    _, seen = observe(engine, 0.3)
    found = fit(seen, None)
    assert 1 < found.most < 64
    assert found.engine.slots == UNSEEN
    assert found.engine.slowdown == pytest.approx(0.2)
    assert fit(seen, 32).engine.slots == 32


def test_one_at_a_time_says_nothing_of_two():
    services = [Service(10.0 * n, 10.0 * n + 2.0, 10.0 * n + 0.1, 100, 1000) for n in range(5)]
    found = fit(services, None)
    assert found.most == 1
    assert found.engine.slowdown == 0.0
    assert found.alone == pytest.approx([2.0] * 5)
    assert found.first == pytest.approx([0.1] * 5)


def test_answers_that_say_nothing_of_their_size():
    services = [Service(n, n + 3.0, n + 3.0, 0, 0) for n in range(9)]
    assert fit(services, None).error < 0.5


def test_the_times_alone_make_the_same_services_again():
    engine = EngineModel(4, 60.0, 6000.0, 0.5)
    outcome, seen = observe(engine, 0.6, models=3)
    trace = outcome.trace
    names = trace.models
    by_model = {name: [i for i, job in enumerate(trace.jobs) if job.model == name] for name in names}
    jobs = list(trace.jobs)
    engines = {}
    for name, indices in by_model.items():
        found = fit([seen[index] for index in indices], None)
        engines[name] = found.engine
        for index, alone, first in zip(indices, found.alone, found.first, strict=True):
            jobs[index] = replace(jobs[index], alone=alone, first=first)
    scene = Scene(
        [ModelSpec(name, max_in_flight=None, max_queued=1 << 30) for name in names], frozenset(names[:1])
    )
    again = simulate(
        replace(trace, jobs=jobs), policy("idle"), TEN, engine=Engines(own=engines), rules=Rules(), scene=scene
    )
    before, after = statistics_of(outcome), statistics_of(again)
    assert after.mean_wait == pytest.approx(before.mean_wait, rel=0.05)
    assert after.p95_wait == pytest.approx(before.p95_wait, rel=0.05)
    assert after.mean_ttft == pytest.approx(before.mean_ttft, rel=0.05)


def test_answers_that_took_no_time_by_the_clock():
    """uvloop's has milliseconds: what is admitted and answered within one begins before it ends."""
    instants = [Service(at / 1000.0, at / 1000.0, at / 1000.0, 14, 180) for at in (10, 10, 21, 21, 21)]
    found = fit([*instants, Service(0.021, 0.5, 0.1, 14, 180)], None)
    assert max(found.alone[:5]) < 0.001
    assert found.alone[5] > 0.4


def test_more_bytes_do_not_take_less_time():
    ones, fewer = [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]
    assert _unexplained([ones, fewer], [3.0, 2.0, 1.0]) == pytest.approx(0.0)
    assert _unexplained([ones, fewer], [1.0, 2.0, 3.0]) == pytest.approx(2.0)  # a constant

import itertools

import pytest

from llmux.simulator import Job, Trace, TraceError
from llmux.simulator.synthetic import Agents, OnOff, Poisson, generate, parse_load

TRACE = Trace("t", [Job(3.0, "b", 1, 1), Job(1.0, "a", 1, 1), Job(9.0, "b", 1, 1)])
LOOP = Trace("l", [Job(1.0, "a", 1, 1, successor=1, think=2.0), Job(None, "b", 1, 1)])


def test_models_by_their_first_arrival():
    assert TRACE.models == ("a", "b")
    assert LOOP.models == ("a", "b")


def test_stretched():
    assert [job.arrival for job in TRACE.stretched(2.0).jobs] == [6.0, 2.0, 18.0]
    assert [job.think for job in LOOP.stretched(2.0).jobs] == [4.0, 0.0]


def test_sliced():
    assert TRACE.sliced(2.0, 9.0).jobs == [Job(1.0, "b", 1, 1)]


def test_busiest():
    assert TRACE.busiest(1).models == ("b",)


def test_a_closed_loop_cannot_be_cut():
    with pytest.raises(TraceError, match="closed loop"):
        LOOP.sliced(0.0, 1.0)
    with pytest.raises(TraceError, match="closed loop"):
        LOOP.busiest(1)


@pytest.mark.parametrize("load", [Poisson(), OnOff(), Agents(2, background=0.2)])
def test_a_seed_says_it_all(load):
    assert generate(load, 300.0, 7) == generate(load, 300.0, 7)
    assert generate(load, 300.0, 7).jobs != generate(load, 300.0, 8).jobs


def test_poisson_rate_and_skew():
    jobs = generate(Poisson(4, 2.0, 2.0), 2000.0, 1).jobs
    assert len(jobs) == pytest.approx(4000, rel=0.05)
    share = sum(job.model == "m0" for job in jobs) / len(jobs)
    assert share == pytest.approx(1 / (1 + 1 / 4 + 1 / 9 + 1 / 16), rel=0.05)
    assert all(0 <= job.arrival < 2000.0 for job in jobs)


def test_on_off_has_pauses():
    jobs = sorted(generate(OnOff(1, 1.0, 20.0, 200.0), 4000.0, 1).jobs, key=lambda job: job.arrival)
    gaps = [after.arrival - before.arrival for before, after in itertools.pairwise(jobs)]
    assert max(gaps) > 60.0


def test_agents_alternate():
    jobs = generate(Agents(1), 300.0, 1).jobs
    assert sum(job.arrival is not None for job in jobs) == 1
    assert [job.model for job in jobs[:4]] == ["m0", "m1", "m0", "m1"]
    assert jobs[0].successor == 1
    assert jobs[-1].successor is None


def test_loads_from_words():
    assert parse_load(Poisson, "models=2,rate=0.25") == Poisson(2, 0.25)
    assert parse_load(Agents, "") == Agents()


@pytest.mark.parametrize(
    "words", ["speed=3", "rate", "rate=fast", "rate=-1", "models=2.5", "models=0", "rate=inf"]
)
def test_loads_that_make_no_sense(words):
    with pytest.raises(TraceError, match="--poisson"):
        parse_load(Poisson, words)

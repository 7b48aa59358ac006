from dataclasses import replace

import pytest

from llmux.simulator.statistics import Statistics, recommend

BASE = Statistics(
    mean_wait=20.0,
    p50_wait=15.0,
    p95_wait=60.0,
    p99_wait=90.0,
    max_wait=120.0,
    mean_ttft=21.0,
    p99_ttft=91.0,
    switching=0.3,
    draining=0.3,
    switches=40,
    completed=1000,
    requests=1000,
    slo=0.8,
    per_hour=1500.0,
)


def test_the_shorter_waits_win_and_the_reason_is_said():
    better = replace(BASE, mean_wait=14.0, p99_wait=80.0, draining=0.05)
    advice = recommend({"fifo": BASE, "adaptive": better})
    assert advice.policy == "adaptive"
    assert "mean -30%, p99 -11%; fifo spends 30% of the time draining, this 5%" in str(advice)


def test_fifo_is_enough_when_nothing_is_better():
    advice = recommend({"adaptive": replace(BASE, mean_wait=19.8), "fifo": BASE})
    assert advice.policy == "fifo"
    assert "adaptive does about as well" in str(advice)


def test_the_tail_counts_too():
    unfair = replace(BASE, mean_wait=18.0, p99_wait=200.0)
    assert recommend({"idle": unfair, "fifo": BASE}).policy == "fifo"


def test_a_shorter_tail_elsewhere_is_said():
    quick = replace(BASE, mean_wait=10.0, p99_wait=110.0)
    assert "fifo has the shorter p99, 90.0 s" in str(recommend({"quick": quick, "fifo": BASE}))


def test_no_request_waits():
    none = replace(BASE, mean_wait=0.0, p99_wait=0.01)
    assert "The waits are negligible" in str(recommend({"fifo": none, "idle": none}))


def test_one_alone():
    assert "Nothing else was compared" in str(recommend({"mine": BASE}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"completed": 500}, "more traffic than"),
        ({"switching": 0.7}, "cheaper switches"),
    ],
)
def test_what_no_policy_mends_is_said(change, words):
    assert words in str(recommend({"fifo": replace(BASE, **change)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"switching": 0.5}, "50% of the time switching"),
        ({"p99_wait": 150.0}, "keep the others waiting too long"),
        ({}, "chooses better which model to serve next"),
    ],
)
def test_reasons(change, words):
    other = replace(BASE, mean_wait=30.0, **change)
    assert words in str(recommend({"mine": BASE, "other": other}))

"""Why the last eviction chose what it chose, in words with figures."""

from __future__ import annotations

import json

import pytest

from llmux.observability.decision_log import Candidate, Evicted
from llmux.runtime.history import brief, eviction, reason

GIB = 2**30


def candidate(model, *, left=False, why="", keep=False, in_flight=0, queued=0, memory=None):
    cost = 2.0 + 10.0 * (1.25 + in_flight + queued)
    return Candidate(model, left, why, keep, in_flight, queued, 1.25, 2.0, 10.0, cost, memory)


def made(*candidates, need=None, free=None, grouped=False):
    return Evicted(5.0, 7, "big", candidates, need, free, grouped)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (
            made(candidate("a", left=True, why="apart", in_flight=1)),
            (
                "a makes room for big: one model at a time is awake;"
                " to lose a costs 24 s (1 in flight, sleep 2 s, wake 10 s, 1.2 expected in 2 min)"
            ),
        ),
        (
            made(
                candidate("a", left=True),
                candidate("b", queued=2, in_flight=1),
                candidate("c", keep=True),
                candidate("d", why="pinned"),
                candidate("e", why="backoff"),
                candidate("f"),
                need={"": 9 * GIB},
                free={"": GIB},
            ),
            (
                "a makes room for big: it needs 9GiB (1GiB free);"
                " to lose a costs 14 s (sleep 2 s, wake 10 s, 1.2 expected in 2 min);"
                " b stays, it is busy: 1 in flight, 2 waiting (it would cost 44 s);"
                " c stays, keep_awake applies to it (it would cost 14 s);"
                " d stays, it is pinned;"
                " e stays, it would not go to sleep a moment ago;"
                " f stays, it would cost 14 s"
            ),
        ),
        (
            made(
                candidate("a", left=True, why="apart", memory={"0": 2 * GIB, "1": GIB}),
                candidate("b", left=True, queued=1),
                need={"0": 9 * GIB, "1": GIB},
                free={"0": 2 * GIB, "1": -GIB},
            ),
            (
                "a and b make room for big: it needs 9GiB of GPU 0 (2GiB free) and 1GiB of GPU 1 (1GiB too much"
                " in use); a (3GiB) cannot be awake beside it;"
                " to lose b costs 24 s (1 waiting, sleep 2 s, wake 10 s, 1.2 expected in 2 min)"
            ),
        ),
        (
            made(candidate("a", left=True, why="apart"), grouped=True),
            "a makes room for big; a cannot be awake beside it",
        ),
    ],
)
def test_the_words(one, words):
    assert reason(one) == words
    assert brief(one, 100.0) == {"time": 105.0, "switch": 7, "for": "big", "reason": words}


def test_the_document():
    one = made(candidate("a", left=True, memory={"": GIB}), candidate("b"), need={"": 9}, free={"": 1})
    found = json.loads(json.dumps(eviction(one, 100.0)))
    assert (found["time"], found["switch"], found["for"], found["left"]) == (105.0, 7, "big", ["a"])
    assert (found["need"], found["free"]) == (9, 1)
    assert found["models"][0] == {
        "model": "a",
        "left": True,
        "why": "",
        "keep_awake": False,
        "in_flight": 0,
        "queued": 0,
        "expected": 1.25,
        "sleep": 2.0,
        "wake": 10.0,
        "cost": 14.5,
        "memory": GIB,
    }
    assert found["models"][1]["memory"] is None
    assert eviction(made(need={"0": 1, "1": 2}), 0.0)["need"] == {"0": 1, "1": 2}

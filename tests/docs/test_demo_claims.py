"""What the demo says of its figures is what they show."""

from __future__ import annotations

import re
import sys

import pytest

from tests.docs.pages import ROOT, text_of

FOLDER = ROOT / "examples" / "quickstart"


@pytest.fixture
def comparison(monkeypatch):
    pytest.importorskip("openai")
    pytest.importorskip("anthropic")
    monkeypatch.syspath_prepend(str(FOLDER))
    import comparison  # noqa: PLC0415 - its folder is not on the path before

    yield comparison
    for name in ("comparison", "clients", "machine"):
        sys.modules.pop(name, None)


def outcomes(comparison, better="adaptive", **changes):
    """Return two outcomes, of which one is better in all respects but for what is changed."""
    worse = {"adaptive": "fifo", "fifo": "adaptive"}[better]
    good = {"waits": [1.0] * 20, "switches": 3, "switching": 2.0, "draining": 0.0, "seconds": 9.0, "answer": 0.5}
    bad = {"waits": [2.0] * 20, "switches": 6, "switching": 5.0, "draining": 2.0, "seconds": 12.0, "answer": 0.5}
    return comparison.Outcome(better, **{**good, **changes}), comparison.Outcome(worse, **bad)


def test_fewer_switches_are_a_reason_where_there_were_fewer(comparison):
    said = comparison.verdict(*outcomes(comparison))
    assert said == (
        "With adaptive requests waited 50% less on average (1.00 s instead of 2.00 s): it switched 3 times instead"
        " of 6, so that 2.0 s instead of 7.0 s went by while a model drained or was being woken."
    )
    assert comparison.verdict(*reversed(outcomes(comparison))) == said


def test_they_are_none_where_there_were_more(comparison):
    said = comparison.verdict(*outcomes(comparison, switches=8))
    assert "it switched" not in said
    assert "2.0 s instead of 7.0 s went by" in said
    said = comparison.verdict(*outcomes(comparison, switches=8, switching=9.0))
    assert "it was the order in which the models were served that mattered" in said
    assert "lost 9.0 s instead of 7.0 s" in said


def test_where_fifo_is_better_that_is_said(comparison):
    said = comparison.verdict(*outcomes(comparison, "fifo"))
    assert said.startswith("With fifo requests waited 50% less")
    assert said.endswith("adaptive is the default all the same: on most traffic it waits less.")


def test_what_another_run_might_turn_round_is_no_difference(comparison):
    said = comparison.verdict(*outcomes(comparison, waits=[1.95] * 20))
    assert said.endswith("this run does not tell the two apart.")
    assert "differ by less than 15%" in said


def test_a_longer_tail_is_said(comparison):
    said = comparison.verdict(*outcomes(comparison, waits=[0.1] * 18 + [9.0, 9.0]))
    assert "The slowest twentieth waited longer with it, though: 9.00 s or more, instead of 2.00 s." in said


def test_runs_at_which_the_machine_was_busy_are_not_compared(comparison):
    said = comparison.verdict(*outcomes(comparison, answer=0.9))
    assert said.endswith("so the two runs do not compare.")
    assert "less on average" not in said


def machine(quill, atlas, switch=0.5):
    from machine import Engine, Machine  # noqa: PLC0415

    return Machine({"quill": Engine(*quill), "atlas": Engine(*atlas)}, switch)


@pytest.mark.parametrize(
    ("quill", "atlas", "switch"),
    [((600, 350), (90, 55), 0.4), ((40, 15), (12, 4), 3.0), ((5000, 4000), (900, 700), 0.1)],
)
def test_the_load_follows_from_the_machine(comparison, quill, atlas, switch):
    made = machine(quill, atlas, switch)
    planned = comparison.plan(made, 40.0)
    assert planned == comparison.plan(made, 40.0)
    assert 20 <= len(planned) <= 80
    assert all(request.tokens >= 4 for request in planned)
    work = sum(request.tokens / {"quill": quill, "atlas": atlas}[request.model][1] / 2 for request in planned)
    assert 0.3 < work / planned[-1].at < 1.1  # below what the engines can do, but not by much
    assert len(comparison.plan(made, 0.0)) == 20


BLOCK = re.compile(r"```console\n\$ make demo\n(.*?)```\n\n(.*?)\n\n", re.DOTALL)


def test_the_readme_shows_what_the_demo_prints(comparison):
    """Check the form, and that the words below the table are those that its figures lead to."""
    shown = BLOCK.search(text_of("README.md"))[1]
    row = re.compile(
        r"│ (adaptive|fifo) +│ +([\d.]+) s │ +([\d.]+) s │ +(\d+) │ +([\d.]+) s │ +([\d.]+) s │ +([\d.]+) s │"
    )
    rows = row.findall(shown)
    assert [name for name, *_ in rows] == ["adaptive", "fifo"]
    said = " ".join(shown[shown.rindex("│") + 1 :].split()).lstrip("…└┴─┘ ")
    found = []
    for name, mean, p95, switches, draining, switching, end in rows:
        waits = [(20 * float(mean) - float(p95)) / 19] * 19 + [float(p95)]
        spent = float(switching), float(draining), float(end)
        found.append(comparison.Outcome(name, waits, int(switches), *spent, 1.0))
    numbers = comparison.verdict(*found)
    assert re.sub(r"[\d.]+", "N", said) == re.sub(r"[\d.]+", "N", numbers)
    assert "requests" in shown
    assert "Every answer came from the engine that was asked for; none failed." in shown

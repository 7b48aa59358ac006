from __future__ import annotations

import logging
import typing

import pytest

from llmux.core import effects as core
from llmux.core.spec import HookKind
from llmux.observability.log import CATALOGUE, get_logger
from llmux.observability.notices import EventLog, describe

EFFECTS = [
    core.Ready(("a",)),
    core.RequestQueued(1, "a", 2),
    core.SwitchStarted(7, ("a", "b"), "c", "fifo"),
    core.SwitchDrained(7, (), "c", 1.23456),
    core.ModelActivated("c", 7, ("a",), 2.5),
    core.ModelDeactivated("a", 60.0),
    core.SwitchEnded(7, ("a",), None, "abandoned", 3.0, 1.0, None, None),
    core.SwitchFailed(7, (), "c", "wake failed"),
    core.ModelDeepened("a", "ram", "disk", 1.5),
    core.SleepHookFailed("a", "c", "exit 1"),
    core.BackoffStarted("c", HookKind.WAKE, 2, 2.1, "exit 1"),
    core.ModelLost("a", "refused"),
    core.ModelFaulted("org/a b", "exit 1"),
    core.ModelAssumedAsleep("a", 3, "exit 1"),
    core.ModelReset("a"),
    core.PolicyOverruled("SwitchTo('x')"),
    core.PolicyDecided("wait", None, "young"),
    core.PolicyAdopted("idle", "adaptive", "it waits less"),
    core.PinSet("a", pinned=True, until=None),
    core.LeaseSet(leased=True, until=5.0, reason="training"),
    core.LeaseHeld(3.5),
    core.ManualSet(manual=True),
    core.ModelRemoved("a"),
    core.Stopped(),
    core.Reject(1, "a", core.Refusal.WAITED_TOO_LONG, "waited", None, 30.004),
    core.Reject(1, "a", core.Refusal.QUEUE_FULL, "full", 3.0, 0.0),
    core.CancelRequests((1, 2), "a", core.CutReason.DRAIN_DEADLINE),
    core.RunHook(1, "a", HookKind.WAKE, None),
    core.Answer(1, accepted=False, reason="pinned"),
]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, logger="llmux")
    return EventLog(get_logger("llmux"), base_url="http://127.0.0.1:3000", clock=Clock())


def told(caplog):
    return [(record.levelname, dict(record.msg)) for record in caplog.records]


def test_every_notice_is_told():
    notices = set(typing.get_args(core.Notice))
    assert notices <= {type(effect) for effect in EFFECTS}
    for effect in EFFECTS:
        event = describe(effect)
        assert event is not None
        assert event.name in CATALOGUE


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: type(effect).__name__)
def test_every_effect_is_one_line(log, caplog, effect):
    log.effect(effect)
    ((level, fields),) = told(caplog)
    event = describe(effect)
    assert fields["event"] == event.name
    assert level == logging.getLevelName(CATALOGUE[event.name].level)
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("effect", "name", "fields"),
    [
        (core.SwitchStarted(7, (), "c", "x"), "switch_started", {"from": "idle", "to": "c"}),
        (core.SwitchStarted(7, ("a", "b"), None, "x"), "switch_started", {"from": "a,b", "to": None}),
        (
            core.ModelActivated("c", 7, ("a",), 2.54321),
            "model_activated",
            {"model": "c", "from": "a", "duration_secs": 2.543},
        ),
        (
            core.SwitchFailed(7, ("a",), "c", "no"),
            "switch_failed",
            {"model": "c", "from": "a", "error": "no"},
        ),
        (
            core.SwitchFailed(7, ("a",), None, "no"),
            "switch_failed",
            {"model": "a", "from": "a", "error": "no"},
        ),
        (
            core.SleepHookFailed("a", "c", "no"),
            "sleep_hook_failed",
            {"model": "a", "to": "c", "error": "no"},
        ),
        (
            core.ModelDeepened("a", "ram", "disk", 1.23456),
            "model_deepened",
            {"model": "a", "from_level": "ram", "to_level": "disk", "duration_secs": 1.235},
        ),
        (
            core.Reject(1, "a", core.Refusal.WAITED_TOO_LONG, "", None, 30.004),
            "request_timeout",
            {"model": "a", "timeout_secs": 30.0},
        ),
    ],
)
def test_the_originals_names_and_fields(effect, name, fields):
    event = describe(effect)
    assert event.name == name
    assert fields.items() <= dict(event.fields).items()


def test_a_fault_says_what_to_run():
    event = describe(core.ModelFaulted("org/a b'$(x)", "exit 1"), base_url="http://h:1")
    assert event.fields["repair"] == "curl -X POST http://h:1/llmux/models/org%2Fa%20b%27%24%28x%29/reset"


def test_what_is_no_news_is_not_told(log, caplog):
    log.effect(core.Admit(1, "a", None, 1, returned=False, waited=0.0))
    log.effect(core.RecordHolders(frozenset()))
    log.effect(core.KillHook(1, "timeout"))
    assert told(caplog) == []
    assert describe(core.RecordHolders(frozenset())) is None


def test_a_flood_of_refusals_is_one_line_in_ten_seconds(log, caplog):
    refusal = core.Reject(1, "a", core.Refusal.QUEUE_FULL, "full", 3.0, 0.0)
    for _ in range(1000):
        log.effect(refusal)
    log._clock.now += 10
    log.effect(refusal)
    log.effect(core.Reject(1, "a", core.Refusal.STOPPING, "stopping", None, 0.0))
    warned = [fields for level, fields in told(caplog) if level == "WARNING"]
    assert [fields.get("more") for fields in warned] == [None, 999]


@pytest.mark.parametrize(
    ("hook", "ok", "level", "name"),
    [
        ("wake", True, "INFO", "hook_completed"),
        ("wake", False, "ERROR", "hook_failed"),
        ("alive", True, "DEBUG", "hook_completed"),
        ("verify", False, "DEBUG", "hook_failed"),
    ],
)
def test_hooks(log, caplog, hook, ok, level, name):
    log.hook_ended("a", hook, ok=ok, seconds=1.23456, exit_code=0 if ok else 1, output="x" * 5000)
    ((seen, fields),) = told(caplog)
    assert (seen, fields["event"], fields["duration_secs"]) == (level, name, 1.235)
    assert fields["exit_code"] == (0 if ok else 1)
    assert len(fields.get("stderr", "")) == (0 if ok else 2000)


def test_hook_output(log, caplog):
    log.hook_output("a", "wake", "loading")
    log.hook_output("a", "alive", "ok")
    assert [level for level, _ in told(caplog)] == ["INFO", "DEBUG"]


def test_anything_in_the_catalogue_can_be_told(log, caplog):
    log.emit("state_file_set_aside", path="/x", error=None)
    assert told(caplog) == [("WARNING", {"event": "state_file_set_aside", "path": "/x"})]
    with pytest.raises(KeyError):
        log.emit("no_such_event")


def test_debug_costs_nothing_when_nobody_listens(log, caplog):
    caplog.set_level(logging.INFO, logger="llmux")
    log.effect(core.RequestQueued(1, "a", 2))
    assert told(caplog) == []


def test_every_event_has_a_meaning():
    assert all(event.meaning.endswith(".") for event in CATALOGUE.values())

"""What is kept for the next llmux: what operators have asked for, and which hooks are being ended."""

import asyncio
import dataclasses
import json
import subprocess

import pytest

from llmux.app import build_app
from llmux.core import Core
from llmux.core import events as ev
from llmux.core.spec import ModelSpec, Rules
from llmux.estimates import Estimates
from llmux.hookrunner.hook_process import trace_of
from llmux.observability import metrics
from llmux.observability.state_file import NoState, State
from llmux.runtime import persistence
from tests.server.house import SLEEP, held, until


class NoOperator:
    def decide(self, _now):
        raise AssertionError("nobody waits")


def core(**rules):
    made = Core([ModelSpec("a"), ModelSpec("b")], Rules(**rules), NoOperator(), Estimates())
    made.handle(ev.Started(), 0.0)
    for hook in (1, 2):
        made.handle(ev.HookFinished(hook, ok=False), 0.0)
    return made


def test_the_next_clock_begins_elsewhere(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    first = core()
    first.handle(ev.PinChanged("a", 1, until=70.0, reason="a demo"), 5.0)
    first.handle(ev.LeaseChanged(2, until=90.0, reason="training", waits=True, id="x"), 5.0)
    first.handle(ev.ManualChanged(3), 5.0)
    kept = json.loads(json.dumps(persistence.dump_operators(first.state, 10.0)))
    monkeypatch.setattr("time.time", lambda: 1020.0)
    found = persistence.load_operators(kept, 3.0)  # 20 s later
    assert (found.pins["a"].until, found.pins["a"].reason) == (43.0, "a demo")
    lease = found.lease
    assert (lease.until, lease.since, lease.reason, lease.waits, lease.id) == (63.0, -22.0, "training", True, "x")
    assert found.manual is True


def test_a_clock_that_is_put_back_makes_no_lease_and_no_pin_longer(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    first = core()
    first.handle(ev.LeaseChanged(1, until=65.0), 5.0)
    first.handle(ev.PinChanged("a", 2, until=150.0), 5.0)
    kept = json.loads(json.dumps(persistence.dump_operators(first.state, 35.0)))
    monkeypatch.setattr("time.time", lambda: 0.0)  # as a machine whose clock has no battery starts
    found = persistence.load_operators(kept, 3.0)
    assert (found.lease.since, found.lease.until) == (3.0, 63.0)
    assert found.pins["a"].until == 123.0  # 115 s, in whole minutes
    del kept["pins"]["a"]["left"]  # an older llmux has written it
    assert persistence.load_operators(kept, 3.0).pins["a"].until == pytest.approx(1e9 + 118)


def test_without_a_wish_nothing_is_kept():
    kept = persistence.dump_operators(core(manual=True).state, 10.0)
    assert kept == {"pins": {}, "lease": None, "manual": None}
    assert (
        persistence.load_operators(kept, 0.0)
        == persistence.load_operators(None, 0.0)
        == persistence.OperatorState()
    )


DAMAGED = [
    7,
    "x",
    {},
    {"pins": 7, "lease": None, "manual": None},
    {"pins": {"a": None}, "lease": None, "manual": None},
    {"pins": {"a": {"until": "x", "reason": ""}}, "lease": None, "manual": None},
    {"pins": {"a": {"until": float("nan"), "reason": ""}}, "lease": None, "manual": None},
    {"pins": {"a": {"until": 1, "reason": "", "left": "x"}}, "lease": None, "manual": None},
    {"pins": {}, "lease": {"until": 1}, "manual": None},
    {"pins": {}, "lease": [], "manual": None},
]


@pytest.mark.parametrize("damaged", DAMAGED)
async def test_what_is_damaged_is_told_and_left_out(house, damaged):
    store = NoState(State(asked=damaged))
    app, switcher = build_app(house.config(), store=store, log=house.log)
    await house.serve(app)
    await until(lambda: switcher.core.state.ready)
    assert "pins and lease" in house.log.named("state_file_unreadable")[0]["error"]
    assert switcher.core.state.lease is None
    assert (await house.chat("a")).status == 200


class Saved(NoState):
    """Keeps all that was saved."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.states: list[State] = []

    def save(self, state: State) -> bool:
        self.states.append(state)
        return super().save(state)


async def test_a_start_that_is_cut_short_leaves_the_hooks_that_it_was_ending_to_the_next_one(house):
    command = ["sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, process_group=0, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220 - for a moment
        process.stdout.read(1)
        trace = trace_of(process.pid)
        before = State(frozenset({"a"}), {"a": 1.0}, hooks=(trace, trace._replace(boot="another")))
        store = Saved(before)
        app, switcher = build_app(house.config(), store=store, log=house.log)
        await house.serve(app)
        await until(lambda: switcher.core.state.ready)
        assert process.wait() == -15
    assert store.states[0] == dataclasses.replace(before, hooks=(trace._replace(ending=True),))
    assert trace.pid not in [pid for pid, *_ in store.states[-1].hooks]


async def test_what_is_alive_is_asked_of_all_and_not_written_down_each_time(house):
    models = {f"m{number}": {"alive": "exit 1"} for number in range(60)}
    store = Saved(State())
    app, switcher = build_app(house.config(models), store=store, log=house.log)
    await house.serve(app)
    await until(lambda: switcher.core.state.ready)
    assert len(store.states) < len(models) / 2


async def test_of_the_directions_that_are_kept_the_last_have_series_of_their_own(house, monkeypatch):
    monkeypatch.setattr(metrics, "PAIRS", 2)
    pairs = [["a", "b", 1.0, 1], ["b", "c", 2.0, 1], [None, "a", 3.0, 1]]
    store = NoState(State(costs={"pairs": pairs, "wakes": {}, "sleeps": {}}))
    app, switcher = build_app(house.config("a b c"), store=store, log=house.log)
    await house.serve(app)
    text = switcher.metrics.render()[0].decode()
    shown = [line.split("{")[1].split("}")[0] for line in text.splitlines() if "cost_ema_seconds{" in line]
    assert sorted(shown) == ['from="b",to="c"', 'from="idle",to="a"']


class Kept(NoState):
    """Keeps all that was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[State] = []

    def save(self, state: State) -> bool:
        self.saved.append(state)
        return super().save(state)


async def test_many_models_that_are_put_to_sleep_are_not_written_down_one_by_one(house, monkeypatch):
    """The file is as long as there are models: 2,000 that ran at a start took minutes."""
    made = []
    remember = persistence.remember
    monkeypatch.setattr(persistence, "remember", lambda spec: made.append(spec) or remember(spec))
    names = [f"m{number}" for number in range(60)]
    for name in names:
        house.up(name)
    config = house.config({name: {"sleep": f"{held('all')}; {SLEEP}"} for name in names})
    store = Kept()
    _, switcher = build_app(config, store=store, log=house.log)
    switcher.start()
    await until(lambda: store.saved and len(store.saved[-1].hooks) == 59)
    running = [state for state in store.saved if len(state.holders) == 60 and state.hooks]
    assert len(running) < 25  # a few of ``alive``, eight at once, and the rest eight by eight
    house.release("all")
    await until(lambda: len(store.saved[-1].holders) == 1 and not store.saved[-1].hooks)
    assert len(made) == 60
    await switcher.stop()


async def test_what_comes_in_one_turn_of_the_loop_is_saved_once(house):
    """It waits for no later turn, whatever comes in those."""
    store = Kept()
    _, switcher = build_app(house.config(), store=store, log=house.log)
    switcher.start()
    await until(lambda: switcher.core.state.ready)
    keeper = switcher._persistence
    keeper.save()
    store.saved.clear()
    for _ in range(3):
        keeper.save_soon()
    assert not store.saved
    await asyncio.sleep(0)
    assert len(store.saved) == 1
    keeper.save_soon()
    keeper.save()
    await asyncio.sleep(0)
    assert len(store.saved) == 2
    for _ in range(6):
        keeper.save_soon()
        await asyncio.sleep(0)
        keeper.save_soon()
    assert len(store.saved) >= 5
    await switcher.stop()

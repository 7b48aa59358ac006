from unittest.mock import ANY

from llmux.core.policy import Stay, SwitchRecord, SwitchTo, WaitUntil
from tests.policies.views import Model, View, policy


def ask(time, *models):
    """Ask one that has seen a switch before."""
    adaptive = policy("adaptive")
    adaptive.on_switch_completed(SwitchRecord(1, ("x",), "y", "success", 0.0, 1.0, 0.0))
    return adaptive.decide(View(time, *models))


def home(**more):
    return Model("a", **{"in_flight": 3, "awake_since": 0.0, **more})


def test_an_idle_model_is_left_for_whoever_waits():
    assert isinstance(ask(10.0, home(in_flight=0), Model("b", [9.0])), SwitchTo)


def test_whoever_waited_at_the_wake_comes_first():
    decision = ask(900.0, Model("a", [4.0], in_flight=16, awake_since=5.0), Model("b", [1.0] * 50))
    assert isinstance(decision, Stay)


def test_until_it_has_seen_a_switch_it_serves_until_idle_and_goes_to_the_oldest():
    b, c = Model("b", [9.0], switch_cost=40.0), Model("c", [9.5] * 5, switch_cost=10.0)
    untaught = policy("adaptive")
    quick = {"arrival_rate": 0.2, "service_time": 1.0}
    assert untaught.decide(View(10.0, home(**quick), b, c)) == WaitUntil(24.0, ANY)
    assert untaught.decide(View(24.0, home(**quick), b, c)).model == "b"
    assert untaught.decide(View(10.0, home(in_flight=0), b, c)).model == "b"


def test_a_slow_engine_has_time_to_be_idle_before_the_first_switch():
    """15 s are less than two of its answers: it would be left busy again and again."""
    decision = policy("adaptive").decide(View(30.0, home(service_time=10.0), Model("b", [9.0])))
    assert isinstance(decision, WaitUntil)
    assert decision.time > 60.0


def test_one_without_a_limit_may_never_be_idle():
    assert policy("adaptive").decide(View(10.0, home(limit=None), Model("b", [9.0]))).model == "b"


class Loaded:
    """An engine that answers one request in a second, and none much sooner than it answers many."""

    slots, most = None, 1.0

    def throughput(self, in_flight):
        return min(1.0, in_flight)

    def drain(self, in_flight):
        return 1.0 * in_flight

    def serving(self, waiting, limit):
        return max(1.0, waiting / (limit or waiting)) * waiting


def test_an_engine_whose_streams_slow_each_other_down_is_idle_sooner_than_its_mean_says():
    """Its answers took 16 s among others; once few are left they take a fraction, and it pays to wait for that."""
    b = Model("b", [9.0] * 10)
    plain, loaded = (home(arrival_rate=0.2, service_time=16.0, in_flight=1) for _ in range(2))
    loaded.engine = Loaded()
    assert isinstance(ask(10.0, plain, b), SwitchTo)
    assert isinstance(ask(10.0, loaded, b), WaitUntil)


def test_few_wait_until_a_lightly_loaded_engine_is_idle():
    decision = ask(10.0, home(arrival_rate=0.2), Model("b", [9.0]))
    assert isinstance(decision, WaitUntil)
    assert decision.time > 10.0


def test_many_do_not():
    assert isinstance(ask(10.0, home(arrival_rate=0.2), Model("b", [9.0] * 200)), SwitchTo)


def test_nobody_waits_longer_than_the_limit():
    decision = ask(10.0, home(arrival_rate=0.2), Model("b", [9.0]))
    assert isinstance(ask(decision.time, home(arrival_rate=0.2), Model("b", [9.0])), SwitchTo)


def test_a_longer_queue_at_home_is_served_on():
    mine = home(in_flight=16, arrival_rate=1.0)
    mine.waiters = [5.0] * 30
    assert isinstance(ask(200.0, mine, Model("b", [6.0])), Stay)
    assert isinstance(ask(20.0, mine, Model("b", [6.0])), WaitUntil)


def test_the_route_clears_most_waiting_per_second():
    b, c = Model("b", [9.0], switch_cost=40.0), Model("c", [9.5] * 5, switch_cost=10.0)
    assert ask(10.0, home(in_flight=0), b, c).model == "c"


def test_few_that_have_waited_come_before_many_that_have_just_come():
    b, c = Model("b", [4.0] * 3, switch_cost=1.0), Model("c", [9.0] * 5, switch_cost=1.0)
    assert ask(10.0, home(in_flight=0), b, c).model == "b"


def test_a_visit_ends_in_proportion_to_the_way_however_long_the_queue_elsewhere():
    few, many = (
        ask(
            40.0, home(in_flight=16, arrival_rate=2.0, awake_since=0.0, waiters=[30.0] * 9), Model("b", [35.0] * n)
        )
        for n in (20, 200)
    )
    assert few == many


def test_without_a_limit_what_is_inside_the_engine_has_time_for_an_answer():
    """All that waited at the wake is admitted at once: no gate keeps it from being shut out behind others."""
    loaded = home(limit=None, in_flight=9, arrival_rate=0.5, service_time=8.0)
    loaded.engine = Loaded()
    decision = ask(10.0, loaded, Model("b", [9.0]))
    drain, switches = loaded.engine.drain(9), 2 * 0.35 * 10.0
    assert isinstance(decision, WaitUntil)
    assert decision.time > 9.0 + 2.0 * (drain + switches + 8.0 / 1.25)


def test_a_small_queue_gets_its_turn():
    b, c = Model("b", [9.0], switch_cost=40.0), Model("c", [199.5] * 5, switch_cost=10.0)
    assert ask(200.0, home(in_flight=0), b, c).model == "b"


def test_whoever_is_about_to_be_overdue_comes_before_all_else():
    b, c = Model("b", [120.0] * 9, switch_cost=120.0), Model("c", [125.0] * 40, switch_cost=120.0)
    assert ask(479.0, home(in_flight=0), b, c).model == "c"
    assert ask(559.0, home(in_flight=0), b, c).model == "b"


def test_it_learns_what_switches_cost():
    learner = policy("adaptive")
    learner.on_switch_completed(SwitchRecord(0, ("x",), "y", "success", 0.0, 1.0, 0.0))
    dear, cheap = Model("b", [9.0, 9.0], switch_cost=10.0), Model("c", [9.0], switch_cost=10.0)
    view = View(10.0, home(in_flight=0), dear, cheap)
    assert learner.decide(view).model == "b"
    learner.on_switch_completed(SwitchRecord(1, ("a",), "b", "success", 0.0, 300.0, 10.0))
    learner.on_switch_completed(SwitchRecord(2, ("a",), "c", "success", 0.0, 1.0, 10.0))
    assert learner.decide(view).model == "c"


def test_of_several_awake_the_least_busy_is_likely_to_leave():
    busy, idle = Model("a", in_flight=9, awake_since=0.0), Model("b", awake_since=0.0)
    assert isinstance(ask(10.0, busy, idle, Model("c", [9.0])), SwitchTo)


def test_an_engine_without_a_limit():
    assert isinstance(ask(10.0, home(in_flight=0), Model("b", [9.0], limit=None)), SwitchTo)

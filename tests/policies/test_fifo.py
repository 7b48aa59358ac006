from llmux.core.policy import Stay, SwitchTo
from tests.policies.views import Model, ask


def test_the_oldest_waiter_is_served_next():
    home = Model("a", in_flight=3, awake_since=0.0)
    decision = ask("fifo", 10.0, home, Model("b", [5.0]), Model("c", [4.0]))
    assert isinstance(decision, SwitchTo)
    assert decision.model == "c"
    assert decision.reason


def test_nobody_awake():
    assert ask("fifo", 10.0, Model("b", [5.0])) == SwitchTo("b", reason="it has the oldest waiter")


def test_whoever_waited_at_the_wake_has_a_place_first():
    home = Model("a", [3.0, 9.0], in_flight=16, awake_since=4.0)
    assert isinstance(ask("fifo", 10.0, home, Model("b", [2.0])), Stay)


def test_whoever_came_before_the_first_foreign_request_has_a_place_first():
    home = Model("a", [5.0], in_flight=16, awake_since=4.0)
    assert isinstance(ask("fifo", 10.0, home, Model("b", [6.0])), Stay)


def test_later_ones_wait_for_their_turn():
    home = Model("a", [7.0], in_flight=16, awake_since=4.0)
    assert isinstance(ask("fifo", 10.0, home, Model("b", [6.0])), SwitchTo)


def test_an_engine_that_serves_nobody_keeps_nobody():
    home = Model("a", [3.0], in_flight=0, awake_since=4.0)
    assert isinstance(ask("fifo", 10.0, home, Model("b", [6.0])), SwitchTo)

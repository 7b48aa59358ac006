"""The agenda: what is due when."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.core.timers import Timers


def test_earliest_first_and_equal_times_in_the_order_they_were_set() -> None:
    agenda = Timers()
    assert agenda.next() is None
    agenda.set("b", 2.0)
    agenda.set("a", 1.0)
    agenda.set("c", 2.0)
    assert agenda.next() == 1.0
    assert agenda.pop_due(0.5) is None
    assert [agenda.pop_due(2.0) for _ in range(4)] == ["a", "b", "c", None]


def test_setting_again_replaces_and_cancelling_forgets() -> None:
    agenda = Timers()
    agenda.set("a", 1.0)
    agenda.set("a", 5.0)
    agenda.set("b", 3.0)
    agenda.cancel("b")
    agenda.cancel("stranger")
    assert "a" in agenda
    assert "b" not in agenda
    assert agenda.next() == 5.0


def test_replaced_entries_do_not_pile_up() -> None:
    agenda = Timers()
    for when in range(10_000):
        agenda.set("a", float(when))
    assert len(agenda._heap) < 100
    assert agenda.next() == 9999.0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 9)), max_size=150))
def test_against_a_plain_dict(steps) -> None:
    agenda, plain = Timers(), {}
    for key, when in steps:
        if when is None:
            agenda.cancel(key)
            plain.pop(key, None)
        else:
            agenda.set(key, float(when))
            plain[key] = float(when)
        assert agenda.next() == min(plain.values(), default=None)


def test_order_survives_the_clearing_out_of_replaced_entries() -> None:
    agenda = Timers()
    for turn in range(100):
        for number, key in enumerate("edcba"):
            agenda.set(key, float(turn * 10 + 9 - number))
    assert [agenda.pop_due(1e9) for _ in range(5)] == ["a", "b", "c", "d", "e"]

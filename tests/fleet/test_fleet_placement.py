"""Where requests go, what happens when hosts refuse, vanish, change or lie."""

import math

import pytest
from fleet_playbook import (
    COST,
    Playbook,
    asks,
    asleep,
    at,
    awake,
    claims,
    due,
    ejected,
    given,
    queued,
    refused,
    rejected,
    report,
    sent,
)

from llmux.core.phases import InvalidEventError, Phase
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import HostReport, ModelReport, read_report
from llmux.fleet.routes import LeastInFlight

TWO = {"h1": [awake("a"), asleep("b")], "h2": [asleep("a", "b")]}


# ---- the way of a request


def test_a_request_goes_where_its_model_is_awake():
    play = given(**TWO)
    play(at(1.0, asks(1, "a"), sent(1, "a", "h1")), at(2.0, ev.AnswerBegan(1)), at(3.0, ev.RequestEnded(1)))
    assert not play.host("h1").own


def test_a_cold_model_is_woken_where_nothing_has_to_leave_and_its_wake_is_claimed():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "b"), sent(1, "b", "h2"), claims("b", "h2")),
        at(1.1, asks(2, "b"), sent(2, "b", "h2")),
    )


def test_a_claim_ends_and_another_may_follow():
    play = given(LeastInFlight(), **TWO)
    play(
        at(1.0, asks(1, "b"), sent(1, "b", "h2"), claims("b", "h2")),
        at(1.0, asks(2, "b"), sent(2, "b", "h1")),  # one claim a model and term, wherever the route goes
        at(2.0, report("h1", awake("a"), asleep("b"), seq=2)),
        at(2.0, report("h2", asleep("a", "b"), seq=2)),
        at(3.0, ev.RequestEnded(1)),
        at(3.0, ev.RequestEnded(2)),
        at(11.0, due),
        at(11.0, report("h1", awake("a"), asleep("b"), seq=3)),
        at(11.0, report("h2", asleep("a", "b"), seq=3)),
        at(11.0, asks(3, "b"), sent(3, "b", "h2"), claims("b", "h2")),
    )


def test_requests_join_the_wake_that_another_gateway_has_claimed():
    play = given(**TWO)
    play(at(1.0, ev.ClaimSeen("b", "h1", 9.0)), at(1.1, asks(1, "b"), sent(1, "b", "h1")))


@pytest.mark.parametrize("where", ["h9", "ejected", "old"])
def test_a_claim_of_a_host_that_cannot_serve_counts_for_nothing(where):
    play = given(**TWO)
    if where == "ejected":
        play(at(0.5, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")))
    elif where == "old":
        play(at(0.5, report("h1", asleep("a", "b"), seq=2, lease=0.1)))
    host = "h9" if where == "h9" else "h1"
    play(
        at(1.0, ev.ClaimSeen("b", host, 9.0)),
        at(1.1, asks(1, "b"), sent(1, "b", "h2"), claims("b", "h2", over=host)),
    )


def test_the_client_leaves():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(2.0, ev.RequestAbandoned(1)),
        at(3.0, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")),
        at(3.0, ev.HostUnreachable("h2", "x"), ejected("h2", reason="x")),
        at(3.0, asks(2, "a"), queued(2, "a")),
        at(3.5, ev.RequestAbandoned(2)),
    )
    assert not play.placement.queues


def test_events_about_requests_that_are_not_there_are_errors():
    play = given(**TWO)
    play(at(1.0, asks(1, "a"), sent(1, "a", "h1")), at(1.5, ev.AnswerBegan(1)))
    for event in (asks(1, "a"), ev.RequestEnded(9), ev.ConnectFailed(1), refused(1, "pinned")):
        with pytest.raises(InvalidEventError):
            play.placement.handle(event, 2.0)


# ---- refusals and failures


def test_a_refusal_before_admission_is_tried_on_the_next_host():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.1, refused(1, "pinned", 50.0), sent(1, "a", "h2", 2, 0.1), claims("a", "h2")),
        at(1.2, asks(2, "a"), sent(2, "a", "h2")),  # h1 has said that it takes nothing for a
        at(1.3, asks(3, "b"), sent(3, "b", "h1"), claims("b", "h1")),  # for b it may well take something
    )


def test_the_last_refusal_is_passed_on_in_the_hosts_words():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.1, refused(1, "backing_off", 50.0), sent(1, "a", "h2", 2, 0.1), claims("a", "h2")),
        at(1.2, refused(1, "pinned", 40.0, "b is pinned"), rejected(1, "a", "pinned", "b is pinned", 40.0, 0.2)),
    )


def test_a_client_is_told_when_the_first_of_the_hosts_may_take_it():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.5, refused(1, "backing_off", 20.0), sent(1, "a", "h2", 2, 0.5), claims("a", "h2")),
        at(2.0, refused(1, "pinned", 900.0, "b is pinned"), rejected(1, "a", "pinned", "b is pinned", 19.5, 1.0)),
    )


def test_a_refusal_without_words_is_passed_on_too():
    play = given(h1=[awake("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, refused(1, "faulted"), rejected(1, "a", "faulted", "'a' was refused", None)),
    )


def test_a_request_is_sent_three_times_at_most():
    play = given(h1=[awake("a")], h2=[awake("a")], h3=[awake("a")], h4=[awake("a")])
    play.ledger.feed(asks(1, "a"), 1.0)
    for _ in range(2):
        play.ledger.feed(refused(1, "queue_full", 2.0), 1.0)
    play(at(1.0, refused(1, "queue_full", 2.0, "full"), rejected(1, "a", "queue_full", "full", 2.0)))


def test_a_lent_host_takes_nothing_for_any_model():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, refused(1, "leased", 9.0), sent(1, "a", "h2", 2), claims("a", "h2")),
        at(1.0, asks(2, "b"), sent(2, "b", "h2"), claims("b", "h2")),
    )


def test_a_newer_report_counts_more_than_an_old_refusal():
    play = given(**TWO)
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, refused(1, "pinned", 500.0), sent(1, "a", "h2", 2), claims("a", "h2")),
        at(1.5, report("h1", awake("a"), asleep("b"), seq=2, age=1.0)),  # taken before the refusal
        at(1.5, asks(2, "a"), sent(2, "a", "h2")),
        at(2.5, report("h1", awake("a"), asleep("b"), seq=3)),
        at(2.5, asks(3, "a"), sent(3, "a", "h1")),
    )


def test_a_refused_connection_ejects_the_host_at_once_and_it_is_probed():
    play = given(h1=[awake("a")], h2=[asleep("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, asks(2, "a"), sent(2, "a", "h1")),
        at(1.1, ev.ConnectFailed(1), ejected("h1"), sent(1, "a", "h2", 2, 0.1), claims("a", "h2")),
        at(1.1, ev.ConnectFailed(2, "timed out"), sent(2, "a", "h2", 2, 0.1)),  # told once
        at(2.1, due, ev.Probe("h1")),
        at(2.2, ev.HostUnreachable("h1", "refused"), ejected("h1", 2.0, "refused")),
        at(4.2, due, ev.Probe("h1")),
        at(4.3, ev.HostReachable("h1"), ev.HostRestored("h1")),
        at(4.3, ev.HostReachable("h1")),
        at(4.4, asks(3, "a"), sent(3, "a", "h1")),
    )


def test_probes_become_rarer():
    play = given(h1=[awake("a")])
    pauses, now = [], 0.0
    for _ in range(8):
        [effect] = play.ledger.feed(ev.HostUnreachable("h1", "x"), now)
        pauses.append(effect.pause)
        now += effect.pause
        assert play.ledger.feed(due, now) == [ev.Probe("h1")]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_host_that_was_started_again_is_probed_at_once():
    play = given(h1=[awake("a")])
    play(
        at(1.0, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")),
        at(1.2, report("h1", asleep("a"), seq=1, instance="2")),
        at(1.2, due, ev.Probe("h1")),
        at(1.3, ev.HostReachable("h1"), ev.HostRestored("h1")),
    )


def test_a_connection_that_ends_after_bytes_were_sent_is_a_502_and_never_again():
    play = given(h1=[awake("a")], h2=[awake("a")])
    message = "h1 ended the connection without an answer; the request is not sent again"
    play.ledger.feed(asks(1, "a"), 1.0)
    host = play.ledger.at[1]
    play(at(2.0, ev.ConnectionBroken(1), rejected(1, "a", "host_lost", message.replace("h1", host), None, 1.0)))


def test_a_host_dies_in_the_middle_of_an_answer():
    play = given(h1=[awake("a")])
    message = "h1 ended the connection without an answer; the request is not sent again"
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.5, ev.AnswerBegan(1)),
        at(2.0, ev.ConnectionBroken(1), rejected(1, "a", "host_lost", message, None, 1.0)),
    )


# ---- the gateway's own queue


def test_what_no_host_can_take_waits_in_order_and_goes_when_one_is_back():
    play = given(h1=[awake("a")])
    play(
        at(1.0, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")),
        at(1.0, asks(1, "a"), queued(1, "a")),
        at(1.5, asks(2, "a"), queued(2, "a", 2)),
        at(2.0, due, ev.Probe("h1")),
        at(
            2.1,
            ev.HostReachable("h1"),
            ev.HostRestored("h1"),
            sent(1, "a", "h1", waited=1.1),
            sent(2, "a", "h1", waited=0.6),
        ),
    )


def test_the_queue_is_bounded_in_number_and_in_time():
    play = given(rules={"max_queued": 1, "max_wait": 10.0}, h1=[awake("a")])
    play(
        at(1.0, ev.HostUnreachable("h1", "x"), ejected("h1", 1.0, "x")),
        at(1.0, asks(1, "a"), queued(1, "a")),
        at(
            3.0,
            asks(2, "a"),
            rejected(2, "a", "queue_full", "1 requests already wait for a host that has 'a'", 5.0),
        ),
        at(3.0, due, ev.Probe("h1")),
        at(11.0, due, rejected(1, "a", "no_host", "no host that has 'a' could take it", 5.0, 10.0)),
    )
    assert not play.placement.queues
    assert play.placement.next_deadline() is None


def test_a_request_that_lost_its_host_waits_before_those_that_came_later():
    play = given(h1=[awake("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, asks(2, "a"), sent(2, "a", "h1")),
        at(2.0, ev.ConnectFailed(2, "refused"), ejected("h1", reason="refused"), queued(2, "a")),
        at(2.1, ev.ConnectFailed(1), queued(1, "a", 2)),
        at(3.0, due, ev.Probe("h1")),
        at(
            3.0,
            ev.HostReachable("h1"),
            ev.HostRestored("h1"),
            sent(1, "a", "h1", 2, 2.0),
            sent(2, "a", "h1", 2, 2.0),
        ),
    )


def test_the_third_host_that_cannot_be_reached_is_the_last():
    play = given(h1=[awake("a")], h2=[awake("a")], h3=[awake("a")], h4=[awake("a")])
    play.ledger.feed(asks(1, "a"), 1.0)
    for _ in range(2):
        play.ledger.feed(ev.ConnectFailed(1), 1.0)
    last = play.ledger.at[1]
    play(
        at(
            1.0,
            ev.ConnectFailed(1),
            ejected(last),
            rejected(1, "a", "no_host", "no host that has 'a' could be reached", 5.0),
        )
    )


def test_a_refused_request_waits_while_another_host_may_come_back():
    """Its one host is unreachable, the other has refused it: what is passed on is the refusal."""
    play = given(h1=[awake("a")], h2=[awake("a")])
    play.ledger.feed(asks(1, "a"), 1.0)
    host = play.ledger.at[1]
    other = "h2" if host == "h1" else "h1"
    play(
        at(1.0, ev.HostUnreachable(other, "x"), ejected(other, reason="x")),
        at(
            1.1,
            refused(1, "wake_failed", 1.0, "it failed"),
            rejected(1, "a", "wake_failed", "it failed", 1.0, 0.1),
        ),
    )


def test_what_every_host_refuses_for_long_is_rejected_at_once():
    play = given(h1=[awake("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, refused(1, "pinned", 90.0, "pinned"), rejected(1, "a", "pinned", "pinned", 90.0)),
        at(2.0, asks(2, "a"), rejected(2, "a", "no_host", "every host that has 'a' refuses it for now", 89.0)),
    )


def test_what_is_refused_for_a_short_while_waits():
    play = given(h1=[awake("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, refused(1, "backing_off", 2.0, "later"), rejected(1, "a", "backing_off", "later", 2.0)),
        at(2.0, asks(2, "a"), queued(2, "a")),
        at(3.0, due, sent(2, "a", "h1", waited=1.0)),
        at(3.1, refused(2, "backing_off", 4.0, "later"), rejected(2, "a", "backing_off", "later", 4.0, 1.1)),
    )


def test_a_queue_in_front_of_hosts_that_would_refuse():
    """A report that says so counts as a refusal, and one that says otherwise opens the door."""
    play = given(h1=[asleep("a", expected_wait=None)])
    play(
        at(1.0, asks(1, "a"), queued(1, "a")),
        at(2.0, report("h1", awake("a"), seq=2), sent(1, "a", "h1", waited=1.0)),
    )


def test_no_model_is_missing_before_all_hosts_are_known_and_have_reported():
    play = Playbook()
    play.placement.complete = False
    play(
        at(1.0, asks(1, "x"), queued(1, "x")),
        at(1.0, asks(2, "a"), queued(2, "a")),
        at(1.5, report("h1", awake("a"), seq=1), sent(2, "a", "h1", waited=0.5)),
        at(1.6, ev.HostAdded("h2")),
        at(2.0, ev.HostsKnown()),
        at(2.5, report("h1", awake("a"), seq=2)),
        at(
            3.0,
            report("h2", awake("b"), seq=1),
            rejected(1, "x", "model_not_found", "model 'x' not found", None, 2.0),
        ),
        at(3.0, asks(3, "x"), rejected(3, "x", "model_not_found", "model 'x' not found", None)),
    )


def test_what_waits_for_a_model_that_no_host_has_ends_when_all_hosts_are_known():
    play = Playbook()
    play.placement.complete = False
    play(
        at(1.0, report("h1", awake("a"), seq=1)),
        at(1.0, asks(1, "x"), queued(1, "x")),
        at(2.0, ev.HostsKnown(), rejected(1, "x", "model_not_found", "model 'x' not found", None, 1.0)),
    )


def test_a_model_that_no_host_has_is_not_found():
    play = given(**TWO)
    play(at(1.0, asks(1, "x"), rejected(1, "x", "model_not_found", "model 'x' not found", None)))


def test_while_a_host_has_not_said_what_it_has_requests_wait():
    play = Playbook()
    play(
        at(0.0, ev.HostAdded("h1")),
        at(1.0, asks(1, "x"), queued(1, "x")),
        at(2.0, report("h1", awake("x"), seq=1), sent(1, "x", "h1", waited=1.0)),
    )


def test_the_last_host_of_a_model_leaves():
    play = given(h1=[awake("a")], h2=[awake("b")])
    play(
        at(1.0, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")),
        at(1.0, asks(1, "a"), queued(1, "a")),
        at(1.0, asks(2, "b"), sent(2, "b", "h2")),
        at(1.5, ev.HostRemoved("h2")),  # what runs there runs on
        at(1.5, ev.HostRemoved("h2")),
        at(2.0, ev.HostRemoved("h1"), rejected(1, "a", "model_not_found", "model 'a' not found", None, 1.0)),
        at(3.0, ev.HostReachable("h1")),
        at(4.0, ev.RequestEnded(2)),
    )
    assert play.placement.next_deadline() is None


def test_a_host_leaves_while_another_has_its_models():
    play = given(h1=[awake("a")], h2=[asleep("a")])
    play(
        at(1.0, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")),
        at(1.0, ev.HostUnreachable("h2", "x"), ejected("h2", reason="x")),
        at(1.0, asks(1, "a"), queued(1, "a")),
        at(1.1, ev.HostRemoved("h1")),
        at(2.0, due, ev.Probe("h2")),
        at(2.0, ev.HostReachable("h2"), ev.HostRestored("h2"), sent(1, "a", "h2", waited=1.0), claims("a", "h2")),
    )


# ---- reports


def test_a_report_that_was_overtaken_is_not_taken_in():
    play = given(h1=[awake("a")])
    stale = ev.ReportRefused("h1", "1", 1, "a later one is known")
    play(at(1.0, report("h1", asleep("a"), seq=1), stale))
    assert play.host("h1").of("a").phase is Phase.AWAKE


def test_another_instance_takes_over_only_after_the_lease():
    play = given(h1=[awake("a")])
    other = ev.ReportRefused("h1", "2", 9, "another instance holds the name")
    play(
        at(1.0, report("h1", asleep("a"), seq=9, instance="2"), other),
        at(6.5, due),
        at(6.5, report("h1", asleep("a"), seq=1, instance="2")),
    )
    assert play.host("h1").of("a").phase is Phase.ASLEEP


def test_an_old_report_places_nothing_while_there_is_a_fresh_one():
    play = given(h1=[awake("a")], h2=[asleep("a")])
    play(
        at(5.0, report("h2", asleep("a"), seq=2)),
        at(6.5, asks(1, "a"), sent(1, "a", "h2"), claims("a", "h2")),  # before the deadline is noticed
        at(6.5, due),
        at(6.6, asks(2, "a"), sent(2, "a", "h2")),
    )


def test_with_old_reports_alone_its_own_counts_decide():
    play = given(h1=[awake("a")], h2=[asleep("a")])
    play(
        at(7.0, due),
        at(7.0, asks(1, "a"), ev.ViewStale("a"), sent(1, "a", "h1")),
        at(7.0, asks(2, "a"), sent(2, "a", "h2")),
        at(7.0, ev.RequestEnded(1)),
        at(7.0, asks(3, "a"), sent(3, "a", "h1")),
        at(8.0, report("h1", awake("a"), seq=2)),
        at(8.0, asks(4, "a"), sent(4, "a", "h1")),
        at(15.0, due),
        at(15.0, asks(5, "a"), ev.ViewStale("a"), sent(5, "a", "h2")),  # told again
    )


def test_a_report_that_is_old_as_it_comes():
    play = Playbook()
    play(
        at(10.0, report("h1", awake("a"), seq=1, age=20.0)),
        at(10.0, asks(1, "a"), ev.ViewStale("a"), sent(1, "a", "h1")),
    )
    assert not play.host("h1").listed


def test_hosts_that_start_or_are_lent_get_nothing():
    play = given(h1=[awake("a")])
    play(
        at(1.0, report("h1", awake("a"), seq=2, ready=False)),
        at(1.0, asks(1, "a"), queued(1, "a")),
        at(2.0, report("h1", awake("a"), seq=3, leased=True)),
        at(3.0, report("h1", awake("a"), seq=4), sent(1, "a", "h1", waited=2.0)),
    )


def test_models_come_and_go():
    play = given(h1=[awake("a"), asleep("b")])
    play(
        at(1.0, report("h1", awake("c"), seq=2)),
        at(1.0, asks(1, "a"), rejected(1, "a", "model_not_found", "model 'a' not found", None)),
        at(1.0, asks(2, "c"), sent(2, "c", "h1")),
    )


# ---- a better host while it waits


def test_a_request_is_taken_back_once_for_a_host_that_has_long_been_better():
    play = given(h1=[awake("a", slots=1, in_flight=9, service=10.0)], h2=[asleep("b")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.5, ev.RequestWaiting(1, None)),
        at(2.0, ev.RequestWaiting(1, 90.0)),  # there is no other
        at(2.5, report("h2", awake("a"), asleep("b"), seq=2)),
        at(3.0, ev.RequestWaiting(1, 80.0)),
        at(4.0, ev.RequestWaiting(1, 80.0)),
        at(5.0, ev.RequestWaiting(1, 70.0), ev.Withdraw(1, "h1", "h2")),
        at(5.0, ev.RequestWaiting(1, 70.0)),
        at(5.1, ev.RequestWithdrawn(1), sent(1, "a", "h2", 2, 4.1)),
        at(6.0, ev.RequestWaiting(1, 700.0)),
        at(9.0, ev.RequestWaiting(1, 700.0)),
    )


def test_what_the_host_has_admitted_meanwhile_stays():
    play = given(h1=[awake("a", slots=1, in_flight=9, service=10.0)], h2=[awake("a")])
    play.ledger.feed(ev.ClaimSeen("a", "h1", 1.0), 0.5)
    play(at(0.6, ev.HostUnreachable("h2", "x"), ejected("h2", reason="x")))
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, ev.HostReachable("h2"), ev.HostRestored("h2")),
        at(1.0, ev.RequestWaiting(1, 70.0)),
        at(3.0, ev.RequestWaiting(1, 70.0), ev.Withdraw(1, "h1", "h2")),
        at(3.1, ev.AnswerBegan(1)),
        at(4.0, ev.RequestWaiting(1, 70.0)),
        at(4.0, ev.RequestEnded(1)),
    )


def test_a_better_host_that_is_gone_when_it_comes_to_it():
    play = given(h1=[awake("a", slots=1, in_flight=9, service=10.0)], h2=[awake("a")])
    play(at(0.6, ev.HostUnreachable("h2", "x"), ejected("h2", reason="x")))
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, ev.HostReachable("h2"), ev.HostRestored("h2")),
        at(1.0, ev.RequestWaiting(1, 70.0)),
        at(2.0, ev.RequestWaiting(1, 1.0)),  # no longer so
        at(3.0, ev.RequestWaiting(1, 70.0)),
        at(5.0, ev.RequestWaiting(1, 70.0), ev.Withdraw(1, "h1", "h2")),
        at(5.0, ev.HostUnreachable("h2", "x"), ejected("h2", reason="x")),
        at(5.1, ev.RequestWithdrawn(1), sent(1, "a", "h1", 2, 4.1)),  # back to where it was
    )


def test_a_cold_host_may_be_the_better_one():
    play = given(h1=[awake("a", slots=1, in_flight=9, service=10.0)])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.5, report("h2", asleep("a"), seq=1)),
        at(2.0, ev.RequestWaiting(1, 90.0)),
        at(4.0, ev.RequestWaiting(1, 90.0), ev.Withdraw(1, "h1", "h2")),
        at(4.1, ev.RequestWithdrawn(1), sent(1, "a", "h2", 2, 3.1), claims("a", "h2")),
    )


# ---- hosts that go while something is under way


def test_requests_of_a_host_that_was_removed_go_on_to_others():
    play = given(h1=[awake("a"), asleep("b")], h2=[asleep("a", "b")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, asks(2, "a"), sent(2, "a", "h1")),
        at(1.1, ev.HostRemoved("h1")),
        at(1.2, ev.ConnectFailed(1), sent(1, "a", "h2", 2, 0.2), claims("a", "h2", over="")),
        at(1.3, refused(2, "stopping"), sent(2, "a", "h2", 2, 0.3)),
    )


def test_nothing_is_asked_back_from_a_host_that_was_removed():
    play = given(h1=[awake("a", slots=1, in_flight=9, service=10.0)], h2=[awake("a"), asleep("b")])
    play(
        at(0.0, report("h2", asleep("b"), seq=2)),
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.1, ev.HostRemoved("h1")),
        at(1.2, report("h2", awake("a"), asleep("b"), seq=3)),
        at(2.0, ev.RequestWaiting(1, 90.0)),
        at(5.0, ev.RequestWaiting(1, 90.0)),
        at(9.0, ev.AnswerBegan(1)),
    )


def test_a_host_may_be_removed_before_it_has_said_anything_and_after_it_fell_silent():
    play = given(h1=[awake("a")])
    play(
        at(0.0, ev.HostAdded("h2")),
        at(1.0, ev.HostRemoved("h2")),
        at(7.0, due),
        at(7.0, ev.HostRemoved("h1")),
        at(7.0, asks(1, "a"), rejected(1, "a", "model_not_found", "model 'a' not found")),
    )


def test_waiters_are_rejected_one_by_one_as_their_time_is_up_in_a_hosts_words_if_it_has_said_any():
    play = given(h1=[awake("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.0, ev.HostUnreachable("h1", "x"), ejected("h1", reason="x")),
        at(2.0, asks(2, "a"), queued(2, "a")),
        at(
            4.0,
            refused(1, "queue_full", 0.0, "it is full"),
            rejected(1, "a", "queue_full", "it is full", 0.0, 3.0),
        ),
        at(5.0, asks(3, "a"), queued(3, "a", 2)),
        at(5.0, due, ev.Probe("h1")),
        at(32.0, due, rejected(2, "a", "no_host", "no host that has 'a' could take it", 5.0, 30.0)),
        at(35.0, due, rejected(3, "a", "no_host", "no host that has 'a' could take it", 5.0, 30.0)),
    )


# ---- one wake is enough


def stuck(seq: int, **fields):
    """h1 has a queue for a model that sleeps there, behind another one."""
    return report("h1", awake("b"), asleep("a", **{"queued": 1, "expected_wait": 60.0, **fields}), seq=seq)


def waits_behind_another() -> Playbook:
    """One request waits on h1; h2 has something else awake."""
    play = given(h1=[awake("b"), asleep("a")])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1"), claims("a", "h1")),
        at(1.5, stuck(2)),
        at(12.0, report("h2", awake("c", in_flight=9), asleep("a", expected_wait=90.0), seq=1)),
        at(12.0, stuck(3)),
    )
    return play


def test_a_request_joins_the_host_that_wakes_its_model_at_once_and_once():
    waking = {"a": ModelReport(Phase.WAKING, expected_wait=8.0, sleep=1.0, wake=5.0)}
    play = waits_behind_another()
    play(
        at(13.0, ev.RequestWaiting(1, 60.0)),
        at(13.1, report("h2", waking, seq=2)),
        at(13.2, ev.RequestWaiting(1, 60.0), ev.Withdraw(1, "h1", "h2")),
        at(13.3, ev.RequestWithdrawn(1), sent(1, "a", "h2", 2, 12.3)),
        at(14.0, report("h2", awake("c"), asleep("a", queued=1, expected_wait=90.0), seq=3)),  # it has failed
        at(14.0, report("h1", waking, seq=4)),
        at(14.1, ev.RequestWaiting(1, 90.0)),
    )


def test_a_request_stays_where_the_switch_to_its_model_has_begun():
    waking = {"a": ModelReport(Phase.WAKING, expected_wait=5.0, sleep=1.0, wake=5.0)}
    play = waits_behind_another()
    play(
        at(13.0, report("h2", waking, seq=2)),
        at(13.1, ev.RequestWaiting(1, COST - 0.1)),  # says the host; its report is on its way
        at(13.2, report("h1", waking, seq=4)),
        at(13.3, ev.RequestWaiting(1, 60.0)),
    )


def test_a_host_without_room_is_not_joined():
    full = {"a": ModelReport(Phase.WAKING, 2, 0, 5.0, sleep=1.0, wake=5.0, slots=2, service=30.0)}
    play = waits_behind_another()
    play(at(13.0, report("h2", full, seq=2)), at(13.1, ev.RequestWaiting(1, 60.0)))


def test_a_request_joins_the_host_that_another_gateway_has_claimed_if_that_is_sooner():
    play = waits_behind_another()
    play(
        at(13.0, ev.ClaimSeen("a", "h2", 9.0)),
        at(13.0, ev.RequestWaiting(1, 60.0)),  # later there
        at(13.1, report("h2", awake("c"), asleep("a"), seq=2)),
        at(13.2, ev.RequestWaiting(1, 60.0), ev.Withdraw(1, "h1", "h2")),
        at(13.3, ev.RequestWithdrawn(1), sent(1, "a", "h2", 2, 12.3)),
    )


def test_a_claim_of_the_host_that_it_is_taken_from_does_not_hold_it():
    waking = {"a": ModelReport(Phase.WAKING, expected_wait=8.0, sleep=1.0, wake=5.0)}
    play = waits_behind_another()
    play(
        at(13.0, ev.ClaimSeen("a", "h1", 9.0)),
        at(13.1, report("h2", {**waking, "a": waking["a"]._replace(expected_wait=1.0)}, seq=2)),
        at(13.2, ev.RequestWaiting(1, 60.0), ev.Withdraw(1, "h1", "h2")),
        at(13.3, ev.RequestWithdrawn(1), sent(1, "a", "h2", 2, 12.3)),
    )


def test_a_request_may_return_to_the_host_that_it_was_taken_from():
    play = given(h1=[awake("a", slots=1, in_flight=9, service=10.0)])
    play(
        at(1.0, asks(1, "a"), sent(1, "a", "h1")),
        at(1.5, report("h2", asleep("a"), seq=1)),
        at(2.0, ev.RequestWaiting(1, 90.0)),
        at(4.0, ev.RequestWaiting(1, 90.0), ev.Withdraw(1, "h1", "h2")),
        at(4.1, ev.RequestWithdrawn(1), sent(1, "a", "h2", 2, 3.1), claims("a", "h2")),
        at(5.0, report("h1", awake("a", slots=1, service=10.0), seq=2)),  # all have left
        at(5.0, report("h2", awake("c"), asleep("a", queued=1), seq=2)),
        at(5.1, ev.RequestWaiting(1, 60.0), ev.Withdraw(1, "h2", "h1")),
        at(5.2, ev.RequestWithdrawn(1), sent(1, "a", "h1", 3, 4.2)),
        at(6.0, ev.RequestWaiting(1, 90.0)),
    )


# ---- what the store says of other gateways


def test_requests_of_other_gateways_count_as_long_as_they_are_known():
    play = given(h1=[awake("a", slots=1, service=10.0)], h2=[awake("a", slots=1, in_flight=1, service=10.0)])
    play(
        at(1.0, ev.LoadSeen("h9", {"a": 9})),
        at(1.0, ev.LoadSeen("h1", {"a": 3})),
        at(1.0, asks(1, "a"), sent(1, "a", "h2")),
        at(17.0, report("h1", awake("a", slots=1, service=10.0), seq=2)),
        at(17.0, report("h2", awake("a", slots=1, in_flight=1, service=10.0), seq=2)),
        at(17.0, asks(2, "a"), sent(2, "a", "h1")),
    )


# ---- routes that misbehave


class Wrong:
    """Answers as it is told."""

    def __init__(self):
        self.answer = None

    def place(self, _model, fleet):
        if isinstance(self.answer, BaseException):
            raise self.answer
        if self.answer is None or not isinstance(self.answer, str):
            return self.answer
        return fleet.hosts[self.answer]


def test_a_route_cannot_break_anything():
    route = Wrong()
    play = given(route, **TWO, h3=[awake("c")])
    ill = ev.RouteOverruled("raised RuntimeError: route is ill")
    refuses = ev.RouteOverruled("named a host that takes no requests for the model")
    old = ev.RouteOverruled("named a host whose report is too old, while there are fresh ones")
    route.answer = RuntimeError("route is ill")
    play(
        at(1.0, asks(1, "a"), ill, sent(1, "a", "h1")),
        at(1.0, asks(2, "a"), sent(2, "a", "h2"), claims("a", "h2")),  # the complaint is told once
    )
    route.answer = "h3"
    play(at(2.0, asks(3, "a"), refuses, sent(3, "a", "h1")))
    route.answer = 7
    play(at(2.0, asks(4, "a"), sent(4, "a", "h2")))
    route.answer = "h1"
    play(
        at(5.0, report("h2", asleep("a", "b"), seq=2)),
        at(6.5, asks(5, "a"), old, sent(5, "a", "h2")),
    )
    route.answer = SystemExit(3)
    play(at(6.6, asks(9, "a"), ev.RouteOverruled("raised SystemExit: 3"), sent(9, "a", "h2")))
    route.answer = None
    play(at(6.6, asks(6, "a"), queued(6, "a")), at(6.7, report("h2", asleep("a", "b"), seq=3)))


def test_what_a_route_leaves_waiting_after_a_refusal_ends_in_the_hosts_words():
    route = Wrong()
    play = given(route, **TWO)
    route.answer = "h1"
    play(at(1.0, asks(1, "a"), sent(1, "a", "h1")))
    route.answer = None
    play(
        at(2.0, refused(1, "pinned", 0.0, "b is pinned"), queued(1, "a")),
        at(31.0, due, rejected(1, "a", "pinned", "b is pinned", 0.0, 30.0)),
    )


def test_what_a_host_says_of_its_load():
    report_ = HostReport("h", models={"a": ModelReport(in_flight=2, queued=3), "b": ModelReport(queued=1)})
    assert report_.load == 6
    assert math.inf > COST


SAID = {
    "phase": "asleep", "queued": 1, "in_flight": 0, "expected_wait": 3.0, "switch_cost": 3.0, "sleep": 1.0,
    "wake": 2.0, "arrival_rate": 0.5, "service": 0.1, "slots": 4, "awake_for": 0.0, "idle_for": 1.0,
    "evicts": ["b"],
}  # fmt: skip


def document(**models: object) -> dict[str, object]:
    known = {name: {**SAID, **each} for name, each in models.items()}
    return {
        "instance": "x", "seq": 7, "lease": 6, "ready": True, "leased": False, "free_in": 0.5, "models": known,
    }  # fmt: skip


def test_a_report_is_read_from_what_a_host_says():
    never = {"expected_wait": None, "slots": None, "idle_for": None, "evicts": None, "phase": "of a newer host"}
    found = read_report("h1", document(a={}, b={**never, "slots": None}, c={"slots": 0}))
    assert found == HostReport("h1", "x", 7, found.models, lease=6.0, free_in=0.5)
    one = ModelReport(Phase.ASLEEP, 1, 0, 3.0, 3.0, 1.0, 2.0, 0.5, 0.1, 4, 0.0, 1.0, ("b",))
    other = one._replace(phase=Phase.UNKNOWN, expected_wait=None, slots=None, idle_for=math.inf, evicts=None)
    assert found.models == {"a": one, "b": other, "c": one._replace(slots=1)}


@pytest.mark.parametrize("wrong", [{"sleep": -1.0}, {"wake": math.inf}, {"service": math.nan}, {"queued": "many"}])
def test_a_report_with_nonsense_is_none(wrong):
    with pytest.raises(ValueError, match=r"is not a duration|invalid literal"):
        read_report("h1", document(a=wrong))


def test_a_report_of_too_many_models_is_none():
    with pytest.raises(ValueError, match="10001 models"):
        read_report("h1", {"models": dict.fromkeys(range(10_001))})

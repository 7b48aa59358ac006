"""What each route chooses, and that looking at a few of many hosts is enough."""

import sys

import pytest
from fleet_playbook import COST, Playbook, asks, asleep, at, awake, given, report, sent

from llmux.core.phases import Phase
from llmux.errors import ConfigError
from llmux.fleet import events as ev
from llmux.fleet.loading import load_route
from llmux.fleet.routes import SHIPPED, Affinity, PowerOfTwo, Random, RoundRobin, Static


def place(play, *models):
    """Return where requests for these models go, one after the other."""
    start = len(play.ledger.model) + len(play.ledger.done)
    for number, model in enumerate(models, start + 1):
        play.ledger.feed(asks(number, model), max(1.0, play.ledger.now))
    return [play.ledger.at[number] for number in range(start + 1, start + 1 + len(models))]


def many(count, route=None, **models):
    """A fleet of idle hosts that have the model asleep; those named have it in another state."""
    play = Playbook(route)
    for number in range(count):
        name = f"g{number}"
        play.ledger.feed(report(name, models.get(name, asleep("a")), seq=1), 0.0)
    return play


@pytest.mark.parametrize("name", SHIPPED)
def test_every_route_places_every_request_of_a_small_fleet(name):
    play = given(SHIPPED[name](), h1=[awake("a"), asleep("b")], h2=[asleep("a", "b")])
    assert set(place(play, *"abababab")) <= {"h1", "h2"}


@pytest.mark.parametrize("name", SHIPPED)
def test_without_a_host_that_takes_requests_a_request_waits(name):
    play = given(SHIPPED[name](), h1=[asleep("a", expected_wait=None)])
    play(at(1.0, asks(1, "a"), ev.RequestQueued(1, "a", 1)))


def test_round_robin_takes_turns():
    assert place(given(RoundRobin(), h1=[awake("a")], h2=[asleep("a")]), *"aaaa") == ["h1", "h2", "h1", "h2"]


def test_static_stays_where_the_hash_says():
    play = many(20, Static())
    assert len(set(place(play, *"aaaaa"))) == 1


def test_random_and_power_of_two_spread():
    for route in (Random(), PowerOfTwo()):
        assert len(set(place(many(10, route), *["a"] * 50))) >= 8


def test_affinity_holds_on_to_a_holder_up_to_its_bound():
    play = many(4, Affinity(), g2=awake("a"))
    assert place(play, *["a"] * 8) == ["g2"] * 8
    assert place(play, "a") != ["g2"]


def test_affinity_goes_by_the_load_of_all_beyond_its_least():
    options = Affinity.Options(least=0, bound=2.0)
    *there, elsewhere = place(many(4, Affinity(options), g2=awake("a")), *["a"] * 5)
    assert there == ["g2"] * 4  # it leaves at twice the mean and one: at 4 of 4
    assert elsewhere != "g2"


def test_affinity_wakes_where_the_last_use_is_longest_ago():
    play = given(Affinity(), h1=[asleep("a", "b", "c")], h2=[asleep("a", "b", "c")])
    [first] = place(play, "a")
    assert place(play, "b") != [first]
    play(at(2.0, ev.RequestEnded(1)), at(2.0, ev.RequestEnded(2)))
    play(at(3.0, report("h1", asleep("a", "b", "c"), seq=2)), at(3.0, report("h2", asleep("a", "b", "c"), seq=2)))
    assert place(play, "a") != place(play, "c")
    assert first in ("h1", "h2")


def test_a_cold_model_goes_where_it_costs_the_others_least():
    """Every host of a large fleet has something awake; one is asked for less than the others."""
    busy = {f"g{n}": {**awake(f"b{n}", arrival_rate=1.0, awake_for=99.0), **asleep("a")} for n in range(100)}
    busy["g77"] = {**awake("c", arrival_rate=0.001, awake_for=99.0), **asleep("a")}
    assert place(many(100, None, **busy), "a") == ["g77"]


def test_a_host_that_serves_a_rare_model_is_found_among_many():
    play = many(100, None, g50={**asleep("a", "rare")})
    assert place(play, "rare") == ["g50"]


def test_of_many_holders_a_few_are_looked_at_and_the_best_of_these_is_taken():
    full = awake("a", slots=1, in_flight=5, service=9.0)
    play = many(100, None, **{f"g{n}": full for n in range(100) if n % 2})
    placed = place(many(100, None, **{f"g{n}": awake("a") if n % 2 else full for n in range(100)}), *["a"] * 40)
    assert {int(name[1:]) % 2 for name in placed} == {1}
    assert len(set(placed)) > 5
    assert place(play, "a")


def test_a_fleet_where_most_hosts_are_excluded_or_old_is_still_placed_on():
    play = many(100)
    for number in range(99):
        play.ledger.feed(ev.HostUnreachable(f"g{number}", "x"), 0.5)
    assert place(play, "a") == ["g99"]


def test_a_request_that_would_wait_longer_than_for_a_copy_wakes_one_at_once():
    play = given(h1=[awake("a", slots=1, in_flight=4, service=10.0)], h2=[asleep("a")])
    assert place(play, "a") == ["h2"]


def test_a_second_copy_is_made_when_waiting_has_cost_as_much():
    """A skier rents until the rent paid is the price: two seconds, then four, and the copy costs six."""
    play = given(h1=[awake("a", slots=4, in_flight=4, service=8.0)], h2=[asleep("a")])
    assert place(play, *"aa") == ["h1", "h2"]


def test_waiting_of_long_ago_is_forgotten():
    play = given(h1=[awake("a", slots=4, in_flight=4, service=8.0)], h2=[asleep("a")])
    assert place(play, "a") == ["h1"]
    for host, models in (("h1", awake("a", slots=4, in_flight=4, service=8.0)), ("h2", asleep("a"))):
        play(at(400.0, report(host, models, seq=2)))
    play(at(400.0, ev.RequestEnded(1)))
    assert place(play, "a") == ["h1"]


def test_no_copy_is_made_while_nothing_waits():
    play = given(h1=[awake("a", slots=9, in_flight=1, service=1.0)], h2=[asleep("a")])
    assert place(play, *["a"] * 8) == ["h1"] * 8


def test_what_has_another_copy_that_is_enough_leaves_before_what_has_none():
    rare = {**awake("rare", arrival_rate=0.005, awake_for=99.0), **asleep("a")}
    spare = {**awake("b", arrival_rate=0.1, awake_for=99.0, slots=4, service=3.0), **asleep("a")}
    assert place(given(h1=[rare], h2=[spare], h3=[spare]), "a") != ["h1"]
    needed = {**awake("b", arrival_rate=2.0, awake_for=99.0, slots=4, service=3.0), **asleep("a")}
    assert place(given(h1=[rare], h2=[needed], h3=[needed]), "a") == ["h1"]


def test_a_burst_that_has_ended_is_not_expected_to_go_on():
    over = {**awake("b", arrival_rate=1.0, awake_for=99.0, idle_for=90.0), **asleep("a")}
    steady = {**awake("c", arrival_rate=0.1, awake_for=99.0, idle_for=2.0), **asleep("a")}
    assert place(given(h1=[steady], h2=[over]), "a") == ["h2"]


def test_what_waits_for_long_without_a_switch_is_expected_to_wait_on():
    """The host forecasts six seconds all the time, and does not switch."""
    stuck = [awake("b", arrival_rate=1.0, in_flight=2), asleep("a", queued=1)]
    other = [awake("c", arrival_rate=0.2), asleep("a")]
    play = given(h1=[awake("b", arrival_rate=1.0, in_flight=2), asleep("a")])
    assert place(play, "a") == ["h1"]
    play(at(60.0, report("h1", *stuck, seq=2)), at(60.0, report("h2", *other, seq=1)))
    assert place(play, "a") == ["h2"]


def test_of_holders_that_admit_at_once_the_least_loaded_is_taken():
    play = given(h1=[awake("a", in_flight=5, slots=9)], h2=[awake("a", in_flight=1, slots=9)])
    assert place(play, *"aaaa") == ["h2", "h2", "h2", "h2"]
    play(at(1.0, asks(5, "a"), sent(5, "a", "h1")))


def test_what_was_placed_since_the_report_counts_until_the_next():
    play = given(h1=[awake("a", slots=1, service=5.0)], h2=[awake("a", slots=1, service=5.0)])
    assert place(play, *"aaaa") == ["h1", "h2", "h1", "h2"]
    play(at(2.0, report("h1", awake("a", slots=1, service=5.0, in_flight=1, queued=0), seq=2)))
    assert place(play, "a") == ["h1"]  # of its two, one must have ended


def test_a_host_that_is_about_to_wake_something_else_is_no_cheap_one():
    play = given(h1=[asleep("a", "b")], h2=[asleep("a", "b")])
    first, second = place(play, "a", "b")
    assert first != second


def test_a_model_under_way_is_joined():
    waking = {"a": awake("a")["a"]._replace(phase=Phase.WAKING, expected_wait=3.0, switch_cost=COST)}
    play = given(h1=[asleep("a")], h2=[waking])
    assert place(play, "a") == ["h2"]


def test_a_model_whose_host_another_gateway_gives_to_another_is_not_taken_for_awake():
    play = given(h1=[awake("a", arrival_rate=1.0), asleep("b")], h2=[asleep("a", "b")])
    play(at(0.5, ev.ClaimSeen("b", "h1", 9.0)), at(0.5, ev.ClaimSeen("b", "h1", 9.0)))
    assert place(play, "a") == ["h2"]
    play = given(h1=[awake("a", arrival_rate=1.0), asleep("b", evicts=())], h2=[asleep("a", "b")])
    play(at(0.5, ev.ClaimSeen("b", "h1", 9.0)))
    assert place(play, "a") == ["h1"]  # it has room for both


def test_a_wake_that_was_refused_displaces_nothing():
    play = given(h1=[awake("a", arrival_rate=0.01), asleep("b")])
    assert place(play, "b") == ["h1"]
    assert play.host("h1").displaced("a")
    play.ledger.feed(ev.RequestRefused(1, "pinned", 9.0), 1.0)
    assert not play.host("h1").displaced("a")


def test_where_a_request_would_be_refused_it_would_wait_for_ever():
    play = given(h1=[asleep("a", expected_wait=None)])
    assert play.placement.fleet.wait(play.host("h1"), "a") == float("inf")


def test_a_claim_of_what_its_host_has_already_changes_nothing():
    play = given(h1=[awake("a"), asleep("b")], h2=[asleep("a", "b")])
    play(at(0.5, ev.ClaimSeen("a", "h1", 9.0)), at(0.5, ev.ClaimSeen("stranger", "h1", 9.0)))
    assert not play.host("h1").arriving
    assert place(play, "a") == ["h1"]


def test_a_wake_that_puts_nothing_to_sleep_costs_the_others_nothing():
    busy = {"arrival_rate": 1.0, "in_flight": 3, "awake_for": 99.0}
    room = [awake("x", **busy), asleep("a", evicts=())]
    none = [awake("y", **busy), asleep("a", evicts=("y",))]
    assert place(given(h1=none, h2=room, h3=none), "a") == ["h2"]
    assert place(given(h1=none, h2=none, h3=room), "a") == ["h3"]


def test_what_leaves_is_worth_more_the_more_requests_gain():
    """A model that waits behind another one for long is moved to a busy host if many wait, not if one does."""
    busy = awake("b", arrival_rate=0.1, awake_for=99.0, in_flight=9)
    for waiting, chosen in ((0, "h1"), (9, "h2")):
        stuck = [awake("c"), asleep("a", queued=waiting + 1, expected_wait=30.0)]
        play = given(h1=stuck, h2=[busy, asleep("a")])
        assert place(play, "a") == [chosen], waiting


OWN = """
from dataclasses import dataclass
from pydantic import BaseModel

@dataclass
class Kept:
    count: int = 0

class Route:
    class Options(BaseModel):
        most: int = 3

    def __init__(self, options):
        if options.most > 9:
            raise ValueError("too many")
        self.most = options.most

    def place(self, model, fleet):
        return None
"""


def test_a_route_is_loaded_with_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "own", None)
    del sys.modules["own"]
    (tmp_path / "own.py").write_text(OWN)
    assert load_route("affinity", {"bound": 2.0}, tmp_path)._options.bound == 2.0
    assert load_route("./own.py:Route", {"most": 5}, tmp_path).most == 5
    (tmp_path / "own.py").write_text(OWN.replace("most: int = 3", "most: int = 4"))
    assert load_route("./own.py:Route", {}, tmp_path).most == 4  # read anew
    for _ in range(2):
        assert load_route("own:Route", {}, tmp_path).most == 4
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("use", "options", "path", "message"),
    [
        ("affinity", {"bund": 2.0}, "route.options.bund", "unknown option; known are: bound, least"),
        ("affinity", {"bound": 0.5}, "route.options.bound", "greater than or equal to 1"),
        ("random", {"bound": 2.0}, "route.options", "random takes no options"),
        ("./own.py:Route", {"most": 10}, "route.use", "cannot be made: ValueError: too many"),
        ("./own.py:Kept", {}, "route.use", "has no method `place(model, fleet)`"),
        ("./own.txt:Route", {}, "route.use", "is not a Python file"),
        ("./own.py:Roote", {}, "route.use", "has no class 'Roote'"),
        ("least_weight", {}, "route.use", "no route is called 'least_weight'; did you mean least_wait?"),
    ],
)
def test_a_route_that_cannot_be_loaded_is_said_where_and_why(tmp_path, use, options, path, message):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.txt").write_text(OWN)
    with pytest.raises(ConfigError) as error:
        load_route(use, options, tmp_path)
    assert error.value.path == path
    assert message in error.value.message

"""Placement: who has to leave. Against brute force, for anything small enough."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.core.residency import EXACT, Cost, fits, leaving
from llmux.core.spec import ModelSpec


def spec(name, memory=None, shared_address=None):
    return ModelSpec(name, memory=memory, shared_address=shared_address)


addresses = st.sampled_from([None, None, "x", "y"])
prices = st.builds(
    Cost,
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 0, 1]),
    st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0, 5000.0]),
)
GPUS = ("0", "1", "2")


@st.composite
def scenes(draw, most=6):
    """A target, holders that fit together, what there is room for, the immovable, and costs.

    Of one GPU or of several, with groups or without; or of groups alone.
    """
    gpus = draw(st.sampled_from([None, GPUS[:2], GPUS]))
    grouped = draw(st.booleans())
    capacity = draw(st.integers(6, 16)) if gpus is None else {gpu: draw(st.integers(4, 9)) for gpu in gpus}
    if grouped and draw(st.booleans()):
        capacity = None
    names = [f"m{number}" for number in range(draw(st.integers(0, most)))]

    def one(name):
        if gpus is None:
            memory = draw(st.integers(1, 6))
        else:
            memory = {gpu: draw(st.integers(1, 4)) for gpu in draw(st.sets(st.sampled_from(gpus), min_size=1))}
        friends = draw(st.sets(st.sampled_from([*names, "target"]))) if grouped else None
        likes = None if friends is None else frozenset({*names, "target"} - friends)
        return ModelSpec(name, memory=memory, shared_address=draw(addresses), companions=likes)

    holders = {}
    for name in names:
        model = one(name)
        if fits([*holders.values(), model], capacity):
            holders[name] = model
    immovable = draw(st.sets(st.sampled_from(sorted(holders)), max_size=2)) if holders else set()
    return one("target"), holders, capacity, immovable, {name: draw(prices) for name in holders}


def stays(scene, gone):
    target, holders, capacity, immovable, _ = scene
    kept = [one for name, one in holders.items() if name not in gone]
    return not immovable & set(gone) and fits([target, *kept], capacity)


def rank(costs, gone):
    return (*(sum(costs[name][part] for name in gone) for part in range(3)), len(gone), gone)


@pytest.mark.no_cover  # it takes twice as long with coverage, and reaches nothing that others do not
@settings(max_examples=60)
@given(scenes())
def test_result_is_the_cheapest_then_smallest_then_first_by_name(scene) -> None:
    target, holders, capacity, immovable, costs = scene
    found = leaving(target, holders, capacity, immovable=immovable, cost=costs.__getitem__)
    possible = [
        rank(costs, gone)
        for size in range(len(holders) + 1)
        for gone in combinations(sorted(holders), size)
        if stays(scene, gone)
    ]
    if capacity is None and target.companions is None:
        assert found == (None if immovable else tuple(holders))
    else:
        assert found == (min(possible)[-1] if possible else None)


@pytest.mark.no_cover
@settings(max_examples=20)
@given(st.data(), st.integers(8, 24))
def test_it_is_exact_for_twelve(data, capacity) -> None:
    holders = {f"m{number:02}": spec(f"m{number:02}", data.draw(st.integers(1, 3))) for number in range(EXACT)}
    costs = {name: data.draw(prices) for name in holders}
    while sum(one.memory for one in holders.values()) > capacity:
        holders.popitem()
    target = spec("target", data.draw(st.integers(2, 8)))
    scene = target, holders, capacity, set(), costs
    possible = [
        rank(costs, gone)
        for size in range(len(holders) + 1)
        for gone in combinations(sorted(holders), size)
        if stays(scene, gone)
    ]
    assert leaving(target, holders, capacity, cost=costs.__getitem__) == min(possible)[-1]


@pytest.mark.no_cover
@settings(max_examples=30)
@given(scenes(most=30))
def test_result_fits_evicts_no_more_than_needed_and_is_always_the_same(scene) -> None:
    target, holders, capacity, immovable, costs = scene
    found = leaving(target, holders, capacity, immovable=immovable, cost=costs.__getitem__)
    if found is None:
        assert not fits([target, *(holders[name] for name in immovable)], capacity)
        return
    assert stays(scene, found)
    if capacity is not None or target.companions is not None:
        for name in found:
            assert not stays(scene, set(found) - {name})
    backwards = dict(reversed(holders.items()))
    again = leaving(target, backwards, capacity, immovable=immovable, cost=costs.__getitem__)
    assert sorted(found) == sorted(again)


@pytest.mark.no_cover
@settings(max_examples=60)
@given(scenes())
def test_a_busy_model_leaves_only_when_the_idle_ones_cannot_make_room(scene) -> None:
    target, holders, capacity, immovable, costs = scene
    found = leaving(target, holders, capacity, immovable=immovable, cost=costs.__getitem__)
    # Whoever is to be kept awake leaves after those that are busy.
    idle = tuple(n for n, cost in costs.items() if not cost.busy and not cost.kept and n not in immovable)
    if found is not None and stays(scene, idle):
        assert not any(costs[name].busy for name in found)


def test_many_holders_are_spared_greedily_the_costliest_first() -> None:
    holders = {f"m{number:02}": spec(f"m{number:02}", 1) for number in range(EXACT + 1)}
    found = leaving(spec("target", 2), holders, 13, cost=lambda name: Cost(seconds=float(name[1:])))
    assert found == ("m00", "m01")
    found = leaving(spec("target", 2), holders, 13, cost=lambda name: Cost(0, int(name < "m05"), float(name[1:])))
    assert found == ("m05", "m06")


def test_each_gpu_has_its_own_room() -> None:
    left, right, both = spec("left", {"0": 8}), spec("right", {"1": 8}), spec("both", {"0": 4, "1": 4})
    room = {"0": 8, "1": 8}
    assert fits([left, right], room)
    assert not fits([left, both], room)
    assert fits([left, both], {"0": 12, "1": 8})
    assert not fits([left, spec("elsewhere", {"9": 1})], room)
    assert not fits([left, spec("one", 1)], room)
    assert leaving(both, {"left": left, "right": right}, {"0": 12, "1": 8}) == ("right",)


def test_groups_keep_apart_whom_they_do_not_name() -> None:
    a, b = ModelSpec("a", companions=frozenset("bc")), ModelSpec("b", companions=frozenset("a"))
    c = ModelSpec("c", companions=frozenset())
    assert fits([a, b], None)
    assert not fits([a, c], None)  # both have to say so
    assert leaving(c, {"a": a, "b": b}, None) == ("a", "b")
    assert leaving(a, {"b": b, "c": c}, None) == ("c",)
    old = spec("b")  # woken before there were groups
    assert not fits([a, old], None)
    assert not fits([a, ModelSpec("b", memory=1)], 10)


def test_without_capacity_everybody_leaves() -> None:
    holders = {"a": spec("a"), "b": spec("b")}
    assert leaving(spec("c"), holders, None) == ("a", "b")
    assert leaving(spec("c"), holders, None, immovable={"b"}) is None
    assert leaving(spec("c"), {}, None) == ()


def test_one_model_fits_alone_whatever_it_needs() -> None:
    assert fits([spec("a", 99)], 10)
    assert fits([], None)
    assert not fits([spec("a", 1), spec("b")], 10)


def test_models_on_one_address_are_never_awake_together() -> None:
    assert not fits([spec("a", 1, "x"), spec("b", 1, "x")], 10)
    assert fits([spec("a", 1, "x"), spec("b", 1, "y"), spec("c", 1), spec("d", 1)], 10)


def test_of_two_that_bear_only_the_target_the_cheaper_one_leaves() -> None:
    target = ModelSpec("t", companions=frozenset("xy"))
    x, y = (ModelSpec(name, companions=frozenset("t")) for name in "xy")
    seconds = {"x": 9.0, "y": 1.0}
    assert leaving(target, {"x": x, "y": y}, None, cost=lambda name: Cost(seconds=seconds[name])) == ("y",)

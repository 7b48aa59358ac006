"""Placement: who has to leave. Against brute force, for anything small enough."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.core.placement import EXACT, fits, leaving
from llmux.core.spec import ModelSpec


def spec(name, memory=None, shared_address=None):
    return ModelSpec(name, memory=memory, shared_address=shared_address)


memories = st.integers(1, 6)
addresses = st.sampled_from([None, None, "x", "y"])
costs_of = st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0])


@st.composite
def scenes(draw, most=6):
    """A target, holders that fit together, the immovable among them, and costs."""
    capacity = draw(st.integers(6, 16))
    holders = {}
    for number in range(draw(st.integers(0, most))):
        one = spec(f"m{number}", draw(memories), draw(addresses))
        if fits([*holders.values(), one], capacity):
            holders[one.name] = one
    target = spec("target", draw(memories), draw(addresses))
    immovable = draw(st.sets(st.sampled_from(sorted(holders)), max_size=2)) if holders else set()
    return target, holders, capacity, immovable, {name: draw(costs_of) for name in holders}


def stays(scene, gone):
    target, holders, capacity, immovable, _ = scene
    kept = [one for name, one in holders.items() if name not in gone]
    return not immovable & set(gone) and fits([target, *kept], capacity)


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_result_is_the_cheapest_then_smallest_then_first_by_name(scene) -> None:
    target, holders, capacity, immovable, costs = scene
    found = leaving(target, holders, capacity, immovable=immovable, cost=costs.__getitem__)
    possible = [
        (sum(costs[name] for name in gone), len(gone), gone)
        for size in range(len(holders) + 1)
        for gone in combinations(sorted(holders), size)
        if stays(scene, gone)
    ]
    assert found == (min(possible)[2] if possible else None)


@settings(max_examples=60, deadline=None)
@given(scenes(most=30))
def test_result_fits_evicts_no_more_than_needed_and_is_always_the_same(scene) -> None:
    target, holders, capacity, immovable, costs = scene
    found = leaving(target, holders, capacity, immovable=immovable, cost=costs.__getitem__)
    if found is None:
        assert not fits([target, *(holders[name] for name in immovable)], capacity)
        return
    assert stays(scene, found)
    for name in found:
        assert not stays(scene, set(found) - {name})
    backwards = dict(reversed(holders.items()))
    assert found == leaving(target, backwards, capacity, immovable=immovable, cost=costs.__getitem__)


def test_many_holders_are_spared_greedily_the_costliest_first() -> None:
    holders = {f"m{number:02}": spec(f"m{number:02}", 1) for number in range(EXACT + 1)}
    found = leaving(spec("target", 2), holders, 13, cost=lambda name: float(name[1:]))
    assert found == ("m00", "m01")


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

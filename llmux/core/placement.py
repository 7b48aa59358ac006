"""Which models may be awake together, and which must leave so that another fits. Pure functions.

The rule: without ``capacity`` one model at a time. With it, any set whose memories sum to at most the
capacity; models on one shared address are never awake together. Of all the sets of holders whose leaving
makes the target fit, and that spare the immovable, the one of least total cost is taken; at equal cost the
smaller, then the first by name. It is exact for up to ``EXACT`` movable holders; beyond, the costliest are
spared first as long as they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations

from llmux.core.spec import ModelSpec

EXACT = 12


def fits(specs: Sequence[ModelSpec], capacity: int | None) -> bool:
    """Whether these models may hold the GPU together."""
    if len(specs) <= 1:
        return True
    if capacity is None or any(spec.memory is None for spec in specs):
        return False
    addresses = [spec.shared_address for spec in specs if spec.shared_address is not None]
    if len(addresses) != len(set(addresses)):
        return False
    return sum(spec.memory or 0 for spec in specs) <= capacity


def leaving(
    target: ModelSpec,
    holders: Mapping[str, ModelSpec],
    capacity: int | None,
    *,
    immovable: Collection[str] = (),
    cost: Callable[[str], float] = lambda _name: 1.0,
) -> tuple[str, ...] | None:
    """Return the holders (``target`` not among them) that must leave, or None if that cannot be."""
    stay = [spec for name, spec in holders.items() if name in immovable]
    movable = [name for name in holders if name not in immovable]
    if not fits([target, *stay], capacity):
        return None
    if capacity is None:
        return tuple(movable)
    if fits([target, *holders.values()], capacity):
        return ()
    if len(movable) <= EXACT:
        return _cheapest(target, stay, movable, holders, capacity, cost)
    return _greedy(target, stay, movable, holders, capacity, cost)


def _cheapest(
    target: ModelSpec,
    stay: list[ModelSpec],
    movable: list[str],
    holders: Mapping[str, ModelSpec],
    capacity: int,
    cost: Callable[[str], float],
) -> tuple[str, ...]:
    costs = {name: cost(name) for name in movable}
    best: tuple[float, int, tuple[str, ...]] | None = None
    for size in range(1, len(movable) + 1):
        for gone in combinations(sorted(movable), size):
            rank = (sum(costs[name] for name in gone), size, gone)
            if best is not None and rank >= best:
                continue
            kept = [holders[name] for name in movable if name not in gone]
            if fits([target, *stay, *kept], capacity):
                best = rank
    # With all movable gone the target fits: the caller has checked that.
    assert best is not None
    return best[2]


def _greedy(
    target: ModelSpec,
    stay: list[ModelSpec],
    movable: list[str],
    holders: Mapping[str, ModelSpec],
    capacity: int,
    cost: Callable[[str], float],
) -> tuple[str, ...]:
    kept: list[ModelSpec] = []
    gone: list[str] = []
    for name in sorted(movable, key=lambda name: (-cost(name), name)):
        if fits([target, *stay, *kept, holders[name]], capacity):
            kept.append(holders[name])
        else:
            gone.append(name)
    return tuple(sorted(gone))

"""Expressions for models that may run together, and what groups can say of them."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.llama_swap.groups import MOST, ExpressionError, expand, in_pairs


def sets_of(expression, **others):
    found = expand({"this": expression, **others}, str)["this"]
    return sorted("".join(sorted(one)) for one in found)


@pytest.mark.parametrize(
    ("expression", "sets"),
    [
        ("a", ["a"]),
        ("a & b", ["ab"]),
        ("a | b", ["a", "b"]),
        ("(a | b) & c", ["ac", "bc"]),
        ("a | b & c", ["a", "bc"]),
        ("(a|b)&(c|d)", ["ac", "ad", "bc", "bd"]),
        ("((a))", ["a"]),
        ("a & a", ["a"]),
        ("+that & c", ["ac", "bc"]),
        ("+that|c", ["a", "b", "c"]),
    ],
)
def test_an_expression(expression, sets):
    assert sets_of(expression, that="a | b") == sets


def test_names_may_hold_dots_and_dashes():
    assert expand({"s": "Qwen3-4B.q4_k & b"}, str) == {"s": [frozenset({"Qwen3-4B.q4_k", "b"})]}


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "ends too early"),
        ("a &", "ends too early"),
        ("(a | b", "never closed"),
        ("a b", "'b' is not expected"),
        ("a | ) b", "')' is not expected"),
        ("a ? b", "cannot read '? b'"),
        ("a & +", "cannot read '+'"),
        ("+nope", "is not one of the sets"),
        ("+this", "leads back to itself"),
        ("+that", "leads back to itself"),
    ],
)
def test_an_expression_that_cannot_be_read(expression, said):
    with pytest.raises(ExpressionError, match=re.escape(said)) as refused:
        sets_of(expression, that="a & +this")
    assert refused.value.name == "this"


def test_an_expression_that_comes_to_too_much():
    parts = " & ".join(f"({' | '.join(f'{letter}{number}' for number in range(10))})" for letter in "abc")
    with pytest.raises(ExpressionError, match=f"more than {MOST} sets"):
        sets_of(parts)


def test_what_pairs_would_allow_too_much_is_left_over():
    kept, left = in_pairs(map(frozenset, ("ab", "bc", "ac", "d", "a")))
    assert len(kept) == 2
    assert len(left) == 1


def test_sets_that_pairs_can_say():
    sets = [frozenset({a, b, "x"}) for a, b in itertools.product("abc", "def")]
    assert in_pairs(sets) == (set(sets), set())
    assert in_pairs(map(frozenset, ("abc", "ab", "cd"))) == ({frozenset("abc"), frozenset("cd")}, set())


@given(st.lists(st.frozensets(st.sampled_from("abcdef"), min_size=1), max_size=7))
@settings(max_examples=300)
def test_pairs_never_allow_more_than_the_sets(sets):
    kept, left = in_pairs(sets)
    pairs = {frozenset(pair) for one in kept for pair in itertools.combinations(one, 2)}
    for size in range(2, 7):
        for some in itertools.combinations("abcdef", size):
            if all(frozenset(pair) in pairs for pair in itertools.combinations(some, 2)):
                assert any(set(some) <= one for one in sets)
    for one in left:  # and with each that was left over they would
        more = pairs | {frozenset(pair) for pair in itertools.combinations(one, 2)}
        assert any(
            not any(set(some) <= whole for whole in sets)
            for size in range(2, 7)
            for some in itertools.combinations("abcdef", size)
            if all(frozenset(pair) in more for pair in itertools.combinations(some, 2))
        )

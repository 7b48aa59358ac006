import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.config.setting_types import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (1.5, 1.5),
        ("90", 90.0),
        ("1.5", 1.5),
        ("90s", 90.0),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        (" 500ms ", 0.5),
        ("2d", 172800.0),
        ("1d2h3m4s5ms", 93784.005),
        ("1.5h", 5400.0),
        ("1e3", 1000.0),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (-1, "negative"),
        ("-1", "negative"),
        (math.nan, "not a number"),
        (math.inf, "30 years"),
        ("1e999", "30 years"),
        (10**400, "30 years"),
        ("inf", "not a duration"),
        ("nan", "not a duration"),
        ("-5s", "not a duration"),
        ("10 min", "not a duration"),
        ("10sec", "not a duration"),
        ("s", "not a duration"),
        ("", "not a duration"),
        ("30m1h", "reorders"),
        ("1m1m", "repeats"),
        ("10 m x", "not a duration"),
        (True, "not a duration"),
        (None, "not a duration"),
        ([], "not a duration"),
    ],
)
def test_what_is_no_duration(text, words):
    with pytest.raises(ValueError, match=words):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=10**12))
def test_what_is_written_is_read_back(milliseconds):
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


def test_formats():
    assert [format_duration(value) for value in (0, 0.5, 1, 600, 5400)] == ["0s", "500ms", "1s", "10m", "1h30m"]

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.config.setting_types import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (1024, 1024),
        ("1024", 1024),
        (1e9, 10**9),
        ("18GiB", 18 * 2**30),
        ("18 gib", 18 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("18G", "write GiB or GB"),
        ("18Gi", "write GiB or GB"),
        ("18 cows", "write GiB or GB"),
        ("GiB", "not a size"),
        ("", "not a size"),
        (-1, "not a size"),
        ("-1GiB", "not a size"),
        (1.5, "whole number"),
        ("99999999TiB", "1024 PiB"),
        (float("inf"), "not a size"),
        (True, "not a size"),
        (None, "not a size"),
    ],
)
def test_what_is_no_size(text, words):
    with pytest.raises(ValueError, match=words):
        parse_size(text)


@given(st.integers(min_value=0, max_value=2**20), st.sampled_from([1, 1000, 2**20, 2**30]))
def test_exact_sizes_are_read_back(count, unit):
    written = format_size(count * unit)
    if "." not in written:
        assert parse_size(written) == count * unit


def test_formats():
    assert [format_size(value) for value in (0, 5, 2**30, 24 * 10**9, 2**30 + 1)] == [
        "0B",
        "5B",
        "1GiB",
        "24GB",
        "1.0GiB",
    ]

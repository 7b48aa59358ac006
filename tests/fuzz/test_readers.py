"""The readers of strangers' bytes on what every fuzzer begins with: good messages, changed at random."""

from __future__ import annotations

import random

import pytest
from readers import READERS, SEEDS

WORDS = [
    b"\r\n",
    b"\n",
    b"\r",
    b":",
    b" ",
    b"\t",
    b"\0",
    b"\xff",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"0",
    b"chunked",
    b"--b",
]


def changed(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with a few pieces removed, doubled, moved, overwritten or put in."""
    for _ in range(chance.randint(1, 4)):
        at, end = sorted(chance.randint(0, len(data)) for _ in range(2))
        end = min(end, at + chance.randint(0, 12))
        what = chance.randrange(4)
        if what == 0:
            data = data[:at] + data[end:]
        elif what == 1:
            data = data[:at] + chance.choice(WORDS) + data[at:]
        elif what == 2:
            data = data[:end] + data[at:]
        elif data:
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    return data


@pytest.mark.parametrize("name", READERS)
def test_two_readers_agree_on_messages_that_were_damaged(name):
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for seeded in SEEDS[name]:
        READERS[name](seeded)
    for number in range(1500):
        data = changed(chance.choice(SEEDS[name]), chance)
        try:
            READERS[name](data)
        except Exception as error:
            raise AssertionError(f"{error!r} with {data!r}: seed {seed}, number {number}") from error

"""When a request goes to a remote instead of waiting for its model. Pure; the simulator asks it, too.

It is asked when a request comes, and again while it waits: then what it has waited counts as well. So no request
waits much longer than ``over``, if it may go and its remote is not too dear.
"""

from __future__ import annotations

from typing import NamedTuple

from llmux.accounts.pricing import TokenPrice, of_tokens

ASSUMED_OUTPUT = 8192
"""Tokens that a request without a limit of its own is taken to have written, at worst."""
BYTES_PER_TOKEN = 2.0
"""Of text, at worst; English has about four."""
TOKENS_PER_FILE = 3000
"""Of an image or a document, at worst."""


DEAR = TokenPrice(input=15_000_000, cached=15_000_000, output=75_000_000)
"""What a remote is taken to cost of which no price is known, for a million tokens."""


class Offer(NamedTuple):
    """What a model's `spill` says: seconds, and millionths of the currency (None: whatever it costs)."""

    to: str
    over: float
    below: int | None = None


def spills(offer: Offer, waited: float, expected: float | None, worst: int | None) -> bool:
    """Whether a request goes to the remote.

    ``waited`` is what it has waited, ``expected`` what it will still wait, in seconds; None: it would be refused.
    ``worst`` is what it may cost there, in millionths; None: that is not known.
    """
    if offer.below is not None and (worst is None or worst > offer.below):
        return False
    return expected is None or waited + expected > offer.over


def worst_cost(price: TokenPrice, text: int, files: int, limit: int | None, answers: int = 1) -> int:
    """Return what a request may cost at worst, in millionths, rounded up.

    ``text`` are its bytes but for ``files``, ``limit`` the tokens that it lets one of its ``answers`` have.
    """
    read = -int(-text // BYTES_PER_TOKEN) + TOKENS_PER_FILE * files
    wrote = (ASSUMED_OUTPUT if limit is None else limit) * answers
    cost, rest = of_tokens(price, (read, 0, wrote), 0)
    return cost + (rest > 0)

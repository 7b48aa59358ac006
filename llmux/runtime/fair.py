"""``policy.fair`` from the configuration, and what an answer counts for where its engine does not tell."""

from __future__ import annotations

from llmux.config import Config
from llmux.estimates.fairness import Fairness, FairOrder, Prices
from llmux.runtime.request_handle import Outcome

BYTES_PER_TOKEN = 4.0  # of text, roughly


def order_of(config: Config, before: FairOrder | None) -> FairOrder | None:
    """Return whose turn it is by the configuration, with the counters of ``before``; None without ``fair``."""
    fair = config.policy.fair
    if fair is None:
        return None
    prices = Prices(fair.input, fair.output, fair.switch_second)
    weights = {entry.name: entry.weight for entry in config.api_keys if entry.name is not None}
    if before is None:
        return FairOrder(Fairness(prices, weights))
    before.fairness.configure(prices, weights)
    return before


def tokens_of(outcome: Outcome | None, sent: int) -> tuple[int, int]:
    """Return the tokens that a request of ``sent`` bytes and its answer had: as told, else estimated."""
    if outcome is None:
        return 0, 0
    read, written = outcome.usage
    if read is None:
        read = round(sent / BYTES_PER_TOKEN)
    if written is None:
        written = outcome.events or round(outcome.bytes_out / BYTES_PER_TOKEN)
    return read, written

"""The metrics by key and model: counted where the rows of the ledger are made, collected on request.

There is one series for each key and model that was used since the start, ``MOST`` at most; further ones are
counted under ``other``. Keys have their names: "" without one, and ``(house)`` for what no key pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmux.accounts.ledger_file import SUMS, Place

HELP: dict[str, str] = {
    "llmux_key_requests_total": "Requests that have ended, by key and model (with `ledger`).",
    "llmux_key_tokens_total": "Tokens by key and model: input, cached (of it), output, reasoning (of it).",
    "llmux_key_gpu_seconds_total": "Seconds that the GPU was held for requests and switches, by key and model.",
    "llmux_key_cost_total": "What requests have cost, by key, model and currency (with `prices`).",
    "llmux_ledger_rows_lost_total": "Rows that the ledger could not write.",
}
MOST = 2000
OTHER = ("other", "other", "")
_KINDS = ("input", "cached", "output", "reasoning")
_SUMMED = (0, *(2 + SUMS.index(name) for name in (*_KINDS, "gpu", "switch", "cost")))  # columns of sums


class KeyMetrics(Collector):
    """Counts rows, in the ledger's thread; ``lost`` returns how many rows could not be written."""

    def __init__(self, lost: Callable[[], int]) -> None:
        self._lost = lost
        # By key, model and currency: requests, four kinds of tokens, microseconds (own, switches), millionths.
        self._counts: dict[tuple[str, ...], list[int]] = {}

    def add(self, sums: Mapping[Place, Sequence[int]]) -> None:
        """Count rows by their sums."""
        for (_, *names), each in sums.items():
            place = tuple(names)
            if place not in self._counts and len(self._counts) >= MOST:
                place = OTHER
            counts = self._counts.setdefault(place, [0] * len(_SUMMED))
            for at, column in enumerate(_SUMMED):
                counts[at] += each[column]

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called by the registry."""
        rows = sorted(self._counts.items())
        requests = _family("llmux_key_requests_total", "key", "model")
        tokens = _family("llmux_key_tokens_total", "key", "model", "kind")
        seconds = _family("llmux_key_gpu_seconds_total", "key", "model", "for")
        cost = _family("llmux_key_cost_total", "key", "model", "currency")
        merged: dict[tuple[str, str], list[int]] = {}
        for (key, model, currency), counts in rows:
            if currency:
                cost.add_metric((key, model, currency), counts[7] / 1e6)
            sums = merged.setdefault((key, model), [0] * 7)
            for at in range(7):
                sums[at] += counts[at]
        for place, sums in merged.items():
            requests.add_metric(place, sums[0])
            for at, kind in enumerate(_KINDS, 1):
                tokens.add_metric((*place, kind), sums[at])
            seconds.add_metric((*place, "requests"), sums[5] / 1e6)
            seconds.add_metric((*place, "switches"), sums[6] / 1e6)
        lost = _family("llmux_ledger_rows_lost_total")
        lost.add_metric((), self._lost())
        yield from (requests, tokens, seconds, cost, lost)


def _family(name: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, HELP[name], labels=labels)

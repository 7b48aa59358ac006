"""Money: what a request costs, in whole millionths of a currency. Pure.

What is served here costs the time that it holds the GPU. What has a price per token costs that instead. Fractions
of a millionth are not lost: what rounding has left over goes to the next request.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from llmux.config import Config

HOUR = 3_600_000_000  # microseconds
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Millionths of the currency for a million tokens: read, read from a cache, written."""

    input: int
    cached: int
    output: int


class Elsewhere(NamedTuple):
    """A model of a remote."""

    model: str  # as the remote calls it
    remote: str  # the remote's name here
    url: str
    private: bool  # it is on this host, or on this network


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of one configuration. ``gpu_hour`` is in millionths of the currency."""

    currency: str
    gpu_hour: int
    models: Mapping[str, TokenPrice]
    elsewhere: Mapping[str, Elsewhere] = field(default_factory=dict)
    """Models of remotes that have no price here, by their names here."""

    @property
    def document(self) -> str:
        """The prices as text: two are the same version if these are."""
        models = {name: [one.input, one.cached, one.output] for name, one in sorted(self.models.items())}
        return json.dumps({"currency": self.currency, "gpu_hour": self.gpu_hour, "models": models})


def version_of(document: str) -> int:
    """Return the number of a version of prices: that of its text, in whatever ledger."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:6])


def micros(amount: float) -> int:
    """Return an amount of money, as it is written in a configuration, in millionths."""
    return round(Decimal(str(amount)) * MILLION)


def price_of(given: float, cached: float | None, made: float) -> TokenPrice:
    """Return a price per million tokens; without one of their own, tokens from a cache cost as the others do."""
    return TokenPrice(micros(given), micros(given if cached is None else cached), micros(made))


def of_gpu(prices: Prices, microseconds: int, rest: int) -> tuple[int, int]:
    """Return what so much time of the GPU costs, and what is left over of ``rest`` and it."""
    return divmod(microseconds * prices.gpu_hour + rest, HOUR)


def of_tokens(price: TokenPrice, tokens: tuple[int, int, int], rest: int) -> tuple[int, int]:
    """Return what tokens (read, cached ones among them, written) cost, and what is left over."""
    read, cached, made = tokens
    plain = max(0, read - cached)
    return divmod(plain * price.input + cached * price.cached + made * price.output + rest, MILLION)


def prices_of(config: Config) -> Prices | None:
    """Return the prices of a configuration, where it has any."""
    given = config.prices
    if given is None:
        return None
    variants = config.variants
    models = {
        name: price_of(one.input, one.cached, one.output)
        for name, one in given.models.items()
        if name not in variants
    }
    elsewhere = {
        name: _elsewhere(config, remote, theirs)
        for name, (remote, theirs) in config.remote_models.items()
        if name not in models
    }
    return Prices(given.currency, micros(given.gpu_hour), models, elsewhere)


def _elsewhere(config: Config, remote: str, theirs: str) -> Elsewhere:
    settings = config.remotes[remote]
    host = settings.address.host
    try:
        private = not ipaddress.ip_address(host).is_global
    except ValueError:
        private = "." not in host or host.endswith((".local", ".internal", ".lan", ".home.arpa"))
    return Elsewhere(theirs, remote, settings.url, private)

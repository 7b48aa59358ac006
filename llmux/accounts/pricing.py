"""Money: what a request costs, in whole millionths of a currency. Pure, but for the ``Catalogue``.

What is served here costs the time that it holds the GPU. What has a price per token costs that instead.
Fractions of a millionth are not lost: what rounding has left over goes to the next request.

The ``Catalogue`` knows, by the package genai-prices, what models of remotes cost that the configuration has no
price for. That is the extra ``prices``; without it, and for a model that it does not list, there is no price. To
import it takes 0.2 s and 30 MB, so only the ledger's thread does that, and only for a remote's model. It asks no
network.
"""

from __future__ import annotations

import hashlib
import importlib
import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

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


CURRENCY = "usd"
_SAMPLE = 1000  # tokens, by which the price of one is found: below any tier of a price

Counts = tuple[int, int, int]  # tokens: read, cached ones among them, written


class Catalogue:
    """Knows the prices. ``tell(event, **fields)`` is called, once for each, with models that it does not know."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._unknown: set[str] = set()
        self._rest = Decimal(0)  # of a millionth
        self.rates: dict[str, TokenPrice] = {}
        """What is known of the prices by target, for estimates: tiers for long requests are left out."""

    @property
    def document(self) -> str:
        """What the prices come from."""
        return f"genai-prices {_version()}"

    def look_up(self, targets: Iterable[tuple[str, Elsewhere]]) -> None:
        """Find the prices of models in advance."""
        for name, where in targets:
            given, cached, made = (
                self._exact(where, tokens) for tokens in ((_SAMPLE, 0, 0), (_SAMPLE, _SAMPLE, 0), (0, 0, _SAMPLE))
            )
            if given is None or cached is None or made is None:
                self._say_unknown(name, where)
                self.rates.pop(name, None)
            else:
                each = (round(price * MILLION / _SAMPLE) for price in (given, cached, made))
                self.rates[name] = TokenPrice(*each)

    def price_of(self, target: str, where: Elsewhere, tokens: Counts) -> int | None:
        """Return what a request costs, in millionths of a dollar; None where that is not known.

        What is below a millionth goes to the next request.
        """
        exact = self._exact(where, tokens)
        if exact is None:
            self._say_unknown(target, where)
            return None
        exact += self._rest
        whole = int(exact)
        self._rest = exact - whole
        return whole

    def _exact(self, where: Elsewhere, tokens: Counts) -> Decimal | None:
        read, cached, made = tokens
        package = _package()
        if package is None:
            return None
        usage = package.Usage(input_tokens=read, cache_read_tokens=min(cached, read), output_tokens=made)
        for by in _ways(where):
            try:
                found = package.calc_price(usage, **by)
            except (LookupError, ValueError):
                continue
            return Decimal(found.total_price) * MILLION
        return None

    def _say_unknown(self, target: str, where: Elsewhere) -> None:
        if target not in self._unknown:
            self._unknown.add(target)
            hint = f"give prices.models.{target}"
            if _package() is None:
                hint += ", or pip install 'llmux[prices]'"
            self._tell("price_unknown", model=target, upstream_model=where.model, hint=hint)


def _ways(where: Elsewhere) -> Iterable[dict[str, str]]:
    """Yield how a model may be listed: by its provider's address, by the remote's name, by its own alone."""
    yield {"model_ref": where.model, "provider_api_url": where.url}
    yield {"model_ref": where.model, "provider_id": where.remote}
    if not where.private:  # what this network serves is not what the model costs elsewhere
        yield {"model_ref": where.model}


@lru_cache(maxsize=1)
def _package() -> Any:
    try:
        return importlib.import_module("genai_prices")
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415 - it takes 10 ms, and most have no use for it

    return version("genai-prices")

"""Money: what a request costs, in whole millionths of a currency. Pure, except for the ``Catalogue``.

A request served by a local model costs the time that it holds the GPU, or the tokens if the model has a price for
them. Fractions of a millionth are not lost: the remainder is carried to the next request.

The ``Catalogue`` finds the prices of remote models for which the configuration has none, in the package
genai-prices (the extra ``prices``). Without it, and for a model that it does not list, there is no price.
Importing it takes 0.2 s and 30 MB, so only the ledger's thread does that, and only for a remote's model. It needs
no network.
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
    remote: str  # the remote's name in this configuration
    url: str
    private: bool  # it is on this host, or in this network


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of one configuration. ``gpu_hour`` is in millionths of the currency."""

    currency: str
    gpu_hour: int
    models: Mapping[str, TokenPrice]
    elsewhere: Mapping[str, Elsewhere] = field(default_factory=dict)
    """Remote models without a configured price, by their names here."""

    @property
    def document(self) -> str:
        """The prices as text: equal texts are the same version."""
        models = {name: [one.input, one.cached, one.output] for name, one in sorted(self.models.items())}
        return json.dumps({"currency": self.currency, "gpu_hour": self.gpu_hour, "models": models})


def version_of(document: str) -> int:
    """Return the number of a version of prices, which is computed from its text and equal in every ledger."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:6])


def micros(amount: float) -> int:
    """Return an amount of money from a configuration in millionths."""
    return round(Decimal(str(amount)) * MILLION)


def price_of(given: float, cached: float | None, made: float) -> TokenPrice:
    """Return a price per million tokens; ``cached`` defaults to ``given``."""
    return TokenPrice(micros(given), micros(given if cached is None else cached), micros(made))


def of_gpu(prices: Prices, microseconds: int, rest: int) -> tuple[int, int]:
    """Return the cost of so much time of the GPU, and the new ``rest``."""
    return divmod(microseconds * prices.gpu_hour + rest, HOUR)


def of_tokens(price: TokenPrice, tokens: tuple[int, int, int], rest: int) -> tuple[int, int]:
    """Return the cost of tokens (read, cached ones among them, written), and the new ``rest``."""
    read, cached, made = tokens
    plain = max(0, read - cached)
    return divmod(plain * price.input + cached * price.cached + made * price.output + rest, MILLION)


def prices_of(config: Config) -> Prices | None:
    """Return the prices of a configuration, if it has any."""
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
_SAMPLE = 1000  # tokens for which a price is computed: below the tiers of any price

Counts = tuple[int, int, int]  # tokens: read, cached ones among them, written


class Catalogue:
    """Finds prices. ``tell(event, **fields)`` is called once for each model that it does not know."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._unknown: set[str] = set()
        self._rest = Decimal(0)  # of a millionth
        self.rates: dict[str, TokenPrice] = {}
        """Known prices by target, for estimates; tiers for long requests are left out."""

    @property
    def document(self) -> str:
        """The source of the prices."""
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
        """Return the cost of a request in millionths of a dollar; None if it is unknown.

        The fraction of a millionth is carried to the next request.
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
    """Yield how a model may be listed: by its provider's address, by the remote's name, by its name alone."""
    yield {"model_ref": where.model, "provider_api_url": where.url}
    yield {"model_ref": where.model, "provider_id": where.remote}
    if not where.private:  # a model in this network does not cost what it costs elsewhere
        yield {"model_ref": where.model}


@lru_cache(maxsize=1)
def _package() -> Any:
    try:
        return importlib.import_module("genai_prices")
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415 - takes 10 ms, and is rarely needed

    return version("genai-prices")

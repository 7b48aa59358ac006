"""What models of remotes cost that the configuration has no price for, by the package genai-prices.

That is the extra ``prices``; without it, and for a model that it does not list, there is no price. To import it
takes 0.2 s and 30 MB, so only the ledger's thread does that, and only for a remote's model. It asks no network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from llmux.accounts.pricing import MILLION, Elsewhere, TokenPrice

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
    return importlib.metadata.version("genai-prices")

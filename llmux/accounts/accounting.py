"""The accounts of one llmux: what is told of each request, and what is asked about them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmux.accounts import usage
from llmux.accounts.ledger import Ledger
from llmux.config import Config
from llmux.errors import UnavailableError


class Accounting:
    """``tell(event, **fields)`` logs; ``count_events`` has streams' events counted from then on."""

    def __init__(self, config: Config, tell: Callable[..., None], count_events: Callable[[], object]) -> None:
        self._config = config
        self._tell = tell
        self._count_events = count_events
        self.ledger: Ledger | None = None
        self.ended: Callable[[tuple[Any, ...]], None] = _not_begun
        """Take a request that has ended: the fields of ``Ended``."""

    def start(self) -> None:
        """Begin. Raises ConfigError when the ledger cannot be used."""
        path = self._config.ledger_path
        assert path is not None
        self.ledger = Ledger(path, self._config.ledger_keep, self._tell)
        self.ended = self.ledger.put
        self._count_events()

    def close(self) -> None:
        """Write what there is; waits for that, but not long."""
        if self.ledger is not None:
            self.ledger.close()

    async def usage(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Answer a question (see ``usage.asked``). Raises ValueError and UnavailableError."""
        ledger = self.ledger
        assert ledger is not None
        question = usage.asked(given, time.time())
        await ledger.settled()
        try:
            rows = await asyncio.to_thread(usage.read, ledger.path, question)
        except sqlite3.Error as error:
            raise UnavailableError(f"The ledger cannot be read: {error}.", code="ledger_unreadable") from error
        return {
            "by": list(question.by),
            "since": question.since,
            "usage": rows,
            "total": usage.totals(rows),
            "lost": ledger.lost,
        }

    async def usage_as_csv(self, given: Mapping[str, str]) -> str:
        """Answer a question in CSV."""
        document = await self.usage(given)
        return usage.as_csv(document["by"], document["usage"])


def _not_begun(_request: tuple[Any, ...]) -> None:
    """Forget a request that ends before the start."""

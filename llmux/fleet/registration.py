"""A host makes itself known in the shared store, for as long as it runs; in a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from llmux.fleet.store import Store, StoreError
from llmux.observability.notices import EventLog
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.config.schema import JoinConfig
    from llmux.runtime import Switcher

EVERY = 2.0  # seconds between two renewals of the lease, which lasts for three of them
SOON = 0.5  # seconds after one that failed


class Registration:
    """One host's entry. Raises ConfigError where the store's client library is missing."""

    def __init__(self, settings: JoinConfig, switcher: Switcher, log: EventLog) -> None:
        self._settings = settings
        self._switcher = switcher
        self._log = log
        self._store = Store(settings.store.get_secret_value())
        self._seq = 0
        self._trouble = ""  # what is wrong, as it was told last

    async def run(self) -> None:
        """Keep the entry until cancelled, then take it out."""
        try:
            while True:
                trouble = await self._renew()
                self._tell(trouble)
                await asyncio.sleep(SOON if trouble else EVERY)
        finally:
            with contextlib.suppress(StoreError, asyncio.CancelledError):
                await self._store.deregister(self._settings.name, self._switcher.instance)
            await self._store.close()

    async def _renew(self) -> str:
        """Renew the lease; return what is wrong."""
        self._seq += 1
        document = {"url": self._settings.url, "version": __version__}
        name = self._settings.name
        try:
            answer = await self._store.register(name, self._switcher.instance, self._seq, document)
        except StoreError as error:
            return str(error)
        if answer == "held":
            return f"another llmux is called {name!r} there: give this one another `fleet.name`, or stop that one"
        return ""

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            if trouble:
                self._log.emit("store_lost", error=trouble)
            else:
                self._log.emit("store_restored")
        self._trouble = trouble

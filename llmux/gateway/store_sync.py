"""A gateway and the store it shares with others: registered hosts, loads, claims of wakes.

All of it runs in tasks beside the requests, which never wait for it. While the store cannot be used, the last view
holds: hosts are followed directly, so it stays right for known hosts. A host that is no longer in the store is
forgotten once it has not reported for ``GONE`` seconds either: emptying the store removes none.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmux.config.gateway import HostConfig
from llmux.fleet import events as ev
from llmux.fleet.store import StoreError, open_store, tell_trouble

if TYPE_CHECKING:
    from llmux.gateway.service import Gateway

EVERY, BUSY = 0.5, 0.1  # seconds between two looks into the store; BUSY: while requests are in progress
SOON = 0.05  # seconds until uses of keys are sent
GONE = 6.0  # seconds


class Sharing:
    """One gateway's part in the store. Raises ConfigError where the client library is missing."""

    def __init__(self, gateway: Gateway, url: str) -> None:
        self._gateway = gateway
        self._store, self._server = open_store(url, gateway.log)
        self._name = secrets.token_hex(8)
        self._claims: asyncio.Queue[ev.ClaimWake] = asyncio.Queue()
        self._missing: dict[str, float] = {}  # hosts that are no longer in the store, and since when
        self._refused: set[tuple[str, str]] = set()  # entries that cannot be used, as logged
        self.found: dict[str, HostConfig] = {}
        self.trouble = "was not asked yet"  # empty: the store answers
        self.asked = False  # the store has been queried, successfully or not
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()  # set: the other gateways should know at once
        gateway.dispatcher.on_claim = self._claimed

    def start(self) -> None:
        """Begin."""
        loop = asyncio.get_running_loop()
        chores = [self._look, self._claim, self._count] + ([] if self._server is None else [self._server.run])
        self._tasks = [loop.create_task(self._keep(chore)) for chore in chores]

    async def _keep(self, chore: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a chore, and restart it after an error: others rely on it."""
        while True:
            try:
                return await chore()
            except Exception as error:  # noqa: BLE001 - whatever the error is
                self._gateway.log.emit("internal_error", error=repr(error), exc_info=error)
                await asyncio.sleep(EVERY)

    async def close(self) -> None:
        """Stop. This gateway's entries in the store expire by themselves."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        gate = self._gateway.handler.gate
        if gate is not None and not self.trouble:
            with contextlib.suppress(StoreError, TimeoutError):  # what was used in the last moment
                async with asyncio.timeout(EVERY):
                    await gate.exchange(self._store, self._name)
        await self._store.close()

    def document(self) -> dict[str, object]:
        """Return what operators see of it."""
        gate = self._gateway.handler.gate
        return {
            "address": "embedded" if self._server is not None else str(self._store.address),
            "trouble": self.trouble or None,
            "limits": None if gate is None else {"alone": gate.alone, "gateways": gate.others + 1},
        }

    async def _look(self) -> None:
        due, loop = 0.0, asyncio.get_running_loop()
        if self._server is not None:
            await self._server.ready()
        while True:
            self._news.clear()
            busy = True
            try:
                if loop.time() >= due:
                    self._known(await self._store.hosts())
                    due = loop.time() + EVERY
                busy = await self._share()
            except (StoreError, ValueError) as error:
                self._tell(str(error))
                busy = False
            else:
                self._tell("")
            await asyncio.sleep(BUSY)
            if not busy:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(EVERY - BUSY):
                        await self._news.wait()

    async def _share(self) -> bool:
        """Send this gateway's requests by host, and fetch those of the others; return whether it has any."""
        own = self._own()
        await self._store.fly(self._name, own)
        others, dispatcher = await self._store.flights(self._name), self._gateway.dispatcher
        for name in list(dispatcher.placement.fleet.hosts):
            dispatcher.post(ev.LoadSeen(name, others.get(name, {})))
        for model, claim in (await self._store.claims()).items():
            dispatcher.post(ev.ClaimSeen(model, claim.host, claim.remaining))
        return bool(own)

    def _claimed(self, effect: ev.ClaimWake) -> None:
        self._claims.put_nowait(effect)
        self._news.set()

    async def _claim(self) -> None:
        while True:
            effect = await self._claims.get()
            try:
                claim = await self._store.claim(effect.model, effect.host, effect.term, effect.over)
            except StoreError:
                continue  # a claim is only advice; the other task logs the trouble
            self._gateway.dispatcher.post(ev.ClaimSeen(effect.model, claim.host, claim.remaining))

    async def _count(self) -> None:
        """Exchange the use of keys, soon after a use and at least every ``EVERY`` seconds."""
        while True:
            gate = self._gateway.handler.gate
            if gate is None:
                await asyncio.sleep(EVERY)
                continue
            try:
                await gate.exchange(self._store, self._name)
            except (StoreError, ValueError):
                await asyncio.sleep(EVERY)  # the other task logs the trouble
                continue
            await asyncio.sleep(SOON)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY - SOON):
                    await gate.used.wait()

    def _known(self, documents: dict[str, dict[str, object]]) -> None:
        """Apply the list of hosts."""
        gateway, now = self._gateway, self._gateway.now()
        settings = gateway.config.fleet
        found = {}
        for name, document in documents.items():
            told = {"url": str(document.get("url")), "key": settings.key, "admin_key": settings.admin_key}
            try:
                found[name] = HostConfig.model_validate(told)
            except ValidationError as error:
                self._refuse(name, f"its entry in the store cannot be used: {error.errors()[0]['msg']}")
                continue
            own = gateway.config.hosts.get(name)
            if own is not None and own.url != found[name].url:
                there = found[name].url
                self._refuse(
                    name, f"is in the store as well, at {there}; what `hosts` says counts: rename one of them"
                )
        for name, host in self.found.items():
            if name in found:
                self._missing.pop(name, None)
            elif now - self._missing.setdefault(name, now) < GONE or not self._lost(name):
                found[name] = host
        if found != self.found:
            self.found = found
            gateway.configure_hosts()
        if not gateway.dispatcher.placement.complete:
            gateway.dispatcher.post(ev.HostsKnown())

    def _refuse(self, name: str, why: str) -> None:
        """Log, once, why an entry is not used."""
        if (name, why) not in self._refused:
            self._refused.add((name, why))
            self._gateway.log.emit("report_refused", host=name, instance="", reason=why)

    def _lost(self, name: str) -> bool:
        hosts = self._gateway.hosts
        return name not in hosts or hosts[name].lost

    def _own(self) -> dict[str, dict[str, int]]:
        """Return this gateway's requests, by host and model."""
        flight: dict[str, dict[str, int]] = {}
        for name, host in self._gateway.dispatcher.placement.fleet.hosts.items():
            for _, model in host.own.values():
                counts = flight.setdefault(name, {})
                counts[model] = counts.get(model, 0) + 1
        return flight

    def _tell(self, trouble: str) -> None:
        tell_trouble(self._gateway.log, self.trouble, trouble)
        self.trouble, self.asked = trouble, True

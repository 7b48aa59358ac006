"""The shared store: which hosts there are, which host wakes what, and what each gateway has where.

Valkey or Redis: one server, one that sentinels watch, or a cluster. Hosts stay the truth: all that is kept is
soft, and comes back by itself when the store is emptied. **No request ever waits for the store**: what is here
runs in tasks beside them, and requests read memory.

    {llmux}:host:NAME     instance, seq, until, document: a host's lease, for LEASE seconds on the store's clock
    {llmux}:hosts         a sorted set of names, by the end of their leases
    {llmux}:wake:MODEL    the host that wakes a model; the first gateway to say so wins, for a term
    {llmux}:flight:NAME   what one gateway has where, as a whole, for FLIGHT seconds
    {llmux}:gateways      a sorted set of gateways, by the end of that

A host's lease is fenced in one script: another instance may not take a name before its lease is over, nor may a
report that was overtaken. No prompts, answers, keys or queues are in the store.

All keys have one hash tag, so in a cluster all of it is on one node, where scripts may use any of it.

A host makes itself known there for as long as it runs, in a task of its own: its ``Registration``.

The client library is the extra ``fleet``; its own retries are off (a frozen server would hold each call for
seconds), and every call has ``LONGEST``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmux.config.store_address import EMBEDDED, StoreAddress, parse_store
from llmux.errors import ConfigError
from llmux.fleet.store_client import clients_of, words_of
from llmux.observability.notices import EventLog
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.config.schema import JoinConfig
    from llmux.fleet.embedded import EmbeddedStore
    from llmux.runtime import Switcher

LEASE = 6.0  # seconds
EVERY = 2.0  # seconds between two renewals of a host's lease
SOON = 0.5  # seconds after a renewal that failed
FLIGHT = 3.0  # seconds
LONGEST = 3.0  # seconds that one call may take, as of sentinels that do not answer
_HOSTS, _GATEWAYS = "{llmux}:hosts", "{llmux}:gateways"

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000);"
# KEYS: the host, all hosts. ARGV: instance, seq, milliseconds, document, name.
_REGISTER = f"""{_NOW}
local known = redis.call('HMGET', KEYS[1], 'instance', 'seq', 'until')
if known[1] and known[1] ~= ARGV[1] and tonumber(known[3]) > now then return 'held' end
if known[1] == ARGV[1] and tonumber(known[2]) >= tonumber(ARGV[2]) then return 'overtaken' end
local over = now + tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'instance', ARGV[1], 'seq', ARGV[2], 'until', over, 'document', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], over, ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return 'ok'
"""
# KEYS: the host, all hosts. ARGV: instance, name.
_DEREGISTER = """
if redis.call('HGET', KEYS[1], 'instance') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
return redis.call('ZREM', KEYS[2], ARGV[2])
"""
# KEYS: a sorted set of names. ARGV: what stands before a name in its key. Returns the names that are not over,
# each with what is kept there: in one answer, however many they are.
_LIVING = f"""{_NOW}
local found = {{}}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')) do
    local key = ARGV[1] .. name
    local kept
    if redis.call('TYPE', key).ok == 'hash' then kept = redis.call('HGET', key, 'document')
    else kept = redis.call('GET', key) end
    if kept then found[#found + 1] = name; found[#found + 1] = kept end
end
return found
"""
# KEYS: the gateway's flight, all gateways. ARGV: document, milliseconds, name.
_FLY = f"""{_NOW}
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return 1
"""
# KEYS: the wake. ARGV: host, milliseconds, whose claim is replaced. Returns who has it, and for how long.
_CLAIM = """
local known = redis.call('GET', KEYS[1])
if not known or known == ARGV[3] then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return {redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])}
"""

# KEYS: wakes. Returns who has each, and for how many milliseconds more.
_CLAIMS = """
local found = {}
for _, key in ipairs(KEYS) do
  found[#found + 1] = redis.call('GET', key) or ''
  found[#found + 1] = redis.call('PTTL', key)
end
return found
"""


class StoreError(Exception):
    """The store cannot be used now; the message says why."""


class Claim(NamedTuple):
    """Which host wakes a model, and for how many seconds more."""

    host: str
    remaining: float


class Store:
    """One client of the store. Every method raises StoreError, within ``LONGEST`` seconds."""

    def __init__(self, address: str | StoreAddress) -> None:
        """Raise ConfigError where the client library is missing, or the address is none."""
        try:
            self.address = parse_store(address) if isinstance(address, str) else address
            self._redis, self._sentinels = clients_of(self.address)
        except ImportError:
            raise ConfigError(
                "a store takes the client library: pip install 'llmux[fleet]'", path="fleet.store"
            ) from None
        except ValueError as error:
            raise ConfigError(str(error), path="fleet.store") from None

    async def register(self, name: str, instance: str, seq: int, document: Mapping[str, Any]) -> str:
        """Renew a host's lease; return ``ok``, ``held`` (another instance has the name) or ``overtaken``."""
        keys = (_host(name), _HOSTS)
        return str(await self._run(_REGISTER, keys, instance, seq, int(LEASE * 1000), json.dumps(document), name))

    async def deregister(self, name: str, instance: str) -> None:
        """End a host's lease, if it is this instance's."""
        await self._run(_DEREGISTER, (_host(name), _HOSTS), instance, name)

    async def hosts(self) -> dict[str, dict[str, Any]]:
        """Return the documents of the hosts whose leases are not over."""
        return {name: json.loads(text) for name, text in await self._living(_HOSTS, _host(""))}

    async def fly(self, gateway: str, flight: Mapping[str, Mapping[str, int]]) -> None:
        """Say what a gateway has where: by host and model."""
        keys = (_flight(gateway), _GATEWAYS)
        await self._run(_FLY, keys, json.dumps(flight), int(FLIGHT * 1000), gateway)

    async def flights(self, but: str) -> dict[str, dict[str, int]]:
        """Return what all gateways but one have where: by host and model."""
        total: dict[str, dict[str, int]] = {}
        for gateway, text in await self._living(_GATEWAYS, _flight("")):
            for host, models in ({} if gateway == but else json.loads(text)).items():
                counts = total.setdefault(host, {})
                for model, count in models.items():
                    counts[model] = counts.get(model, 0) + count
        return total

    async def claim(self, model: str, host: str, term: float, over: str = "") -> Claim:
        """Claim the wake of a model for a host, unless there is a claim; return the one that holds.

        A claim of the host ``over`` is replaced.
        """
        who, left = await self._run(_CLAIM, (_wake(model),), host, max(1, int(term * 1000)), over)
        return Claim(str(who), max(0.0, left / 1000))

    async def claims(self, models: Sequence[str]) -> dict[str, Claim]:
        """Return the claims that hold, of these models."""
        if not models:
            return {}
        flat = await self._run(_CLAIMS, tuple(map(_wake, models)))
        pairs = zip(models, flat[::2], flat[1::2], strict=True)
        return {model: Claim(str(who), left / 1000) for model, who, left in pairs if left > 0}

    async def close(self) -> None:
        """Close the connections."""
        for client in (self._redis, *self._sentinels):
            await client.aclose()

    async def _living(self, names: str, before: str) -> list[tuple[str, str]]:
        flat = await self._run(_LIVING, (names,), before)
        return list(zip(flat[::2], flat[1::2], strict=True))

    async def _run(self, script: str, keys: tuple[str, ...], *values: Any) -> Any:
        return await self._call("eval", script, len(keys), *keys, *values)

    async def _call(self, name: str, *values: Any) -> Any:
        try:
            async with asyncio.timeout(LONGEST):
                return await getattr(self._redis, name)(*values)
        except Exception as error:
            raise StoreError(words_of(error, self.address)) from error


def _wake(model: str) -> str:
    return f"{{llmux}}:wake:{model}"


def _host(name: str) -> str:
    return f"{{llmux}}:host:{name}"


def _flight(gateway: str) -> str:
    return f"{{llmux}}:flight:{gateway}"


def open_store(address: str, log: EventLog) -> tuple[Store, EmbeddedStore | None]:
    """Return a client of the store, and where it is embedded what is to run beside it. Raises ConfigError."""
    if address.strip() != EMBEDDED:
        return Store(address), None
    from llmux.fleet.embedded import EmbeddedStore  # noqa: PLC0415 - most stores have an address

    own = EmbeddedStore(log)
    return Store(own.address), own


class Registration:
    """One host's entry. Raises ConfigError where the store's client library is missing."""

    def __init__(self, settings: JoinConfig, switcher: Switcher, log: EventLog) -> None:
        self._settings = settings
        self._switcher = switcher
        self._log = log
        self._store, self._server = open_store(settings.store.get_secret_value(), log)
        self._seq = 0
        self._trouble = ""  # what is wrong, as it was told last

    async def run(self) -> None:
        """Keep the entry until cancelled, then take it out."""
        server = None if self._server is None else asyncio.create_task(self._server.run())
        try:
            while True:
                trouble = await self._renew()
                self._tell(trouble)
                await asyncio.sleep(SOON if trouble else EVERY)
        finally:
            with contextlib.suppress(StoreError, asyncio.CancelledError):
                await self._store.deregister(self._settings.name, self._switcher.instance)
            await self._store.close()
            if server is not None:
                server.cancel()
                await asyncio.wait({server})

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

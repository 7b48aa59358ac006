"""The shared store: which hosts there are, which host wakes what, and what each gateway has where.

Valkey or Redis: one server, one with sentinels, or a cluster. Hosts stay the source of truth: everything here is
soft, and comes back by itself when the store is emptied. **No request ever waits for the store**: this code runs
in tasks beside the requests, which read memory.

    {llmux}:host:NAME     instance, seq, until, document: a host's lease, for LEASE seconds on the store's clock
    {llmux}:hosts         a sorted set of names, by the end of their leases
    {llmux}:wake:MODEL    the host that wakes a model; the first gateway to say so wins, for a term
    {llmux}:wakes         a sorted set of these models, by the end of the terms
    {llmux}:flight:NAME   all requests of one gateway by host, for FLIGHT seconds
    {llmux}:gateways      a sorted set of gateways, by the end of that
    {llmux}:use:NAME      what all gateways' requests used of a key's limit or budget
    {llmux}:used          a sorted set of these, by their last changes
    {llmux}:held:NAME     what one gateway's requests in progress hold of limits, for FLIGHT seconds
    {llmux}:batch:NAME    the number of the last uses that one gateway sent

A host's lease is fenced in one script, which refuses another instance before the lease is over, and a report that
was overtaken. No prompts, answers, keys or queues are in the store.

All keys have one hash tag, so in a cluster all of it is on one node, where scripts may use any of it.

A host keeps its entry there as long as it runs, in a task of its own: its ``Registration``.

The client library is the extra ``fleet``; its own retries are off (a frozen server would hold each call for
seconds), and every call has ``LONGEST``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmux.config.setting_types import EMBEDDED, StoreAddress, parse_store
from llmux.errors import ConfigError
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
_HOSTS, _GATEWAYS, _WAKES = "{llmux}:hosts", "{llmux}:gateways", "{llmux}:wakes"
_HOST, _FLIGHT, _WAKE = "{llmux}:host:", "{llmux}:flight:", "{llmux}:wake:"  # before a name

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
# KEYS: the wake, all wakes. ARGV: host, milliseconds, whose claim is replaced, model. Returns the holder, and for
# how long; all have it from then on, though it may come from a gateway that does not keep them.
_CLAIM = f"""{_NOW}
local known = redis.call('GET', KEYS[1])
if not known or known == ARGV[3] then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
local left = redis.call('PTTL', KEYS[1])
redis.call('ZADD', KEYS[2], now + left, ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
return {{redis.call('GET', KEYS[1]), left}}
"""

# KEYS: all wakes. ARGV: what stands before a model in its key. Returns the models that are claimed, each with the
# holder, and for how many milliseconds more: few, however many models there are.
_CLAIMS = f"""{_NOW}
local found = {{}}
for _, model in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')) do
    local holder = redis.call('GET', ARGV[1] .. model)
    if holder then
        found[#found + 1] = model
        found[#found + 1] = holder
        found[#found + 1] = redis.call('PTTL', ARGV[1] .. model)
    end
end
return found
"""


# KEYS: the set of recent uses (by their last changes), gateways, the number of this gateway's last batch, what it
# holds. ARGV: the batch's number, the time since which changes are wanted, what is held, for how long, prefixes of
# a use's key and of a gateway's, then for each use its name, kind, amount, known value, and how long it is kept. A
# batch counts once. A change later than now shows by how much the clock was set back: rates move with it. Returns
# whether the store was empty, its time, what each gateway holds, and what has changed.
_USE = f"""{_NOW}
local empty = redis.call('EXISTS', KEYS[1]) == 0
local since = tonumber(ARGV[2]) <= now and ARGV[2] or '-inf'
local function kept(full) return string.format('%.0f', math.ceil(math.max(0, full - now)) + {int(60e3)}) end
local ahead = redis.call('ZRANGEBYSCORE', KEYS[1], string.format('(%.0f', now), '+inf', 'WITHSCORES')
for i = 1, #ahead, 2 do
    local key = ARGV[5] .. ahead[i]
    local full = string.sub(ahead[i], 1, 7) ~= 'budget:' and tonumber(redis.call('GET', key) or 'nil')
    if full then
        full = full - (tonumber(ahead[i + 1]) - now)
        redis.call('SET', key, string.format('%.3f', full), 'PX', kept(full))
    end
    redis.call('ZADD', KEYS[1], now, ahead[i])
end
local new = tonumber(ARGV[1]) > tonumber(redis.call('GET', KEYS[3]) or '-1')
redis.call('SET', KEYS[4], ARGV[3], 'PX', ARGV[4])
for i = 7, #ARGV, 5 do
    local key, amount, known = ARGV[5] .. ARGV[i], new and tonumber(ARGV[i + 2]) or 0, tonumber(ARGV[i + 3])
    local stored = tonumber(redis.call('GET', key) or 'nil')
    if ARGV[i + 1] == 'rate' then
        local full = stored or now + known
        full = amount > 0 and math.max(full, now) + amount or full + amount
        redis.call('SET', key, string.format('%.3f', full), 'PX', kept(full))
    else
        redis.call('SET', key, string.format('%.0f', math.max(stored or 0, known) + amount), 'PX', ARGV[i + 4])
    end
    redis.call('ZADD', KEYS[1], now, ARGV[i])
end
redis.call('ZADD', KEYS[1], now, '-')
redis.call('SET', KEYS[3], ARGV[1], 'PX', {int(86400e3)})
local held, values = {{}}, {{}}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], now, '+inf')) do
    held[#held + 1] = name
    held[#held + 1] = redis.call('GET', ARGV[6] .. name) or '{{}}'
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], since, '+inf')) do
    local value = name ~= '-' and redis.call('GET', ARGV[5] .. name)
    if value then
        values[#values + 1] = name
        values[#values + 1] = value
    elseif name ~= '-' then redis.call('ZREM', KEYS[1], name) end
end
return {{empty and 1 or 0, string.format('%.0f', now), held, values}}
"""


NONSENSE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What parsing a foreign document may raise: endless numbers, a thousand brackets."""


class StoreError(Exception):
    """The store cannot be used now; the message says why."""


class Claim(NamedTuple):
    """Which host wakes a model, and for how many seconds more."""

    host: str
    remaining: float


class Use(NamedTuple):
    """The use of a limit by a key."""

    name: str
    kind: str  # rate: milliseconds until it is full again; budget: millionths of the currency
    amount: float  # used since the last batch
    known: float  # what the store is given if it knows nothing
    kept: int  # milliseconds for which a budget is kept


class Told(NamedTuple):
    """What all gateways have used: the values that have changed, and what each of the others holds."""

    empty: bool  # the store knew of nothing
    now: float  # milliseconds on its clock
    held: list[dict[str, tuple[int, int]]]
    values: dict[str, float]


class Store:
    """One client of the store. Every method raises StoreError, within ``LONGEST`` seconds."""

    def __init__(self, address: str | StoreAddress) -> None:
        """Raise ConfigError if the client library is missing, or the address is invalid."""
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
        keys = (_HOST + name, _HOSTS)
        return str(await self._run(_REGISTER, keys, instance, seq, int(LEASE * 1000), json.dumps(document), name))

    async def deregister(self, name: str, instance: str) -> None:
        """End a host's lease, if it is this instance's."""
        await self._run(_DEREGISTER, (_HOST + name, _HOSTS), instance, name)

    async def hosts(self) -> dict[str, dict[str, Any]]:
        """Return the documents of the hosts whose leases are not over."""
        return {name: _read(text) for name, text in await self._living(_HOSTS, _HOST)}

    async def fly(self, gateway: str, flight: Mapping[str, Mapping[str, int]]) -> None:
        """Write a gateway's requests, by host and model."""
        keys = (_FLIGHT + gateway, _GATEWAYS)
        await self._run(_FLY, keys, json.dumps(flight), int(FLIGHT * 1000), gateway)

    async def flights(self, but: str) -> dict[str, dict[str, int]]:
        """Return the requests of all gateways but one, by host and model."""
        total: dict[str, dict[str, int]] = {}
        for gateway, text in await self._living(_GATEWAYS, _FLIGHT):
            for host, models in ({} if gateway == but else _read(text)).items():
                counts = total.setdefault(host, {})
                for model, count in models.items() if isinstance(models, dict) else ():
                    counts[model] = counts.get(model, 0) + (count if isinstance(count, int) else 0)
        return total

    async def claim(self, model: str, host: str, term: float, over: str = "") -> Claim:
        """Claim the wake of a model for a host, unless there is a claim; return the valid one.

        A claim of the host ``over`` is replaced.
        """
        keys = (_WAKE + model, _WAKES)
        holder, left = await self._run(_CLAIM, keys, host, max(1, int(term * 1000)), over, model)
        return Claim(str(holder), max(0.0, left / 1000))

    async def claims(self) -> dict[str, Claim]:
        """Return the claims that hold, by model."""
        flat = await self._run(_CLAIMS, (_WAKES,), _WAKE)
        each = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return {str(model): Claim(str(holder), left / 1000) for model, holder, left in each if left > 0}

    async def use(
        self, gateway: str, batch: int, since: float, uses: Sequence[Use], held: Mapping[str, tuple[int, int]]
    ) -> Told:
        """Send what was used, and what is held; return what all have. A batch that is sent again counts once."""
        keys = ("{llmux}:used", _GATEWAYS, f"{{llmux}}:batch:{gateway}", f"{{llmux}}:held:{gateway}")
        flat = [
            value
            for use in uses
            for value in (use.name, use.kind, f"{use.amount:.3f}", f"{use.known:.3f}", use.kept)
        ]
        empty, now, others, values = await self._run(
            _USE,
            keys,
            batch,
            f"{since:.0f}",
            json.dumps(held),
            int(FLIGHT * 1000),
            "{llmux}:use:",
            "{llmux}:held:",
            *flat,
        )
        pairs = zip(others[::2], others[1::2], strict=True)
        return Told(
            bool(empty),
            float(now),
            [_held(document) for name, document in pairs if name != gateway],
            {name: float(value) for name, value in zip(values[::2], values[1::2], strict=True)},
        )

    async def close(self) -> None:
        """Close the connections."""
        for client in (self._redis, *self._sentinels):
            await client.aclose()

    async def _living(self, names: str, before: str) -> list[tuple[str, str]]:
        flat = await self._run(_LIVING, (names,), before)
        return list(zip(flat[::2], flat[1::2], strict=True))

    async def _run(self, script: str, keys: tuple[str, ...], *values: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        before, failed, answer = task.cancelling(), None, None
        try:
            async with asyncio.timeout(LONGEST):
                answer = await self._eval(script, keys, values)
        except Exception as error:  # noqa: BLE001 - whatever the library raises, the store cannot be used
            failed = error
        if task.cancelling() > before:  # the library may have swallowed it, as it does in the middle of connecting
            raise asyncio.CancelledError
        if failed is not None:
            raise StoreError(words_of(failed, self.address)) from failed
        return answer

    async def _eval(self, script: str, keys: tuple[str, ...], values: tuple[Any, ...]) -> Any:
        """Run a script; again, on a new connection, if that of before is what is wrong.

        The server may have closed it meanwhile; or it leads to one that is a replica since a failover, while the
        address leads to the new master. No script does more if it runs twice.
        """
        try:
            return await self._redis.eval(script, len(keys), *keys, *values)
        except Exception as error:
            closed, task = type(error).__name__ == "ConnectionError", asyncio.current_task()
            replica = "READONLY" in str(error) or type(error).__name__ == "ReadOnlyError"  # Redis 6 quotes it
            if not (closed or replica) or (task is not None and task.cancelling()):
                raise
            if replica and (pool := getattr(self._redis, "connection_pool", None)) is not None:
                await pool.disconnect(inuse_connections=False)  # the library would keep it
        return await self._redis.eval(script, len(keys), *keys, *values)


def _read(text: str) -> dict[str, Any]:
    """Parse a document of another llmux, perhaps of another version; an invalid one is empty."""
    with contextlib.suppress(*NONSENSE):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def _held(text: str) -> dict[str, tuple[int, int]]:
    """Return what a gateway's requests in progress hold, by key."""
    found = {}
    for key, each in _read(text).items():
        match each:
            case [int(running), int(reserved)]:
                found[key] = running, reserved
    return found


def require_store(address: str) -> None:
    """See to it that its client library is there and, if it is embedded, a server. Raises ConfigError."""
    if address.strip() != EMBEDDED:
        Store(address)
        return
    from llmux.fleet.embedded import server  # noqa: PLC0415 - as below

    path = server(os.environ)
    Store(StoreAddress("server", socket=path, called=EMBEDDED))  # for its client; any path does


def open_store(address: str, log: EventLog) -> tuple[Store, EmbeddedStore | None]:
    """Return a client of the store and, if it is embedded, the server to run. Raises ConfigError."""
    if address.strip() != EMBEDDED:
        return Store(address), None
    from llmux.fleet.embedded import EmbeddedStore  # noqa: PLC0415 - most stores have an address

    own = EmbeddedStore(log)
    return Store(own.address), own


def tell_trouble(log: EventLog, before: str, now: str) -> None:
    """Log what is wrong with the store, or that nothing is any more, if it was something else before."""
    if now and now != before:
        log.emit("store_lost", error=now)
    elif before and not now:
        log.emit("store_restored")


class Registration:
    """One host's entry. Raises ConfigError where the store's client library is missing."""

    def __init__(self, settings: JoinConfig, switcher: Switcher, log: EventLog) -> None:
        self._settings = settings
        self._switcher = switcher
        self._log = log
        self._store, self._server = open_store(settings.store.get_secret_value(), log)
        self._seq = 0
        self._trouble = ""  # what is wrong, as last logged

    async def run(self) -> None:
        """Keep the entry until cancelled, then take it out."""
        server = None if self._server is None else asyncio.create_task(self._server.run())
        try:
            if self._server is not None:
                await self._server.ready()
            while True:
                trouble = await self._renew()
                tell_trouble(self._log, self._trouble, trouble)
                self._trouble = trouble
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


# ---- the client for each form of the store, and error messages

PATIENCE = 1.0  # seconds that one step of a call may take


def clients_of(address: StoreAddress) -> tuple[Any, Sequence[Any]]:
    """Return the library's client, and those of its sentinels. Nothing is connected yet."""
    asynchronous = importlib.import_module("redis.asyncio")
    retry = importlib.import_module("redis.asyncio.retry").Retry
    backoff = importlib.import_module("redis.backoff").NoBackoff
    common: dict[str, Any] = {
        "socket_timeout": PATIENCE,
        "socket_connect_timeout": PATIENCE,
        "retry": retry(backoff(), 0),
    }
    if address.tls:
        common |= {
            "ssl": True,
            "ssl_ca_certs": address.ca,
            "ssl_certfile": address.cert,
            "ssl_keyfile": address.cert_key,
        }
        if address.ca is not None:  # as for remotes: a private CA is verified alike by every Python
            common["ssl_exclude_verify_flags"] = [ssl.VERIFY_X509_STRICT]
    login = {"username": address.user, "password": address.password, "decode_responses": True}
    if address.kind == "cluster":
        node = importlib.import_module("redis.asyncio.cluster").ClusterNode
        nodes = [node(host, port) for host, port in address.nodes]
        return asynchronous.RedisCluster(startup_nodes=nodes, **common, **login), ()
    if address.kind == "sentinel":
        asked = common | {"username": address.sentinel_user, "password": address.sentinel_password}
        sentinel = importlib.import_module("redis.asyncio.sentinel").Sentinel
        known = sentinel(address.nodes, sentinel_kwargs=asked, **common, **login)
        return known.master_for(address.master, db=address.db), known.sentinels
    if address.socket:
        where: dict[str, Any] = {"unix_socket_path": address.socket}
    else:
        where = dict(zip(("host", "port"), address.nodes[0], strict=True))
    return asynchronous.Redis(db=address.db, **where, **common, **login), ()


_CERTIFICATE = "wants a certificate of its clients: name yours, as rediss://host:6379/0?cert=FILE&cert_key=FILE"
_SAID: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NOAUTH", "Authentication required", "already authenticated", "HELLO must be called with"),
        "it wants a password: write the address as redis://:PASSWORD@host:6379/0",
    ),
    (
        ("WRONGPASS", "invalid password", "invalid username-password"),
        "it refuses the password in its address, or the user",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "its certificate is not trusted: name the file of its CA, as rediss://host:6379/0?ca=/etc/llmux/ca.pem",
    ),
    (
        ("CERTIFICATE_REQUIRED", "certificate required"),
        f"it {_CERTIFICATE}",
    ),
    (
        ("WRONG_VERSION_NUMBER", "record layer failure"),
        "it does not speak TLS: write redis:// for a port without",
    ),
    (
        ("READONLY", "read only replica"),
        "it is a replica, which cannot be written to: give the address of its master, or redis+sentinel://",
    ),
    (
        ("MovedError", "AskError"),
        "it is a node of a cluster: write the address as redis+cluster://host:6379",
    ),
    (
        ("cluster mode is not enabled", "cluster support disabled"),
        "it is not a node of a cluster: write the address as redis://host:6379/0",
    ),
    (("CLUSTERDOWN", "Hash slot not served"), "its cluster is not whole: see `redis-cli cluster info`"),
    (
        ("No master found", "No such master"),
        "no sentinel that answers knows a master of this name",
    ),
    (("NOPERM", "has no permissions"), "its user may not do all that is needed: see FLEET.md for the ACL"),
    (("DB index is out of range", "invalid DB index"), "it has no database of that number"),
    (("OOM command", "used memory > 'maxmemory'"), "its memory is full: raise its `maxmemory`"),
    (("LOADING", "loading the dataset"), "it is starting"),
    (("Connect call failed", "Connection refused"), "it takes no connections: does it run?"),
    (("No such file or directory",), "there is no such socket: does it run?"),
    (("Protocol Error", "Invalid response", "unknown command"), "what answers there is not Valkey or Redis"),
)


def words_of(error: Exception, address: StoreAddress) -> str:
    """Describe what is wrong, and what to do."""
    text = " ".join(f"{type(each).__name__}: {each}" for each in _chain(error))
    if "certificate is not valid for" in text or "IP address mismatch" in text or "Hostname mismatch" in text:
        return f"the certificate of {address} is another host's: call it as its certificate does"
    for signs, words in _SAID:
        if any(sign.lower() in text.lower() for sign in signs):
            return f"{address}: {words}"
    if isinstance(error, TimeoutError) or "Timeout" in text:
        return f"{address}: it does not answer{', or not by TLS' if address.tls else ''}"
    if "Connection closed by server" in text or "reset by peer" in text or "Connection lost" in text:
        more = "" if address.tls or address.socket else ": is it one, and does it want TLS (rediss://)?"
        if address.tls and address.cert is None:  # the server's alert about that may be lost with the connection
            more = f"; perhaps it {_CERTIFICATE}"
        return f"{address}: it has closed the connection{more}"
    return f"{address}: {error}" if str(error) else f"{address}: {type(error).__name__}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

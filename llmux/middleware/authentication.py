"""Which clients may use llmux, and which may operate it.

With ``api_keys`` a client sends one of them as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``. Operators send
``admin_key`` in the same way, which permits everything else too. Without ``admin_key`` they use the control socket
(``llmux.control``), or, without ``api_keys``, a connection from this machine that is not through a proxy. With
``api_keys`` that is not enough: a proxy on this machine connects from there for all of its clients, and few add a
header by default. Without either all credentials pass untouched; else a header with one of llmux's keys is not
sent to the engine.

Theory of operation: which key is it
====================================

The configuration holds hashes, and a hash is expensive on purpose: one Argon2id. So once a key has been checked,
its digest under a secret of this process is remembered, not the key itself. A key is recognized by looking its
digest up, in a microsecond. Without the secret one cannot choose keys whose digests begin alike, so the time of a
look-up reveals nothing. The digests of the last ``WRONG`` wrong keys are remembered, too, until the next reload:
none is checked twice. So the memory is bounded: one digest for each configured key, and ``WRONG`` others.

An unknown key is checked against the hashes whose keys have not been seen yet (a key of the others would have been
recognized): in a thread, one at a time; all requests with the same key wait for the same result. A flood of wrong
keys gains little, and costs others little:

- after a wrong key there is a pause of three times as long as the check took: wrong keys take a quarter of one
  core at most;
- addresses take turns: before a key of an address that has none waiting, at most two keys of each other address
  are checked, however many wait;
- an address may try ``BURST`` wrong keys, and one more every ``EVERY`` seconds; beyond that the answer is 429. So
  it is, when ``PENDING`` keys wait to be checked, for the newest key of the address with the most. Known keys are
  not affected;
- requests that are refused without a check are refused by ``refusal``, which waits for nothing.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from aiohttp import hdrs, web

from llmux.config.access import OPERATORS, Access, fits, is_hash
from llmux.config.setting_types import LONGEST_NAME
from llmux.errors import ForbiddenError, RequestError, TooManyAttemptsError, UnauthorizedError

BURST = 20
EVERY = 3.0  # seconds
PENDING = 64
PAUSE = 3.0  # times as long as the check took
WRONG = 1024  # wrong keys that are remembered
LONGEST = 512  # bytes; no key is longer
_ADDRESSES = 1024


class Holder(NamedTuple):
    """The holder of a key, and what the key permits."""

    name: str | None
    operator: bool
    progress: bool | None = None  # whether its holder gets progress messages; None: as configured for all
    rides: bool = False  # its requests cause no switch
    gateway: bool = False  # it names the keys of its requests
    captured: bool = False  # its requests and answers are captured
    remote: bool = False  # its requests may leave this host


@dataclass(slots=True, eq=False)
class _Entry:
    text: str  # a hash
    holder: Holder
    digest: bytes | None = None  # of its key, once that has been shown


class Keyring:
    """The keys of the configuration in force."""

    def __init__(self, *, check: Callable[[bytes, str], bool] = fits) -> None:
        self.wanted = False  # clients need a key
        self.guarded = False  # operators need a key
        self.any = False
        self._check = check
        self._secret = blake2b(key=os.urandom(32), digest_size=16)
        self._known: dict[bytes, Holder] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()  # digests of keys that fit nothing
        self._named: dict[str, Holder] = {}  # the clients', by their keys' names
        self._entries: list[_Entry] = []
        self._open: list[_Entry] = []
        self._generation = 0
        self._pending: dict[bytes, asyncio.Task[Holder | None]] = {}
        self._turns = Turns()
        self._attempts = Attempts()

    def configure(self, config: Access) -> None:
        """Apply a configuration's keys, at once. Hashes that remain keep the digests of their keys."""
        old = {entry.text: entry.digest for entry in self._entries}
        captures = config.captured
        given = []
        for entry in config.api_keys:
            captured = entry.name in captures
            more = (entry.progress, entry.rides, entry.gateway, captured, config.may_leave(entry))
            given.append((entry.key, Holder(entry.name, False, *more)))
        self._named = {holder.name: holder for _, holder in given if holder.name is not None}
        if config.admin_key is not None:  # last: a key that is both permits both
            given.append((config.admin_key, Holder(OPERATORS, operator=True)))
        known: dict[bytes, Holder] = {}
        entries: list[_Entry] = []
        for secret, holder in given:
            text = secret.get_secret_value()
            if is_hash(text):
                entries.append(_Entry(text, holder, old.get(text)))
                digest = old.get(text)
            else:
                digest = self.digest(text.encode())
            if digest is not None:
                known[digest] = holder
        self._known, self._entries = known, entries
        self._open = _not_shown(entries)
        self._wrong.clear()
        self._generation += 1
        self.wanted, self.guarded = bool(config.api_keys), config.admin_key is not None
        self.any = self.wanted or self.guarded

    def recognize(self, key: bytes) -> Holder | None:
        """Return the holder of a key that is in plain text in the configuration, or was seen before."""
        return self._known.get(self.digest(key))

    def named(self, gateway: Holder, name: str) -> Holder:
        """Return the holder of the key that a gateway names; the gateway's own if that can be no key's name.

        What a key of this name may here applies to it; to a name without a key, what the gateway's key may.
        """
        if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
            return gateway
        own = self._named.get(name, gateway)
        captured = own.captured or gateway.captured
        return gateway._replace(name=name, rides=own.rides, remote=own.remote, captured=captured)

    async def ask(self, keys: Iterable[bytes], address: str) -> Holder | None:
        """Return the holder of one of these unknown keys, None if all are wrong.

        Raises TooManyAttemptsError when this address, or all together, have shown too many wrong ones.
        """
        attempts = 0
        for key in keys:
            digest = self._unjudged(key)
            if digest is None:
                continue
            task = self._pending.get(digest)
            if task is None:
                if len(self._pending) >= PENDING and not self._turns.displace(address):
                    raise _too_many_pending()
                self._attempts.begin(address)
                attempts += 1
                task = asyncio.get_running_loop().create_task(
                    self._look(key, digest, address), name="llmux: check a key"
                )
                self._pending[digest] = task
                task.add_done_callback(functools.partial(self._looked, digest))
            # Shielded: the first client may leave, the others still need the result.
            holder = await asyncio.shield(task)
            if holder is not None:
                self._attempts.take_back(address, attempts)
                return holder
        return None

    def refusal(self, keys: Iterable[bytes], address: str) -> RequestError | None:
        """Return what ``ask`` would raise, or UnauthorizedError for its None, at once; None if it would wait.

        None of the keys is known.
        """
        for key in keys:
            digest = self._unjudged(key)
            if digest is None:
                continue
            return None if digest in self._pending else self._attempts.spent(address)
        return no_valid_key()

    def _unjudged(self, key: bytes) -> bytes | None:
        """Return the digest of a key that has to be checked; None: it is known to be wrong."""
        if not self._open or not 0 < len(key) <= LONGEST:
            return None
        digest = self.digest(key)
        return None if digest in self._wrong else digest

    def digest(self, key: bytes) -> bytes:
        """Return a digest that is only valid in this process."""
        state = self._secret.copy()
        state.update(key)
        return state.digest()

    async def _look(self, key: bytes, digest: bytes, address: str) -> Holder | None:
        loop = asyncio.get_running_loop()
        await self._turns.wait(address)
        pause = 0.0
        try:
            while True:
                generation = self._generation
                began = loop.time()
                entry = await asyncio.to_thread(self._first, key, self._open)
                if generation == self._generation:
                    break
            if entry is None:
                pause = PAUSE * (loop.time() - began)
                holder = self._known.get(digest)  # a reload may have brought it in plain text
                if holder is None:
                    self._wrong[digest] = None
                    if len(self._wrong) > WRONG:
                        self._wrong.popitem(last=False)
                return holder
            entry.digest = digest
            self._known[digest] = entry.holder
            self._open = _not_shown(self._entries)
            return entry.holder
        finally:
            loop.call_later(pause, self._turns.end)

    def _looked(self, digest: bytes, task: asyncio.Task[Holder | None]) -> None:
        del self._pending[digest]
        if not task.cancelled():
            task.exception()  # all clients that waited for it may have left

    def _first(self, key: bytes, entries: Iterable[_Entry]) -> _Entry | None:
        return next((entry for entry in entries if self._check(key, entry.text)), None)


def _not_shown(entries: Iterable[_Entry]) -> list[_Entry]:
    """Return the hashes whose keys have not been seen, the operators' first: their key may be a client's too."""
    return sorted(
        (entry for entry in entries if entry.digest is None), key=lambda entry: not entry.holder.operator
    )


def no_valid_key() -> UnauthorizedError:
    """Return the error for a client without a valid key.

    It does not name Anthropic's header: Claude Code shows "Please run /login" in place of a message that does.
    """
    return UnauthorizedError(
        "No valid API key: send Authorization: Bearer KEY, or the key as Anthropic's SDKs do."
    )


def _too_many_pending() -> TooManyAttemptsError:
    return TooManyAttemptsError("Too many keys wait to be checked.", retry_after=1.0)


class Turns:
    """One check at a time. Addresses take turns, and the keys of an address keep their order."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # whose turn is next first
        self._taken = False

    async def wait(self, address: str) -> None:
        """Wait for a turn. Raises TooManyAttemptsError when it has been displaced."""
        if not self._taken:
            self._taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(address, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.end()  # the turn had just been given to it
            raise

    def end(self) -> None:
        """Give the turn to the next address."""
        while self._waiting:
            address, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[address] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False

    def displace(self, address: str) -> bool:
        """Refuse the newest key of the address with the most, if ``address`` would still have fewer."""
        most = max(self._waiting, key=lambda one: len(self._waiting[one]), default=address)
        if len(self._waiting.get(most, ())) <= len(self._waiting.get(address, ())) + 1:
            return False
        turn = self._waiting[most].pop()
        if not turn.done():
            turn.set_exception(_too_many_pending())
        return True


class Attempts:
    """How many wrong keys each address may still show."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how many, as of when

    def begin(self, address: str) -> None:
        """Count an attempt. Raises TooManyAttemptsError."""
        now = asyncio.get_running_loop().time()
        left, seen = self._left.get(address, (float(BURST), now))
        left = min(float(BURST), left + (now - seen) / EVERY)
        if left < 1.0:
            raise _too_many(left)
        self._keep(address, left - 1.0, now)

    def spent(self, address: str) -> TooManyAttemptsError | None:
        """Return what ``begin`` would raise."""
        found = self._left.get(address)
        if found is None or found[0] >= 1.0:
            return None
        left = found[0] + (asyncio.get_running_loop().time() - found[1]) / EVERY
        return _too_many(left) if left < 1.0 else None

    def take_back(self, address: str, count: int) -> None:
        """Forget attempts that led to a valid key."""
        left, seen = self._left.get(address, (float(BURST), 0.0))
        self._keep(address, min(float(BURST), left + count), seen)

    def _keep(self, address: str, left: float, now: float) -> None:
        self._left[address] = (left, now)
        self._left.move_to_end(address)
        if len(self._left) > _ADDRESSES:
            self._left.popitem(last=False)


def _too_many(left: float) -> TooManyAttemptsError:
    return TooManyAttemptsError(
        "Too many wrong keys came from this address; a key that is new to llmux is not looked at for now.",
        retry_after=(1.0 - left) * EVERY,
    )


def network_of(host: str) -> str:
    """Return what identifies a client that can choose among many addresses: the first 64 bits of IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped is not None else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


KEY_NAME = "X-LLMux-Key"
"""With a gateway's key: the name of the key of its client."""
_KEY_NAME = KEY_NAME.lower().encode()
_OF_GATEWAYS = frozenset({_KEY_NAME, b"x-llmux-progress"})  # no client has sent these
_AUTHORIZATION = b"authorization"
_API_KEY = b"x-api-key"
_LOOPBACK = ("127.", "::ffff:127.")
_FROM_ELSEWHERE = (  # some proxies send only one of the last three: Envoy, for example
    *(hdrs.FORWARDED, hdrs.X_FORWARDED_FOR, "X-Real-IP"),
    *(hdrs.X_FORWARDED_PROTO, hdrs.X_FORWARDED_HOST, hdrs.VIA),
)
_HOW = "send Authorization: Bearer KEY, or X-API-Key: KEY"


class Authenticated(NamedTuple):
    """The holder that was authenticated, and the headers (in lower case) that must not reach an engine."""

    holder: Holder | None = None
    drop: frozenset[bytes] = frozenset()

    @property
    def may_withdraw(self) -> bool:
        """Whether it is a key that takes requests back: a gateway's, or an operator's."""
        return self.holder is not None and (self.holder.gateway or self.holder.operator)


class FastAuthenticated(NamedTuple):
    """The same on the fast path: the lines of the head that must not go on."""

    drop: Sequence[int]
    holder: Holder | None


ANONYMOUS = Authenticated()
_THIS_HOST = Holder(None, operator=True)


class Keys:
    """The keys of the configuration in force."""

    def __init__(self) -> None:
        self.ring = Keyring()

    def configure(self, config: Access) -> None:
        """Take over a configuration's keys, at once."""
        self.ring.configure(config)

    async def client(self, request: web.BaseRequest) -> Authenticated:
        """Authenticate a client. Raises UnauthorizedError or TooManyAttemptsError."""
        ring = self.ring
        if not ring.any:
            return ANONYMOUS
        shown = _shown(request)
        let = self._recognized(shown)
        if let.holder is not None or not ring.wanted:
            return let
        if not ring.guarded and is_control(request):
            return Authenticated(_THIS_HOST)
        await ring.ask(shown.values(), address_of(request))
        let = self._recognized(shown)  # a reload may have removed the key meanwhile
        if let.holder is None and ring.wanted:
            raise no_valid_key()
        return let

    def of_client(self, let: Authenticated, request: web.BaseRequest) -> Authenticated:
        """Return what was authenticated; for a gateway's key, that of its client, if it names one."""
        if let.holder is None or not let.holder.gateway:
            return let
        name = request.headers.get(KEY_NAME, "")
        return Authenticated(self.ring.named(let.holder, name), let.drop | _OF_GATEWAYS)

    async def operator(self, request: web.BaseRequest) -> Authenticated:
        """Authenticate an operator. Raises UnauthorizedError, ForbiddenError or TooManyAttemptsError."""
        ring = self.ring
        shown = _shown(request) if ring.any else {}
        let = self._recognized(shown)
        if not ring.guarded:
            if is_control(request):
                return Authenticated(_THIS_HOST, let.drop)
            if ring.wanted:
                raise ForbiddenError(
                    "With `api_keys`, operating llmux over HTTP takes `admin_key`, which is not set: set it in the"
                    " configuration, or use the llmux command on llmux's own host.",
                    code="admin_key_not_set",
                )
            if not is_loopback(request) or any(name in request.headers for name in _FROM_ELSEWHERE):
                raise ForbiddenError("Without `admin_key` only this machine may do this, and not through a proxy.")
            return let
        if let.holder is None or not let.holder.operator:
            unknown = [key for key in shown.values() if ring.recognize(key) is None]
            await ring.ask(unknown, address_of(request))
            let = self._recognized(shown)
            if let.holder is None or not let.holder.operator:
                what = "No valid admin key" if let.holder is None else "This takes the admin key"
                raise UnauthorizedError(f"{what}: {_HOW}.")
        return let

    async def shows_one(self, request: web.BaseRequest) -> bool:
        """Whether a request has any valid key. Raises TooManyAttemptsError."""
        shown = _shown(request) if self.ring.any else {}
        if self._recognized(shown).holder is not None:
            return True
        return bool(shown) and await self.ring.ask(shown.values(), address_of(request)) is not None

    def on_fast_path(self, lines: list[bytes], shown: Sequence[int]) -> FastAuthenticated | None:
        """Return the lines of a head that must not go on, and the holder; None if that takes more than a look-up.

        ``shown`` are the lines with credentials.
        """
        found = []
        best: Holder | None = None
        seen = b""
        for at in shown:
            name, _, value = lines[at].partition(b": ")
            name = name.lower()
            if name == seen or len(shown) > 2:  # noqa: PLR2004 - one of them twice
                return None
            seen = name
            key = _bearer(value) if name == _AUTHORIZATION else value
            holder = None if key is None else self.ring.recognize(key)
            if holder is not None:
                found.append(at)
                if best is None or holder.operator or (name == _AUTHORIZATION and not best.operator):
                    best = holder
        if best is not None and best.gateway:
            return self._for_client(lines, found, best)
        return FastAuthenticated(found, best) if found or not self.ring.wanted else None

    def refusal(self, lines: list[bytes], shown: Sequence[int], address: str) -> RequestError | None:
        """Return why a client with these lines of a head is refused; None if that takes more than a look-up."""
        ring = self.ring
        if not ring.wanted:
            return None
        keys: dict[bytes, bytes | None] = {}
        for at in shown:
            name, _, value = lines[at].partition(b": ")
            name = name.lower()
            if name in keys:
                return None
            keys[name] = _bearer(value) if name == _AUTHORIZATION else value
        found = [key for name in (_AUTHORIZATION, _API_KEY) if (key := keys.get(name)) is not None]
        if any(ring.recognize(key) is not None for key in found):
            return None
        return ring.refusal(found, address)

    def _for_client(self, lines: list[bytes], found: list[int], gateway: Holder) -> FastAuthenticated:
        """Return the same for the key of the gateway's client, if the gateway names it."""
        name = None
        for at, line in enumerate(lines):
            field, _, value = line.partition(b": ")
            if field.lower() in _OF_GATEWAYS:
                found.append(at)
                if name is None and field.lower() == _KEY_NAME:
                    name = value.decode("ascii")
        return FastAuthenticated(found, self.ring.named(gateway, name or ""))

    def _recognized(self, shown: dict[bytes, bytes]) -> Authenticated:
        best: Holder | None = None
        drop = set()
        for header, key in shown.items():
            holder = self.ring.recognize(key)
            if holder is not None:
                drop.add(header)
                if best is None or holder.operator:
                    best = holder
        return Authenticated(best, frozenset(drop)) if drop else ANONYMOUS


def is_control(request: web.BaseRequest) -> bool:
    """Whether the request came over the control socket, which only this host's user can open."""
    return getattr(request.protocol, "control", False)


def is_loopback(request: web.BaseRequest) -> bool:
    """Whether the request comes from this machine (over a Unix socket too)."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    if isinstance(peer, tuple):
        return peer[0] == "::1" or str(peer[0]).startswith(_LOOPBACK)
    return peer is not None


def address_of(request: web.BaseRequest) -> str:
    """Return the address under which a client's wrong keys are counted."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return network_of(str(peer[0])) if isinstance(peer, tuple) else ""


def _shown(request: web.BaseRequest) -> dict[bytes, bytes]:
    """Return the keys of a request, by header."""
    shown = {}
    value = request.headers.get(hdrs.AUTHORIZATION)
    if value is not None and (key := _bearer(value.encode("utf-8", "surrogateescape"))) is not None:
        shown[_AUTHORIZATION] = key
    value = request.headers.get("X-API-Key")
    if value is not None:
        shown[_API_KEY] = value.encode("utf-8", "surrogateescape")
    return shown


def _bearer(value: bytes) -> bytes | None:
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None

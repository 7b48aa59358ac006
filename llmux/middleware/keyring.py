"""Whose key is it? A known one is recognized in a microsecond; one not seen before takes an Argon2id.

Theory of operation
===================

The configuration holds hashes, and a hash is dear on purpose. So the key that a hash was made of is remembered
once it has been shown: not itself, but its digest under a secret that this process has made up. A key is
recognized by looking its digest up. Without the secret keys whose digests begin alike cannot be
chosen, so the time that a look-up takes tells nothing. The same is remembered, until the next reload, of the last
``WRONG`` keys that fitted nothing: none of them is checked twice. So the memory holds at most one digest for each
configured key, and as many of wrong ones.

What is not recognized is checked against the hashes whose keys have not been shown yet (the others can only fit
what would have been recognized): in a thread, one after the other, and all requests that show the same key
meanwhile wait for the same answer. A flood of wrong keys gets, and takes from others, little:

- after a key that fits nothing there is a pause of three times as long as that took: wrong keys take a quarter of
  one core at most;
- addresses take turns: before a key of an address of which none waits at most two keys of each other address are
  checked, however many wait;
- an address may have ``BURST`` wrong keys, and one more every ``EVERY`` seconds; beyond that the answer is 429.
  When ``PENDING`` keys wait to be checked, so it is for the last that came of the address with the most. Keys that
  have been shown before do not notice;
- what is refused without a check is refused by ``refusal``, which waits for nothing.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from llmux.config.access import Access, fits, is_hash
from llmux.errors import RequestError, TooManyAttemptsError, UnauthorizedError

BURST = 20
EVERY = 3.0  # seconds
PENDING = 64
PAUSE = 3.0  # times as long as the check took
WRONG = 1024  # wrong keys that are remembered
LONGEST = 512  # bytes; no key is longer
_ADDRESSES = 1024


class Holder(NamedTuple):
    """Whose key it is, and what it opens."""

    name: str | None
    operator: bool
    progress: bool | None = None  # whether its holder gets progress messages; None: as configured for all
    rides: bool = False  # its requests cause no switch
    gateway: bool = False  # it tells whose its requests are
    captured: bool = False  # what they say is kept
    remote: bool = False  # its requests may leave this host


@dataclass(slots=True, eq=False)
class _Entry:
    text: str  # a hash
    holder: Holder
    digest: bytes | None = None  # of its key, once that has been shown


class Keyring:
    """The keys of the configuration in force."""

    def __init__(self, *, check: Callable[[bytes, str], bool] = fits) -> None:
        self.wanted = False  # clients have to show one
        self.guarded = False  # operators have to
        self.any = False
        self._check = check
        self._secret = blake2b(key=os.urandom(32), digest_size=16)
        self._known: dict[bytes, Holder] = {}
        self._wrong: OrderedDict[bytes, None] = OrderedDict()  # digests of keys that fit nothing
        self._entries: list[_Entry] = []
        self._open: list[_Entry] = []
        self._generation = 0
        self._pending: dict[bytes, asyncio.Task[Holder | None]] = {}
        self._turns = Turns()
        self._attempts = Attempts()

    def configure(self, config: Access) -> None:
        """Take over a configuration's keys, at once. Of hashes that stay it is still known whose they are."""
        old = {entry.text: entry.digest for entry in self._entries}
        captures = config.captured
        given = []
        for entry in config.api_keys:
            captured = entry.name in captures
            more = (entry.progress, entry.rides, entry.gateway, captured, config.may_leave(entry))
            given.append((entry.key, Holder(entry.name, False, *more)))
        if config.admin_key is not None:  # the last: a key that is both opens both
            given.append((config.admin_key, Holder("admin_key", operator=True)))
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
        """Return whose key it is, if it is in plain text in the configuration or has been shown before."""
        return self._known.get(self.digest(key))

    async def ask(self, keys: Iterable[bytes], address: str) -> Holder | None:
        """Return whose key one of these is, None when they fit nothing. They have not been recognized.

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
            # Shielded: the client that was first may leave, the others still want to know.
            holder = await asyncio.shield(task)
            if holder is not None:
                self._attempts.take_back(address, attempts)
                return holder
        return None

    def refusal(self, keys: Iterable[bytes], address: str) -> RequestError | None:
        """Return what ``ask`` would raise, or UnauthorizedError for its None, at once; None if it would wait.

        None of the keys has been recognized.
        """
        for key in keys:
            digest = self._unjudged(key)
            if digest is None:
                continue
            return None if digest in self._pending else self._attempts.spent(address)
        return no_valid_key()

    def _unjudged(self, key: bytes) -> bytes | None:
        """Return the digest of a key that has to be checked; None: it is wrong without a check."""
        if not self._open or not 0 < len(key) <= LONGEST:
            return None
        digest = self.digest(key)
        return None if digest in self._wrong else digest

    def digest(self, key: bytes) -> bytes:
        """Return a digest that is of use in this process only."""
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
            task.exception()  # every client that waited for it may have left

    def _first(self, key: bytes, entries: Iterable[_Entry]) -> _Entry | None:
        return next((entry for entry in entries if self._check(key, entry.text)), None)


def _not_shown(entries: Iterable[_Entry]) -> list[_Entry]:
    """Return the hashes whose keys have not been shown, the operators' first: their key may be a client's too."""
    return sorted(
        (entry for entry in entries if entry.digest is None), key=lambda entry: not entry.holder.operator
    )


def no_valid_key() -> UnauthorizedError:
    """Return the error for a client without a key that opens anything."""
    return UnauthorizedError("No valid API key: send Authorization: Bearer KEY, or X-API-Key: KEY.")


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
                self.end()  # it had just been given
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
        """Refuse the last that came of the address with the most, if ``address`` would still have fewer."""
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
        """Forget attempts: they led to a right one."""
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
    """Return what stands for a client that can choose among many addresses: of IPv6 the first 64 bits."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped is not None else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)

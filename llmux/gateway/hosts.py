"""The hosts: each is followed by its reports, and probed after it was lost.

Theory of operation
===================

A follower keeps one connection to its host, on which ``/llmux/events?report=…`` streams reports: periodically, and
whenever a model changes its phase. When the connection ends or cannot be made, the placement is told at once
(``HostUnreachable``), and the follower retries after a pause that grows from a quarter of a second to ``LONGEST``.
After ``SILENCE`` (a frozen host, a broken network) it reconnects: the host's last report has expired by then.

The placement orders probes (``GET /ready``) to find out whether a lost host is back.

All of it uses the same connections as requests do (``llmux.upstream``): a host is reached in one way or not at
all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Container, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from llmux.config.gateway import HostConfig
from llmux.core.phases import Phase
from llmux.errors import INTERNAL_ERROR, EngineError
from llmux.fleet import events as ev
from llmux.fleet.fleet_view import HostReport, ModelReport, read_report
from llmux.fleet.store import NONSENSE
from llmux.gateway.dispatcher import Dispatcher, Trip
from llmux.observability.notices import EventLog
from llmux.upstream import ConnectionPool, EngineActivity, EngineAddress, EngineConnection, ResponseHead
from llmux.upstream.engine import EngineLostError, EngineProtocolError

SILENCE = 6.0  # seconds, and three reports at least
FIRST, LONGEST = 0.25, 5.0  # seconds between two attempts to follow a host
PATIENCE = 5.0  # seconds that a query to a host may take
LIST_PATIENCE = 1.0  # seconds that a list of models waits for those of hosts that have just reported
_LARGEST = 4 << 20  # bytes of one event, or of an answer
_OK = 200
_REFUSES_KEY = frozenset({401, 403})


class Answer(NamedTuple):
    """What a host answered."""

    status: int
    body: bytes


class _Reader:
    """The sink of a follower's or a query's connection: delivers the body's bytes, and the end."""

    def __init__(self, connection: EngineConnection, take: Callable[[bytes], None]) -> None:
        self.status = 0
        self.head = asyncio.get_running_loop().create_future()
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._take = take

    def response_started(self, head: ResponseHead) -> None:
        self.status = head.status
        if head.framing.value == "chunked":
            self._connection.unchunk()
        if not self.head.done():
            self.head.set_result(None)

    def response_data(self, data: bytes) -> None:
        if data:
            self._take(data)

    def response_ended(self) -> None:
        self._over(None)

    def response_lost(self, error: EngineLostError | EngineProtocolError) -> None:
        self._over(error)

    def _over(self, error: Exception | None) -> None:
        for future in (self.head, self.end):
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                future.exception()  # retrieved, whether or not it is waited for


class Host:
    """One configured host: its address and keys, its last report, and counts."""

    def __init__(self, name: str, config: HostConfig) -> None:
        self.name = name
        self.config = config
        if config.socket:
            self.address = EngineAddress("localhost", 80, socket=config.socket)
        else:
            where = config.address
            self.address = EngineAddress(where.host, where.port, where.tls, where.base_path)
        self.activity = EngineActivity()
        self.names: Mapping[str, str] = {}
        self.virtual: frozenset[str] = frozenset()  # those of them that stand for a choice between models
        self.unlisted: frozenset[str] = frozenset()  # those of them that no error names
        self.version: str | None = None
        self.heard: float | None = None  # when it reported last, on the loop's clock
        self.trouble = "has not answered yet"  # empty: it is being followed
        self.lost = False  # the placement was told that
        self.instance = ""  # of the llmux that reports
        self.refuses_key = False  # for its reports, so for requests, too
        self.mistaken = ""  # what was wrong with its last report, logged once
        self.entries: Mapping[str, Mapping[str, Any]] = {}  # of its ``/v1/models``, by id
        self.listed: Mapping[str, str] | None = None  # the names that it had when these were asked for
        self.listing: asyncio.Task[None] | None = None  # asks for them
        self.measured: frozenset[str] = frozenset()  # the models whose wake was measured there
        self.wakes = 0  # models that woke, as far as reports told
        self._woke: deque[float] = deque(maxlen=1000)
        self._awake: frozenset[str] = frozenset()

    @property
    def key(self) -> bytes | None:
        """The key that is sent to it."""
        key = self.config.key
        return None if key is None else key.get_secret_value().encode()

    def reported(self, report: HostReport, now: float) -> None:
        """Count the models that woke."""
        awake = frozenset(name for name, each in report.models.items() if each.phase is Phase.AWAKE)
        if self.heard is not None:
            for _ in awake - self._awake:
                self.wakes += 1
                self._woke.append(now)
        self._awake = awake
        self.heard = now

    def wakes_within(self, seconds: float, now: float) -> int:
        """Return how many models woke in the last ``seconds``."""
        return sum(1 for woke in self._woke if woke > now - seconds)

    def request(self, method: str, path: str, body: bytes = b"", *, operator: bool = False) -> bytes:
        """Write a request of the gateway's own."""
        secret = (self.config.admin_key or self.config.key) if operator else self.config.key
        lines = [
            f"{method} {self.address.base_path}{path} HTTP/1.1".encode(),
            b"Host: " + self.address.host_header,
            b"Content-Length: %d" % len(body),
        ]
        if secret is not None:
            lines.append(b"Authorization: Bearer " + secret.get_secret_value().encode())
        return b"\r\n".join([*lines, b"", body])


class _SameHostError(Exception):
    """An llmux is already followed under another name."""


class Hosts:
    """All configured hosts, each with its follower."""

    def __init__(self, dispatcher: Dispatcher, log: EventLog) -> None:
        self.every = 1.0  # seconds between two reports
        self._dispatcher = dispatcher
        self._log = log
        self._pool = ConnectionPool(connect_timeout=PATIENCE)
        self._hosts: dict[str, Host] = {}
        self.known: dict[str, str] = {}
        """All names that clients may ask for, and their models; the first host's word counts."""
        self._virtual: frozenset[str] = frozenset()
        self._wakes: dict[str, dict[str, float]] = {}  # model → host → seconds of a wake, as measured there
        self._following: dict[str, asyncio.Task[None]] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._differing: dict[str, dict[str, str]] = {}  # names of another model on some hosts → that, by the host
        self.on_names: Callable[[Iterable[str]], None] = lambda _models: None
        dispatcher.on_probe = self.probe
        dispatcher.on_withdraw = self.withdraw

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __contains__(self, name: str) -> bool:
        return name in self._hosts

    def get(self, name: str) -> Host | None:
        """Return a host by its name."""
        return self._hosts.get(name)

    def all(self) -> list[Host]:
        """Return them in the order of the configuration."""
        return list(self._hosts.values())

    def configure(self, hosts: Mapping[str, HostConfig]) -> None:
        """Follow these hosts from now on, and no others. Hosts that remain are not disturbed."""
        for name in [name for name, host in self._hosts.items() if hosts.get(name) != host.config]:
            self._following.pop(name).cancel()
            self._learn(self._hosts.pop(name), {})
            self._dispatcher.post(ev.HostRemoved(name))
        for name, config in hosts.items():
            if name not in self._hosts:
                host = self._hosts[name] = Host(name, config)
                self._dispatcher.post(ev.HostAdded(name))
                self._following[name] = asyncio.get_running_loop().create_task(
                    self._follow(host), name=f"llmux: follow {name}"
                )
        self._hosts = {name: self._hosts[name] for name in hosts}
        self._index()

    async def close(self) -> None:
        """Stop following all hosts."""
        tasks = [*self._following.values(), *self._probes]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._following.clear()
        await self._pool.close()

    # ---- names

    def listed(self) -> set[str]:
        """Return the names that clients may use, and hosts list."""
        return {name for host in self.all() for name in host.names.keys() - host.unlisted}

    def _index(self) -> None:
        self.known.clear()
        for host in reversed(self.all()):
            self.known.update(host.names)
        self._virtual = frozenset[str]().union(*(host.virtual for host in self.all()))
        differing: dict[str, dict[str, str]] = {}
        for host in self.all():
            if not host.names.items() <= self.known.items():  # hardly ever
                for name in host.names.keys() - self._virtual:
                    if host.names[name] != self.known[name]:
                        differing.setdefault(name, {})[host.name] = host.names[name]
        for name in sorted(name for name in differing if self._differing.get(name) != differing[name]):
            self._log.emit("names_differ", name=name, model=self.known[name], others=differing[name])
        self._differing = differing

    def model_of(self, name: str) -> str | None:
        """Return the model that serves a name; None if no host has reported that it knows it."""
        return self.known.get(name)

    def stands_for(self, name: str) -> str | None:
        """Return the model that a key has to be allowed for a name; None for a virtual model, or an unknown name.

        A virtual model stands for a choice, which its host makes: whatever would serve it now, another may.
        """
        return None if name in self._virtual else self.known.get(name)

    # ---- following

    async def _follow(self, host: Host) -> None:
        pause = FIRST
        while True:
            began = time.monotonic()
            try:
                await self._listen(host)
                trouble = "has ended the stream of its reports"
            except TimeoutError:
                trouble = f"has said nothing for {self._silence:g} s"
            except (EngineError, OSError, ValueError) as error:
                trouble = words_of(error)
            except Exception as error:  # noqa: BLE001 - a mistake here must not end the following of a host
                self._log.emit("internal_error", error=repr(error), exc_info=error)
                trouble = INTERNAL_ERROR
            self._lost(host, trouble)
            if time.monotonic() - began > LONGEST:
                pause = FIRST
            await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - gateways should not come together
            pause = min(LONGEST, 2 * pause)

    @property
    def _silence(self) -> float:
        return max(SILENCE, 3 * self.every)

    async def _listen(self, host: Host) -> None:
        """Handle reports until the stream ends. Raises EngineError, OSError, ValueError or TimeoutError."""
        try:
            async with asyncio.timeout(PATIENCE):
                connection = await self._pool.connect(host.address)
        except TimeoutError:
            raise OSError(f"cannot be reached within {PATIENCE:g} s") from None
        news, buffer = asyncio.Event(), bytearray()

        def take(data: bytes) -> None:
            buffer.extend(data)
            news.set()

        reader = _Reader(connection, take)
        try:
            connection.begin(reader)
            connection.write_whole(host.request("GET", f"/llmux/events?report={self.every:g}s"))
            reader.end.add_done_callback(lambda _future: news.set())
            async with asyncio.timeout(PATIENCE):
                await reader.head
            refused, host.refuses_key = host.refuses_key, reader.status in _REFUSES_KEY
            if refused and not host.refuses_key:
                self.probe(host.name)
            if reader.status != _OK:
                raise ValueError(_refusal(reader.status))
            while not reader.end.done() or buffer:
                async with asyncio.timeout(self._silence):
                    await news.wait()
                news.clear()
                self._read(host, buffer)
                if reader.end.done():
                    break
            reader.end.result()
        finally:
            connection.abort()

    def _read(self, host: Host, buffer: bytearray) -> None:
        """Handle the complete events."""
        *events, rest = bytes(buffer).split(b"\n\n")
        if len(rest) > _LARGEST:
            raise ValueError("sent a report of more than 4 MiB")
        buffer[:] = rest
        reports = [event for event in events if event.startswith(b"event: report\ndata: ")]
        for event in reports[-1:]:  # each replaces the one before it
            self._take(host, event.partition(b"data: ")[2])

    def _take(self, host: Host, data: bytes) -> None:
        try:
            document = json.loads(data)
            report = read_report(host.name, document)
            measured = {name for name, each in document["models"].items() if each.get("measured", True)}
            names = {str(name): str(model) for name, model in document["names"].items()}
            virtual, unlisted = (frozenset(map(str, document.get(kind, ()))) for kind in ("virtual", "unlisted"))
            self._refuse_twin(host, report.instance)
        except _SameHostError as error:
            host.trouble = str(error)
            if host.mistaken != host.trouble:
                host.mistaken = host.trouble
                self._log.emit("report_refused", host=host.name, instance=report.instance, reason=host.trouble)
            return
        except NONSENSE as error:
            wrong = f"its report cannot be read ({error!r}): is it a llmux of another version?"
            if host.mistaken != wrong:
                host.mistaken = wrong
                self._log.emit("report_refused", host=host.name, instance="", reason=wrong)
            return
        host.mistaken = ""
        if (names, virtual, unlisted) != (host.names, host.virtual, host.unlisted):
            host.names, host.virtual, host.unlisted = names, virtual, unlisted
            self._index()
            self._dispatcher.rename(self.known)
        if host.trouble:  # it may have another configuration now
            host.listed = None
        if host.listed is not host.names and (host.listing is None or host.listing.done()):
            host.listing = self._start(self._list(host), f"llmux: models of {host.name}")
        host.version = str(document.get("version", ""))
        host.reported(report, self._dispatcher.now())
        self.on_names(report.models)
        if host.trouble:
            host.trouble = ""
            self._log.emit("host_followed", host=host.name, version=host.version, models=list(report.models))
        host.lost = False
        self._learn(host, {name: report.models[name].wake for name in measured})
        self._dispatcher.post(ev.HostReported(self._with_costs(report, measured)))

    def _learn(self, host: Host, wakes: Mapping[str, float]) -> None:
        """Record the wake costs of models that were measured on a host."""
        for model in host.measured - wakes.keys():
            del self._wakes[model][host.name]
        for model, seconds in wakes.items():
            self._wakes.setdefault(model, {})[host.name] = seconds
        host.measured = frozenset(wakes)

    def _refuse_twin(self, host: Host, instance: str) -> None:
        """Prevent following an llmux under two names: its GPU would count twice."""
        for other in self._hosts.values():
            if other is not host and instance and other.instance == instance and not other.lost:
                raise _SameHostError(
                    f"is followed as {other.name} already: give each host one name and one address"
                )
        host.instance = instance

    def _with_costs(self, report: HostReport, measured: Container[str]) -> HostReport:
        """Return a report whose wake costs are measured: on this host, else on others.

        A host that has never woken a model guesses. A guess that is too high would keep it from ever finding out,
        and the host idle beside others that switch all the time.
        """
        better: dict[str, ModelReport] = {}
        for name, each in report.models.items():
            if name in measured or each.phase is Phase.AWAKE:
                continue
            known = self._wakes.get(name)
            if known:
                wake = sum(known.values()) / len(known)
                more, wait = wake - each.wake, each.expected_wait
                better[name] = each._replace(
                    wake=wake,
                    switch_cost=max(0.0, each.switch_cost + more),
                    expected_wait=None if wait is None else max(0.0, wait + more),
                )
        return dataclasses.replace(report, models={**report.models, **better}) if better else report

    def _lost(self, host: Host, trouble: str) -> None:
        if trouble != host.trouble:
            self._log.emit("host_lost", host=host.name, error=trouble)
        host.trouble = trouble
        if not host.lost:
            host.lost = True
            self._dispatcher.post(ev.HostUnreachable(host.name, trouble))

    # ---- asking

    def probe(self, name: str) -> None:
        """Find out whether a host takes requests again."""
        host = self._hosts.get(name)
        if host is not None:
            self._start(self._probe(host), f"llmux: probe {name}")

    def withdraw(self, trip: Trip, name: str) -> None:
        """Ask a host to give back a queued request. The request itself gets the answer: refused, or as usual."""
        host = self._hosts.get(name)
        if host is not None:
            self._start(self._withdraw(host, trip.request_id), f"llmux: withdraw from {name}")

    async def _withdraw(self, host: Host, request_id: str) -> None:
        with contextlib.suppress(EngineError, OSError):
            await self.ask(host, "POST", f"/llmux/withdraw/{quote(request_id, safe='')}")

    async def _list(self, host: Host) -> None:
        """Request the entries of a host's models. If that fails, the next report has it tried again."""
        with contextlib.suppress(EngineError, OSError, *NONSENSE):
            while (names := host.names) is not host.listed:
                answer = await self.ask(host, "GET", "/v1/models")
                host.entries = {str(entry["id"]): dict(entry) for entry in json.loads(answer.body)["data"]}
                host.listed = names

    async def lists(self) -> None:
        """Wait for the entries of models that hosts have only just reported, but not long."""
        new = (host for host in self.all() if host.listed is not host.names and not host.lost)
        tasks = [host.listing for host in new if host.listing is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=LIST_PATIENCE)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)
        return task

    async def _probe(self, host: Host) -> None:
        try:
            answer = await self.ask(host, "GET", "/ready")
        except (EngineError, OSError) as error:
            found: ev.Event = ev.HostUnreachable(host.name, words_of(error))
        else:
            if host.refuses_key:  # /ready takes none
                found = ev.HostUnreachable(host.name, host.trouble)
            elif answer.status == _OK:
                found = ev.HostReachable(host.name)
            else:
                found = ev.HostUnreachable(host.name, f"is not ready: /ready answered {answer.status}")
        if self._hosts.get(host.name) is host:
            self._dispatcher.post(found)

    async def ask(
        self, host: Host, method: str, path: str, body: Mapping[str, Any] | None = None, *, operator: bool = False
    ) -> Answer:
        """Send a request of the gateway's own, and return the answer. Raises EngineError."""
        kept = bytearray()

        def take(data: bytes) -> None:
            kept.extend(data)
            if len(kept) > _LARGEST:
                connection.abort()
                reader.response_lost(EngineProtocolError(f"{host.name} answered with more than 4 MiB."))

        try:
            async with asyncio.timeout(PATIENCE):
                connection = await self._pool.connect(host.address)
                reader = _Reader(connection, take)
                try:
                    connection.begin(reader)
                    data = b"" if body is None else json.dumps(body).encode()
                    connection.write_whole(host.request(method, path, data, operator=operator))
                    await reader.end
                finally:
                    connection.abort()
        except TimeoutError:
            raise EngineLostError(f"{host.name} did not answer within {PATIENCE:g} s.") from None
        return Answer(reader.status, bytes(kept))

    async def lease(self, host: Host) -> dict[str, Any] | None:
        """Return the lease of a host's GPU, if there is one. Raises EngineError."""
        answer = await self.ask(host, "GET", "/llmux/status")
        try:
            lease = json.loads(answer.body)["lease"]
        except NONSENSE:
            raise EngineProtocolError(f"{host.name} did not tell its status: {_refusal(answer.status)}.") from None
        return lease if isinstance(lease, dict) else None


def words_of(error: Exception) -> str:
    """Return what went wrong with a host, in words that do not mention engines."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError) and not cause.errno:  # the limit's own, which says nothing
        return "cannot be reached in time"
    if isinstance(cause, ssl.SSLError):  # its number is none of the system's
        why = getattr(cause, "verify_message", "") or cause.strerror or str(cause)
        return f"cannot be reached by TLS: {why.lower()}"
    if isinstance(cause, OSError):
        number = cause.errno or 0
        why = os.strerror(number) if number > 0 else cause.strerror or str(cause) or "it closed the connection"
        return f"cannot be reached: {why.lower()}"
    return str(error).replace("The engine", "it").replace("the engine", "it").rstrip(".")


def _refusal(status: int) -> str:
    """Describe what a status means to a gateway."""
    meanings = {
        401: "wants another key: see `hosts.NAME.key`",
        403: "refuses the gateway: see `hosts.NAME.key`",
        404: "has no reports: it is not llmux, or an older version",
        400: "does not understand the question: is it a llmux of an older version?",
    }
    return meanings.get(status, f"answered with status {status}")


def lease_path(lease: Mapping[str, Any]) -> str:
    """Return the path at which a host ends a lease."""
    return f"/llmux/lease?id={quote(str(lease.get('id', '')), safe='')}"

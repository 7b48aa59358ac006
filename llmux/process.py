"""llmux as a process: the socket, the signals, the order of start, reload and stop.

Start: the configuration is read and checked, the port is bound, then the application starts, which runs the
first hooks. Reload: on HUP, and when the configuration's or the policy's file changes; a mistake in it changes
nothing. Stop: see ``llmux.core.lifecycle``; the listener stays open meanwhile, so that new clients get an answer.

``Notifier`` tells systemd, by the sd_notify protocol (sd_notify(3)), for a unit with ``Type=notify`` and a
watchdog; nothing happens, and nothing fails, where there is no systemd. ``changes`` watches files, by the kernel's
events and by looking every few seconds: the kernel does not tell of a file that is bind-mounted into a container
and replaced on the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from llmux.app import FRONT, build_app
from llmux.config import Config
from llmux.config.checks import open_to_all, operators
from llmux.config.setting_types import working_folder
from llmux.control import ControlSocket, open_control
from llmux.errors import ConfigError, LLMuxError
from llmux.middleware import Front
from llmux.observability.notices import EventLog
from llmux.observability.state_file import NoState, StateFile
from llmux.plugins import file_of
from llmux.runtime import Switcher
from llmux.runtime.engine_locks import EngineLocks, most_locks
from llmux.server import BACKLOG, Runner
from llmux.upstream import native
from llmux.upstream.sockets import probe_when_silent


class Notifier:
    """Sends states to the socket that ``$NOTIFY_SOCKET`` names."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog: float | None = None
        """How often to call ``alive``, in seconds: half of what systemd waits. None: no watchdog."""
        if mine and watchdog.isdigit() and int(watchdog) > 0:
            self.watchdog = int(watchdog) / 2e6

    def ready(self, status: str) -> None:
        """The start, or a reload, is done."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """A reload begins."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The stop begins."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """All is well."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), self._address)
        except OSError:
            # systemd is not there any more, or slow: its watchdog will say so.
            return


CHANGED = "file changed"  # why the configuration is read again
LOOK = 5.0  # seconds between two looks
STEP = 300  # milliseconds between two looks at what the kernel has told; it is taken in at the second
DEBOUNCE = 600  # milliseconds: editors write in several steps


def fingerprint(files: Iterable[Path]) -> tuple[tuple[int, ...] | None, ...]:
    """Return what changes when one of the files does."""
    return tuple(_stat(file) for file in files)


def _stat(file: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)  # noqa: PTH116 - follows links, as opening does
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


async def changes(files: Callable[[], Iterable[Path]], *, look: float = LOOK) -> AsyncIterator[None]:
    """Yield after every change of one of ``files()``; a file that vanishes is waited for."""
    seen = fingerprint(files())
    async for _ in _ticks(files, look):
        now = fingerprint(files())
        if now != seen:
            seen = now
            if None not in now:
                yield


async def _ticks(files: Callable[[], Iterable[Path]], look: float) -> AsyncIterator[None]:
    """Yield when something may have changed, at least every ``look`` seconds."""
    # An extra; and the kernel watches for so many programs only, and no folder that is not there.
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        from watchfiles import awatch  # noqa: PLC0415

        folders = {file.parent for file in files()}
        async for _ in awatch(
            *folders,
            watch_filter=None,
            recursive=False,
            debounce=DEBOUNCE,
            step=STEP,
            rust_timeout=int(look * 1000),
            yield_on_timeout=True,
        ):
            yield
    while True:
        await asyncio.sleep(look)
        yield


LAST_WORDS = 1.0  # seconds that what is still connected has after the stop, as event streams
KEPT = 16 << 20  # bytes of memory that stay with the process when they are free
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
GARBAGE_AT = 20_000  # more objects than at the last look: Python's 700 costs a twentieth of a stream's CPU
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESTART_NEEDED = (
    "host",
    "port",
    "state_path",
    "ledger_path",
    "ledger_keep",
    "otlp",
    "fleet",
    "log_level",
    "log_format",
)


class Process:
    """One running llmux. ``read`` reads the configuration again; ``announce`` tells people that it runs."""

    restart_needed: tuple[str, ...] = RESTART_NEEDED
    runs_hooks = True

    def __init__(
        self, config: Config, read: Callable[[], Config], announce: Callable[[str, Config], None]
    ) -> None:
        self._config = config
        self._running = config  # what host, port and state came from
        self._read = read
        self._announce = announce
        self._log = EventLog(base_url=f"http://127.0.0.1:{config.port}")
        self._systemd = Notifier()
        self._reloads: asyncio.Queue[str] = asyncio.Queue()  # that are asked for, and why
        self._read_as: tuple[tuple[int, ...] | None, ...] = ()  # the fingerprint of what was read last
        self._ending = asyncio.Event()
        self._at_once = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal says to stop. Raises LLMuxError when address or state file cannot be had."""
        config = self._config
        try:
            listener = _listen(config.host, config.port)
        except OSError as error:
            where = f"{_bracketed(config.host)}:{config.port}"
            why = error.strerror or error
            raise ConfigError(f"cannot listen on {where}: {why}; choose another with -p PORT") from error
        with contextlib.closing(listener):
            host, port = listener.getsockname()[:2]
            self._log.base_url = f"http://{_bracketed(host)}:{port}"
            _raise_open_files(self._log)
            app, switcher = self._build(config)
            front = app[FRONT]
            front.port = port
            front.configure(config)
            self._listen_to_signals()
            runner = Runner(app, self._log)
            chores = [self._watch(), self._reload(switcher, front), self._beat()]
            chores += self._joining(config, switcher)
            tasks = [asyncio.create_task(chore) for chore in chores]
            try:
                await self._set_up(runner)
                await web.SockSite(runner, listener, backlog=BACKLOG).start()
                control = await self._open_control(runner, host, port)
                with contextlib.nullcontext() if control is None else contextlib.closing(control):
                    self._started(host, port)
                    _settle_memory()
                    await self._until_stopped(switcher)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=LAST_WORDS)
                await self._clean_up(runner)
                for number in SIGNALS:  # one that comes in the last moment does not change the exit code
                    signal.signal(number, signal.SIG_IGN)

    # ---- what differs between a host and a gateway

    def _build(self, config: Config) -> tuple[web.Application, Switcher]:
        """Return the application, and what serves its requests."""
        path = config.state_path
        store = NoState() if path is None else StateFile(path, self._log.emit)
        app, switcher = build_app(config, store=store, log=self._log)
        most = most_locks(len(config.models))
        switcher.engine_locks = EngineLocks(self._log, str(config.file or ""), most)
        return app, switcher

    def _joining(self, config: Config, switcher: Switcher) -> Iterable[Coroutine[Any, Any, None]]:
        """Return what makes it known to gateways, if anything does. Raises ConfigError."""
        if config.fleet is None:
            return ()
        from llmux.fleet.store import Registration  # noqa: PLC0415 - one host has no use for it

        return (Registration(config.fleet, switcher, self._log).run(),)

    async def _set_up(self, runner: web.AppRunner) -> None:
        """Start the application. Raises ConfigError for what it cannot use."""
        try:
            await runner.setup()
        except OSError as error:  # the only file that is opened there
            why, path = error.strerror or error, self._config.state_path
            raise ConfigError(
                f"{path} cannot be used: {why}; give another file, or null for none", path="state"
            ) from error

    def _told(self, config: Config) -> dict[str, Any]:
        """Return what a start and a reload are told with."""
        return {"models": list(config.models), "policy": config.policy.use}

    def _in_short(self, config: Config) -> str:
        """Return what systemd shows of it."""
        return f"{len(config.models)} models"

    def _watched(self) -> Iterable[Path]:
        """Return the files whose change is a reload."""
        policy = file_of(self._config.policy.use, self._config.folder)
        return [file for file in (self._config.file, policy) if file is not None]

    # ---- start and stop

    async def _open_control(self, runner: Runner, host: str, port: int) -> ControlSocket | None:
        try:
            control = open_control(host, port, os.environ)
        except OSError as error:
            self._log.emit("control_socket_unavailable", error=error.strerror or str(error))
            return None
        await runner.serve_control(control.listener)
        return control

    def _started(self, host: str, port: int) -> None:
        config = self._config
        url = f"http://{_bracketed(host)}:{port}"
        self._log.emit(
            "started",
            url=url,
            **self._told(config),
            operators=operators(config),
            loop=type(asyncio.get_running_loop()).__module__.partition(".")[0],
            relay=native.which(),
        )
        if host.startswith("127.") or host == "::1":
            self._log.emit(
                "listening_on_loopback", hint="set `host: 0.0.0.0` and `api_keys` to open it to other machines"
            )
        for warning in config.warnings:
            self._log.emit("config_warning", warning=warning)
        if self.runs_hooks and config.folder != working_folder():
            self._log.emit("original_difference", hint=f"hooks run in {config.folder}, the configuration's folder")
        self._announce(url, config)
        self._systemd.ready(f"{self._in_short(config)} on {url}")

    async def _until_stopped(self, switcher: Switcher) -> None:
        await self._ending.wait()
        self._log.emit("stopping")
        self._systemd.stopping()
        stopping = asyncio.create_task(switcher.stop(), name="stop")
        at_once = asyncio.create_task(self._at_once.wait(), name="stop at once")
        await asyncio.wait({stopping, at_once}, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        if stopping.done():
            stopping.result()
            return
        stopping.cancel()
        switcher.stopped.set()
        await switcher.close()

    async def _clean_up(self, runner: Runner) -> None:
        runner._shutdown_timeout = 0.01 if self._at_once.is_set() else LAST_WORDS  # noqa: SLF001 - 0: for ever
        await runner.cleanup()

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def end() -> None:
            (self._at_once if self._ending.is_set() else self._ending).set()

        def received(number: int, _frame: object) -> None:
            if number == signal.SIGHUP:
                loop.call_soon_threadsafe(self._reloads.put_nowait, "signal")
            else:
                loop.call_soon_threadsafe(end)

        # Not the loop's handlers: it would put the default back, which kills, before the process has ended.
        for number in SIGNALS:
            signal.signal(number, received)

    async def _beat(self) -> None:
        """Tell systemd's watchdog that the event loop runs."""
        if self._systemd.watchdog is not None:
            while True:
                self._systemd.alive()
                await asyncio.sleep(self._systemd.watchdog)

    # ---- reload

    async def _watch(self) -> None:
        async for _ in changes(self._watched):
            if self._config.watch:
                self._reloads.put_nowait(CHANGED)

    async def _reload(self, switcher: Switcher, front: Front) -> None:
        while True:
            asked = [await self._reloads.get()]
            while not self._reloads.empty():  # one reading serves all that came before it
                asked.append(self._reloads.get_nowait())
            because = next((why for why in asked if why != CHANGED), CHANGED)
            if self._ending.is_set():
                return
            if because == CHANGED and fingerprint(self._watched()) == self._read_as:
                continue  # a signal was quicker
            self._systemd.reloading()
            try:
                # Not on the loop: of hundreds of models it takes 0.1 s, and answers are under way.
                found = await asyncio.to_thread(self._found)
                if self._ending.is_set():
                    return
                self._take_over(found, switcher, front, because)
            except Exception as error:  # noqa: BLE001 - the next one may do
                switcher.last_reload_error = str(error)
                self._log.emit("internal_error", error=str(error), during="reload", exc_info=error)
                self._systemd.ready("a reload failed, see the log")

    def _found(self) -> Config | Exception:
        """Return the configuration as it is now, or what is wrong with it."""
        self._read_as = fingerprint(self._watched())  # before: what is written meanwhile is another change
        try:
            return self._read()
        except Exception as error:  # noqa: BLE001 - it is raised where the others are
            return error

    def _take_over(self, found: Config | Exception, switcher: Switcher, front: Front, because: str) -> None:
        try:
            if isinstance(found, Exception):
                raise found
            config = found
            # Another `host` takes a restart: what the old one lets in is what counts.
            for problem in open_to_all(self._running.host, config):
                raise ConfigError(f"llmux listens on an address that {problem.message}", path="api_keys")
            switcher.replace(config)
        except LLMuxError as error:
            switcher.last_reload_error = str(error)
            self._log.emit("config_rejected", error=str(error))
            if switcher.audit is not None:
                switcher.audit.put("reload_rejected", because=because, error=str(error))
            self._systemd.ready("the configuration has a mistake; the old one is in force")
            return
        front.configure(config)
        for setting in self.restart_needed:
            if getattr(config, setting) != getattr(self._running, setting):
                self._log.emit("restart_needed", setting=setting.removesuffix("_path"))
        for warning in config.warnings:
            self._log.emit("config_warning", warning=warning)
        switcher.last_reload_error = None
        if switcher.audit is not None:
            switcher.audit.reloaded(because, self._config, config)
        self._config = config
        self._log.emit("config_reloaded", **self._told(config))
        self._systemd.ready(self._in_short(config))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A client whose machine has gone says nothing, and while one waits, what forgets silent connections on
        # the way (NAT, a load balancer) would forget its own.
        with contextlib.suppress(OSError):  # not every system that says it is Linux has all of these options
            probe_when_silent(listener)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _settle_memory() -> None:
    """Have the garbage collector look at new objects only, and less often; and keep memory that becomes free.

    glibc would give it back after each piece of a large answer, only to ask for it again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_AT, 20, 20)
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        with contextlib.suppress(AttributeError, OSError):  # another C library
            change = ctypes.CDLL(None).mallopt
            change(_TRIM_THRESHOLD, KEPT)
            change(_MMAP_THRESHOLD, KEPT // 4)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _raise_open_files(log: EventLog) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.emit("open_files_limit", soft=soft, hard=hard, error=str(error))
    else:
        log.emit("open_files_limit", soft=hard, was=soft)

"""llmux as a process: the socket, the signals, the order of start and stop.

Start: the configuration is read and checked, the port is bound, then the application starts, which runs the
first hooks. Stop: see ``llmux.core.stopping``; the listener stays open meanwhile, so that who comes is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from llmux.app import FRONT, build_app
from llmux.config import Config
from llmux.errors import BadRequestError, ConfigError, LLMuxError, RequestError
from llmux.middleware import Front
from llmux.middleware.identity import request_id
from llmux.observability.notices import EventLog
from llmux.observability.state import NoState, StateFile
from llmux.proxy import error_response
from llmux.runtime import Switcher

HEADER_LIMIT = 32 * 1024  # bytes of one header field, and of the request line
BACKLOG = 4096
LINGER = 1.0  # seconds to read on after an answer that came before the end of the request's body


class Connection(RequestHandler):
    """One client's connection. It answers what aiohttp would answer by itself in llmux's way."""

    __slots__ = ("_event_log",)

    def __init__(self, *args: Any, event_log: EventLog, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._event_log = event_log

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer malformed HTTP (400) and mistakes of llmux (500)."""
        error: RequestError
        if isinstance(exc, ConnectionError):  # the client has left; whoever noticed has told it
            raise exc
        if status == BadRequestError.status:
            reason = str(message or "").strip().partition("\n")[0].rstrip(":") or "malformed HTTP"
            self._event_log.emit("malformed_request", client=request.remote, error=reason)
            error = BadRequestError(f"Malformed HTTP: {reason}", code="malformed_request")
        else:
            self._event_log.emit("internal_error", error=repr(exc), exc_info=exc)
            error = RequestError("llmux made a mistake; its log says more.")
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer is under way already")
        headers = [
            ("X-Request-ID", request_id(request.headers.get("X-Request-ID"))),
            ("X-LLMux-Queue-Seconds", "0.000"),
        ]
        response = error_response(error, anthropic=False, headers=headers)
        response.force_close()
        return response

    def data_received(self, data: bytes) -> None:
        """Tell the reader of a body at once when its framing breaks in the middle."""
        before = len(self._messages)
        super().data_received(data)
        if len(self._messages) == before or not isinstance(self._messages[-1][0], _ErrInfo):
            return
        current = self._current_request
        payload = self._messages[-2][1] if before else current.content if current is not None else None
        if isinstance(payload, StreamReader) and not payload.is_eof():
            # The answer to that request says what was wrong, and is the last one on this connection.
            self._messages.pop()
            self._close = True
            payload.set_exception(BadRequestError("The body's framing is broken.", code="incomplete_body"))
            payload.feed_eof()


class Server(web.Server):
    """Makes our connections."""

    def __call__(self) -> RequestHandler:
        """Return the protocol for a new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves the application as production must: clients that leave are noticed, bodies are left as they are."""

    def __init__(self, app: web.Application, log: EventLog) -> None:
        super().__init__(app)
        self._event_log = log

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        front = self.app.get(FRONT)
        return Server(
            made.request_handler if front is None else front.server_handler(made.request_handler),
            request_factory=made.request_factory,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
            lingering_time=LINGER,
            event_log=self._event_log,
        )


class Process:
    """One running llmux. ``read`` reads the configuration again, for a reload."""

    def __init__(
        self, config: Config, read: Callable[[], Config], announce: Callable[[str, Config], None]
    ) -> None:
        self._config = config  # of the start: what a reload cannot change
        self._read = read
        self._announce = announce
        self._log = EventLog(base_url=f"http://127.0.0.1:{config.port}")
        self._ending = asyncio.Event()
        self._at_once = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal says to stop. Raises LLMuxError when the address or the state file cannot be had."""
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
            path = config.state_path
            store = NoState() if path is None else StateFile(path, self._log.emit)
            app, switcher = build_app(config, store=store, log=self._log)
            front = app[FRONT]
            front.port = port
            front.configure(config)
            self._listen_to_signals(switcher, front)
            runner = Runner(app, self._log)
            try:
                await _set_up(runner, path)
                await web.SockSite(runner, listener, backlog=BACKLOG).start()
                self._started(host, port)
                await self._until_stopped(switcher)
            finally:
                await self._clean_up(runner)
        self._log.emit("stopped")

    def _started(self, host: str, port: int) -> None:
        config = self._config
        url = f"http://{_bracketed(host)}:{port}"
        self._log.emit("started", url=url, models=list(config.models), policy=config.policy.use)
        if host.startswith("127.") or host == "::1":
            self._log.emit("listening_on_loopback", hint="set `host: 0.0.0.0` to open it to other machines")
        for warning in config.warnings:
            self._log.emit("config_warning", warning=warning)
        if config.folder != Path.cwd():
            self._log.emit("original_difference", hint=f"hooks run in {config.folder}, the configuration's folder")
        self._announce(url, config)

    async def _until_stopped(self, switcher: Switcher) -> None:
        await self._ending.wait()
        self._log.emit("stopping")
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
        # What is still connected has had its grace.
        # (For aiohttp 0 means for ever.)
        runner._shutdown_timeout = 0.01 if self._at_once.is_set() else 1.0  # noqa: SLF001
        await runner.cleanup()

    def _listen_to_signals(self, switcher: Switcher, front: Front) -> None:
        loop = asyncio.get_running_loop()

        def end() -> None:
            (self._at_once if self._ending.is_set() else self._ending).set()

        loop.add_signal_handler(signal.SIGTERM, end)
        loop.add_signal_handler(signal.SIGINT, end)
        loop.add_signal_handler(signal.SIGHUP, self._reload, switcher, front)

    def _reload(self, switcher: Switcher, front: Front) -> None:
        try:
            config = self._read()
            switcher.replace(config)
        except LLMuxError as error:
            switcher.last_reload_error = str(error)
            self._log.emit("config_rejected", error=str(error))
            return
        front.configure(config)
        for setting in ("host", "port", "state_path", "log_level", "log_format"):
            if getattr(config, setting) != getattr(self._config, setting):
                self._log.emit("restart_needed", setting=setting.removesuffix("_path"))
        for warning in config.warnings:
            self._log.emit("config_warning", warning=warning)
        switcher.last_reload_error = None
        self._log.emit("config_reloaded", models=list(config.models), policy=config.policy.use)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


async def _set_up(runner: web.AppRunner, state: Path | None) -> None:
    try:
        await runner.setup()
    except OSError as error:  # the only file that is opened there
        why = error.strerror or error
        raise ConfigError(f"{state} cannot be used: {why}; give another file, or null for none", path="state") from error


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

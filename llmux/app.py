"""The whole application, from a configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmux.admin import Admin
from llmux.admin.endpoints import BEAT
from llmux.config import Config
from llmux.middleware import Front
from llmux.observability import open_tracing
from llmux.observability.notices import EventLog
from llmux.observability.state_file import StateStore
from llmux.proxy import Forwarder
from llmux.runtime import Switcher

if TYPE_CHECKING:
    from llmux.accounts.accounting import Accounting
    from llmux.observability.spans import Tracing

SWITCHER = web.AppKey("switcher", Switcher)
FRONT = web.AppKey("front", Front)


def build_app(
    config: Config, *, store: StateStore | None = None, log: EventLog | None = None, tracer_provider: Any = None
) -> tuple[web.Application, Switcher]:
    """Return llmux as an aiohttp application, and its switcher.

    The switcher starts and stops with the application. Serve it with ``handler_cancellation=True`` (as
    ``llmux.server`` does), or clients that leave are only noticed after a second, and with
    ``auto_decompress=False``, or compressed bodies reach the engines unpacked. Without ``store`` nothing is
    kept across restarts. With a ``tracer_provider`` of OpenTelemetry's spans go there, whatever ``otlp`` says.

    Raises PolicyLoadError, and ConfigError for ``otlp`` without OpenTelemetry.
    """
    tracing = open_tracing(config.otlp, tracer_provider)
    forwarder = Forwarder()
    log = log or EventLog(base_url=f"http://127.0.0.1:{config.port}")
    switcher = Switcher(
        config, store=store, log=log, on_sleep=forwarder.discard_idle, on_close=forwarder.close, own=True
    )
    front = Front(switcher, forwarder, own=True, tracing=tracing)
    _trace(switcher, tracing)
    accounting = _account(switcher, front)
    admin = Admin(switcher, accounting)
    app = web.Application(middlewares=[front.middleware()])
    app[SWITCHER] = switcher
    app[FRONT] = front
    app.add_routes(admin.routes())

    async def life(_app: web.Application) -> AsyncIterator[None]:
        switcher.start()
        beating = asyncio.create_task(_beat(admin), name="heartbeat")
        yield
        beating.cancel()
        await asyncio.to_thread(front.close)  # the last requests end after the switcher
        if accounting is not None:
            await asyncio.to_thread(accounting.close)
        if tracing is not None and tracer_provider is None:
            await asyncio.to_thread(tracing.close)

    async def stop(_app: web.Application) -> None:
        # Before aiohttp waits for the handlers: what is queued has to be told.
        if not switcher.stopped.is_set():
            await switcher.stop()

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(stop)
    return app, switcher


def middleware_for(config: Config, *, tracer_provider: Any = None) -> tuple[Front, Switcher]:
    """Return llmux as a middleware for an application of your own, and its switcher.

    Put ``front.middleware()`` among the application's middlewares, call ``switcher.start()`` when it starts, and
    await ``switcher.stop()`` when it shuts down (``on_shutdown``: before aiohttp waits for the handlers). Spans go
    to a ``tracer_provider`` of OpenTelemetry's; ``otlp`` is left to you.

    Raises PolicyLoadError.
    """
    tracing = open_tracing(None, tracer_provider)
    forwarder = Forwarder()
    switcher = Switcher(config, on_sleep=forwarder.discard_idle, on_close=forwarder.close)
    _trace(switcher, tracing)
    front = Front(switcher, forwarder, tracing=tracing)
    accounting = _account(switcher, front)

    async def close() -> None:
        await forwarder.close()
        await asyncio.to_thread(front.close)
        if accounting is not None:
            await asyncio.to_thread(accounting.close)

    switcher.on_close = close
    return front, switcher


def _trace(switcher: Switcher, tracing: Tracing | None) -> None:
    if tracing is not None:
        switcher.subscribe(tracing.follow(switcher.clock))
        switcher.history.on_hook = tracing.hook_ended


def _account(switcher: Switcher, front: Front) -> Accounting | None:
    if switcher.config.ledger is None:
        return None
    from llmux.accounts.accounting import Accounting  # noqa: PLC0415 - the others have no use for it

    accounting = Accounting(switcher)
    accounting.gate = front.gate
    switcher.accounts = accounting
    return accounting


async def _beat(admin: Admin) -> None:
    while True:
        admin.beat()
        await asyncio.sleep(BEAT)

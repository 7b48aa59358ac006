"""A gateway as an application and as a process: the server, the front and the relay are those of a host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from llmux.app import FRONT, SWITCHER
from llmux.config.gateway import GatewayConfig
from llmux.core.phases import Phase
from llmux.fleet import fleet_view
from llmux.fleet.loading import load_route
from llmux.fleet.placement import Rules
from llmux.gateway.dispatcher import Dispatcher
from llmux.gateway.handler import GatewayHandler
from llmux.gateway.host_path import HostPath
from llmux.gateway.hosts import Host, Hosts
from llmux.gateway.store_sync import Sharing
from llmux.gateway.views import FleetMetrics, Views
from llmux.middleware import Front
from llmux.middleware.context import Reporting
from llmux.middleware.fast_path import FastPath
from llmux.middleware.paths import ForwardedPaths
from llmux.observability import open_audit, put_audit
from llmux.observability.metrics import Metrics
from llmux.observability.notices import EventLog
from llmux.observability.request_log import RequestLog
from llmux.plugins import comes_from_file, file_of
from llmux.process import Process
from llmux.proxy import Forwarder
from llmux.runtime import Switcher
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.observability.audit import Audit

USE, OPTIONS = "route.use", "route.options"
SAVE_EVERY = 2.0  # seconds until the next attempt
SAVE_SOON = 0.05  # least seconds between two


class Gateway:
    """All of one gateway: the hosts, the requests in progress, and the counts."""

    accounts = None

    def __init__(self, config: GatewayConfig, log: EventLog) -> None:
        """Raise ConfigError for a route that cannot be loaded."""
        self.config = config
        self.log = log
        self.audit: Audit | None = None
        self.metrics = Metrics()
        self.metrics.registry.register(FleetMetrics(self))
        self.last_reload_error: str | None = None
        self.started_at = time.monotonic()
        self.stopped = asyncio.Event()
        self.stopping = False
        self._saving: asyncio.Task[None] | None = None
        self._unsaved = ""
        rules = Rules(config.fleet.max_queued, config.fleet.max_wait)
        self.dispatcher = Dispatcher(load_route(config.route.use, config.route.options, config.folder), rules, log)
        self.requests = RequestLog(self.now)
        self.hosts = Hosts(self.dispatcher, log)
        self.hosts.on_names = self.metrics.declare
        self.forwarder = Forwarder()
        store = config.store
        self.sharing = None if store is None else Sharing(self, store.get_secret_value())
        self.handler = GatewayHandler(config, self.hosts, self.dispatcher, self.forwarder, self.now)
        if (sharing := self.sharing) is not None:
            self.dispatcher.placement.complete = False  # until the store has reported which hosts there are
            self.handler.store_trouble = lambda: sharing.trouble if sharing.asked else ""
        self.hold_keys(config)

    def now(self) -> float:
        """Return the time on the loop's clock."""
        return self.dispatcher.now()

    # ---- life

    def start(self) -> None:
        """Follow the hosts. The loop runs, the port is bound."""
        if (audit := open_audit(self.config.audit_path, self.log.emit)) is not None:
            self.audit = put_audit(audit, self.audit, self.metrics.registry)
            audit.put("started", version=__version__, pid=os.getpid(), hosts=list(self.config.hosts))
        self.dispatcher.start()
        self.hosts.every = self.config.fleet.report_every
        self.configure_hosts()
        if self.sharing is not None:
            self.sharing.start()
        self._saving = asyncio.get_running_loop().create_task(self._save(), name="llmux: save budgets")

    def configure_hosts(self) -> None:
        """Follow the hosts of the configuration and of the store."""
        found = {} if self.sharing is None else self.sharing.found
        self.hosts.configure({**found, **self.config.hosts})

    def hold_keys(self, config: GatewayConfig) -> None:
        """Apply the keys' roles, limits and budgets. Raises ConfigError."""
        gate = self.handler.gate
        if gate is None:
            if not any(entry.managed for entry in config.api_keys):
                return
            from llmux.gateway.shared_limits import SharedGate  # noqa: PLC0415 - most gateways have no use for it

            gate = SharedGate(self.now, self._is_awake)
        gate.configure_gateway(config, self.hosts.stands_for)
        if gate.unreadable:
            self.log.emit("state_file_unreadable", path=str(config.state_path), error=gate.unreadable)
            gate.unreadable = ""
        self.handler.gate = gate

    def _is_awake(self, model: str) -> bool:
        fleet = self.dispatcher.placement.fleet
        reports = [host.report for host in fleet.holders(model) if host.report is not None]
        return any(model in each.models and each.models[model].phase is Phase.AWAKE for each in reports)

    def replace(self, config: GatewayConfig) -> None:
        """Put a new configuration into force. Raises ConfigError, and changes nothing then."""
        placement, old = self.dispatcher.placement, self.config
        new_route = config.route != old.route or comes_from_file(config.route.use)
        route = load_route(config.route.use, config.route.options, config.folder) if new_route else placement.route
        self.hold_keys(config)
        if config.audit_path != old.audit_path:
            self.audit = put_audit(open_audit(config.audit_path, self.log.emit), self.audit, self.metrics.registry)
        placement.route = route
        placement.rules = Rules(config.fleet.max_queued, config.fleet.max_wait)
        self.hosts.every = config.fleet.report_every
        self.handler.configure(config)
        self.config = config
        self.configure_hosts()

    async def stop(self) -> None:
        """Stop in order: requests in progress may finish within the grace. Returns when all have ended."""
        self.stopping = True
        self.dispatcher.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.shutdown_grace):
                await self.handler.idle.wait()
        self.handler.cut()
        await self.close()

    async def close(self) -> None:
        """Release everything."""
        self.dispatcher.close()
        if self.sharing is not None:
            await self.sharing.close()
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait({self._saving})
            self._save_now()
        await self.hosts.close()
        await self.forwarder.close()
        if self.audit is not None:
            self.audit.put("stopped")
            await asyncio.to_thread(self.audit.close)
        self.stopped.set()
        self.log.emit("stopped")

    async def _save(self) -> None:
        """Save what budgets have spent."""
        while True:
            gate = self.handler.gate
            if gate is None:  # a reload may bring one
                await asyncio.sleep(SAVE_EVERY)
                continue
            await gate.unsaved.wait()
            gate.unsaved.clear()
            self._save_now()
            await asyncio.sleep(SAVE_EVERY if self._unsaved else SAVE_SOON)
            if self._unsaved:
                gate.unsaved.set()

    def _save_now(self) -> None:
        trouble = ""
        try:
            if self.handler.gate is not None:
                self.handler.gate.save()
        except OSError as error:
            trouble = f"{error.filename}: {error.strerror}"
        if trouble and trouble != self._unsaved:
            self.log.emit("state_file_unwritable", path=str(self.config.state_path), error=trouble)
        self._unsaved = trouble

    # ---- looking

    def view(self, host: Host) -> fleet_view.Host | None:
        """Return what the placement knows of a host."""
        return self.dispatcher.placement.fleet.hosts.get(host.name)

    def state(self, host: Host) -> str:
        """Say in a word whether a host takes requests."""
        seen = self.view(host)
        if host.lost or (seen is not None and seen.ejected):
            return "unreachable"
        if seen is None or seen.report is None:
            return "unknown"
        if not seen.fresh(self.now()):
            return "stale"
        if seen.report.leased:
            return "leased"
        return "ready" if seen.report.ready else "not ready"


class GatewayFront(Front):
    """The front of a gateway: it judges requests as that of a host does."""

    def __init__(self, gateway: Gateway) -> None:
        # Of a switcher the front uses what a gateway has, too: its clock, log, metrics and list of requests.
        self._gateway = gateway
        super().__init__(cast("Switcher", gateway), gateway.forwarder, own=True, handler=gateway.handler)

    def _make_fast_path(self, reporting: Reporting, forwarder: Forwarder) -> FastPath:
        return HostPath(reporting, forwarder, self._gateway.handler)

    def configure(self, config: Any) -> None:
        """Take over a configuration."""
        assert isinstance(config, GatewayConfig)
        paths, gateway = ForwardedPaths(config.forward), self._gateway
        hosts = self.let_in(config, paths)
        self.fast_path.configure(
            paths,
            lambda _key, _path: gateway.hosts.known,
            most=config.max_body,
            keys=self._keys,
            hosts=hosts,
            alone=True,
            gate=gateway.handler.gate,
        )


def build_gateway(config: GatewayConfig, log: EventLog) -> tuple[web.Application, Gateway]:
    """Return a gateway as an aiohttp application, and what it knows. Raises ConfigError."""
    gateway = Gateway(config, log)
    front = GatewayFront(gateway)
    app = web.Application(middlewares=[front.middleware()])
    app[SWITCHER] = cast("Switcher", gateway)
    app[FRONT] = front
    app.add_routes(Views(gateway).routes())

    async def life(_app: web.Application) -> AsyncIterator[None]:
        gateway.start()
        yield

    async def stop(_app: web.Application) -> None:
        if not gateway.stopped.is_set():
            await gateway.stop()

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(stop)
    return app, gateway


class GatewayProcess(Process):
    """One running gateway."""

    def __init__(
        self,
        config: GatewayConfig,
        read: Callable[[], GatewayConfig],
        announce: Callable[[str, GatewayConfig], None],
    ) -> None:
        # A process asks of its configuration what a gateway's has, too, but in the methods below.
        super().__init__(cast("Any", config), cast("Any", read), cast("Any", announce))

    restart_needed = ("host", "port", "store", "state", "log_level", "log_format")
    runs_hooks = False

    def _build(self, config: Any) -> tuple[web.Application, Switcher]:
        app, gateway = build_gateway(config, self._log)
        return app, cast("Switcher", gateway)

    def _joining(self, _config: Any, _switcher: Switcher) -> Iterable[Coroutine[Any, Any, None]]:
        return ()

    async def _set_up(self, runner: web.AppRunner) -> None:
        await runner.setup()

    def _told(self, config: Any) -> dict[str, Any]:
        return {"hosts": list(config.hosts), "route": config.route.use}

    def _in_short(self, config: Any) -> str:
        return f"a gateway to {len(config.hosts)} hosts"

    def _watched(self) -> Iterable[Path]:
        config = cast("GatewayConfig", self._config)
        files = [config.file, file_of(config.route.use, config.folder)]
        return [file for file in files if file is not None]

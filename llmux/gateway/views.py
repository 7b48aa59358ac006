"""What operators, clients and Prometheus see of the fleet: the gateway's own paths."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from aiohttp import hdrs, web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmux.admin.endpoints import MODEL_LISTS, page_routes, read_options, refuse_unknown, wants_page
from llmux.config.schema import MIB
from llmux.core.phases import Phase
from llmux.errors import BadRequestError, ConflictError, EngineError, PathRefusedError
from llmux.extract import BodyBudget
from llmux.fleet.store import NONSENSE
from llmux.gateway.hosts import Host, lease_path
from llmux.middleware.front import GRANT
from llmux.middleware.model_handler import unknown_model
from llmux.observability.metrics import CONTENT_TYPE, Samples, filled
from llmux.version import __version__

if TYPE_CHECKING:
    from llmux.gateway.hosts import Hosts
    from llmux.gateway.service import Gateway


HELP: dict[str, str] = {
    "llmux_fleet_host_up": "1 while the host reports and takes requests, else 0.",
    "llmux_fleet_report_age_seconds": "Age of the host's last report.",
    "llmux_fleet_host_in_flight": "Requests of this gateway that are on the host, in its queue or in flight.",
    "llmux_fleet_host_queued": "Requests that wait on the host, as it reported last.",
    "llmux_fleet_store_up": "1 while the store answers, else 0 (with `fleet.store`).",
    "llmux_fleet_queue_depth": "Requests that wait in the gateway for a host, by model.",
    "llmux_fleet_placed_total": "Requests that were sent to the host; one that was sent again counts again.",
    "llmux_fleet_retried_total": "Those of them that another host had not taken.",
    "llmux_fleet_refused_total": "Requests that the host refused before their admission, by code.",
    "llmux_fleet_broken_total": "Requests whose connection ended without an answer; these are not sent again.",
    "llmux_fleet_withdrawn_total": "Requests that were asked back from the host's queue for a better one.",
    "llmux_fleet_ejected_total": "How often the host was found unreachable.",
    "llmux_fleet_wakes_total": "Models that woke on the host, as far as its reports told.",
}
_REASON = "drained through the gateway"
_PHASES = [Phase.AWAKE, Phase.WAKING, Phase.DRAINING, Phase.SLEEPING, Phase.ASLEEP]  # the best first
_ACCEPTED = 202


class FleetMetrics(Collector):
    """The metrics of the fleet, collected on request."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """Yield every metric; called by the registry."""
        gateway, now = self._gateway, self._gateway.now()
        rows = [(host, gateway.view(host)) for host in gateway.hosts.all()]
        ready = [((host.name,), gateway.state(host) == "ready") for host, _ in rows]
        ages = [((host.name,), now - host.heard) for host, _ in rows if host.heard is not None]
        own = [((host.name,), len(seen.own)) for host, seen in rows if seen is not None]
        reported = [(host, seen.report) for host, seen in rows if seen is not None and seen.report is not None]
        queued = [((host.name,), sum(each.queued for each in report.models.values())) for host, report in reported]
        depths = [((model,), depth) for model, depth in gateway.dispatcher.queued().items()]
        yield _gauge("llmux_fleet_host_up", ready)
        yield _gauge("llmux_fleet_report_age_seconds", ages)
        yield _gauge("llmux_fleet_host_in_flight", own)
        yield _gauge("llmux_fleet_host_queued", queued)
        yield _gauge("llmux_fleet_queue_depth", depths, ("model",))
        if gateway.sharing is not None:
            yield _gauge("llmux_fleet_store_up", [((), float(not gateway.sharing.trouble))], ())
        counted: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for (kind, *labels), count in sorted(gateway.dispatcher.counts.items()):
            counted.setdefault(f"llmux_fleet_{kind}_total", []).append((tuple(labels), count))
        counted["llmux_fleet_wakes_total"] = [((host.name,), host.wakes) for host, _ in rows]
        for name, meaning in HELP.items():
            if name.endswith("_total"):
                names = ("host", "code") if name == "llmux_fleet_refused_total" else ("host",)
                yield filled(CounterMetricFamily, name, meaning, names, counted.get(name, ()))


def _gauge(name: str, samples: Samples, labels: tuple[str, ...] = ("host",)) -> Metric:
    return filled(GaugeMetricFamily, name, HELP[name], labels, samples)


# ---- documents


def fleet_document(gateway: Gateway) -> dict[str, Any]:
    """Return the state of all hosts. Durations are seconds."""
    return {
        "version": __version__,
        "time": time.time(),
        "uptime": time.monotonic() - gateway.started_at,
        "route": gateway.config.route.use,
        "hosts": {host.name: _host(gateway, host) for host in gateway.hosts.all()},
        "queued": gateway.dispatcher.queued(),
        "reload_error": gateway.last_reload_error,
        "store": None if gateway.sharing is None else gateway.sharing.document(),
    }


def _host(gateway: Gateway, host: Host) -> dict[str, Any]:
    seen, now = gateway.view(host), gateway.now()
    models = {} if seen is None or seen.report is None else seen.report.models
    return {
        "url": host.config.url,
        "state": gateway.state(host),
        "trouble": host.trouble or None,
        "version": host.version,
        "age": None if host.heard is None else now - host.heard,
        "awake": [name for name, each in models.items() if each.phase is Phase.AWAKE],
        "waking": [name for name, each in models.items() if each.phase is Phase.WAKING],
        "queued": sum(each.queued for each in models.values()),
        "in_flight": sum(each.in_flight for each in models.values()),
        "placed": 0 if seen is None else len(seen.own),
        "wakes_per_minute": host.wakes_within(60.0, now),
        "models": {
            name: {
                "phase": each.phase.value,
                "queued": each.queued,
                "in_flight": each.in_flight,
                "expected_wait": each.expected_wait,
                "switch_cost": each.switch_cost,
                "placed": 0 if seen is None else sum(1 for _, model in seen.own.values() if model == name),
            }
            for name, each in models.items()
        },
    }


def model_entries(gateway: Gateway) -> list[dict[str, Any]]:
    """Return the entries of ``/v1/models``: the union of the hosts', sorted by id."""
    found: dict[str, Mapping[str, Any]] = {}
    for host in gateway.hosts.all():
        for name, entry in host.entries.items():
            if name in host.names:  # the others are of remotes alone
                found.setdefault(name, entry)
    return [_entry(gateway, name, found[name]) for name in sorted(found)]


def _entry(gateway: Gateway, name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return one host's entry with the state of all."""
    phases: dict[str, Phase] = {}
    queued = in_flight = 0
    for host in gateway.hosts.all():
        seen, model = gateway.view(host), host.names.get(name)
        if seen is None or seen.report is None or model is None or model not in seen.report.models:
            continue
        each = seen.report.models[model]
        phases[host.name] = each.phase
        queued += each.queued
        in_flight += each.in_flight
    best = next((phase for phase in _PHASES if phase in phases.values()), Phase.UNKNOWN)
    ours = told.get("llmux") if isinstance(told.get("llmux"), dict) else {}
    kept = {key: value for key, value in (ours or {}).items() if key not in _OF_ONE_HOST}
    status = {Phase.AWAKE: "loaded", Phase.DRAINING: "loaded", Phase.WAKING: "loading"}.get(best, "unloaded")
    more = {
        "state": best.value,
        "queued": queued + gateway.dispatcher.queued().get(name, 0),
        "in_flight": in_flight,
        "hosts": {host: phase.value for host, phase in phases.items()},
    }
    return {**told, "status": {"value": status}, "llmux": {**kept, **more}}


_OF_ONE_HOST = frozenset({"level", "host_memory", "memory", "pinned", "evicted"})


# ---- routes


class Views:
    """The gateway's own endpoints."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._bodies = BodyBudget(MIB)

    def routes(self) -> list[web.RouteDef]:
        """Return the routes for ``app.add_routes``."""
        return [
            web.get("/", self.index),
            *(web.get(path, self.models) for path in MODEL_LISTS),
            web.get("/v1/models/{model:.+}", self.model),
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/metrics", self.metrics),
            web.get("/llmux/fleet", self.fleet),
            web.get("/llmux/activity", self.activity),
            web.get("/llmux/usage", self.usage),
            *page_routes("fleet.html"),
            web.post("/llmux/fleet/{host}/drain", self.drain),
            web.post("/llmux/fleet/{host}/undrain", self.undrain),
        ]

    async def index(self, request: web.Request) -> web.Response:
        """Say what this is; send a browser to the page."""
        if wants_page(request):
            raise web.HTTPFound("llmux/ui")
        see = ["/v1/models", "/llmux/fleet", "/llmux/ui"]
        return web.json_response({"llmux": "a gateway: many hosts, one endpoint", "see": see})

    async def models(self, request: web.Request) -> web.Response:
        """List what the hosts serve; a key sees what it may use."""
        await self._gateway.hosts.lists()
        grant = request.get(GRANT)
        data = [entry for entry in model_entries(self._gateway) if grant is None or grant.allows(entry["id"])]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        """Show one model, by any of its names."""
        name, grant = request.match_info["model"], request.get(GRANT)
        allowed = (lambda _name: True) if grant is None else grant.allows
        await self._gateway.hosts.lists()
        for host in self._gateway.hosts.all() if allowed(name) else ():
            served = host.names.get(name)
            told = None if served is None else host.entries.get(name) or host.entries.get(served)
            if told is not None:
                return web.json_response(_entry(self._gateway, name, {**told, "id": name}))
        raise unknown_model(name, sorted(filter(allowed, self._gateway.hosts.listed())))

    async def health(self, _request: web.Request) -> web.Response:
        """Say that the gateway works, and what is wrong with hosts."""
        gateway = self._gateway
        notes = [
            f"{host.name}: {state}{f': {host.trouble}' if host.trouble else ''}"
            for host in gateway.hosts.all()
            if (state := gateway.state(host)) != "ready"
        ]
        notes += [
            f"{count} wait for a host that has {model}" for model, count in gateway.dispatcher.queued().items()
        ]
        if gateway.sharing is not None and gateway.sharing.trouble:
            notes.append(f"the store cannot be used, the last view holds: {gateway.sharing.trouble}")
        return web.json_response({"status": "ok", "failing": [], "notes": notes})

    async def ready(self, _request: web.Request) -> web.Response:
        """Say whether any host takes requests: 200 or 503."""
        gateway = self._gateway
        count = sum(gateway.state(host) == "ready" for host in gateway.hosts.all())
        ready = count > 0 and not gateway.stopping
        return web.json_response({"ready": ready, "hosts": count}, status=200 if ready else 503)

    async def metrics(self, _request: web.Request) -> web.Response:
        """Return the metrics in Prometheus' text format."""
        body = await self._gateway.metrics.text()
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def fleet(self, _request: web.Request) -> web.Response:
        """Return the state of all hosts."""
        return web.json_response(fleet_document(self._gateway))

    async def activity(self, request: web.Request) -> web.Response:
        """Return the last requests that have ended, newest first."""
        limit = request.query.get("limit", "200")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 9):  # noqa: PLR2004
            raise BadRequestError('"limit" must be a whole number, as ?limit=20', param="limit")
        query = request.query
        rows = self._gateway.requests.rows(int(limit), model=query.get("model"), key=query.get("key"))
        return web.json_response({"requests": rows})

    async def usage(self, request: web.Request) -> web.Response:
        """Return what each key used on all hosts: JSON, or CSV to a client that accepts that."""
        from llmux.accounts.usage import as_csv  # noqa: PLC0415 - few gateways have a use for it

        document = await read_usage(self._gateway.hosts, request.query)
        if "text/csv" in request.headers.get(hdrs.ACCEPT, ""):
            return web.Response(text=as_csv(document["by"], document["usage"]), content_type="text/csv")
        return web.json_response(document)

    # ---- operating

    async def drain(self, request: web.Request) -> web.Response:
        """Lease a host's GPU: requests in flight finish, every model sleeps, no new request is taken."""
        host, options = self._host(request), await self._options(request, {"for", "reason"})
        if (lease := await self._gateway.hosts.lease(host)) is not None:
            raise ConflictError(f"{host.name} is leased already: {lease.get('reason') or 'no reason was given'}")
        reason = options.get("reason") or _REASON
        if not isinstance(reason, str):
            raise BadRequestError('"reason" must be a text', param="reason")
        asked = {"reason": reason if _REASON in reason else f"{_REASON}: {reason}", "requests": "reject"}
        if options.get("for") is not None:
            asked["for"] = options["for"]
        document = await self._ask(host, "POST", "/llmux/lease", asked)
        return web.json_response({"host": host.name, "drained": True, "lease": document.get("id")}, status=202)

    async def undrain(self, request: web.Request) -> web.Response:
        """End that lease, and no other."""
        host = self._host(request)
        await self._options(request, set())
        lease = await self._gateway.hosts.lease(host)
        if lease is None:
            raise ConflictError(f"{host.name} is not drained")
        if not str(lease.get("reason") or "").startswith(_REASON):
            raise ConflictError(
                f"{host.name} is leased for something else ({lease.get('reason') or 'no reason was given'}):"
                " give it back there, with `llmux release`"
            )
        await self._ask(host, "DELETE", lease_path(lease))
        return web.json_response({"host": host.name, "drained": False}, status=202)

    async def _options(self, request: web.Request, known: set[str]) -> dict[str, Any]:
        options = await read_options(request, self._bodies, self._gateway.config.body_idle_timeout)
        refuse_unknown(options, known)
        return options

    def _host(self, request: web.Request) -> Host:
        name = request.match_info["host"]
        if name not in self._gateway.hosts:
            known = ", ".join(host.name for host in self._gateway.hosts.all()) or "none"
            raise PathRefusedError(
                f"No host is called {name[:100]!r}; configured are: {known}", code="host_not_found"
            )
        return self._gateway.hosts[name]

    async def _ask(
        self, host: Host, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Forward an operator's command to a host. Raises ConflictError with the host's words, and EngineError."""
        answer = await self._gateway.hosts.ask(host, method, path, body, operator=True)
        try:
            document = json.loads(answer.body)
        except NONSENSE:
            document = None
        if not isinstance(document, dict):
            raise EngineError(f"{host.name} answered {answer.status}, and not as llmux does")
        if answer.status != _ACCEPTED:
            error = document.get("error")
            words = error.get("message") if isinstance(error, dict) else f"status {answer.status}"
            hint = (
                "; set `admin_key` of the host in the gateway's configuration"
                if answer.status in {401, 403}
                else ""
            )
            raise ConflictError(f"{host.name} refuses: {words}{hint}")
        return document


# ---- what each key used, over all hosts: the sums of their ledgers
#
# Hosts learn the key of each request, and know its GPU time. So a gateway keeps no ledger: it queries the hosts,
# and adds up, also by host if wanted.

HOST = "host"  # the dimension that only a gateway can split by
_OK = 200


async def read_usage(hosts: Hosts, given: Mapping[str, str]) -> dict[str, Any]:
    """Answer a query as a host does, with ``missing``: the hosts that did not answer, and why.

    Raises BadRequestError.
    """
    from llmux.accounts import usage  # noqa: PLC0415 - few gateways have a use for it

    by = [part.strip() for part in given.get("by", "key,model").split(",") if part.strip()]
    theirs = ",".join(part for part in by if part != HOST)
    try:
        question = usage.asked({**given, "by": theirs}, time.time())
    except ValueError as error:
        param, why = error.args
        raise BadRequestError(f'"{param}": {why}', param=param) from None
    if question.top is not None:
        raise BadRequestError('"top" can be asked of a host only', param="top")
    query = urlencode({**given, "by": theirs})
    names = list(dict.fromkeys(by))
    answers = await asyncio.gather(*(_ask(host, hosts, query) for host in hosts.all()))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    missing, lost = {}, 0
    for host, answer in zip(hosts.all(), answers, strict=True):
        if isinstance(answer, str):
            missing[host.name] = answer
            continue
        lost += int(answer.get("lost") or 0)
        for row in answer["usage"]:
            _add(rows, names, {**row, HOST: host.name} if HOST in names else row)
    found = [rows[place] for place in sorted(rows, key=str)]
    return {
        "by": names,
        "since": question.since,
        "usage": found,
        "total": usage.totals(found),
        "lost": lost,
        "missing": missing,
    }


async def _ask(host: Host, hosts: Hosts, query: str) -> dict[str, Any] | str:
    """Return a host's answer, or why there is none."""
    from llmux.accounts.usage import totals  # noqa: PLC0415 - as above

    try:
        answer = await hosts.ask(host, "GET", f"/llmux/usage?{query}")
        document = json.loads(answer.body)
        if answer.status == _OK:
            totals(document["usage"])  # which another version may give in another shape
            return dict(document)
        return str(document["error"]["message"])
    except EngineError as error:
        return error.message
    except NONSENSE:
        return "it does not answer as a llmux of this version does"


def _add(rows: dict[tuple[Any, ...], dict[str, Any]], names: list[str], row: Mapping[str, Any]) -> None:
    """Add a row to the one with the same dimensions."""
    place = tuple(row.get(name) for name in (*names, "currency"))
    one = rows.get(place)
    if one is None:
        # In the order of the query, as a host's.
        figures = {name: value for name, value in row.items() if name not in names}
        rows[place] = {name: row.get(name) for name in names} | figures
        return
    for name, value in row.items():
        if name not in names and isinstance(value, int | float) and not isinstance(value, bool):
            one[name] += value

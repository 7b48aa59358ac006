"""``/v1/models``, ``/health``, ``/ready``, ``/metrics``, ``/llmux/…``; and the page, which is built on them."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aiohttp import hdrs, web

from llmux.admin.stream import EventStream, ReportStream
from llmux.config.accounts import HOUSE
from llmux.config.setting_types import parse_duration
from llmux.core import events as ev
from llmux.errors import BadRequestError, PathRefusedError
from llmux.extract import BodyBudget, BodyLimits, read_body
from llmux.middleware.front import GRANT, HEADERS, OPERATOR, OPTIONS
from llmux.middleware.model_handler import unknown_model
from llmux.observability.decision_log import KEPT
from llmux.observability.gpus import Gpus
from llmux.observability.metrics import CONTENT_TYPE
from llmux.runtime import Switcher
from llmux.runtime.history import decisions
from llmux.runtime.model_list import model_entry, model_list
from llmux.runtime.status_document import health, host_report, lease_document, status

if TYPE_CHECKING:
    from llmux.accounts.accounting import Accounting

BEAT = 1.0  # seconds
SHOWN = 200  # requests, unless specified
MOST_PAST = 1000  # past requests in one answer
MODEL_LISTS = ("/v1/models", "/v1/models/", "/models", "/models/")
_Default = TypeVar("_Default", int, None)
_LARGEST = 64 * 1024  # bytes of an operator's request body
_LONGEST = 200  # characters of a reason
_OFTENEST, _SELDOMEST = 0.2, 60.0  # seconds between two statuses of the event stream
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

PAGE_HEADERS = {
    # Nothing from other sites, nothing inline; and no text ever becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    hdrs.CACHE_CONTROL: "no-cache",  # revalidated every time: an update is seen at once
}


class _File(NamedTuple):
    content: bytes
    content_type: str
    etag: str


@functools.cache
def _files() -> dict[str, _File]:
    found = {}
    for path in resources.files("llmux").joinpath("ui").iterdir():
        kind = _TYPES.get(path.name[path.name.rfind(".") :])
        if kind is not None:
            content = path.read_bytes()
            found[path.name] = _File(content, kind, hashlib.sha256(content).hexdigest()[:32])
    return found


def wants_page(request: web.BaseRequest) -> bool:
    """Return whether a browser requests llmux's address, and not an API client."""
    return "text/html" in request.headers.get(hdrs.ACCEPT, "")


def page_file(request: web.Request, name: str) -> web.Response:
    """Return one file of the page, or 304 if the browser has it. Raises HTTPNotFound."""
    file = _files().get(name)
    if file is None:
        raise web.HTTPNotFound
    known = request.if_none_match or ()
    if any(etag.value == file.etag for etag in known):
        response = web.Response(status=304, headers=PAGE_HEADERS)
    else:
        response = web.Response(
            body=file.content, content_type=file.content_type, charset="utf-8", headers=PAGE_HEADERS
        )
    response.etag = file.etag
    return response


def page_routes(index: str) -> list[web.RouteDef]:
    """Return the routes of a page, whose file ``index`` is shown to people."""

    async def page(request: web.Request) -> web.Response:
        return page_file(request, index)

    async def below(_request: web.Request) -> web.Response:
        raise web.HTTPPermanentRedirect("../ui")  # the page's files are relative to it

    async def part(request: web.Request) -> web.Response:
        return page_file(request, request.match_info["file"])

    return [web.get("/llmux/ui", page), web.get("/llmux/ui/", below), web.get("/llmux/ui/{file}", part)]


class Admin:
    """llmux's own endpoints. ``beat`` is called every ``BEAT`` seconds: a late call means that it stalled."""

    def __init__(self, switcher: Switcher, accounting: Accounting | None = None) -> None:
        self._switcher = switcher
        self._accounting = accounting
        self._beaten = time.monotonic()
        self._stalled = 0.0  # seconds, as of the last beat
        self._bodies = BodyBudget(64 * _LARGEST)
        self._gpus = Gpus()

    def routes(self) -> list[web.RouteDef]:
        """Return the routes for ``app.add_routes``."""
        return [
            web.get("/", self.index),
            *(web.get(path, self.models) for path in MODEL_LISTS),
            web.get("/v1/models/{model:.+}", self.model),
            web.get("/health", self.health),
            web.get("/ready", self.ready),
            web.get("/metrics", self.metrics),
            web.get("/llmux/status", self.status),
            web.get("/llmux/decisions", self.decisions),
            web.get("/llmux/activity", self.activity),
            web.get("/llmux/usage", self.usage),
            web.get("/llmux/events", self.events),
            web.get("/llmux/history", self.history),
            web.get("/llmux/gpus", self.gpus),
            *page_routes("index.html"),
            web.post("/llmux/models/{model:.+}/wake", self._on_model(ev.ActivationRequested)),
            web.post("/llmux/models/{model:.+}/sleep", self._on_model(ev.SleepRequested)),
            web.post("/llmux/models/{model:.+}/pin", self._on_model(ev.PinChanged, self._pin)),
            web.post(
                "/llmux/models/{model:.+}/unpin", self._on_model(functools.partial(ev.PinChanged, pinned=False))
            ),
            web.post("/llmux/models/{model:.+}/reset", self._on_model(ev.ResetRequested)),
            web.post("/llmux/requests/{request}/cancel", self.cancel),
            web.post("/llmux/withdraw/{request}", self.withdraw),
            web.post("/llmux/lease", self.lease),
            web.delete("/llmux/lease", self.end_lease),
            web.post("/llmux/manual", self.manual),
            web.delete("/llmux/manual", self.end_manual),
        ]

    def beat(self) -> None:
        """Record that the event loop runs, and whether it had stalled."""
        now = time.monotonic()
        self._stalled = max(0.0, now - self._beaten - BEAT)
        self._beaten = now
        if self._stalled > BEAT:
            self._switcher.log.emit("loop_stalled", secs=round(self._stalled, 1))

    # ---- queries

    async def index(self, request: web.Request) -> web.Response:
        """Describe llmux; send a browser to the page."""
        if wants_page(request):
            raise web.HTTPFound("llmux/ui")
        return web.json_response(
            {"llmux": "one GPU, many models", "see": ["/v1/models", "/llmux/status", "/llmux/ui"]}
        )

    async def models(self, request: web.Request) -> web.Response:
        """List the models; for a key, those that it may use."""
        grant = request.get(GRANT)
        data = [entry for entry in model_list(self._switcher) if grant is None or grant.allows(entry["id"])]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        """Show one model, by any of its names, listed or not."""
        name, grant, config = request.match_info["model"], request.get(GRANT), self._switcher.config
        if grant is not None and not grant.allows(name):
            raise unknown_model(name, config.listed_among(grant.models))
        if name not in config.virtual and name not in config.remote_models:
            self._known(name)
        return web.json_response(model_entry(self._switcher, name))

    async def health(self, _request: web.Request) -> web.Response:
        """Say whether everything that is due is done: 200 or 503."""
        # A request that came during a stall is answered after the beat that noticed it.
        stalled = max(self._stalled, time.monotonic() - self._beaten - BEAT)
        ok, body = health(self._switcher, stalled)
        return web.json_response(body, status=200 if ok else 503)

    async def ready(self, _request: web.Request) -> web.Response:
        """Say whether requests are taken: 200 or 503."""
        s = self._switcher.core.state
        ready = s.ready and not s.stopping
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def metrics(self, _request: web.Request) -> web.Response:
        """Return the metrics in Prometheus' text format."""
        body = await self._switcher.metrics.text()
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def status(self, _request: web.Request) -> web.Response:
        """Return the whole status, for operators and gateways."""
        return web.json_response(status(self._switcher) | {"fleet": host_report(self._switcher)})

    async def decisions(self, request: web.Request) -> web.Response:
        """Return the last decisions, oldest first; with virtual models also the targets that were chosen."""
        switcher, limit = self._switcher, _whole(request, "limit", KEPT)
        document: dict[str, Any] = {"decisions": decisions(switcher, limit)}
        if riding := switcher.riders.document():
            document["riding"] = riding
        config = switcher.config
        if config.virtual or config.remotes or config.routes:
            document["targets"] = list(switcher.choices)[-limit:] if limit else []
        return web.json_response(document)

    async def activity(self, request: web.Request) -> web.Response:
        """Return the last requests that have ended, newest first; or past ones from the ledger."""
        name = request.query.get("model")
        remote = name in self._switcher.config.remote_models
        model = name if name is None or remote else self._known(name)
        before, after = _whole(request, "before", None), _whole(request, "after", 0)
        limit = _whole(request, "limit", SHOWN)
        key = request.query.get("key")
        source = request.query.get("from", "memory")
        if source == "ledger":
            return await self._past(request, limit, key, model)
        if source != "memory":
            raise BadRequestError('"from" must be "memory" or "ledger"', param="from")
        rows = self._switcher.requests.rows(limit, before=before, after=after, model=model, key=key)
        if self._accounting is not None:
            self._accounting.complete(rows)
        return web.json_response({"requests": rows, **self._unknown_key(key, rows)})

    async def _past(self, request: web.Request, limit: int, key: str | None, model: str | None) -> web.Response:
        from llmux.accounts.usage import Wanted  # noqa: PLC0415 - most configurations have no use for it

        accounting = self._with_ledger()
        before, text = _whole(request, "before", None), request.query.get("until")
        until = None
        if text is not None:
            if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text, re.ASCII):
                raise BadRequestError('"until" must be a Unix time, as ?until=1790000000.5', param="until")
            until = float(text)
        rows, more = await accounting.past(Wanted(min(limit, MOST_PAST), before, until, key, model))
        return web.json_response({"requests": rows, "next": more, **self._unknown_key(key, rows or more)})

    def _unknown_key(self, name: str | None, found: object) -> dict[str, Any]:
        """Return the hint for a key without any data that is not configured."""
        known = [entry.name for entry in self._switcher.config.api_keys if entry.name is not None]
        if found or name is None or name in (*known, "", HOUSE):
            return {}
        return {"unknown_key": {"name": name, "near": difflib.get_close_matches(name, known, n=1)}}

    def _with_ledger(self) -> Accounting:
        if self._accounting is None:
            raise PathRefusedError(
                "there is no ledger; set `ledger: true` in the configuration, and restart llmux", code="no_ledger"
            )
        return self._accounting

    async def usage(self, request: web.Request) -> web.Response:
        """Return each key's usage from the ledger: JSON, or CSV for a client that accepts that."""
        accounting = self._with_ledger()
        query = dict(request.query)
        if "model" in query:
            query["model"] = self._switcher.config.names.get(query["model"], query["model"])
        try:
            if "text/csv" in request.headers.get(hdrs.ACCEPT, ""):
                text = await accounting.usage_as_csv(query)
                return web.Response(text=text, content_type="text/csv")
            document = await accounting.usage(query)
            return web.json_response(document | self._unknown_key(query.get("key"), document["usage"]))
        except ValueError as error:
            param, why = error.args
            raise BadRequestError(f'"{param}": {why}', param=param) from None

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Stream events; with ``?every=1s`` also the status and the GPUs, periodically.

        With ``?report=1s``, for gateways: only reports, at that interval and whenever a model changes its phase.
        """
        every, report = _every(request, "every"), _every(request, "report")
        if every is not None and report is not None:
            raise BadRequestError('"report" has events of its own: leave "every" out', param="report")
        headers = {
            hdrs.CONTENT_TYPE: "text/event-stream",
            hdrs.CACHE_CONTROL: "no-cache",
            "X-Accel-Buffering": "no",
            **dict(request.get(HEADERS, ())),
        }
        response = web.StreamResponse(headers=headers)
        if report is not None and request.method != hdrs.METH_HEAD:
            await ReportStream(self._switcher, every=report).serve(request, response)
        elif request.method != hdrs.METH_HEAD:
            gpus = None if every is None else self._gpus
            stream = EventStream(self._switcher, every=every, gpus=gpus, output=request.get(OPERATOR, False))
            await stream.serve(request, response)
        return response

    async def history(self, request: web.Request) -> web.Response:
        """Return the last hour; for operators, with the last output of hooks."""
        switcher, output = self._switcher, request.get(OPERATOR, False)
        return web.json_response(switcher.history.document(output=output, base_url=switcher.log.base_url))

    async def gpus(self, _request: web.Request) -> web.Response:
        """Return the GPUs' memory and load, or why they are unknown."""
        return web.json_response(await self._gpus.read())

    # ---- commands

    def _on_model(
        self, make: Callable[..., ev.Event], read: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Return the handler of a command about a model; ``read`` returns what its options add to the event."""

        async def handler(request: web.Request) -> web.Response:
            model, options = self._known(request.match_info["model"]), await self._options(request)
            if read is None:
                refuse_unknown(options, set())
            more = {} if read is None else read(options)
            answer = await self._switcher.command(lambda ticket: make(model, ticket, **more))
            state = self._switcher.core.state.models.get(model)
            phase = state.phase.value if state is not None else None
            return web.json_response({"model": model, "switch": answer.switch, "phase": phase}, status=202)

        return handler

    def _pin(self, options: dict[str, Any]) -> dict[str, Any]:
        refuse_unknown(options, {"for", "reason"})
        return {"until": self._until(options), "reason": _reason(options)}

    async def cancel(self, request: web.Request) -> web.Response:
        """End a request, queued or in flight, by its client's id for it."""
        refuse_unknown(await self._options(request), set())
        given = request.match_info["request"]
        models = self._switcher.cancel(given)
        if not models:
            raise PathRefusedError(f"No request is called {given[:_LONGEST]!r}.", code="request_not_found")
        return web.json_response({"request_id": given, "models": list(models)}, status=202)

    async def withdraw(self, request: web.Request) -> web.Response:
        """Return a request that is still queued to its gateway, by its id; see ``llmux.gateway``."""
        refuse_unknown(await self._options(request), set())
        given = request.match_info["request"]
        models = self._switcher.withdraw(given)
        return web.json_response({"request_id": given, "withdrawn": list(models)}, status=202)

    async def lease(self, request: web.Request) -> web.Response:
        """Lease the GPU to another job: all models sleep until it ends. With ``id``: renew that lease."""
        options = await self._options(request)
        refuse_unknown(options, {"for", "reason", "requests", "id"})
        until, reason, waits = self._until(options), _reason(options), _waits(options)
        given = _id(options)
        name = given or secrets.token_hex(4)
        answer = await self._switcher.command(
            lambda ticket: ev.LeaseChanged(
                ticket, until=until, reason=reason, waits=waits, id=name, renew=bool(given)
            )
        )
        s = self._switcher.core.state
        lease = {} if s.lease is None else lease_document(s, s.lease, self._switcher.now())
        return web.json_response({"leased": True, "switch": answer.switch, "id": name, **lease}, status=202)

    async def end_lease(self, request: web.Request) -> web.Response:
        """End the lease; with ``?id=`` only that one."""
        name = _id(request.query)
        answer = await self._switcher.command(lambda ticket: ev.LeaseChanged(ticket, leased=False, id=name))
        return web.json_response({"leased": False, "switch": answer.switch}, status=202)

    async def manual(self, request: web.Request) -> web.Response:
        """Leave all switching to operators."""
        refuse_unknown(await self._options(request), set())
        return await self._set_manual(manual=True)

    async def end_manual(self, _request: web.Request) -> web.Response:
        """Let the policy switch again."""
        return await self._set_manual(manual=False)

    async def _set_manual(self, *, manual: bool) -> web.Response:
        answer = await self._switcher.command(lambda ticket: ev.ManualChanged(ticket, manual))
        return web.json_response({"manual": manual, "switch": answer.switch}, status=202)

    def _until(self, options: dict[str, Any]) -> float | None:
        given = options.get("for")
        if given is None:
            return None
        try:
            seconds = parse_duration(given)
        except ValueError as error:
            raise BadRequestError(f'"for": {error}', param="for") from None
        return self._switcher.now() + seconds

    def _known(self, name: str) -> str:
        config = self._switcher.config
        model = config.names.get(name) or config.variants.get(name)
        if model is None:
            raise unknown_model(name, config.listed)
        return model

    async def _options(self, request: web.Request) -> dict[str, Any]:
        return await read_options(request, self._bodies, self._switcher.config.body_idle_timeout)


async def read_options(request: web.Request, bodies: BodyBudget, idle_timeout: float) -> dict[str, Any]:
    """Return the JSON object that an operator sends, {} for nothing. Raises BadRequestError."""
    with await read_body(request, BodyLimits(_LARGEST, bodies.max_buffered, idle_timeout), bodies) as body:
        data = b"".join(body)
    if not data.strip():
        return {}
    try:
        options = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(options, dict):
        raise BadRequestError('the body must be a JSON object, as {"for": "2h"}', code="invalid_json")
    request[OPTIONS] = options
    return options


def _whole(request: web.Request, name: str, default: _Default) -> int | _Default:
    text = request.query.get(name)
    if text is None:
        return default
    # A number of a thousand digits is never intended.
    if not (text.isascii() and text.isdigit() and len(text) <= 15):  # noqa: PLR2004
        raise BadRequestError(f'"{name}" must be a whole number, as ?{name}=20', param=name)
    return int(text)


def _text(options: Mapping[str, Any], name: str) -> str:
    given = options.get(name)
    if given is None:
        return ""
    if not isinstance(given, str) or len(given) > _LONGEST or not given.isprintable():
        raise BadRequestError(
            f'"{name}" must be a text of one line, with at most {_LONGEST} characters', param=name
        )
    return given


def _id(options: Mapping[str, Any]) -> str:
    if options.get("id") == "":  # an unset variable of a script must not mean another lease
        raise BadRequestError('"id" is empty: leave it out, or say which lease', param="id")
    return _text(options, "id")


def _reason(options: dict[str, Any]) -> str:
    return _text(options, "reason").strip()


def _waits(options: dict[str, Any]) -> bool | None:
    given = options.get("requests")
    if given not in (None, "wait", "reject"):
        raise BadRequestError('"requests" must be "wait" or "reject"', param="requests")
    return None if given is None else given == "wait"


def _every(request: web.Request, name: str) -> float | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise BadRequestError(f'"{name}": {error}', param=name) from None
    if not _OFTENEST <= seconds <= _SELDOMEST:
        raise BadRequestError(f'"{name}" must be {_OFTENEST} s to {_SELDOMEST:.0f} s, as ?{name}=1s', param=name)
    return seconds


def refuse_unknown(options: Mapping[str, Any], known: set[str]) -> None:
    """Raise BadRequestError for an option that is not in ``known``."""
    for name in options:
        if name not in known:
            takes = ", ".join(sorted(known)) or "no options"
            raise BadRequestError(f"unknown option {name!r}; this takes {takes}", param=name)

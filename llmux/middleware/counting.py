"""``/v1/messages/count_tokens``: how many tokens a request would have. No model is woken to count.

An awake engine is asked: for its own count, else to apply its template and tokenizer (``/apply-template`` and
``/tokenize`` of llama.cpp, ``/tokenize`` of vLLM). Such a query does not count as in flight: it neither keeps a
model awake nor delays a switch. Without an engine the answer is an estimate, and says so.

Imported with the first such request.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from aiohttp import web

from llmux.config import Config, EngineDefinition
from llmux.core import effects as fx
from llmux.core.phases import Phase
from llmux.core.spec import HookKind
from llmux.errors import BadRequestError, EngineError, RequestError
from llmux.extract import SLICE, Body
from llmux.middleware.context import QUEUE_SECONDS, RequestContext
from llmux.middleware.paths import COUNT
from llmux.proxy import Exchange, Forwarder
from llmux.proxy.heads import request_head
from llmux.runtime import Switcher
from llmux.upstream import EngineConnection, Framing, ResponseHead, engine_address

ESTIMATED = "X-LLMux-Estimated"
PATIENCE = 10.0  # seconds for an engine's answer
_TEMPLATE, _TOKENIZE = b"/apply-template", b"/tokenize"
_LACKED = frozenset({404, 405, 501})
_REFUSED = frozenset({400, 413, 422})  # the engine cannot count this request
_SUCCESS = 200
_PER_TOKEN = 3.5  # bytes of a request in JSON
_PER_FILE = 1500  # tokens of an image or a document, about
_LARGE = 1 << 20  # bytes of a body above which it is not parsed in the loop
_MOST = 64 << 20  # bytes of an answer
_PASSED_ON = frozenset({b"authorization", b"x-api-key"})
_JSON = (b"Content-Type", b"application/json")
_ENDS = frozenset({HookKind.SLEEP, HookKind.STOP})


class Counting:
    """Counts the tokens of requests."""

    def __init__(self, switcher: Switcher, forwarder: Forwarder) -> None:
        self._switcher = switcher
        self._forwarder = forwarder
        self._lacks: dict[str, tuple[int, set[bytes]]] = {}  # by model: its epoch, and the paths it does not know

    async def answer(
        self, config: Config, request: web.Request, context: RequestContext, body: Body
    ) -> web.Response | None:
        """Return how many tokens a request has; None if it has no messages to count.

        Raises BadRequestError if it is not JSON.
        """
        document = await _document(body)
        if document is None:
            return None
        assert context.model is not None
        found: _Counted | None = None
        model = self._switcher.core.state.models[context.model]
        if model.phase is Phase.AWAKE:
            engine = _Engine(self, request, context)
            apis = config.models[context.model].apis
            try:
                async with asyncio.timeout(PATIENCE):
                    if apis is None or "count_tokens" in apis:
                        found = await engine.own(body)
                    found = found or await engine.tokenized(document)
            except (RequestError, TimeoutError):
                pass  # it does not know the path, or goes to sleep
        if isinstance(found, web.Response):
            return found
        tokens, exact = found or (await _off_loop(body.size, functools.partial(estimate, document)), False)
        return web.json_response({"input_tokens": tokens}, headers=dict(_fields(context, exact=exact)))

    def lacking(self, model: str, epoch: int) -> set[bytes]:
        """Return the paths that a model's engine is known to lack."""
        known = self._lacks.get(model)
        if known is None or known[0] != epoch:
            known = self._lacks[model] = epoch, set()
        return known[1]

    async def ask(self, model: str, exchange: Exchange) -> tuple[int, bytes]:
        """Ask an engine; return the status and the body of its answer. Raises EngineError."""
        head = request_head(exchange, may_upgrade=False).data
        answers: list[_Answer] = []

        async def attempt(connection: EngineConnection) -> None:
            answer = _Answer(connection)
            end = self._switcher.subscribe(functools.partial(_end_before_sleep, model, answer))
            try:
                connection.begin(answer)
                await connection.send([head, *(exchange.body.slices() if exchange.body else ())])
                await answer.done
            except BaseException:
                connection.abort()
                raise
            finally:
                end()
            self._forwarder.pool.release(connection, exchange.activity)
            answers.append(answer)

        await self._forwarder.attempt(exchange, attempt)
        return answers[0].status, b"".join(answers[0].pieces)


async def estimated(context: RequestContext, body: Body) -> web.Response | None:
    """Return an estimate of a request's tokens; None if it has no messages. Raises BadRequestError."""
    document = await _document(body)
    if document is None:
        return None
    tokens = await _off_loop(body.size, functools.partial(estimate, document))
    return web.json_response({"input_tokens": tokens}, headers=dict(_fields(context, exact=False)))


_Counted = web.Response | tuple[int, bool]  # the engine's refusal; or how many, and whether that is exact


class _Engine:
    """The engine of one request's model, which is awake."""

    def __init__(self, counting: Counting, request: web.Request, context: RequestContext) -> None:
        assert context.model is not None
        switcher = counting._switcher  # noqa: SLF001
        model = switcher.core.state.models[context.model]
        definition = model.running.definition
        assert isinstance(definition, EngineDefinition)
        self._counting = counting
        self._context = context
        self._model = context.model
        self._definition = definition
        self._address = engine_address(definition.host, definition.port, definition.tls, definition.base_path)
        admission = fx.Admit(0, context.model, definition, model.epoch, returned=False, waited=0.0)
        self._activity = switcher.activity(admission)
        self._lacks = counting.lacking(context.model, model.epoch)
        self._headers = [field for field in request.raw_headers if field[0].lower() != b"accept-encoding"]

    async def own(self, body: Body) -> _Counted | None:
        """Let it count by itself; None if it cannot."""
        if self._definition.upstream_model is not None:
            body = await body.renamed(self._definition.upstream_model)
        target = self._context.route.target.encode("utf-8", "surrogateescape")
        status, said = await self._ask(COUNT.encode(), target, self._headers, body)
        if status in _REFUSED:
            headers = dict(_fields(self._context, exact=True))
            return web.Response(status=status, body=said, content_type="application/json", headers=headers)
        tokens = _whole(_parsed(status, said), "input_tokens")
        return None if tokens is None else (tokens, True)

    async def tokenized(self, document: dict[str, Any]) -> _Counted | None:
        """Let it apply its template and tokenize; None if it cannot."""
        if _TOKENIZE in self._lacks:
            return None
        from llmux.targets.codecs import Dialect, Translation  # noqa: PLC0415 - most engines count by themselves

        chat = Translation(Dialect.MESSAGES, Dialect.CHAT, lossy=True).request({"model": self._model, **document})
        messages: dict[str, Any] = {name: chat[name] for name in ("messages", "tools") if name in chat}
        said = _prompt_of(document)
        made = await self._json(_TEMPLATE, messages)
        if isinstance(prompt := made.get("prompt"), str):
            # llama.cpp calls it content, SGLang prompt.
            question = {"content": prompt, "prompt": prompt, "add_special": True, "parse_special": True}
        else:
            question = {"content": "\n".join(said.texts), **messages}
        name = self._definition.upstream_model or self._model
        found = await self._json(_TOKENIZE, {"model": name, **question})
        tokens = _whole(found, "count")
        exact = isinstance(prompt, str) or tokens is not None
        if tokens is None and isinstance(found.get("tokens"), list):
            tokens = len(found["tokens"])
        return None if tokens is None else (tokens, exact and not said.files)

    async def _json(self, path: bytes, document: dict[str, Any]) -> dict[str, Any]:
        """Return its answer to a document; empty if it gives none."""
        dropped = self._context.drop_headers
        fields = [field for field in self._headers if field[0].lower() in _PASSED_ON - dropped]
        return _parsed(*await self._ask(path, path, [*fields, _JSON], _Whole(json.dumps(document).encode())))

    async def _ask(
        self, path: bytes, target: bytes, headers: list[tuple[bytes, bytes]], body: Body | _Whole
    ) -> tuple[int, bytes]:
        if path in self._lacks:
            return 404, b""
        exchange = Exchange(
            address=self._address,
            request_id=self._context.request_id,
            activity=self._activity,
            target=target,
            raw_headers=headers,
            body=body,
            drop_headers=self._context.drop_headers,
        )
        status, said = await self._counting.ask(self._model, exchange)
        if status in _LACKED:
            self._lacks.add(path)
        return status, said


class _Whole:
    """A body in one piece."""

    def __init__(self, data: bytes) -> None:
        self.single: bytes | None = data
        self.size = len(data)
        self._data = data

    def slices(self) -> Iterator[bytes]:
        """Iterate over it in pieces."""
        return (self._data[start : start + SLICE] for start in range(0, self.size, SLICE))


class _Answer:
    """Keeps an engine's answer. ``done`` is set when all of it is there."""

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self.done: asyncio.Future[None] = connection.loop.create_future()
        self.status = 0
        self.pieces: list[bytes] = []
        self._size = 0

    def response_started(self, head: ResponseHead) -> None:
        self.status = head.status
        if head.framing is Framing.CHUNKED:
            self._connection.unchunk()

    def response_data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > _MOST:
            self._connection.abort()
            self.response_lost(EngineError("The engine's count is too long."))
        self.pieces.append(data)

    def response_ended(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def response_lost(self, error: EngineError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def _end_before_sleep(model: str, answer: _Answer, effect: fx.Effect) -> None:
    """An open connection could keep an engine from ending."""
    if isinstance(effect, fx.RunHook) and effect.model == model and effect.kind in _ENDS:
        answer._connection.abort()  # noqa: SLF001
        answer.response_lost(EngineError("The model goes to sleep."))


def _fields(context: RequestContext, *, exact: bool) -> list[tuple[str, str]]:
    estimated = [] if exact else [(ESTIMATED, "true")]
    return [*context.headers, *estimated, (QUEUE_SECONDS, "0.000")]


async def _document(body: Body) -> dict[str, Any] | None:
    """Return the request; None where it has no messages to count. Raises BadRequestError."""
    if body.form or body.compressed:
        return None
    data = b"".join(body)
    try:
        document = await _off_loop(body.size, functools.partial(json.loads, data))
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    return document if isinstance(document, dict) and isinstance(document.get("messages"), list) else None


async def _off_loop(size: int, work: functools.partial[Any]) -> Any:
    """Do slow work on large bodies outside the loop."""
    return work() if size < _LARGE else await asyncio.to_thread(work)


def _parsed(status: int, said: bytes) -> dict[str, Any]:
    try:
        found = json.loads(said) if status == _SUCCESS else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _whole(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def estimate(document: dict[str, Any]) -> int:
    """Return about how many tokens a request has: by the bytes of its text, and a guess for each file."""
    said = _prompt_of(document)
    size = said.names + sum(len(text.encode(errors="replace")) for text in said.texts)
    return max(1, math.ceil(size / _PER_TOKEN)) + said.files * _PER_FILE


class _Prompt(NamedTuple):
    """What is counted of a request: texts, images and documents, and the bytes of the fields' names."""

    texts: list[str]
    files: int
    names: int


def _prompt_of(document: dict[str, Any]) -> _Prompt:
    texts: list[str] = []
    files = names = 0
    pending: list[Any] = [{name: document.get(name) for name in ("system", "messages", "tools")}]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += reversed(value)
        elif isinstance(value, dict):
            files += isinstance(value.get("source"), dict)
            pending += reversed([item for name, item in value.items() if name != "source"])
            names += sum(len(name) + 4 for name in value)
        elif isinstance(value, str):
            texts.append(value)
    return _Prompt(texts, files, names)

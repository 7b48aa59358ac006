"""llmux's own endpoints: names of every kind, bodies of every kind, who may."""

import asyncio
import json
from urllib.parse import quote

import pytest
from aiohttp import web

from llmux.admin.endpoints import Admin
from llmux.core import effects as fx
from llmux.middleware.authentication import is_loopback
from tests.server.house import WAKE, Line, message, until

NAMES = [
    "org/model",
    "a b",
    "100%",
    "a%2Fb",
    "Qwen/ü-模型",
    'say "hi"',
    "it's",
    "a+b",
    "x/wakes",
    "a?b#c",
    "v1.5:q4",
    "a&b=c",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("safe", ["", "/"])
async def test_models_of_every_name_can_be_operated(house, name, safe):
    hooks = {"wake": "touch up", "sleep": "rm -f up", "alive": "test -e up"}
    await house.open(models={name: hooks, "other": {}})
    path = quote(name, safe=safe)
    reply = await house.ask("GET", f"/v1/models/{path}")
    assert (reply.status, reply.json()["id"]) == (200, name)
    reply = await house.ask("POST", f"/llmux/models/{path}/wake")
    assert reply.status == 202, reply
    assert reply.json()["model"] == name
    await until(lambda: house.switcher.core.state.switch is None)
    assert (await house.ask("POST", f"/upstream/{path}/v1/x", b"anything")).body == b"ok"
    assert (await house.chat(name)).status == 200
    assert (await house.ask("GET", f"/v1/x?model={quote(name, safe='')}")).status == 200


BODIES = [
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b"[" * 60_000, 400),
    (b'{"for": NaN}', 400),
    (b'{"for": 1e999}', 400),
    (b'{"for": -1}', 400),
    (b'{"for": true}', 400),
    (b'{"for": "soon"}', 400),
    (b'{"for": ' + b"9" * 5000 + b"}", 400),
    (b'{"four": 1}', 400),
    (b" " * 70_000, 413),
    (b"", 202),
    (b"  ", 202),
    (b'{"for": null}', 202),
    (b'{"for": "1h", "reason": "me"}', 202),
]


@pytest.mark.parametrize(("body", "status"), BODIES)
async def test_bodies_of_operators(house, body, status):
    await house.open()
    reply = await house.ask("POST", "/llmux/models/a/pin", body, Content_Type="text/plain; charset=nonsense")
    assert reply.status == status
    assert reply.marked
    assert not house.log.named("internal_error")


async def test_an_operator_that_is_slow_is_given_up(house):
    await house.open(body_idle_timeout="20ms")
    line = await house.line()
    line.send(b"POST /llmux/lease HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
    reply = await line.reply()
    assert reply.status == 408
    assert reply.marked


async def test_keys(house):
    await house.open(api_keys=["user"], admin_key="root")
    for path in ("/llmux/status", "/metrics", "/v1/models", "/llmux/events", "/llmux/history", "/llmux/gpus", "/"):
        assert (await house.ask("GET", path)).status == 401, path
    # The page asks for a key by itself; what it is made of tells nothing.
    for path in ("/health", "/ready", "/llmux/ui", "/llmux/ui/main.js"):
        assert (await house.ask("GET", path)).status == 200
    assert (await house.ask("GET", "/llmux/status", X_API_Key="user")).status == 200
    assert (await house.ask("POST", "/llmux/models/a/wake", Authorization="Bearer user")).status == 401
    assert (await house.ask("POST", "/llmux/models/a/wake", Authorization="bearer root")).status == 202
    assert (await house.ask("POST", "/upstream/a/x", {}, Authorization="Bearer user")).status == 401
    assert (await house.ask("POST", "/v1/messages", {"model": "a"})).json()["error"][
        "type"
    ] == "authentication_error"
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, X_API_Key="user", Authorization="x")).status == 200
    assert b"x-api-key" not in house.engine.heads[-1].lower()
    assert b"authorization: x\r\n" in house.engine.heads[-1].lower()


async def test_the_key_of_a_client_never_reaches_an_engine_from_an_operator(house):
    await house.open(api_keys=["user"])
    await house.control()
    assert (await house.ask("POST", "/upstream/a/x", {}, socket=True, Authorization="Bearer user")).status == 200
    assert b"authorization" not in house.engine.heads[-1].lower()


OPERATING = [
    ("POST", "/llmux/models/a/wake"),
    ("POST", "/llmux/models/nobody/wake"),
    ("POST", "/llmux//models/a/wake"),
    ("POST", "/%6clmux/models/a/wake"),
    ("POST", "/llmux/lease"),
    ("DELETE", "/llmux/lease"),
    ("POST", "/llmux/manual"),
    ("GET", "/upstream/a/v1/x"),
    ("POST", "/upstream/a/v1/chat/completions"),
]


@pytest.mark.parametrize("key", [{}, {"X_API_Key": "user"}, {"Authorization": "Bearer user"}])
async def test_with_api_keys_loopback_is_not_enough_to_operate(house, key):
    # A proxy on this host that says nothing of its clients, as nginx and haproxy do by default.
    await house.open(api_keys=["user"])
    for method, path in OPERATING:
        reply = await house.ask(method, path, **key)
        assert (reply.status, reply.error["code"]) == (403, "admin_key_not_set"), path
        assert "`admin_key`" in reply.error["message"]
        assert reply.marked
    assert (await house.ask("GET", "/llmux/history", X_API_Key="user")).json()["output"] is None
    assert not house.engine.heads
    assert house.switcher.core.state.lease is None
    assert house.switcher.core.state.models["a"].phase.value == "asleep"


async def test_the_control_socket_opens_everything_without_a_key(house):
    await house.open(api_keys=["user"])
    await house.control()
    assert (await house.ask("POST", "/llmux/models/a/wake", socket=True)).status == 202
    await until(lambda: house.switcher.core.state.switch is None)
    assert (await house.ask("POST", "/upstream/a/x", {}, socket=True, X_API_Key="wrong")).status == 200
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, socket=True)).status == 200
    for path in ("/llmux/status", "/metrics", "/v1/models", "/llmux/history"):
        reply = await house.ask("GET", path, socket=True, Host="any.example", Sec_Fetch_Site="cross-site")
        assert reply.status == 200, path
    assert reply.json()["output"] is not None


async def test_the_admin_key_counts_on_the_control_socket_too(house):
    await house.open(api_keys=["user"], admin_key="root")
    await house.control()
    assert (await house.ask("POST", "/llmux/models/a/wake", socket=True)).status == 401
    assert (await house.ask("GET", "/llmux/status", socket=True)).status == 401
    assert (await house.ask("POST", "/llmux/models/a/wake", socket=True, X_API_Key="root")).status == 202


async def test_the_control_socket_has_a_limit_of_its_own(house, monkeypatch):
    monkeypatch.setattr("llmux.server.CONTROL", 1)
    await house.open(api_keys=["user"], max_connections=1)
    await house.control()
    held = await house.line()
    held.send(message("GET", "/health"))
    assert (await held.reply()).status == 200
    assert (await house.ask("GET", "/v1/models")).status == 503
    assert (await house.ask("POST", "/llmux/models/a/wake", socket=True)).status == 202


async def test_a_unix_socket_of_another_application_is_not_the_control_socket(house):
    # As a library, behind a proxy that comes by a Unix socket for all of its clients.
    await house.open(api_keys=["user"])
    path = str(house.folder / "app.sock")
    await web.UnixSite(house._runner, path).start()
    line = Line(*await asyncio.open_unix_connection(path))
    line.send(message("POST", "/llmux/models/a/wake"))
    assert (await line.reply()).status == 403
    line.close()


class Peer:
    def __init__(self, name):
        self.transport = self
        self._name = name

    def get_extra_info(self, _what):
        return self._name


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        (("127.0.0.1", 1), True),
        (("127.9.9.9", 1), True),
        (("::1", 1, 0, 0), True),
        (("::ffff:127.0.0.1", 1, 0, 0), True),
        (("", 0), False),
        ("", True),  # a Unix socket
        (None, False),
        (("::1234", 1, 0, 0), False),
        (("::ffff:10.0.0.1", 1, 0, 0), False),
        (("10.0.0.127", 1), False),
    ],
)
def test_who_is_on_this_machine(peer, local):
    assert is_loopback(Peer(peer)) is local


async def test_from_elsewhere_only_with_a_key(house, monkeypatch):
    await house.open()
    monkeypatch.setattr("llmux.middleware.authentication.is_loopback", lambda _request: False)
    for method, path in (
        ("POST", "/llmux/models/a/wake"),
        ("POST", "/llmux/models/nobody/wake"),
        ("POST", "/llmux//models/a/wake"),
        ("POST", "/%6clmux/models/a/wake"),
        ("DELETE", "/llmux/lease"),
        ("GET", "/upstream/a/v1/x"),
    ):
        assert (await house.ask(method, path)).status == 403, path
    assert (await house.ask("GET", "/llmux/status")).status == 200


async def test_whatever_changes_something_is_for_operators(house, monkeypatch):
    switcher = await house.open()
    monkeypatch.setattr("llmux.middleware.authentication.is_loopback", lambda _request: False)
    routes = [(route.method, route.path) for route in Admin(switcher).routes() if route.method != "GET"]
    assert ("POST", "/llmux/manual") in routes
    routes.remove(("POST", "/llmux/withdraw/{request}"))  # for gateways: with keys, only theirs will do
    for method, path in routes:
        reply = await house.ask(method, path.replace("{model:.+}", "a"))
        assert reply.status == 403, path


async def test_only_gateways_take_requests_back(house):
    keys = [{"name": "client", "key": "key-of-client"}, {"name": "west", "key": "key-of-west", "gateway": True}]
    await house.open(api_keys=keys)
    for key, status in (("key-of-client", 403), ("key-of-west", 202)):
        reply = await house.ask("POST", "/llmux/withdraw/abc", Authorization=f"Bearer {key}")
        assert reply.status == status
    assert (await house.ask("POST", "/llmux/withdraw/abc")).status == 401


@pytest.mark.parametrize("keys", [(), ({"name": "client", "key": "key-of-client"},)])
async def test_and_operators_who_may_do_everything(house, keys):
    await house.open(api_keys=keys, admin_key="key-of-root")
    assert (await house.ask("POST", "/llmux/withdraw/abc", X_API_Key="key-of-root")).status == 202


async def test_a_preflight_says_what_varies(house):
    await house.open(cors=["http://page.test"])
    headers = {"Origin": "http://page.test", "Access_Control_Request_Method": "POST"}
    reply = await house.ask("OPTIONS", "/v1/chat/completions", **headers)
    assert reply.status == 204
    assert "Access-Control-Request-Method" in reply.headers["vary"]
    assert "access-control-expose-headers" not in reply.headers
    assert reply.marked
    other = await house.ask("POST", "/v1/x", {"model": "a"}, Origin="http://other.test")
    assert (other.status, other.error["code"]) == (403, "origin_not_allowed")
    assert other.marked


async def test_a_stall_of_the_loop_fails_health_once(house):
    await house.open()
    line = await house.line()
    assert (await house.ask("GET", "/health")).status == 200
    admin = next(cell for cell in _handler(house).__closure__ if hasattr(cell.cell_contents, "beat")).cell_contents
    admin._beaten -= 7.5
    admin.beat()
    line.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    reply = await line.reply()
    assert reply.status == 503
    assert "event loop" in reply.json()["failing"][0]
    assert house.log.named("loop_stalled")
    admin.beat()
    assert (await house.ask("GET", "/health")).status == 200


def _handler(house):
    return house._runner.app.cleanup_ctx[-1]


async def test_the_stream_tells_what_happens_and_where_to_mend(house):
    await house.open(models={"a": {"sleep": "exit 1", "alive": "false"}, "b": {}})
    house.log.base_url = "http://127.0.0.1:4711"
    line = await house.begin("GET", "/llmux/events")
    assert (await line.head()).status == 200
    await line.reader.readuntil(b"event: status\ndata: ")
    status = json.loads(await line.reader.readuntil(b"\n\n"))
    assert set(status) >= {"version", "uptime", "ready", "policy", "awake", "switch", "models", "switch_costs"}
    assert (await house.chat("a")).status == 200
    await line.reader.readuntil(b"event: model_activated")
    assert (await house.chat("b")).status == 503
    await line.reader.readuntil(b"event: model_faulted\ndata: ")
    assert (
        "http://127.0.0.1:4711/llmux/models/a/reset" in json.loads(await line.reader.readuntil(b"\n\n"))["repair"]
    )


async def test_a_stream_ends_with_llmux(house):
    await house.open()
    line = await house.begin("GET", "/llmux/events")
    await line.head()
    closing = asyncio.create_task(house.close())
    await line.closed()
    await closing
    assert not house.switcher._driver.subscribers


async def test_an_answer_that_operators_get_when_it_cannot_be_now(house):
    await house.open(models={"a": {"wake": f"until [ -e go ]; do sleep 0.01; done; {WAKE}"}, "b": {}})
    first = await house.ask("POST", "/llmux/models/a/wake")
    assert (first.status, first.json()["switch"]) == (202, 1)
    second = await house.ask("POST", "/llmux/models/b/wake")
    assert second.status == 409
    assert "switch 1" in second.error["message"]
    (house.folder / "go").touch()
    activated = []
    house.switcher.subscribe(
        lambda effect: activated.append(effect) if isinstance(effect, fx.ModelActivated) else None
    )
    await until(lambda: activated)

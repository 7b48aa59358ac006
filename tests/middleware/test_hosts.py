"""DNS rebinding and foreign pages: the ``Host`` and ``Sec-Fetch-Site`` headers, on both ways through llmux."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.middleware.fast_head import read
from llmux.middleware.origin import Hosts, canonical_host
from tests.server.house import message

HERE = [
    "localhost",
    "LocalHost:3000",
    "localhost.",
    "localhost.:80",
    "llmux.localhost",
    "127.0.0.1",
    "127.0.0.1:3000",
    "127.1.2.3:65535",
    "[::1]",
    "[::1]:3000",
    "[0:0:0:0:0:0:0:1]:1",
    "[::ffff:127.0.0.1]:3000",
    "gpu.lan",
    "GPU.LAN.:3000",
    "box",
    "[fd00::5]:3000",
]
ELSEWHERE = [
    "evil.example",
    "evil.example:3000",
    "EVIL.example.",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io:3000",
    "notlocalhost.example",
    "test.example",
    "gpu.lan.evil.example",
    "xgpu.lan",
    "0.0.0.0",
    "0.0.0.0:3000",
    "[::]:3000",
    "[::2]",
    "192.0.2.1",
    "[::ffff:192.0.2.1]",
    "2130706433.x",
    "127.1.x",
    "evil.example:80:80",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost:3000:evil.example",
    "localhost/evil.example",
    "localhost, evil.example",
    "localhost evil.example",
    "localhost:port",
    "localhost:999999",
    "::1",
    "[::1",
    "[localhost]",
    ".",
    ".localhost.evil.example",
]
HOSTS = Hosts(["gpu.lan", "box", "fd00::5"])


@pytest.mark.parametrize("host", HERE)
def test_names_of_this_host(host):
    assert HOSTS.refused([host], {"Accept-Encoding": "gzip"}) is None
    assert HOSTS.knows(host.encode())
    assert HOSTS.knows(host.encode())


@pytest.mark.parametrize("host", ELSEWHERE)
def test_names_of_others(host):
    assert HOSTS.refused([host], {}) == host
    assert not HOSTS.knows(host.encode())
    assert Hosts(["*"]).refused([host], {}) is None
    assert Hosts(held=False).refused([host], {}) is None
    assert Hosts(held=False).knows(host.encode())


def test_every_host_of_a_request_counts():
    assert HOSTS.refused(["localhost", "evil.example"], {}) == "evil.example"
    assert HOSTS.refused([], {}) is None
    assert HOSTS.refused([""], {"Accept-Encoding": "gzip"}) is None


def test_a_name_that_is_not_in_the_public_dns_is_refused_from_a_browser():
    # Fedora has localhost4 in /etc/hosts, Debian ip6-localhost: a page may use them, and without Sec-Fetch-Site.
    for name in ("localhost4", "ip6-localhost:3000", "gpubox", "llmux.test", "a.b.test.:80"):
        assert HOSTS.refused([name], {"Accept-Encoding": "gzip, deflate"}) == name
        assert HOSTS.refused([name], {}) is None
        assert not HOSTS.knows(name.encode())


def test_what_is_remembered_is_bounded():
    hosts = Hosts()
    for port in range(1000):
        assert hosts.knows(b"localhost:%d" % port)
    assert len(hosts._allowed) < 100


@given(st.text(max_size=40))
def test_no_name_raises(host):
    assert canonical_host(canonical_host(host)) in {canonical_host(host), canonical_host(host).rstrip("."), ""}
    HOSTS.refused([host], {})
    HOSTS.knows(host.encode())


KINDS = [
    ("GET", "/llmux/status", None),
    ("GET", "/llmux/events", None),
    ("GET", "/llmux/history", None),
    ("GET", "/llmux/decisions", None),
    ("GET", "/llmux/gpus", None),
    ("GET", "/llmux/nothing", None),
    ("GET", "/metrics", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/", None),
    ("HEAD", "/v1/models", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/a", None),
    ("GET", "/v1/x?model=b", None),
    ("GET", "http://localhost/v1/x?model=b", None),
    ("GET", "/upstream/b/x", None),
    ("GET", "/nothing", None),
    ("POST", "/v1/chat/completions", {"model": "b"}),
    ("POST", "/v1/messages", {"model": "b"}),
    ("POST", "/llmux/models/b/wake", None),
    ("DELETE", "/llmux/lease", None),
    ("OPTIONS", "/v1/models", None),
]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:3000", "0.0.0.0:3000", "localhost.evil.example."])
async def test_every_kind_of_request_is_held(house, host):
    house.up("a")
    await house.open()
    for method, path, body in [*KINDS, ("GET", "/llmux/ui", None), ("GET", "/llmux/ui/main.js", None)]:
        reply = await house.ask(method, path, body, Host=host)
        assert reply.status == 403, path
        assert reply.marked
        if method != "HEAD":
            assert "`hosts`" in reply.body.decode()
            assert "host_not_allowed" in reply.body.decode() or path == "/v1/messages"
    assert not house.engine.heads
    assert house.switcher.core.state.models["b"].phase.value == "asleep"
    assert house.log.named("host_refused")


@pytest.mark.parametrize("host", ["evil.example", "0.0.0.0"])
async def test_the_short_way_holds_host_too(house, host):
    house.up("a")
    await house.open()
    line = await house.line()
    # On one connection: what was let through before says nothing about what comes next.
    for name, status in (("127.0.0.1", 200), (host, 403), ("localhost", 200), (host, 403)):
        line.send(message("POST", "/v1/x", {"model": "a"}, Host=name))
        assert (await line.reply()).status == status
    assert len(house.engine.heads) == 2


async def test_websockets_are_held(house):
    house.up("a")
    await house.open()
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    for more in ({"Host": "evil.example"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}):
        assert (await house.ask("GET", "/v1/realtime?model=a", **upgrade, **more)).status == 403
    line = await house.begin("GET", "/v1/realtime?model=a", **upgrade, Host="localhost:1")
    assert (await line.head()).status == 101


async def test_hosts_names_what_else_llmux_is_called(house):
    house.up("a")
    await house.open(hosts=["GPU.example.", "fd00::5"])
    for host in ("gpu.example", "gpu.example:3000", "[fd00::5]", "127.0.0.1"):
        assert (await house.ask("GET", "/llmux/status", Host=host)).status == 200
        assert (await house.ask("POST", "/v1/x", {"model": "a"}, Host=host)).status == 200
    assert (await house.ask("GET", "/llmux/status", Host="other.example")).status == 403
    # llmux's own page under that name.
    own = {"Host": "gpu.example:3000", "Origin": "http://gpu.example:3000", "Sec_Fetch_Site": "same-origin"}
    assert (await house.ask("POST", "/llmux/models/a/pin", **own)).status == 202
    house.front.configure(house.config(hosts=["*"]))
    assert (await house.ask("GET", "/llmux/status", Host="other.example")).status == 200
    house.front.configure(house.config())
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, Host="gpu.example")).status == 403


async def test_where_keys_are_wanted_any_name_will_do(house):
    house.up("a")
    await house.open(api_keys=["user"])
    for _ in range(2):
        reply = await house.ask("POST", "/v1/x", {"model": "a"}, Host="gpu.example", X_API_Key="user")
        assert reply.status == 200
    assert (await house.ask("GET", "/health", Host="gpu.example")).status == 200


async def test_beyond_loopback_any_name_will_do(house):
    # Served on loopback by the test, but told that it listens everywhere.
    house.up("a")
    await house.open(host="0.0.0.0", insecure=True)
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, Host="gpu.example")).status == 200


async def test_requests_without_a_host(house):
    await house.open()
    for head in (b"GET /health HTTP/1.0\r\n\r\n", b"GET /health HTTP/1.1\r\nHost:\r\n\r\n"):
        assert (await house.raw(head)).status == 200
    # A target's authority is not the name that a browser has for the server: it says that in Host.
    assert (await house.raw(b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n")).status == 200
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert (await house.raw(two)).status in {400, 403}


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site", " same-site "])
async def test_what_other_sites_have_a_browser_send_is_refused(house, site):
    house.up("a")
    await house.open(cors=["http://page.test"])
    for method, path, body in KINDS:
        reply = await house.ask(method, path, body, Sec_Fetch_Site=site)
        assert reply.status == 403, path
        assert reply.marked
        if method != "HEAD":
            assert "origin_not_allowed" in reply.body.decode() or path == "/v1/messages"
            assert "`cors`" in reply.body.decode()
    assert not house.engine.heads
    assert house.switcher.core.state.models["b"].phase.value == "asleep"
    for origin, status in (("http://page.test", 200), ("http://other.test", 403), ("null", 403)):
        reply = await house.ask("POST", "/v1/x", {"model": "a"}, Sec_Fetch_Site=site, Origin=origin)
        assert reply.status == status


@pytest.mark.parametrize("site", ["none", "same-origin", "nonsense", ""])
async def test_what_the_user_and_the_own_page_send_passes(house, site):
    house.up("a")
    await house.open()
    assert (await house.ask("GET", "/llmux/status", Sec_Fetch_Site=site)).status == 200
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, Sec_Fetch_Site=site)).status == 200


async def test_a_link_may_open_the_page_and_nothing_else(house):
    await house.open()
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert (await house.ask("GET", "/llmux/ui", **link)).status == 200
    assert (await house.ask("GET", "/v1/x?model=a", **link)).status == 403
    assert (await house.ask("POST", "/llmux/ui", **link)).status == 403
    for other in ({"Sec_Fetch_Dest": "iframe"}, {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}):
        assert (await house.ask("GET", "/llmux/ui", **link | other)).status == 403


async def test_a_star_in_cors_lets_other_sites_do_all(house):
    house.up("a")
    await house.open(cors=["*"])
    assert (await house.ask("GET", "/v1/x?model=a", Sec_Fetch_Site="cross-site")).status == 200


def test_the_short_way_leaves_what_a_page_sends_to_the_long_one():
    assert read(message("POST", "/v1/x", {"model": "a"}))[0].plain
    assert not read(message("POST", "/v1/x", {"model": "a"}, Sec_Fetch_Site="none"))[0].plain
    assert read(message("POST", "/v1/x", {"model": "a"}, Host="LOCALHOST:1"))[0].called == b"LOCALHOST:1"


async def test_a_request_that_shows_a_key_is_not_a_foreign_page_s(house):
    await house.open(admin_key="root")
    assert (await house.ask("GET", "/llmux/status", Host="gpu.example")).status == 403
    assert (await house.ask("GET", "/llmux/status", Host="gpu.example", X_API_Key="wrong")).status == 403
    assert (await house.ask("GET", "/llmux/status", Host="gpu.example", X_API_Key="root")).status == 200

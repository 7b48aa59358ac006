"""A real proxy on the same host: what it opens by default, and the configurations of ``examples/proxy``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from llmux.config import Config
from llmux.config.gateway import GatewayConfig
from tests.harness import launcher
from tests.harness.lease.lab import HOST, Lab, free_port
from tests.harness.lease.raw import Wire, request, wire
from tests.harness.waiting import PATIENCE

EXAMPLES = Path(__file__).parents[2] / "examples" / "proxy"
KEY = [("Authorization", "Bearer user")]

# What the documentation of each begins with: pass everything on, and nothing else.
BARE = {
    "nginx": "server { listen 127.0.0.1:%d; location / { proxy_pass http://127.0.0.1:%d; } }",
    "haproxy": "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
    "frontend f\n bind 127.0.0.1:%d\n default_backend b\nbackend b\n server s 127.0.0.1:%d\n",
    "caddy": "http://:%d {\n bind 127.0.0.1\n reverse_proxy 127.0.0.1:%d\n}\n",
}
OPERATING = [
    ("GET", "/upstream/a/v1/models"),
    ("POST", "/upstream/a/v1/chat/completions"),
    ("POST", "/llmux/models/a/wake"),
    ("POST", "/llmux/models/a/sleep"),
    ("POST", "/llmux/models/a/pin"),
    ("POST", "/llmux/models/a/reset"),
    ("POST", "//llmux//models/a/wake"),
    ("POST", "/%6clmux/models/a/wake"),
    ("POST", "/llmux/lease"),
    ("DELETE", "/llmux/lease"),
    ("POST", "/llmux/manual"),
]


def nginx(folder: Path, servers: str) -> list[str]:
    (folder / "server.conf").write_text(servers)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; {user} worker_processes 1; events {{}}\n"
        f"http {{ access_log off; {temporary} include {folder}/server.conf; }}\n"
    )
    return [shutil.which("nginx") or "", "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]


def haproxy(folder: Path, text: str) -> list[str]:
    (folder / "haproxy.cfg").write_text(text)
    return [shutil.which("haproxy") or "", "-db", "-f", f"{folder}/haproxy.cfg"]


def caddy(folder: Path, sites: str) -> list[str]:
    (folder / "Caddyfile").write_text("{\n admin off\n auto_https off\n grace_period 1s\n}\n" + sites)
    folders = [f"{name}={folder}" for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")]
    return ["env", *folders, "caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


COMMANDS = {"nginx": nginx, "haproxy": haproxy, "caddy": caddy}


def example(name: str, port: int, llmux: int) -> str:
    """Return the documented lines, with the ports of this test."""
    file, listens, server = {
        "nginx": ("nginx.conf", ("listen 80;", f"listen {HOST}:%d;"), "server 127.0.0.1:3000;"),
        "haproxy": ("haproxy.cfg", ("bind :80 ", f"bind {HOST}:%d "), "server llmux 127.0.0.1:3000"),
        "caddy": (
            "Caddyfile",
            ("llm.example.com {", f"http://:%d {{\n\tbind {HOST}"),
            "reverse_proxy 127.0.0.1:3000",
        ),
    }[name]
    text = (EXAMPLES / file).read_text()
    changes = {listens[0]: listens[1] % port, server: server.replace("3000", str(llmux))}
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(params=COMMANDS)
def name(request):
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param}: apt install {request.param}")
    return request.param


@pytest.fixture
def proxy(name, tmp_path):
    """Start the proxy with a configuration, given its port; return the port once it listens."""
    started = []

    def go(make) -> int:
        port = free_port()
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(COMMANDS[name](folder, make(port)), stdout=log, stderr=log)
        started.append(process)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((HOST, port), timeout=5).close()
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return port

    yield go
    for process in started:
        process.terminate()
        process.wait(PATIENCE)


async def ask(port: int, method: str, target: str, **more):
    async with await wire(port) as line:
        return await line.ask(request(method, target, **more), method=method)


def command(lab: Lab, *words: str) -> str:
    """Run an operator's command on llmux's host, with the default address but for the port; return its words."""
    env = {"PATH": os.environ["PATH"], "HOME": str(lab.root), "XDG_STATE_HOME": str(lab.root / "xdg")}
    env |= {"XDG_RUNTIME_DIR": lab.env["XDG_RUNTIME_DIR"], "LLMUX_URL": f"http://localhost:{lab.port}"}
    code, said = launcher.run(words, env=env)
    assert code == 0, said
    return said


@pytest.fixture
def keyed(lab):
    """An llmux with ``api_keys`` and no ``admin_key``."""
    lab.env["XDG_RUNTIME_DIR"] = str(lab.root)
    lab.write("a b", api_keys=["user"])
    lab.start()
    return lab


@pytest.mark.parametrize("shown", [[], KEY])
async def test_a_bare_proxy_opens_nothing_to_operate(keyed, name, proxy, shown):
    port = proxy(lambda port: BARE[name] % (port, keyed.port))
    for method, target in OPERATING:
        answer = await ask(port, method, target, headers=shown, body=b"{}")
        assert answer.status in (401, 403), (target, answer.status, answer.body)
        assert "`admin_key`" in answer.json()["error"]["message"], target
    assert (await ask(port, "POST", "/v1/chat/completions", body={"model": "a"})).status == 401
    assert keyed.count("wake") == 0
    status = json.loads(command(keyed, "status", "--json"))
    assert (status["lease"], status["awake"]) == (None, [])
    answer = await ask(port, "POST", "/v1/chat/completions", body={"model": "a"}, headers=KEY)
    assert answer.status == 200
    # On the host it is as easy as without keys.
    assert "b is awake" in command(keyed, "switch", "b")


# Seconds that they keep an idle connection to llmux. A request on one that llmux has just closed is answered with
# 502: what is no GET is not sent twice.
KEPT = {"nginx": 60, "Traefik": 90, "cloudflared": 90, "Caddy": 120}


@pytest.mark.parametrize("config", [Config, GatewayConfig])
def test_idle_connections_are_kept_longer_than_proxies_keep_them(config):
    assert config.model_fields["keepalive_timeout"].default > max(KEPT.values()) + 10


async def test_the_documented_proxy_streams_and_refuses_operators(keyed, name, proxy):
    port = proxy(lambda port: example(name, port, keyed.port))
    for method, target in OPERATING:
        answer = await ask(port, method, target, headers=KEY, body=b"{}")
        assert answer.status == 403, (target, answer.status)
    assert keyed.count("wake") == 0
    async with await wire(port) as line:
        body = {"model": "a", "stream": True}
        await line.send(
            request("POST", "/v1/chat/completions", headers=KEY, body=body, do={"sse": 3, "hold_after": [1, "x"]})
        )
        answer = await line.head()
        assert answer.status == 200
        # The engine holds the second event back: the first has come through by itself.
        await asyncio.wait_for(line.reader.readuntil(b"\n\n"), PATIENCE)
        keyed.release("x")
        assert await asyncio.wait_for(line.reader.readuntil(b"\r\n0\r\n\r\n"), PATIENCE)


async def until(lab: Lab, **counts: tuple[int, int]) -> None:
    """Wait until so many requests of each model are in flight and queued."""

    async def there() -> bool:
        models = (await lab.get("/llmux/status", headers=KEY)).json()["models"]
        return all((models[each]["in_flight"], models[each]["queued"]) == two for each, two in counts.items())

    await lab.until(there)


async def test_a_client_that_leaves_the_documented_proxy_leaves_llmux(keyed, name, proxy):
    """Else the GPU works on for no client, and a model wakes for none."""
    port = proxy(lambda port: example(name, port, keyed.port))
    stream = {"headers": KEY, "body": {"model": "a", "stream": True}, "do": {"sse": 3, "hold_after": [1, "x"]}}
    async with await wire(port) as line:
        await line.send(request("POST", "/v1/chat/completions", **stream))
        await line.head()
        await asyncio.wait_for(line.reader.readuntil(b"\n\n"), PATIENCE)
        async with await wire(port) as waiting:
            await waiting.send(request("POST", "/v1/chat/completions", headers=KEY, body={"model": "b"}))
            await until(keyed, a=(1, 0), b=(0, 1))
        await until(keyed, a=(1, 0), b=(0, 0))
    await until(keyed, a=(0, 0), b=(0, 0))
    assert keyed.count("wake", "b") == 0


async def test_the_documented_proxy_passes_large_bodies_once(keyed, name, proxy):
    port = proxy(lambda port: example(name, port, keyed.port))
    filler = "x" * 12_000_000
    answer = await ask(port, "POST", "/v1/chat/completions", headers=KEY, body={"image": filler, "model": "a"})
    assert answer.status == 200, answer.body[:300]
    assert answer.json()["body_size"] > len(filler)


async def test_the_documented_proxy_passes_websockets(keyed, name, proxy):
    port = proxy(lambda port: example(name, port, keyed.port))
    upgrade = [
        ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="), *KEY,
    ]  # fmt: skip
    line: Wire = await wire(port)
    await line.send(request("GET", "/v1/realtime?model=a", headers=upgrade, do={"greeting": "hello at once"}))
    head = await line.head()
    assert head.status == 101
    assert head.get("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert await asyncio.wait_for(line.reader.readexactly(13), PATIENCE) == b"hello at once"
    data = os.urandom(100_000)
    sending = asyncio.create_task(line.send(data))
    assert await asyncio.wait_for(line.reader.readexactly(len(data)), PATIENCE) == data
    await sending
    await line.close()

"""llmux and the proxies it is compared with: how each is started in front of the fake engine."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import measure

# `slow` is another model on another engine: it is what many clients wait for.
LLMUX = """\
port: {port}
models:
  m:
    port: {engine}
    wake: ":"
    sleep: ":"
    alive: ":"
  slow:
    port: {other}
    wake: sleep {wake_seconds:g}
    sleep: ":"
    alive: "false"
"""
NGINX = """\
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 8192; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 100000000; client_body_buffer_size 1m;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 4096; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 1h;
    }}
  }}
}}
"""
HAPROXY = """\
global
  maxconn 8192
  nbthread 1
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 10s
  timeout client 1h
  timeout server 1h
frontend front
  bind 127.0.0.1:{port} backlog 4096
  default_backend engine
backend engine
  server engine 127.0.0.1:{engine}
"""
# As if uvloop were not installed.
_PLAIN = "import sys; sys.modules['uvloop'] = None; from llmux.cli import main; main()"


Command = Sequence[str | Path]


@dataclass
class Rival:
    """One that takes part, and runs. ``pid`` is None where there is nothing to account for."""

    name: str
    port: int
    pid: int | None


@dataclass
class Place:
    """Where a rival is started: an empty folder, the engines' ports, how long a wake takes."""

    folder: Path
    engine: int
    other: int
    wake_seconds: float


def available() -> list[str]:
    """Return the names of all that can be started here."""
    names = ["direct", "llmux", "llmux without uvloop"]
    names += [name for name in ("nginx", "haproxy") if _program(name)]
    if (measure.BUILD / "goproxy").exists():
        names.append("go")
    if original() is not None and only_loopback():
        names.append("rust")
    return names


def original() -> Path | None:
    """Return the original in Rust: what ``cargo install llmux --locked`` builds, or ``LLMUX2``."""
    path = Path(os.environ.get("LLMUX2", "~/.cargo/bin/llmux")).expanduser()
    return path if path.exists() else None


def only_loopback() -> bool:
    """Say whether this is a network namespace of its own: the original listens on every interface."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def running(name: str, place: Place) -> Iterator[Rival]:
    """Start a rival, wait until it answers, and end it afterwards."""
    port = measure.free_port()
    values = {"port": port, **vars(place)}
    with ExitStack() as stack:
        if name == "direct":
            yield Rival(name, place.engine, None)
            return
        command = _command(name, place, values)
        pid = stack.enter_context(process(command, core=measure.PROXY_CORE, log=place.folder.with_suffix(".log")))
        if name.startswith("llmux"):
            wait_for(port, "/ready")
        else:
            wait_for(port)
        yield Rival(name, port, pid)


def _command(name: str, place: Place, values: dict[str, object]) -> Command:
    file = place.folder / "configuration.yaml"
    if name.startswith("llmux"):
        file.write_text(LLMUX.format(**values))
        start = ["-m", "llmux"] if name == "llmux" else ["-c", _PLAIN]
        return ["env", f"XDG_STATE_HOME={place.folder}", sys.executable, *start, "-c", file]
    if name == "rust":
        file.write_text(LLMUX.format(**values))
        return ["env", "RUST_LOG=warn", original() or "llmux", "-c", file]
    if name == "relay":
        return [measure.BUILD / "relay", str(values["port"]), str(place.engine)]
    if name == "go":
        return [measure.BUILD / "goproxy", f"127.0.0.1:{values['port']}", f"http://127.0.0.1:{place.engine}"]
    program = _program(name)
    assert program is not None
    file.write_text((NGINX if name == "nginx" else HAPROXY).format(**values))
    return [program, "-c", file] if name == "nginx" else [program, "-f", file]


@contextmanager
def process(command: Command, *, core: int, log: Path) -> Iterator[int]:
    """Run a command on a core, its output in a file; end it with TERM."""
    with (
        log.open("wb") as output,
        subprocess.Popen([*measure.pinned(core), *command], stdout=output, stderr=output) as child,
    ):
        try:
            yield child.pid
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


@contextmanager
def engine(folder: Path, port: int = 0) -> Iterator[int]:
    """Run a fake engine; give its port."""
    port = port or measure.free_port()
    name = f"engine-{port}"
    with process([measure.BUILD / "engine", str(port)], core=measure.LOAD_CORE, log=folder / name):
        wait_for(port)
        yield port


def peer(text: str) -> Rival:
    """Read NAME=URL: somebody who runs already, in front of the engine."""
    name, equals, url = text.partition("=")
    port = urlsplit(url).port
    if not equals or port is None:
        raise SystemExit(f"PEER={text}: expected NAME=http://127.0.0.1:PORT")
    return Rival(name, port, measure.listener(port))


def wait_for(port: int, path: str | None = None, seconds: float = 30.0) -> None:
    """Wait until somebody listens, or with a path until it answers 200."""
    until = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.connect()
            if path is None:
                return
            connection.request("GET", path)
            if connection.getresponse().status == http.client.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.monotonic() > until:
            raise SystemExit(f"nobody answers on port {port}")
        time.sleep(0.02)

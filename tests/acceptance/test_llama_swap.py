"""A configuration of llama-swap, imported and run: real engines, requests across switches, a group."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.quickstart.tiny_gguf import cached
from tests.engine.mux import Mux
from tests.engine.real import ENGINE, TINY, VECTOR, runs, status_of, wait_until
from tests.harness import launcher
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE

MESSAGES = [{"role": "user", "content": "wake up"}]

# As people write it: macros in macros, comments between lines, quotes, backslashes, a variable, a relative path.
CONFIG = """
startPort: {first}
healthCheckTimeout: 30
logLevel: warn
macros:
  server: >
    {python} "{engine}" --port ${{PORT}}
  name: --alias ${{MODEL_ID}}
  small: "--ctx-size 512 ${{name}}"
models:
  "quick one":
    name: A quick one
    metadata: {{shown: nowhere}}
    cmd: |
      # ${{server}} is above
      ${{server}} \\
        --model "models/a tiny.gguf" --alias '${{MODEL_ID}}'
      # the end
    aliases: [gpt-4o-mini]
    filters: {{setParamsByID: {{"quick and short": {{max_tokens: 2}}}}}}
    unlisted: true
    ttl: 300
    concurrencyLimit: 2
  slow:
    macros: {{name: "--alias 'not so slow'"}}
    cmd: ${{server}} ${{small}} --model ${{env.TINY}}
    cmdStop: sh -c 'echo "$0" > stopped && kill -TERM "$1"' ${{MODEL_ID}} ${{PID}}
    useModelName: whatever
    env: ["TINY_SAYS=hello", "PORT=1"]
    filters: {{strip_params: temperature}}
  vector:
    cmd: ${{server}} --model {vector} --embedding --alias vector
    checkEndpoint: /v1/models
  second: {{cmd: "${{server}} ${{small}} --model ${{env.TINY}}"}}
groups:
  chat:
    members: ["quick one", slow]
  always:
    swap: false
    exclusive: false
    persistent: true
    members: [vector, second]
hooks: {{on_startup: {{preload: [vector]}}}}
"""


def four_ports() -> int:
    """Return the first of four ports in a row that nothing listens on."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + 4):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PID_DIR", str(tmp_path / "pids"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TINY", str(cached(TINY)))
    source = tmp_path / "llama-swap" / "config.yaml"
    (source.parent / "models").mkdir(parents=True)
    (source.parent / "models" / "a tiny.gguf").symlink_to(cached(TINY))
    python, vector = shlex.quote(sys.executable), cached(VECTOR)
    source.write_text(CONFIG.format(first=four_ports(), python=python, engine=ENGINE, vector=vector))
    return source


@pytest.fixture
def imported(source, tmp_path) -> Iterator[Mux]:
    mux = Mux.on(tmp_path / "out" / "config.yaml", free_port())
    check(*import_(source, mux), mux.config)
    yield mux
    mux.clean_up()


def import_(source: Path, mux: Mux) -> tuple[int, str]:
    """Import a file as a configuration; return the exit code, and what was said."""
    words = ["import", "llama-swap", source, "-o", mux.config.parent, "-p", mux.port]
    return launcher.run([str(word) for word in words], env=os.environ)


def check(code: int, said: str, config: Path) -> None:
    """See that what was written is right, and that all else was named."""
    assert code == 1, said  # something was not carried over, and is named
    lost = [line.split(": ")[1] for line in said.splitlines() if "not carried over" in line]
    assert sorted(lost) == ["1 setting, named above and in the file", "models.quick one.metadata"]
    code, said = launcher.run(["check", str(config)], env=os.environ)
    assert code == 0, said
    hook = config.parent / "hooks" / "process.sh"
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert subprocess.run([shellcheck, "-s", "sh", hook], check=False).returncode == 0


async def ask(client: openai.AsyncOpenAI, model: str) -> str:
    answer = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4)
    return answer.model


async def embed(client: openai.AsyncOpenAI) -> int:
    answer = await client.embeddings.create(model="vector", input=["one"], encoding_format="float")
    return len(answer.data[0].embedding)


async def test_an_imported_file_runs(imported):
    await asyncio.to_thread(imported.start)
    await asyncio.to_thread(wait_until, lambda: imported.phase("vector") == "awake")
    async with openai.AsyncOpenAI(base_url=f"{imported.url}/v1", api_key="none", max_retries=0) as client:
        (vector,) = imported.engine_pids()
        assert await ask(client, "quick one") == "quick one"
        assert sorted(imported.status()["awake"]) == ["quick one", "vector"]
        assert await ask(client, "slow") == "not so slow"
        assert sorted(imported.status()["awake"]) == ["slow", "vector"]
        assert await ask(client, "gpt-4o-mini") == "quick one"
        answer = await client.chat.completions.create(model="quick and short", messages=MESSAGES, max_tokens=4)
        assert (answer.model, answer.usage.completion_tokens) == ("quick one", 2)
        names = [model.id async for model in client.models.list()]
        assert names == ["second", "slow", "vector"]
        assert await embed(client) == VECTOR.dim
        assert await ask(client, "second") == "second"
        assert sorted(imported.status()["awake"]) == ["quick one", "second", "vector"]
        assert vector in imported.engine_pids()  # it was never in the way
    assert (imported.config.parent / "stopped").read_text() == "slow\n"  # by `cmdStop`
    assert imported.stop() == 0
    assert runs(vector)  # engines are left as they are
    assert "Traceback" not in imported.said()


# ---- beside llama-swap itself, where it is there: in LLAMA_SWAP, or on the PATH

ECHO = """
import http.server, json, sys
class Echo(http.server.BaseHTTPRequestHandler):
    def answer(self, document):
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer({"data": [{"id": sys.argv[1]}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"by": sys.argv[1], "asked": asked, "key": self.headers["Authorization"]})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Echo).serve_forever()
"""
BESIDE = """
startPort: {first}
models:
  m:
    cmd: {python} {echo} m ${{PORT}}
    aliases: [m-alias]
    filters:
      stripParams: top_k
      setParamsByID: {{"m:hot": {{temperature: 2, chat_template_kwargs: {{thinking: true}}}}}}
  n: {{cmd: "{python} {echo} n ${{PORT}}", useModelName: served-n}}
peers:
  far: {{proxy: "http://127.0.0.1:{peer}", models: [org/x, y], apiKey: secret}}
selectors:
  warm: {{strategy: warm, targets: [m, n]}}
  spills: {{strategy: spillover, targets: [n, org/x]}}
  pinned: {{strategy: pin, targets: [y, m]}}
  hot: {{strategy: pin, targets: ["m:hot"]}}
"""
NAMES = ("m", "m-alias", "m:hot", "hot", "warm", "n", "org/x", "far/org/x", "y", "pinned", "spills")
LLAMA_SWAP = os.environ.get("LLAMA_SWAP") or shutil.which("llama-swap")


def ask_all(port: int) -> dict[str, Any]:
    """Return what is listed, and what each name's request becomes: its engine, with which parameters and key."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=PATIENCE) as answer:
        ids = {entry["id"] for entry in json.load(answer)["data"]}
    found: dict[str, Any] = {"listed": ids - {"org/x", "y"}}  # here, a peer's models are listed under both names
    for name in NAMES:
        asked = {"model": name, "messages": [], "top_k": 5, "temperature": 1}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            got = json.load(answer)
        if got["by"] == "m":  # there, it is told the alias; here, its own name
            got["asked"].pop("model")
        found[name] = got
    return found


@pytest.mark.skipif(LLAMA_SWAP is None, reason="llama-swap is not here; LLAMA_SWAP may say where it is")
def test_requests_become_what_they_become_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PID_DIR", str(tmp_path / "pids"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "echo.py").write_text(ECHO)
    (tmp_path / "there").mkdir()
    source, peer, own = tmp_path / "there" / "config.yaml", free_port(), free_port()
    echo = [sys.executable, str(tmp_path / "echo.py")]
    source.write_text(BESIDE.format(first=four_ports(), python=echo[0], echo=echo[1], peer=peer))
    with subprocess.Popen([*echo, "far", str(peer)]) as far:
        try:
            command = [LLAMA_SWAP, "-config", str(source), "-listen", f"127.0.0.1:{own}"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
                try:
                    wait_until(lambda: status_of(f"http://127.0.0.1:{own}/v1/models") == 200)
                    there = ask_all(own)
                finally:
                    other.terminate()
            mux = Mux.on(tmp_path / "out" / "config.yaml", free_port())
            assert import_(source, mux)[0] == 0
            try:
                mux.start()
                assert ask_all(mux.port) == there
                assert mux.stop() == 0
            finally:
                mux.clean_up()
        finally:
            far.terminate()

"""llmux as a process, with real shell hooks, in front of one engine that streams as slowly as it is told."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.engine.real import status_of, wait_until
from tests.harness.launcher import Running, launch
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE


class Engine(ThreadingHTTPServer):
    """Answers for every model; to a chat with its own words.

    What says ``hold`` in its body is sent an event every 20 ms until ``go`` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = self.server_address[1]
        self.go = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave."""

    def stop(self) -> None:
        """End what is held, and the server."""
        self.go.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as engines do: a body would wait 40 ms for its head's acknowledgement
    server: Engine

    def do_GET(self) -> None:
        """Be a web page of another origin."""
        body = b"<!doctype html><title>another page</title>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while body.get("hold") and not self.server.go.wait(0.02):
            self._event("word")
        for message in body.get("messages", ()):
            for word in message["content"].split():
                self._event(json.dumps({"choices": [{"delta": {"content": f"{word} "}}]}))
            self._event(json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: str) -> None:
        text = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Stage:
    """One llmux in a folder of its own. Model number n is up while the file ``up.n`` is there."""

    def __init__(
        self, folder: Path, models: Mapping[str, Mapping[str, Any]], *, fake_gpu: bool = False, **settings: Any
    ) -> None:
        self.folder = folder
        self.fake_gpu = fake_gpu  # a module which takes the real one's place, found when Python starts
        self.env = dict(os.environ)
        if fake_gpu:
            self.env["PYTHONPATH"] = str(Path(__file__).with_name("nvml"))
        self.engine = Engine()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        sections = {name: self._section(number, more) for number, (name, more) in enumerate(models.items())}
        config = {"port": self.port, "state": "state.json", "alive_every": 0, "models": sections, **settings}
        (folder / "config.json").write_text(json.dumps(config))
        admin = settings.get("admin_key")
        self.operator = {} if admin is None else {"Authorization": f"Bearer {admin}"}
        self.process: Running | None = None
        self.clients: list[threading.Thread] = []

    def _section(self, number: int, more: Mapping[str, Any]) -> dict[str, Any]:
        up = f"up.{number}"
        return {
            "port": self.engine.port,
            "shared_address": True,
            "wake": f"touch {up}",
            "sleep": f"rm -f {up}",
            "alive": f"test -e {up}",
            **more,
        }

    def start(self) -> None:
        """Start llmux and wait until it is ready."""
        log = (self.folder / "llmux.log").open("ab")
        with log:
            self.process = launch(
                ["-c", self.folder / "config.json"], log=log.fileno(), env=self.env, cold=self.fake_gpu
            )
        wait_until(lambda: status_of(f"{self.url}/ready") == 200, what="/ready")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop llmux."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE)

    def close(self) -> None:
        """Leave nothing behind."""
        self.engine.stop()
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)
        for client in self.clients:
            client.join(10)

    def release(self, name: str) -> None:
        """Let the hook go on that waits for this file."""
        (self.folder / name).touch()

    def ask(self, model: str, key: str | None = None, request_id: str = "", **body: Any) -> threading.Thread:
        """Send a request from a thread, and read its answer there."""
        headers = {"X-Request-ID": request_id} if request_id else {}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        client = threading.Thread(target=self._post, args=({"model": model, **body}, headers), daemon=True)
        client.start()
        self.clients.append(client)
        return client

    def _post(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data, {**kind, **headers})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                response.read()
        except (OSError, http.client.HTTPException):  # llmux has gone in the middle
            return

    def status(self) -> dict[str, Any]:
        """Return /llmux/status."""
        request = urllib.request.Request(f"{self.url}/llmux/status", headers=self.operator)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            status: dict[str, Any] = json.load(response)
        return status

    def command(self, path: str, options: Mapping[str, Any]) -> None:
        """Do what an operator does with ``POST /llmux/…``."""
        body = json.dumps(options).encode()
        request = urllib.request.Request(f"{self.url}/llmux/{path}", body, self.operator, method="POST")
        urllib.request.urlopen(request, timeout=PATIENCE).close()

    def in_flight(self, model: str) -> None:
        """Wait until a request for the model is in flight."""
        wait_until(lambda: self.status()["models"][model]["in_flight"], what=f"a request in flight for {model}")


def held(name: str) -> str:
    """Shell text that waits for ``Stage.release(name)``."""
    return f"until [ -e {name} ]; do sleep 0.03; done"

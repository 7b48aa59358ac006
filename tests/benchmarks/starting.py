"""How much CPU time llmux takes to start, as a multiple of `python -c pass`.

    python tests/benchmarks/starting.py [--rounds 20] [--python OTHER/bin/python]

A round runs each command once, in turn, so that other load on the machine affects all of them; the least of all
rounds counts. With bytecode caches, as in an installed llmux. `status` queries a server in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

MODEL = {
    "phase": "asleep", "queued": 0, "in_flight": 0, "oldest_wait": None, "expected_wait": None, "awake_for": None,
    "backoff_until": None, "last_error": None, "pinned": False, "pin_expires_in": None, "pin_reason": None,
}  # fmt: skip
STATUS = {
    "version": "3", "uptime": 1.0, "ready": True, "policy": {"use": "adaptive"}, "awake": [], "switch": None,
    "manual": False, "lease": None, "models": {"a": MODEL, "b": MODEL}, "decisions": [], "reload_error": None,
}  # fmt: skip


class Server(BaseHTTPRequestHandler):
    """Answers with a status."""

    def do_GET(self) -> None:
        answer = json.dumps(STATUS).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def cpu_of(words: list[str], environ: dict[str, str]) -> float:
    """Run a command to its end; return the seconds of CPU that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, env=environ, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        hooks = {"wake": "true", "sleep": "true", "alive": "true"}
        file.write_text(json.dumps({"models": {"a": {"port": 9, **hooks}, "b": {"port": 10, **hooks}}}))
        environ = {name: value for name, value in os.environ.items() if not name.startswith("LLMUX")}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        environ["LLMUX_URL"] = f"http://127.0.0.1:{server.server_port}"
        llmux = [given.python, "-m", "llmux"]
        commands = {
            "python -c pass": [given.python, "-c", "pass"],
            "--version": [*llmux, "--version"],
            "--help": [*llmux, "--help"],
            "check": [*llmux, "check", str(file)],
            "status": [*llmux, "status"],
            "status --json": [*llmux, "status", "--json"],
        }
        for words in commands.values():  # the caches
            cpu_of(words, environ)
        least = dict.fromkeys(commands, float("inf"))
        for _ in range(given.rounds):
            least = {name: min(least[name], cpu_of(words, environ)) for name, words in commands.items()}
    for name, seconds in least.items():
        print(f"{name:15} {seconds:6.3f} s  {seconds / least['python -c pass']:5.1f} times")


if __name__ == "__main__":
    main()

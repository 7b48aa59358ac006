from __future__ import annotations

import contextlib
import http.server
import json
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

STRING, ARRAY, UINT32 = 8, 9, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_gguf(path: Path, said: Mapping[str, Any], size: int = 0) -> Path:
    """Write the beginning of a GGUF file, as llama.cpp's own tools do, and fill it up to a size."""
    body = b""
    for key, value in said.items():
        if isinstance(value, str):
            body += text(key) + struct.pack("<I", STRING) + text(value)
        elif isinstance(value, list):
            body += text(key) + struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
        else:
            body += text(key) + struct.pack("<II", UINT32, value)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(said)) + body
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.ljust(size, b"\0"))
    return path


@contextlib.contextmanager
def answering(answers: Mapping[str, Any]) -> Iterator[int]:
    """Answer each path with JSON, or with a status and JSON; all others with 404. Yields the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path, (404, {"error": "not here"}))
            status, body = answer if isinstance(answer, tuple) else (200, answer)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def listed(owner: str, *names: str, **more: Any) -> dict[str, Any]:
    """Return what `/v1/models` answers."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "owned_by": owner, **more} for name in names],
    }


@pytest.fixture
def serve() -> Iterator[Callable[[Mapping[str, Any]], int]]:
    with contextlib.ExitStack() as stack:
        yield lambda answers: stack.enter_context(answering(answers))

"""What llmux uses of aiohttp beyond its documented interface: an aiohttp which has changed fails here."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_writer import StreamWriter
from aiohttp.web_protocol import RequestHandler, _ErrInfo

ROOT = Path(__file__).parents[2] / "llmux"
# The only file that may touch them.
ADAPTER = "aiohttp_internals.py"

HANDLER = (
    "_close", "_current_request", "_drain_helper", "_force_close", "_handle_request", "_loop", "_manager",
    "_messages", "_task_handler", "_waiter", "force_close", "handle_error", "pause_writing", "resume_writing",
    "set_parser", "transport",
)  # fmt: skip
SERVER = ("_connections", "_kwargs", "_loop", "handler_cancellation", "request_factory", "request_handler")
CHANGED = f"aiohttp {aiohttp.__version__} has changed what llmux relies on: see llmux/aiohttp_internals.py"


@pytest.fixture
async def server():
    return web.Server(lambda _request: None)


@pytest.mark.parametrize("name", HANDLER)
async def test_the_protocol_of_a_connection(server, name):
    assert hasattr(RequestHandler, name) or hasattr(server(), name), CHANGED


@pytest.mark.parametrize("name", SERVER)
async def test_the_server(server, name):
    assert hasattr(server, name), CHANGED


async def test_the_task_of_a_connection_can_begin_later(server):
    """With the transport, which is all that a connection has until then."""
    assert "start" in vars(RequestHandler), CHANGED
    assert server()._task_handler is None, CHANGED
    assert "self.start()" in inspect.getsource(RequestHandler.connection_made), CHANGED
    assert "transport" in inspect.signature(BaseProtocol.connection_made).parameters, CHANGED


def test_a_message_that_is_malformed_comes_as_a_record_of_its_own():
    assert {"status", "exc", "message"} <= set(inspect.signature(_ErrInfo).parameters), CHANGED


def test_a_response_can_be_told_that_it_is_sent():
    assert {"_keep_alive", "_eof_sent"} <= {*vars(web.StreamResponse), *vars(web.StreamResponse())}, CHANGED


def test_the_writer_counts_what_went_out():
    assert "output_size" in {
        *AbstractStreamWriter.__annotations__,
        *vars(AbstractStreamWriter),
        *vars(StreamWriter),
    }, CHANGED


def test_a_runner_makes_its_server_in_one_place():
    assert inspect.iscoroutinefunction(web.AppRunner._make_server), CHANGED
    runner = web.AppRunner(web.Application())
    assert hasattr(runner, "_shutdown_timeout"), CHANGED
    assert "self._server" in inspect.getsource(web.BaseSite), CHANGED


def test_no_other_file_touches_them():
    inside = re.compile(
        r"\b_ErrInfo\b|self\._(messages|current_request|force_close|drain_helper|connections|kwargs)\b"
        r"|\.writer\.output_size|\.set_parser\(|request\.protocol\._|request\.writer\.drain"
    )
    touching = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if inside.search(path.read_text())}
    assert touching == {ADAPTER}

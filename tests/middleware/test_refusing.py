"""Requests without a key: refused before aiohttp parses them, with the same bytes, and a flood of them is cut."""

from __future__ import annotations

import asyncio
import re

import pytest
from argon2 import PasswordHasher

from llmux.config.access import new_key
from llmux.middleware import authentication
from llmux.middleware.fast_path import FastPath
from llmux.proxy import envelope
from tests.server.house import message, until

KEY, OTHER = (new_key() for _ in range(2))
HASH, OTHER_HASH = map(PasswordHasher(1, 8, 1).hash, (KEY, OTHER))  # of little work
BODY = {"model": "a"}


@pytest.fixture
def early(monkeypatch):
    """Note which requests are refused before aiohttp sees them."""
    taken = []
    refusal = FastPath.refusal

    def noted(path, client, head):
        answer = refusal(path, client, head)
        taken.append(answer is not None)
        return answer

    monkeypatch.setattr(FastPath, "refusal", noted)
    return taken


async def answer(line) -> bytes:
    """Read an answer as it comes, without its moment."""
    head = await line.reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)\r\n", head)
    body = await line.reader.readexactly(int(length[1]))
    return re.sub(rb"\r\nDate: [^\r]*", b"\r\nDate: now", head) + body


def chat(target: str = "/v1/chat/completions", *more: str) -> bytes:
    head, _, rest = message("POST", target, BODY, X_Request_ID="mine").partition(b"\r\n")
    return head + b"\r\n" + "".join(f"{line}\r\n" for line in more).encode() + rest


def listing(target: str, *more: str) -> bytes:
    head = message("GET", target, X_Request_ID="mine")
    return head[:-2] + "".join(f"{line}\r\n" for line in more).encode() + b"\r\n"


REFUSED = [
    chat(),
    chat("/v1/messages"),
    chat("/v1/messages/count_tokens?x=1"),
    chat("/v1/chat/completions", "Authorization: Basic abc"),
    chat("/v1/chat/completions", "Authorization: Bearer wrong", "X-API-Key: wrong too"),
    chat("/v1/chat/completions", "X-API-Key: " + "x" * 600),
    chat("/v1/chat/completions", "Content-Type: multipart/form-data; boundary=x"),
    listing("/v1/models"),
    listing("/v1/models/a"),
    listing("/metrics"),
    listing("/llmux/status"),
    listing("/v1/x?model=a"),
]


@pytest.mark.parametrize("data", REFUSED, ids=range(len(REFUSED)))
@pytest.mark.parametrize("spent", [False, True])
async def test_both_ways_refuse_with_the_same_bytes_and_count_the_same(house, early, monkeypatch, data, spent):
    monkeypatch.setattr(authentication, "EVERY", 1e6)
    house.up("a")
    await house.open(api_keys=["plain", HASH] if spent else ["plain"])
    if spent:
        use_up(house)
    early.clear()
    house.log.events.clear()
    answers, counted, lines = [], [], []
    for fast in (True, False):
        house.front.fast_path.open = fast
        before = counts(house)
        line = await house.line()
        line.send(data)
        answers.append(re.sub(rb"Retry-After: \d+", b"Retry-After: soon", await answer(line)))
        counted.append({name: value - before.get(name, 0.0) for name, value in counts(house).items()})
        lines.append([name for name, _ in house.log.events])
        house.log.events.clear()
    assert early == [True]
    assert answers[0] == answers[1]
    assert answers[0].startswith(b"HTTP/1.1 401 ") or (spent and answers[0].startswith(b"HTTP/1.1 429 "))
    assert counted[0] == counted[1]
    assert lines[0] == lines[1]
    assert sum(counted[0].values()) >= 1


def use_up(house) -> None:
    attempts = house.front._keys.ring._attempts
    for _ in range(authentication.BURST):
        attempts.begin("127.0.0.1")


def counts(house) -> dict[str, float]:
    text = house.switcher.metrics.render()[0].decode()
    found = re.findall(r"^(llmux_requests(?:_rejected)?_total\S*) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.parametrize(
    "data",
    [
        chat("/v1/chat/completions", "X-API-Key: plain"),
        chat("/v1/chat/completions", "X-API-Key: no", "Authorization: Bearer plain"),
        listing("/v1/models", "X-API-Key: plain"),
        listing("/health"),
        listing("/ready"),
        listing("/llmux/ui"),
    ],
    ids=range(6),
)
async def test_what_may_pass_passes(house, early, data):
    house.up("a")
    await house.open(api_keys=["plain"])
    assert (await house.raw(data)).status == 200
    assert True not in early


async def test_a_key_that_has_to_be_checked_is_checked(house, early):
    house.up("a")
    await house.open(api_keys=[HASH])
    assert (await house.raw(chat("/v1/chat/completions", f"X-API-Key: {KEY}"))).status == 200
    assert (await house.raw(chat("/v1/chat/completions", f"X-API-Key: {KEY}"))).status == 200
    assert early == [False]  # the second took the fast path


async def test_the_control_socket_takes_no_key(house, early):
    house.up("a")
    await house.open(api_keys=[HASH])
    await house.control()
    for fast in (True, False):
        house.front.fast_path.open = fast
        assert (await house.ask("POST", "/v1/chat/completions", BODY, socket=True)).status == 200
    assert True not in early


async def test_the_access_log_tells_them(house, early):
    await house.open(api_keys=["plain"], access_log=True)
    assert (await house.raw(chat())).status == 401
    assert early == [True]
    (line,) = house.log.named("request_finished")
    assert (line["status"], line["request_id"], line["key"], line["model"]) == (401, "mine", None, None)
    assert line["code"] == "invalid_api_key"


async def test_in_pieces_and_in_a_row(house):
    await house.open(api_keys=["plain"])
    line = await house.line()
    data = chat() * 3 + listing("/health") + chat("/v1/messages")
    for start in range(0, len(data), 50):
        line.send(data[start : start + 50])
        await asyncio.sleep(0)
    statuses = [(await line.reply()).status for _ in range(5)]
    assert statuses == [401, 401, 401, 200, 401]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("data", [chat(), listing("/v1/models"), chat("/upstream/a/v1/x")], ids=range(3))
async def test_many_refusals_end_the_connection(house, monkeypatch, fast, data):
    monkeypatch.setattr(envelope, "MOST_REFUSED", 3)
    await house.open(api_keys=["plain"], admin_key="root")
    house.front.fast_path.open = fast
    line = await house.line()
    for nth in range(3):
        line.send(data)
        reply = await line.reply()
        assert reply.status == 401
        assert reply.headers.get("connection") == ("close" if nth == 2 else None)
    assert await line.closed() == b""
    assert (await house.raw(data)).status == 401


async def test_a_client_that_does_not_read_its_refusals_is_not_written_for_without_end(house, early):
    await house.open(api_keys=["plain"])
    line = await house.line()
    line.writer.transport.pause_reading()
    (connection,) = await connections(house)
    connection.pause_writing()
    line.send(chat())
    await until(lambda: connection._busy == 1)
    assert True not in early
    connection.resume_writing()
    line.writer.transport.resume_reading()
    assert (await line.reply()).status == 401


async def connections(house):
    found = house._runner.server._connections
    await until(lambda: found)
    return list(found)


async def test_a_reload_that_drops_the_keys_lets_in(house):
    house.up("a")
    await house.open(api_keys=["plain"])
    line = await house.line()
    line.send(chat())
    assert (await line.reply()).status == 401
    config = house.config()
    house.switcher.replace(config)
    house.front.configure(config)
    line.send(chat())
    assert (await line.reply()).status == 200

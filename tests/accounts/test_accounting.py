"""What the event loop makes of what happens: nothing is lost, and nothing waits."""

import asyncio
import contextlib
import sqlite3
import threading

import pytest

from llmux.accounts.ledger_file import Store
from llmux.middleware.fast_path import MOST
from tests.server.house import until

CHAT = "/v1/chat/completions"
KEYS = [
    {"name": "alice", "key": "key-of-alice"},
    {"name": "bob", "key": "key-of-bob", "limits": {"requests": "9999/d"}},
]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def send(house, key, padding=0):
    body = {"model": "a", "stream": True, "padding": "x" * padding}
    return await house.ask("POST", CHAT, body, Authorization=f"Bearer key-of-{key}")


def rows(house, what="*", kind=0):
    with contextlib.closing(sqlite3.connect(house.folder / "ledger.db")) as connection, connection:
        return connection.execute(f"SELECT {what} FROM requests WHERE kind = {kind} ORDER BY id").fetchall()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("padding", [0, MOST])  # the fast path, and the other
@pytest.mark.parametrize("key", ["alice", "bob"])  # metered, and managed
@pytest.mark.parametrize("size", [1, 4097])
async def test_each_event_of_a_long_stream_is_counted(house, size, key, padding, watched):
    """In chunks of their own, which come one by one or many at once."""
    await house.open("a", ledger="ledger.db", api_keys=KEYS)
    await send(house, key)
    if watched:
        house.switcher.activities.watch()
    count = 53
    event = b'data: {"delta":{"content":"%b"}}\n\n' % (b"x" * size)
    house.engine.says = [HEAD, *[b"%x\r\n%b\r\n" % (len(event), event)] * count, b"0\r\n\r\n"]
    assert (await send(house, key, padding)).status == 200
    await house.close()
    assert rows(house, "output, estimated")[-1] == (count, 1)


async def test_a_disk_that_hangs_holds_up_nothing(house, monkeypatch):
    """Rows wait in memory, and each is written once."""
    await house.open("a", ledger="ledger.db", api_keys=KEYS)
    await send(house, "alice")
    books = house.switcher.accounts
    hung, write, free = threading.Event(), Store.write, threading.Event()

    def hang(*arguments, **more):
        hung.set()
        free.wait()
        write(*arguments, **more)

    monkeypatch.setattr(Store, "write", hang)
    try:
        await send(house, "alice")
        await until(hung.is_set)
        for _ in range(5):
            assert {
                reply.status for reply in await asyncio.gather(*(send(house, "alice") for _ in range(20)))
            } == {200}
    finally:
        free.set()
    await house.close()
    assert len(set(rows(house, "request_id"))) == len(rows(house)) == 102
    assert books.ledger.lost == 0


async def test_what_a_guard_was_held_for_is_paid_at_the_end(house):
    await house.open("a", ledger="ledger.db", prices={"gpu_hour": 1})
    async with house.switcher.hold("a"):
        await asyncio.sleep(0.1)
    await house.close()
    assert sum(gpu for (gpu,) in rows(house, "gpu", 1)) >= 99_000  # a timer may be early by its clock's resolution

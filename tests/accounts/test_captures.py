"""Captures: what they hold, what they never hold, and that no request waits for them."""

import asyncio
import gzip
import json
import os
import stat
import time
from collections import deque

import pytest

from llmux.accounts import aging
from llmux.accounts import captures as capturing
from llmux.accounts.captures import MOST, REMOVED, Captures, Remover
from tests.server.house import Log, until

CHAT = "/v1/chat/completions"
SECRETS = ("key-of-alice", "key-of-bob")
KEYS = [{"name": "alice", "key": "key-of-alice"}, {"name": "bob", "key": "key-of-bob"}]
ALICE, BOB = ({"Authorization": f"Bearer {key}"} for key in SECRETS)


def answer(body, kind="application/json", *more):
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def open_with(house, **captures):
    given = {"keys": ["alice"], "folder": "kept"} | captures
    await house.open(captures=given, api_keys=KEYS)


def files(folder):
    return sorted((folder / "kept").glob("*/*.json"))


async def documents(house, count):
    """Return so many captures, by their requests' ids."""
    await until(lambda: len(files(house.folder)) >= count)
    found = [json.loads(file.read_text()) for file in files(house.folder)]
    assert len(found) == count
    return {document["request_id"]: document for document in found}


async def test_a_request_and_its_answer(house):
    await open_with(house)
    house.engine.says = answer(b'{"choices":[{"message":{"content":"hello"}}],"usage":{"prompt_tokens":3}}')
    body = {"model": "a", "messages": [{"role": "user", "content": "h\u00ff\n"}], "max_tokens": 5}
    for key in (ALICE, BOB):
        reply = await house.ask("POST", CHAT + "?x=1", body, X_Request_ID=f"of-{key['Authorization']}", **key)
        assert reply.status == 200
    assert (await house.ask("POST", CHAT, body, X_Request_ID="my/../id", **ALICE)).status == 200
    found = await documents(house, 2)
    kept = found["my/../id"]
    assert kept["request"]["body"] == body
    assert kept["answer"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert (kept["key"], kept["model"], kept["asked"], kept["status"]) == ("alice", "a", "a", 200)
    assert (kept["method"], kept["path"], kept["answer"]["status"]) == ("POST", CHAT, 200)
    assert kept["answer"]["headers"]["x-request-id"] == "my/../id"
    file, *_ = files(house.folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == stat.S_IMODE(file.parent.parent.stat().st_mode) == 0o700
    await until(lambda: house.front._handler.captures._written == 2)  # counted once the file is there
    metrics = (await house.ask("GET", "/metrics", **BOB)).body.decode()
    assert "llmux_captures_total 2.0" in metrics
    assert "llmux_captures_lost_total 0.0" in metrics


async def test_what_a_captured_gateway_sends_for_its_clients_is_captured_too(house):
    keys = [*KEYS, {"name": "gate", "key": "key-of-gate", "gateway": True}]
    house.up("a")
    await house.open(captures={"keys": ["gate"], "folder": "kept"}, api_keys=keys)
    assert (await house.ask("POST", CHAT, {"model": "a"}, **BOB)).status == 200  # the model is known to be awake
    for name in ("bob", "nobodys"):
        gateway = {"Authorization": "Bearer key-of-gate", "X_LLMux_Key": name, "X_Request_ID": f"of-{name}"}
        assert (await house.ask("POST", CHAT, {"model": "a"}, **gateway)).status == 200
    found = await documents(house, 2)
    assert {ident: kept["key"] for ident, kept in found.items()} == {"of-bob": "bob", "of-nobodys": "nobodys"}


async def test_what_a_gateway_sends_for_a_captured_key_is_captured(house):
    keys = [*KEYS, {"name": "gate", "key": "key-of-gate", "gateway": True}]
    await house.open(captures={"keys": ["alice"], "folder": "kept"}, api_keys=keys)
    for name in ("alice", "bob"):
        gateway = {"Authorization": "Bearer key-of-gate", "X_LLMux_Key": name, "X_Request_ID": f"of-{name}"}
        assert (await house.ask("POST", CHAT, {"model": "a"}, **gateway)).status == 200
    assert set(await documents(house, 1)) == {"of-alice"}


async def test_no_credential_and_nothing_that_was_configured(house):
    """Not in a header, a field or the query, nor where an engine says it again."""
    await open_with(house, remove=["content", "X-Project"])
    said = {"error": {"message": "key-of-alice is odd", "content": "private"}, "api_key": "sk-of-the-engine"}
    house.engine.says = answer(
        json.dumps(said).encode(), "application/json", "Set-Cookie: a=session-of-the-engine"
    )
    body = {
        "model": "a",
        "messages": [{"role": "user", "content": "private"}],
        "tools": [
            {"type": "mcp", "authorization": "token-of-a-tool", "headers": {"Authorization": "another-token"}}
        ],
        "user": "key-of-alice",
        "max_tokens": 4,
    }
    sent = {"X_API_Key": "key-of-elsewhere", "Cookie": "c=cookie-of-alice", "X_Project": "private", **ALICE}
    target = f"{CHAT}?api_key=query-secret&key=query-secret&key-of-alice&b=1"
    assert (await house.ask("POST", target, body, X_Request_ID="key-of-alice", **sent)).status == 200
    (file,) = [file async for file in _when(house, 1)]
    text = file.read_text()
    for secret in (
        "key-of-",
        "private",
        "sk-of",
        "session-of",
        "token-of",
        "another-token",
        "cookie-of",
        "query-s",
    ):
        assert secret not in text, text
    kept = json.loads(text)
    assert kept["request"]["body"]["max_tokens"] == 4
    assert kept["query"] == f"api_key={REMOVED}&key={REMOVED}&{REMOVED}&b=1"
    assert kept["answer"]["body"]["error"]["message"] == f"{REMOVED} is odd"


async def _when(house, count):
    await until(lambda: len(files(house.folder)) >= count)
    for file in files(house.folder):
        yield file


async def test_streams(house):
    await open_with(house, remove=["content"])
    events = [b'data: {"choices":[{"delta":{"content":"private"}}]}\n\n', b": a comment\n\n", b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    house.engine.says = head + chunks + b"0\r\n\r\n"
    body = {"model": "a", "stream": True}
    assert (await house.ask("POST", CHAT, body, X_Request_ID="whole", **ALICE)).body == b"".join(events)
    house.engine.says = head + chunks[:40]  # it ends within an event
    line = await house.begin("POST", CHAT, body, X_Request_ID="cut", **ALICE)
    await line.reader.readuntil(b"cont")
    line.abort()
    found = await documents(house, 2)
    delta = {"choices": [{"delta": {"content": REMOVED}}]}
    assert found["whole"]["answer"]["events"] == [{"data": delta}, {"comment": "a comment"}, {"data": "[DONE]"}]
    assert found["cut"]["answer"]["events"] == [{"data": "(not JSON)"}]
    assert found["cut"]["status"] is None
    assert "private" not in str(found)


async def test_what_cannot_be_read_field_by_field_is_left_out(house):
    await open_with(house)
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    house.engine.says = answer(b"\x00\xff" * 50, "audio/wav")
    await house.ask("POST", "/v1/audio/transcriptions", form, X_Request_ID="form", **kind, **ALICE)
    house.engine.says = answer(gzip.compress(b'{"a": 1}'), "application/json", "Content-Encoding: gzip")
    await house.ask("GET", "/v1/x?model=a", X_Request_ID="gzip", **ALICE)
    house.engine.says = answer(b"...", "application/json", "Content-Encoding: br")
    await house.ask("GET", "/v1/x?model=a", X_Request_ID="br", **ALICE)
    house.engine.says = answer(gzip.compress(b" " * 2 * MOST), "application/json", "Content-Encoding: gzip")
    await house.ask("GET", "/v1/x?model=a", X_Request_ID="bomb", **ALICE)
    house.engine.says = answer(b'{"a":"%b"}' % (b"x" * MOST))
    await house.ask("POST", CHAT, {"model": "a", "b": "x" * MOST}, X_Request_ID="large", **ALICE)
    house.engine.says = None
    for depth in (480, 700, 960, 5000):  # which of them is too deep, and for what, depends on the Python
        deep = b'{"model":"a","messages":%b}' % (b"[" * depth + b"]" * depth)
        assert (await house.ask("POST", CHAT, deep, X_Request_ID=f"deep-{depth}", **ALICE)).status == 200
    found = await documents(house, 9)
    assert found["deep-5000"]["request"]["left_out"]
    assert found["form"]["request"]["left_out"] == "not JSON"
    assert (found["form"]["answer"]["left_out"], found["form"]["answer"]["size"]) == ("not text", 100)
    assert found["gzip"]["answer"]["body"] == {"a": 1}
    assert found["br"]["answer"]["left_out"] == "Content-Encoding 'br'"
    assert "unpacked" in found["bomb"]["answer"]["left_out"]
    assert (
        found["large"]["request"]["left_out"]
        == found["large"]["answer"]["left_out"]
        == f"larger than {MOST} bytes"
    )
    assert found["large"]["answer"]["size"] == MOST + 8


async def test_what_llmux_answers_itself_and_websockets(house):
    await open_with(house)
    assert (await house.ask("POST", CHAT, {"model": "none"}, X_Request_ID="unknown", **ALICE)).status == 404
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    line = await house.begin("GET", "/v1/realtime?model=a", X_Request_ID="socket", **upgrade, **ALICE)
    assert (await line.reply()).status == 101
    line.abort()
    found = await documents(house, 2)
    assert found["unknown"]["answer"]["body"]["error"]["code"] == "model_not_found"
    assert (found["unknown"]["status"], found["unknown"]["error"]) == (404, "model_not_found")
    assert found["socket"]["answer"]["left_out"] == "a tunnel"


async def test_an_answer_that_begins_while_the_model_wakes(house):
    await house.open(
        {"a": {"wake": "until [ -e go ]; do sleep 0.01; done; touch a.up"}},
        captures={"keys": ["alice"], "folder": "kept"},
        api_keys=KEYS,
        progress=True,
        progress_every=0.05,
    )
    house.engine.says = answer(b'{"a": 1}')
    line = await house.begin("POST", CHAT, {"model": "a", "stream": False}, X_Request_ID="early", **ALICE)
    await line.reader.readuntil(b"\r\n\r\n")
    (house.folder / "go").touch()
    assert b'{"a": 1}' in await line.reader.readuntil(b"0\r\n\r\n")
    assert (await documents(house, 1))["early"]["answer"]["body"] == {"a": 1}


async def test_a_reload_changes_which_keys_and_where(house):
    await house.open(api_keys=KEYS)
    assert (await house.ask("POST", CHAT, {"model": "a"}, **ALICE)).status == 200
    for keys, folder in ((["alice"], "kept"), (["bob"], "kept"), (["alice"], "other"), (None, None)):
        captures = None if keys is None else {"keys": keys, "folder": folder}
        config = house.config(api_keys=KEYS, captures=captures)
        house.switcher.replace(config)
        house.front.configure(config)
        name = f"{keys}-{folder}"
        assert (await house.ask("POST", CHAT, {"model": "a"}, X_Request_ID=name, **ALICE)).status == 200
    await until(lambda: list((house.folder / "other").glob("*/*.json")))
    assert list(await documents(house, 1)) == ["['alice']-kept"]


async def test_a_stop_writes_the_last_ones(house):
    await open_with(house)
    for number in range(20):
        assert (await house.ask("POST", CHAT, {"model": "a"}, X_Request_ID=f"id-{number}", **ALICE)).status == 200
    await house.close()
    assert len(files(house.folder)) == 20


async def test_requests_are_served_when_the_folder_cannot_be_written(house):
    (house.folder / "kept").write_text("a file")
    await open_with(house)
    for _ in range(3):
        assert (await house.ask("POST", CHAT, {"model": "a"}, **ALICE)).status == 200
    captures = house.front._handler.captures
    await until(lambda: captures.lost == 3)
    assert len(house.log.named("captures_unwritable")) == 1
    (house.folder / "kept").unlink()
    assert (await house.ask("POST", CHAT, {"model": "a"}, **ALICE)).status == 200
    await documents(house, 1)


class Store:
    """A store by itself."""

    def __init__(self, folder, **given):
        self.log = Log()
        self.captures = Captures(folder, self.log.emit)
        self.captures.keep, self.captures.most = given.get("keep", 1e9), given.get("most", 2**30)

    async def write(self, request_id, size=10):
        body = json.dumps("x" * size).encode()
        before = self.captures._written + self.captures.lost
        capture = self.captures.begin("POST", CHAT, [], [body], len(body))
        capture.ended(
            None, request_id=request_id, key="", asked=None, model=None, status=200, error=None, waited=0
        )
        await until(lambda: self.captures._written + self.captures.lost > before)

    async def close(self):
        await asyncio.to_thread(self.captures.close)


async def test_a_full_disk(tmp_path, monkeypatch):
    """Nothing is left of a file that could not be written."""
    store = Store(tmp_path / "kept")
    await store.write("one")

    def full(file, data):
        if data.startswith(b"{"):
            return real(file, data[:5])
        raise OSError(28, "No space left on device")

    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(capturing.os, "write", full)
        await store.write("two")
        await store.write("three")
    assert (store.captures.lost, len(store.log.named("captures_unwritable"))) == (2, 1)
    await store.write("four")
    await store.close()
    assert [file.name.partition("-")[2] for file in files(tmp_path)] == ["one.json", "four.json"]
    assert not list(tmp_path.glob("**/*.part"))


async def test_the_oldest_go_when_there_is_too_much_or_they_are_too_old(tmp_path, monkeypatch):
    store = Store(tmp_path / "kept", most=10_000)
    stray = tmp_path / "kept" / "2020-01-01" / "mine.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("no capture")
    for number in range(40):
        await store.write(f"id-{number}", 500)
    kept = files(tmp_path)
    assert sum(file.stat().st_size for file in kept if file != stray) <= 10_000
    assert [file.stem.rpartition("-")[2] for file in kept if file != stray] == [
        str(number) for number in range(40 - len(kept) + 1, 40)
    ]
    await store.write("too large", 20_000)
    assert store.captures.lost == 1
    store.captures.keep, now, steady = 3600.0, time.time(), time.monotonic()
    await store.write("old")
    monkeypatch.setattr(capturing.time, "time", lambda: now + 3700)
    monkeypatch.setattr(aging, "monotonic", lambda: steady + 3700)
    await store.write("new")
    await store.close()
    assert not [file for file in files(tmp_path) if "-old" in file.name]
    monkeypatch.setattr(capturing.time, "time", lambda: now + 3701)
    again = Store(tmp_path / "kept", most=10_000, keep=0.0)  # what is there from before counts
    await again.write("last")
    await again.close()
    assert [file for file in files(tmp_path) if file != stray and "-last" not in file.name] == []
    assert stray.read_text() == "no capture"


async def test_a_clock_that_is_wrong_for_a_while_deletes_nothing_and_keeps_nothing_for_long(tmp_path, monkeypatch):
    store = Store(tmp_path / "kept", most=10_000_000, keep=86_400.0)
    now, steady, hour = time.time(), time.monotonic(), 3600.0

    def kept():
        return {file.stem.rpartition("-")[2] for file in files(tmp_path)}

    async def write(name, later, wrong=0.0):
        monkeypatch.setattr(capturing.time, "time", lambda: now + later + wrong)
        monkeypatch.setattr(aging, "monotonic", lambda: steady + later)
        await store.write(name)

    await write("a", 0)
    await write("b", 1 * hour, wrong=1e8)
    await write("c", 1.5 * hour, wrong=1e8)
    await write("d", 3 * hour)
    assert kept() == {"a", "b", "c", "d"}
    await write("e", 26 * hour)
    assert kept() == {"b", "c", "d", "e"}
    await write("f", 28 * hour)
    assert kept() == {"e", "f"}
    await write("g", 29 * hour, wrong=1e8)  # it is the time
    await write("h", 30.1 * hour, wrong=1e8)
    assert kept() == {"g", "h"}
    await store.close()


async def test_many_of_a_clock_that_was_ahead_go_at_once(tmp_path, monkeypatch):
    store = Store(tmp_path / "kept", keep=86_400.0)
    await store.write("first")
    name, size = store.captures._files[0]
    ahead = [(f"2999-01-01/000000.{number:06}-ahead.json", size) for number in range(1000)]
    looks = []

    class Watched(deque):
        def __iter__(self):
            for each in super().__iter__():
                looks.append(each)
                yield each

    store.captures._files = Watched([*ahead, (name, size)])
    steady, now = time.monotonic(), time.time()
    monkeypatch.setattr(capturing.time, "time", lambda: now + 100_000)
    monkeypatch.setattr(aging, "monotonic", lambda: steady + 100_000)
    await store.write("last")
    await store.close()
    assert len(store.captures._files) == len(files(tmp_path)) == 1
    assert len(looks) < 3000  # not for each of them all that come after it


async def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "HELD", 3000)
    store = Store(tmp_path / "kept")
    captures = store.captures
    body = [b"x" * 1000]
    begun = [captures.begin("POST", CHAT, [], body, 1000) for _ in range(4)]
    assert begun[3] is None
    assert (captures.lost, len(store.log.named("captures_lost"))) == (1, 1)
    begun[0].took(b"y" * 2 * MOST)
    assert captures.held == 3000 + MOST
    for one in begun[:3]:
        one.ended(None, request_id="i", key="", asked=None, model=None, status=200, error=None, waited=0)
    await until(lambda: captures._written == 3)
    await until(lambda: len(captures._given_back) == 3)
    assert captures.begin("POST", CHAT, [], body, 1000) is not None
    assert captures.held == 1000
    await store.close()


def test_odd_answers():
    remover = Remover(["A"], ["secret"])
    assert remover.json({"a": [1], "the secret": {"B": ["a secret", None, 1.5]}}) == {
        "a": REMOVED, f"the {REMOVED}": {"B": [f"a {REMOVED}", None, 1.5]},
    }  # fmt: skip
    for raw in (
        b"",
        b"\r\n\r\n",
        b"HTTP/1.1",
        b"HTTP/1.1 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz",
    ):
        assert "headers" in capturing._answer(raw, len(raw), remover)


@pytest.mark.parametrize("request_id", ["a" * 128, "../../etc/passwd", "...", "a b", "é", "%2e"])
def test_a_request_id_makes_a_harmless_name(request_id):
    safe = capturing._safe(request_id)
    assert "/" not in safe
    assert not safe.startswith(".")
    assert capturing._FILE.match(f"010203.000001-{safe}.json")


async def test_what_a_killed_llmux_had_begun_goes(tmp_path):
    """And what it had written counts."""
    store = Store(tmp_path / "kept")
    await store.write("one", 3000)
    await store.close()
    (whole,) = files(tmp_path)
    part = whole.with_name("010203.000001-two.json.part")
    part.write_text("{")
    again = Store(tmp_path / "kept", most=4000)
    await until(lambda: not part.exists())
    assert files(tmp_path) == [whole]
    await again.write("three", 2000)
    await again.close()
    assert [file.name.partition("-")[2] for file in files(tmp_path)] == ["three.json"]

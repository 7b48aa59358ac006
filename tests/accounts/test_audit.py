"""The audit: every act of an operator, reload and event of a key, and nothing that is secret."""

import asyncio
import json
import os
import stat

import pytest

from llmux.config import Config
from llmux.errors import ConfigError
from llmux.observability import audit as auditing
from llmux.observability.audit import KEPT, REFUSALS, Audit, act_of
from tests.server.house import Log, until

ADMIN = {"Authorization": "Bearer key-of-the-admin"}
KEYS = {"admin_key": "key-of-the-admin", "api_keys": [{"name": "alice", "key": "key-of-alice"}]}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


async def lines(house, event, count):
    """Return the lines of one kind, when so many are there."""

    def found():
        file = house.folder / "audit.jsonl"
        return [line for line in read(file) if line["event"] == event] if file.exists() else []

    await until(lambda: len(found()) >= count)
    return found()


async def test_what_operators_do(house):
    await house.open(audit="audit.jsonl", **KEYS)
    acts = [
        ("POST", "/llmux/models/a/wake", None, 202),
        ("POST", "/llmux/models/a/pin", {"for": "2h", "reason": "tests"}, 202),
        ("POST", "/llmux/models/a/unpin", None, 202),
        ("POST", "/llmux/models/b/wake", {"what": 1}, 400),
        ("POST", "/llmux/models/none/sleep", None, 404),
        ("POST", "/llmux/lease", {"for": "1h"}, 202),
        ("DELETE", "/llmux/lease?id=another", None, 409),
        ("DELETE", "/llmux/lease", None, 202),
        ("POST", "/llmux/manual", None, 202),
        ("DELETE", "/llmux/manual", None, 202),
        ("POST", "/llmux/requests/my-id/cancel", None, 404),
        ("POST", "/upstream/a/not/a/path/of/clients", None, 200),
    ]
    for number, (method, path, body, status) in enumerate(acts):
        reply = await house.ask(method, path, body, X_Request_ID=f"id-{number}", **ADMIN)
        assert reply.status == status, reply
    for path in ("/llmux/status", "/upstream/a/v1/models", "/llmux/decisions"):  # looking is no act
        await house.ask("GET", path, **ADMIN)
    assert (await house.ask("POST", "/upstream/a/v1/chat/completions", b"{}", **ADMIN)).status == 200
    found = await lines(house, "operated", len(acts))
    assert [(line["act"], line["status"]) for line in found] == [
        ("wake", 202), ("pin", 202), ("unpin", 202), ("wake", 400), ("sleep", 404), ("lease", 202),
        ("end lease", 409), ("end lease", 202), ("manual", 202), ("end manual", 202), ("cancel", 404),
        ("POST /not/a/path/of/clients", 200),
    ]  # fmt: skip
    assert all(line["by"] == "admin_key" and line["from"] == "127.0.0.1" for line in found)
    assert [line["request_id"] for line in found] == [f"id-{number}" for number in range(len(acts))]
    assert found[1]["options"] == {"for": "2h", "reason": "tests"}
    assert (found[1]["model"], found[10]["request"]) == ("a", "my-id")
    assert (found[4]["error"], found[6]["error"]) == ("model_not_found", "conflict")
    assert found[6]["options"] == {"id": "another"}
    text = (house.folder / "audit.jsonl").read_text()
    assert "key-of" not in text
    assert stat.S_IMODE((house.folder / "audit.jsonl").stat().st_mode) == 0o600


async def test_the_control_socket_and_a_machine_without_keys(house):
    await house.open(audit="audit.jsonl")
    await house.control()
    assert (await house.ask("POST", "/llmux/models/a/wake", socket=True)).status == 202
    assert (await house.ask("POST", "/llmux/models/a/pin")).status == 202
    found = await lines(house, "operated", 2)
    assert [(line["by"], line["from"]) for line in found] == [
        ("operator", "control socket"),
        ("operator", "127.0.0.1"),
    ]


@pytest.mark.parametrize("fast", [True, False])
async def test_keys_that_open_nothing(house, fast):
    """A flood of them does not fill the disk."""
    await house.open(audit="audit.jsonl", **KEYS)
    more = {"Authorization": "Bearer key-of-bob"} | ({} if fast else {"X-Odd": "ü"})
    for _ in range(REFUSALS + 5):
        assert (await house.ask("POST", "/v1/chat/completions", {"model": "a"}, **more)).status == 401
    found = await lines(house, "key_refused", REFUSALS)
    assert (found[0]["path"], found[0]["from"], found[0]["status"]) == ("/v1/chat/completions", "127.0.0.1", 401)
    house.switcher.audit._refused.clear()  # a minute later
    refused = await house.ask("POST", "/llmux/models/a/wake", Authorization="Bearer key-of-alice")
    assert refused.status == 401
    *_, last = await lines(house, "key_refused", REFUSALS + 1)
    assert (last["path"], last["more"]) == ("/llmux/models/a/wake", 5)
    assert "key-of" not in (house.folder / "audit.jsonl").read_text()


async def test_a_reload_turns_it_on_moves_it_and_ends_it(house):
    await house.open()
    assert house.switcher.audit is None
    for name in ("audit.jsonl", "other.jsonl"):
        house.switcher.replace(house.config(audit=name))
        assert (await house.ask("POST", "/llmux/models/a/unpin")).status == 202
        await until(lambda name=name: "operated" in (house.folder / name).read_text())
    house.switcher.replace(house.config())
    assert (await house.ask("POST", "/llmux/models/a/pin")).status == 202
    for name in ("audit.jsonl", "other.jsonl"):
        await until(lambda name=name: "moved" in (house.folder / name).read_text())
    assert [line["event"] for line in read(house.folder / "audit.jsonl")] == ["operated", "moved"]
    assert [line["event"] for line in read(house.folder / "other.jsonl")] == ["operated", "moved"]


def test_what_a_reload_does_to_keys(read_config):
    before = read_config(
        "admin_key: a\napi_keys: [{name: gone, key: k1}, {name: same, key: k2}, {name: turned, key: k3}, k4]"
    )
    after = read_config(
        "api_keys: [{name: same, key: k2}, {name: turned, key: k5, limits: {requests: 1/s}}, {name: new, key: k1},"
        " k6, k7]"
    )
    events = list(auditing.key_events(before, after))
    assert events == [
        ("key_removed", {"key": "admin_key", "changed": None}),
        ("key_removed", {"key": "gone"}),
        ("key_changed", {"key": "turned", "changed": ["key", "limits"]}),
        ("key_added", {"key": "new", "role": None}),
        ("key_removed", {"without_name": 1}),
        ("key_added", {"without_name": 2}),
    ]
    assert auditing.changed_settings(before, after) == ["admin_key", "api_keys"]
    assert list(auditing.key_events(after, after)) == []


@pytest.fixture
def read_config(tmp_path):
    def read_config(text):
        file = tmp_path / "read.yaml"
        file.write_text("models: {q: {port: 8001, wake: w, sleep: s, alive: a}}\n" + text)
        return Config.from_file(file, environ={})

    return read_config


def test_the_act_in_a_path():
    assert act_of("POST", "/llmux/models/org/name/wake") == {"act": "wake", "model": "org/name"}
    assert act_of("POST", "/llmux/fleet/one/drain") == {"act": "drain", "host": "one"}
    assert act_of("POST", "/llmux/else/one/more") == {"act": "else/one/more"}
    assert act_of("DELETE", "/llmux/lease") == {"act": "end lease"}


async def test_a_file_that_cannot_be_written_at_the_start_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be written: .*; give another file, or null"):
        Audit(tmp_path / "none" / "audit.jsonl", print)


async def test_a_folder_that_goes_away(tmp_path):
    """The lines wait, and what does not fit is counted, told, and said in the file."""
    folder, log = tmp_path / "folder", Log()
    folder.mkdir()
    audit = Audit(folder / "audit.jsonl", log.emit)
    audit.put("one")
    await until(lambda: (folder / "audit.jsonl").read_text().endswith("\n"))
    folder.rename(tmp_path / "away")
    audit.put("two")
    await until(lambda: log.named("audit_unwritable"))
    for _ in range(KEPT + 9):
        audit.put("more")
    assert audit.lost == 10
    assert len(log.named("audit_lines_lost")) == 1
    assert [metric.samples[0].value for metric in audit.collect()] == [10]
    folder.mkdir()
    await until(lambda: (folder / "audit.jsonl").exists() and "lines_lost" in (folder / "audit.jsonl").read_text())
    found = read(folder / "audit.jsonl")
    assert [line["event"] for line in found] == ["two", *["more"] * (KEPT - 1), "lines_lost"]
    assert found[-1]["lines"] == 10
    await asyncio.to_thread(audit.close)
    assert len(log.named("audit_unwritable")) == 1


async def test_a_full_disk(tmp_path, monkeypatch):
    """A line that was cut is written again, on a line of its own."""
    log, real, room = Log(), os.write, [30]

    def write(file, data):
        if room[0] is None:
            return real(file, data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = real(file, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(auditing.os, "write", write)
    monkeypatch.setattr(auditing, "PAUSE", 0.01)
    audit = Audit(tmp_path / "audit.jsonl", log.emit)
    audit.put("one", text="x" * 400)
    await until(lambda: log.named("audit_unwritable"))
    audit.put("two")
    room[0] = None
    await asyncio.to_thread(audit.close)
    torn, *whole = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert len(torn) == 30
    assert [json.loads(line)["event"] for line in whole] == ["one", "two"]
    assert len(json.loads(whole[0])["text"]) == 301  # bounded


async def test_a_pipe_which_cannot_be_synced_is_written_all_the_same(tmp_path):
    """The standard output of a container, for example."""
    log, pipe = Log(), tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    audit = Audit(pipe, log.emit)
    audit.put("one")
    audit.put("two")
    await asyncio.to_thread(audit.close)
    assert [json.loads(line)["event"] for line in os.read(reading, 65536).splitlines()] == ["one", "two"]
    os.close(reading)
    assert not log.named("audit_unwritable")


async def test_what_no_operator_asked_does_not_fill_the_disk(house):
    """Neither paths that are not there nor commands of those who may not."""
    await house.open(audit="audit.jsonl", api_keys=KEYS["api_keys"])
    alice = {"Authorization": "Bearer key-of-alice"}
    for _ in range(REFUSALS + 5):
        assert (await house.ask("POST", "/llmux/not/there", **alice)).status == 404
        assert (await house.ask("POST", "/llmux/models/a/wake", **alice)).status == 403
        assert (await house.ask("POST", "/upstream/a/some/path", **alice)).status == 403
    found = await lines(house, "refused", REFUSALS)
    assert len(found) == REFUSALS
    assert {line["path"] for line in found} == {"/llmux/models/a/wake", "/some/path"}
    assert {line["error"] for line in found} == {"admin_key_not_set"}
    assert [line["event"] for line in read(house.folder / "audit.jsonl")] == ["started", *["refused"] * REFUSALS]


def test_a_line_that_a_killed_llmux_has_left_torn_is_ended_by_the_next(tmp_path):
    path = tmp_path / "audit.jsonl"
    for text in ("", '{"time": "2026-01-01T00:00:00Z", "ev'):
        path.write_text(text)
        audit = Audit(path, lambda *_, **__: None)
        audit.put("started")
        audit.close()
        assert json.loads(path.read_text().removeprefix(text))["event"] == "started"
        assert path.read_text().removeprefix(text).startswith("\n" if text else "{")

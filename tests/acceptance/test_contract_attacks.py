"""What clients, engines, files and pauses did to llmux in an attack, each as it was done, on a real process."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import time

import pytest

from tests.harness.lease.lab import free_port
from tests.harness.lease.raw import request


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def events(lab, name: str) -> list[dict]:
    lines = (json.loads(line) for line in lab.log.splitlines() if line.startswith("{"))
    return [line for line in lines if line["event"] == name]


async def test_the_access_log_is_written_at_the_default_level(lab):
    lab.write("a", access_log=True)
    lab.start()
    assert (await lab.chat("a")).status == 200  # wakes it
    assert (await lab.chat("a")).status == 200  # by the fast path
    assert (await lab.chat("unknown")).status == 404
    await lab.until(lambda: len(events(lab, "request_finished")) == 3)
    lines = events(lab, "request_finished")
    assert [line["status"] for line in lines] == [200, 200, 404]
    assert {line["level"] for line in lines} == {"info"}
    assert lines[0]["model"] == lines[1]["model"] == "a"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("TRACE", "/v1/chat/completions?model=a"),
        ("TRACE", "/upstream/a/v1/chat/completions"),
        ("TRACE", "/health"),
        ("TRACE", "/"),
        ("CONNECT", "/v1/chat/completions?model=a"),
        ("CONNECT", "127.0.0.1:80"),
    ],
)
async def test_connect_and_trace_are_not_taken(lab, method, target):
    lab.write("a")
    lab.start()
    answer = await lab.raw(request(method, target))
    assert answer.status == 405
    assert "POST" in answer.get("Allow")
    assert method not in answer.get("Allow")
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert lab.count("wake") == 0


@pytest.mark.parametrize(
    "fields",
    [
        [("Transfer-Encoding", "gzip, chunked")],
        [("Transfer-Encoding", "gzip"), ("Transfer-Encoding", "chunked")],
        [("Transfer-Encoding", "chunked, chunked")],
        [("Transfer-Encoding", "deflate")],
        [("Transfer-Encoding", "chunked;q=1")],
    ],
)
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/llmux/models/a/wake"])
async def test_a_body_in_another_coding_than_chunked_is_refused(lab, fields, target):
    lab.write("a")
    lab.start()
    body = b'e\r\n{"model": "a"}\r\n0\r\n\r\n'
    answer = await lab.raw(request("POST", target, headers=fields, body=body))
    assert answer.status == 400
    assert answer.json()["error"]["code"] == "malformed_request"
    assert lab.count("wake") == 0
    proper = [("Transfer-Encoding", "Chunked")]
    answer = await lab.raw(request("POST", "/v1/x", headers=proper, body=body))
    assert answer.status == 200


async def test_two_keys_for_the_model_that_differ_in_case_are_refused(lab):
    lab.write("a b")
    lab.start()
    assert (await lab.chat("a")).status == 200
    much = "x" * 300_000
    for body in (
        b'{"model": "a", "Model": "b"}',
        b'{"MODEL": "b", "model": "a"}',
        b'{"model": "a", "\\u004dodel": "b"}',
        b'{"\\u006dodel": "a", "mod\\u0045l": "b"}',
        b'{"model": "a", "Model": null}',
        json.dumps({"Model": "b", "much": much, "model": "a"}).encode(),
        json.dumps({"model": "a", "much": much, "moDel": "b"}).encode(),
    ):
        answer = await lab.ask("POST", "/v1/chat/completions", body=body)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "ambiguous_model"), body[:80]
        assert "case" in answer.json()["error"]["message"]
    answer = await lab.ask("POST", "/v1/chat/completions?model=a", body=b'{"Model": "b"}')
    assert (answer.status, answer.json()["error"]["code"]) == (400, "ambiguous_model")
    answer = await lab.get("/v1/x?model=a&MODEL=b")
    assert (answer.status, answer.json()["error"]["code"]) == (400, "ambiguous_model")
    form = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % pair
        for pair in ((b"model", b"a"), (b"Model", b"b"))
    )
    kind = [("Content-Type", "multipart/form-data; boundary=x")]
    answer = await lab.ask("POST", "/v1/audio/transcriptions", headers=kind, body=form + b"--x--\r\n")
    assert (answer.status, answer.json()["error"]["code"]) == (400, "ambiguous_model")
    answer = await lab.ask("POST", "/v1/chat/completions", body=b'{"Model": "a"}')
    assert (answer.status, answer.json()["error"]["code"]) == (400, "model_required")
    nested = b'{"model": "a", "metadata": {"Model": "b"}, "models": ["Model"]}'
    assert (await lab.ask("POST", "/v1/chat/completions", body=nested)).status == 200
    assert lab.count("wake", "b") == 0


async def test_a_flood_of_interim_responses_is_a_502_and_holds_up_nobody(lab):
    lab.write("a")
    lab.start()
    assert (await lab.chat("a")).status == 200
    flood = b64(b"HTTP/1.1 102 P\r\n\r\n" * 1000)
    answer = await lab.chat("a", do={"raw": [flood], "raw_close": True})
    assert answer.status == 502
    assert "interim" in answer.json()["error"]["message"]
    few = [b64(b"HTTP/1.1 102 Processing\r\n\r\n" * 100), b64(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")]
    answer = await lab.chat("a", do={"raw": few})
    assert (answer.status, answer.body) == (200, b"ok")


async def test_a_wake_that_ended_while_llmux_was_stopped_was_not_killed(lab):
    timeout = 3.0
    lab.write({"a": {"timeouts": {"wake": timeout}}})
    lab.script("a", "wake", lab.hold("it"))
    lab.start()
    line = await lab.begin("a")
    await lab.until(lambda: lab.count("wake"))
    lab.signal(signal.SIGSTOP)
    lab.release("it")
    await lab.until(lambda: lab.count("wake", ev="end"))
    await asyncio.sleep(lab.hooks("wake")[0].t + timeout - time.time())  # it began a little before it said so
    lab.signal(signal.SIGCONT)
    assert (await line.head()).status == 200
    await lab.until(lambda: events(lab, "hook_completed"))
    assert events(lab, "hook_killed") == []
    assert events(lab, "hook_failed") == []


BOMB = "".join(
    [
        "x-0: &a0 [x, x, x, x, x, x, x, x, x, x]\n",
        *(f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
    ]
)


async def test_an_alias_bomb_is_refused_at_a_reload_and_at_a_start(lab):
    lab.write("a")
    lab.start()
    sound = lab.file.read_text()
    lab.file.write_text(BOMB + sound)
    lab.signal(signal.SIGHUP)
    await lab.until(lambda: events(lab, "config_rejected"))
    error = events(lab, "config_rejected")[0]["error"]
    assert "config.yaml:1:" in error
    assert "aliases" in error
    assert (await lab.chat("a")).status == 200
    lab.end()
    lab.launch()
    assert lab.ended() != 0
    assert lab.log.count("counting what aliases stand for") >= 2


NOT_JSON = ["1e400", "-1e400", "Infinity", "NaN"]


@pytest.mark.parametrize("number", NOT_JSON)
async def test_a_state_file_with_numbers_that_are_none_stays_writable(lab, number):
    lab.write("a")
    lab.start()
    assert (await lab.chat("a")).status == 200
    lab.kill()
    file = lab.root / "state" / "s.json"
    state = json.loads(file.read_text())
    assert state["holders"] == ["a"]
    mark = "@"
    state["last_use"] = {"a": mark, "b": mark}
    state["costs"]["wakes"] = {"a": [mark, 1]}
    state["costs"]["pairs"] = [[None, "a", 1.0, mark]]
    state["definitions"]["gone"] = {**state["definitions"]["a"], "timeouts": {"sleep": mark}, "name": "gone"}
    state["holders"] = ["a", "gone"]
    state["asked"]["pins"] = {"a": {"until": mark, "reason": ""}}
    file.write_text(json.dumps(state).replace(f'"{mark}"', number))
    lab.start()
    lab.allow_again = True
    assert (await lab.chat("a")).status == 200
    assert [line["model"] for line in events(lab, "holder_unknown")] == ["gone"]
    assert len(events(lab, "state_file_unreadable")) == 3
    lab.end()
    assert events(lab, "state_file_unwritable") == []
    after = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert after["last_use"].keys() == {"a"}
    assert after["last_use"]["a"] < 1e300


@pytest.mark.parametrize("how", ["file", "folder"])
async def test_a_second_llmux_does_not_start_on_the_same_state_by_another_name(lab, how):
    lab.write("a")
    lab.start()
    assert (await lab.chat("a")).status == 200
    real = lab.root / "state" / "s.json"
    other = lab.root / "other"
    if how == "folder":
        other.symlink_to(lab.root / "state")
    else:
        other.mkdir()
        (other / "s.json").symlink_to("../state/s.json")
    first, first_port = lab.process, lab.port
    lab.port = free_port()
    lab.write("a", state=str(other / "s.json"))
    lab.launch()
    assert lab.ended() == 2
    assert "is in use by the llmux with pid" in lab.log
    lab.process, second_port, lab.port = first, lab.port, first_port
    assert (await lab.chat("a")).status == 200
    lab.end()
    lab.port = second_port
    lab.start()  # by the link, now that the first has ended
    assert (await lab.chat("a")).status == 200
    lab.end()
    assert (other / "s.json").is_symlink() or other.is_symlink()
    assert not real.is_symlink()
    assert json.loads(real.read_text())["holders"] == ["a"]


async def test_what_it_writes_is_for_its_own_user(lab):
    own = lab.root / "own"
    own.mkdir(mode=0o700)
    lab.write(
        {"a": {}},
        state=str(own / "state.json"),
        ledger=True,
        record=str(own / "record.jsonl"),
        audit=str(own / "audit.jsonl"),
        captures={"keys": ["k"], "keep": "1d", "max": "1MiB"},
        api_keys=[{"name": "k", "key": "secret-of-k"}],
    )
    lab.start()
    assert (await lab.chat("a", headers=[("Authorization", "Bearer secret-of-k")])).status == 200
    assert lab.end() == 0
    found = [path for path in own.rglob("*") if path.is_file()]
    assert {path.suffix for path in found} >= {".json", ".jsonl", ".db"}
    assert len(found) >= 5
    assert {oct(path.stat().st_mode & 0o777) for path in found} == {"0o600"}
    assert {oct(path.stat().st_mode & 0o777) for path in [own, *own.rglob("*")] if path.is_dir()} == {"0o700"}
    assert not any(b"secret-of-k" in path.read_bytes() for path in found)

"""Corners that a careful adversary would look into."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import Gone, request, uid
from tests.harness.waiting import PATIENCE


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("edges"))
    found.write({"a": {"aliases": ["ali"]}, "b": {}})
    found.start()
    yield found
    found.finish()


def rss(lab) -> int:
    """MiB of memory that llmux has resident."""
    for line in Path(f"/proc/{lab.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    raise AssertionError


def files(lab) -> int:
    return len(os.listdir(f"/proc/{lab.process.pid}/fd"))  # noqa: PTH208


@pytest.mark.parametrize(
    "model",
    [
        r"\ud800",
        r"\udfff\ud83d",
        r"\u0000",
        r"a\n\r\nX-Evil: 1",
        "x" * 1_000_000,
        r"\u202eevil\u001b[31m",
        "é😀",
        "a ",
        "A",
        "../a",
        "%61",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_strange_model_names(shared, path, model):
    before = len(shared.log)
    answer = await shared.raw(request("POST", path, body=f'{{"model":"{model}"}}'.encode()))
    assert answer.status == (400 if model.startswith(("\\ud", "xx")) else 404)  # as no name can be
    assert answer.json()["error"]["message"]
    assert len(answer.body) < 5000
    assert answer.get("X-Evil") is None
    assert "Traceback" not in shared.log[before:]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","d":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"model":"a","d":' + b'{"x":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"n":' + b"9" * 20_000 + b',"model":"a"}',
        b'{"s":"' + b"\\\\" * 100_000 + b'","model":"a"}',
        b'{"s":"' + b'\\"' * 100_000 + b'","model":"a"}',
        b" " * 100_000 + b'{"model":"a"}' + b"\n" * 100_000,
        b"{" + b"".join(b'"k%d":0,' % n for n in range(50_000)) + b'"model":"a"}',
    ],
)
async def test_json_that_breaks_parsers(shared, body):
    """It is JSON (or too deep to say): served byte for byte or refused in the envelope, never an accident."""
    answer = await asyncio.wait_for(shared.raw(request("POST", "/v1/x", body=body)), PATIENCE)
    assert answer.status in (200, 400), answer.body[:200]
    if answer.status == 200:
        assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()
    else:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b'{"model":"a", nonsense}', b'{"model":"a","x":}', b'{"model":"a"', b'{"model":"a",,"x":1}']
)
async def test_json_that_is_none(shared, body):
    answer = await shared.raw(request("POST", "/v1/x", body=body))
    assert answer.status == 400, answer.body


async def test_a_compressed_request_is_not_unpacked(shared):
    body = gzip.compress(b'{"model":"zz"}')
    headers = [("Content-Encoding", "gzip"), ("Content-Type", "application/json")]
    answer = await shared.raw(request("POST", "/v1/x?model=a", headers=headers, body=body))
    assert answer.status == 200, answer.body
    assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert ("Content-Encoding", "gzip") in answer.seen_headers()


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"other": "a"}, 400), ({"model": "zz"}, 404), ({"model": ""}, 400), ({"model": "ali"}, 200)],
)
async def test_multipart_refusals(shared, fields, status):
    parts = "".join(f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items())
    body = f"{parts}--b--\r\n".encode()
    kind = [("Content-Type", "multipart/form-data; boundary=b")]
    answer = await shared.raw(request("POST", "/v1/audio/transcriptions", headers=kind, body=body))
    assert answer.status == (200 if status == 200 else status), answer.body
    if status == 200:
        assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=zz"]
)
async def test_broken_multipart(shared, kind):
    answer = await shared.raw(request("POST", "/v1/x", headers=[("Content-Type", kind)], body=b"--b\r\n\r\nx"))
    assert answer.status == 400
    assert answer.json()["error"]["message"]


async def test_an_upgrade_to_something_else_is_no_upgrade(shared):
    headers = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAA")]
    answer = await shared.chat("a", headers=headers)
    assert answer.status == 200
    names = {n.lower() for n, _ in answer.seen_headers()}
    assert not names & {"upgrade", "http2-settings"}


async def test_an_upload_that_breaks_off(shared):
    before = len(shared.journal("request"))
    for how in ("close", "reset", "half"):
        line = await shared.wire()
        await line.send(request("POST", "/v1/x", headers=[("Content-Length", "100000")]) + b'{"model":"a"' * 20)
        await asyncio.sleep(0.02)
        if how == "half":
            line.writer.write_eof()
            await asyncio.sleep(0.05)
        await (line.reset() if how == "reset" else line.close())
    await shared.until_model("a", in_flight=0, queued=0)
    assert len(shared.journal("request")) == before
    assert (await shared.chat("a")).status == 200


async def test_a_client_that_does_not_read_costs_no_memory(shared):
    await shared.chat("a")
    before = rss(shared)
    line = await shared.begin("a", do={"flood": 300})
    assert (await line.head()).status == 200
    await asyncio.sleep(0.7)
    assert rss(shared) - before < 60
    sent = max(f["sent"] for f in shared.journal("flood"))
    assert sent < 100 * 2**20, "the engine is held back"
    await line.reset()
    await shared.until_model("a", in_flight=0)


async def test_a_large_answer_arrives_whole(shared):
    answer = await shared.chat("a", do={"flood": 64})
    assert answer.whole
    assert len(answer.body) == 64 * 2**20


async def test_nothing_leaks(shared):
    await asyncio.gather(*(shared.chat("a") for _ in range(30)))
    await asyncio.sleep(0.1)
    before = files(shared)
    for _ in range(5):
        lines = [await shared.begin("a", do={"sse": 50, "interval": 0.01}) for _ in range(20)]
        for line in lines:
            await line.reset()
        for _ in range(5):
            line = await shared.wire()
            await line.send(request("POST", "/v1/x", headers=[("Content-Length", "9000000")]) + b" " * 3_000_000)
            await line.reset()
        await asyncio.gather(*(shared.chat("zz") for _ in range(20)))
        await asyncio.gather(*(shared.chat("a", do={"fail": "reset"}) for _ in range(10)))
    await shared.until_model("a", in_flight=0)
    await shared.until(lambda: files(shared) <= before + 5)


async def test_a_smuggled_answer_is_no_answer(shared):
    """Two lengths that disagree: the bytes after the first must not become the next client's answer."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"
    answer = await shared.chat("a", do={"raw": [base64.b64encode(raw).decode()]})
    assert answer.body == b"ok"
    for _ in range(5):
        answer = await shared.chat("a")
        assert answer.json()["engine"] == "a"
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 4\r\n\r\nokok"
    answer = await shared.chat("a", do={"raw": [base64.b64encode(raw).decode()], "raw_close": True})
    assert answer.status == 502
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    answer = await shared.chat("a", do={"raw": [base64.b64encode(raw).decode()], "raw_close": True})
    assert answer.status == 502
    assert not (answer.get("Content-Length") and answer.get("Transfer-Encoding"))


async def test_bytes_before_a_request_are_no_answer(shared):
    """What an engine says on an idle connection belongs to nobody."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    late = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nLATE"
    parts = [base64.b64encode(raw).decode(), base64.b64encode(late).decode()]
    answer = await shared.chat("a", do={"raw": parts, "interval": 0.03})
    assert answer.body == b"ok"
    await asyncio.sleep(0.1)
    for _ in range(3):
        assert (await shared.chat("a")).json()["engine"] == "a"


async def test_aliases_in_llmuxs_own_paths(shared):
    assert (await shared.get("/v1/models/ali")).status == 200
    assert (await shared.post("/llmux/models/ali/reset")).status == 202


async def test_a_timed_pin_says_how_long(lab):
    lab.write("a b")
    lab.start()
    answer = await lab.post("/llmux/models/a/pin", body={"for": "30s"})
    assert answer.status == 202
    await lab.until_phase("a", "AWAKE")
    answer = await lab.chat("b")
    assert answer.status == 503
    assert 25 <= int(answer.get("Retry-After")) <= 31
    assert (await lab.post("/llmux/models/a/pin", body={"for": "100ms"})).status == 202
    await asyncio.sleep(0.2)
    assert (await lab.chat("b")).status == 200


async def test_a_timed_lease_says_how_long_and_ends(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    assert (await lab.post("/llmux/lease", body={"for": "1s"})).status == 202
    answer = await lab.chat("a")
    assert answer.status == 503
    assert int(answer.get("Retry-After")) in (1, 2)

    async def served():
        return (await lab.chat("a")).status == 200

    await lab.until(served, every=0.05)


async def test_a_pin_drains_what_it_displaces(lab):
    lab.write("a b")
    lab.start()
    line = await lab.begin("a", do={"sse": 4, "hold_after": [1, "x"]})
    head = await line.head()
    assert (await lab.post("/llmux/models/b/pin")).status == 202
    await lab.until_phase("a", "DRAINING")
    lab.release("x")
    assert (await line.body(head)).whole
    await line.close()
    await lab.until_phase("b", "AWAKE")


async def test_all_waiters_hear_of_a_failed_wake(lab):
    lab.write("a")
    lab.script("a", "wake", f"{lab.hold('go')}; exit 1")
    lab.start()
    waiting = [asyncio.create_task(lab.chat("a")) for _ in range(8)]
    await lab.until_model("a", queued=8)
    lab.release("go")
    answers = await asyncio.gather(*waiting)
    assert {a.status for a in answers} == {503}
    assert lab.count("wake") == 1


async def test_hooks_start_with_clean_hands(lab):
    """No input to wait for, no inherited descriptors, no ignored or blocked signals, a group of their own."""
    lab.write("a")
    text = (
        'cat >/dev/null; ls -l /proc/$$/fd >"$LAB/fds"; '
        'cat /proc/self/status >"$LAB/status"; cat /proc/$$/stat >"$LAB/stat"'
    )
    lab.script("a", "wake", text)
    lab.start()
    assert (await lab.chat("a")).status == 200
    lines = [line.split() for line in (lab.root / "fds").read_text().splitlines() if "->" in line]
    inherited = {line[-3]: line[-1] for line in lines}
    pipes = {inherited["1"], inherited["2"]}  # of which the shell keeps copies
    inherited = {n: to for n, to in inherited.items() if to not in pipes and str(lab.root) not in to}
    assert inherited == {"0": "/dev/null"}
    status = dict(line.split(":\t", 1) for line in (lab.root / "status").read_text().splitlines() if ":\t" in line)
    assert int(status["SigBlk"], 16) == 0
    threads = 0b11 << 31  # 32 and 33 belong to the C library: nobody can set them back
    assert int(status["SigIgn"], 16) & ~threads == 0
    group = int((lab.root / "stat").read_text().rpartition(")")[2].split()[2])
    assert group != os.getpgid(lab.process.pid), "a process group of its own"


async def test_an_alive_that_hangs_at_start_counts_as_no(lab):
    lab.write({"a": {"timeouts": {"alive": "200ms"}}, "b": {}})
    lab.script("a", "alive", "sleep 60")
    lab.start()
    assert (await lab.chat("b")).status == 200
    assert (await lab.chat("a")).status == 200
    lab.unscript("a", "alive")


async def test_after_term_a_kept_connection_is_told(lab):
    lab.write("a")
    lab.start()
    line = await lab.begin("a", do={"hold": "x"})
    await lab.until_model("a", in_flight=1)
    async with await lab.wire() as kept:
        assert (await kept.ask(request("GET", "/health"), method="GET")).status == 200
        lab.signal(signal.SIGTERM)
        await lab.until(lambda: "stopping" in lab.log)
        data = request("POST", "/v1/x", body={"model": "a"})
        try:
            answer = await kept.ask(data)
        except (Gone, ConnectionResetError, BrokenPipeError):
            pass  # closed is an answer, too
        else:
            assert answer.status == 503
            assert answer.get("X-Request-ID")
    assert not [r for r in lab.journal("request") if r["uid"] == uid(data)]
    lab.release("x")
    assert (await line.head()).status == 200
    await line.close()
    assert lab.ended() == 0


async def test_one_engine_with_several_models(lab):
    """Two names on one address, each with its upstream_model."""
    lab.write({"a": {"upstream_model": "u1", "names": "u1,u2"}, "b": {"upstream_model": "u2", "key": "a"}})
    config = yaml.safe_load(lab.file.read_text())
    config["models"]["b"] = {**config["models"]["a"], "upstream_model": "u2"}
    lab.file.write_text(yaml.safe_dump(config))
    lab.check_holding = False
    lab.start()
    for name, upstream in (("a", "u1"), ("b", "u2"), ("a", "u1")):
        answer = await lab.chat(name)
        assert (answer.status, answer.json()["model"]) == (200, upstream)


async def test_the_schema_is_json(lab):
    process = lab.spawn("schema")
    assert process.wait(PATIENCE) == 0
    assert json.loads(lab.log)["properties"]["models"]


async def test_reading_an_own_page_with_head(shared):
    for page in ("/health", "/v1/models", "/llmux/status"):
        answer = await shared.ask("HEAD", page)
        assert answer.status == 200


async def test_an_engine_that_answers_before_the_body_has_come(shared):
    for _ in range(2):
        answer = await shared.post("/v1/x", body={"model": "a", "x": "y" * 8_000_000}, do={"early": 413})
        assert (answer.status, answer.body) == (413, b"early")
    await shared.until_model("a", in_flight=0)
    assert (await shared.chat("a")).status == 200


async def test_names_with_slashes_in_llmuxs_own_paths(lab):
    lab.write({"org/sl ash": {"key": "s"}, "b": {}})
    lab.start()
    for name in ("org%2Fsl%20ash", "org/sl%20ash"):
        assert (await lab.get(f"/v1/models/{name}")).json()["id"] == "org/sl ash"
        assert (await lab.post(f"/llmux/models/{name}/wake")).status == 202
        await lab.until_phase("org/sl ash", "AWAKE")
        answer = await lab.get(f"/upstream/{name}/health%2Fx?y")
        assert (answer.status, answer.json()["target"]) == (200, "/health%2Fx?y")


async def test_three_hundred_waiters_are_admitted_at_once(lab):
    lab.write("a b")
    lab.script("a", "wake", lab.hold("go"))
    lab.start()
    waiting = [asyncio.create_task(lab.chat("a")) for _ in range(300)]
    await lab.until_model("a", queued=300)
    other = asyncio.create_task(lab.chat("b"))
    await lab.until_model("b", queued=1)
    lab.release("go")
    answers = await asyncio.gather(*waiting)
    assert {a.status for a in answers} == {200}
    assert (await other).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake b"]

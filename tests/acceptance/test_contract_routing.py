"""How a request finds its model, and what the engine and the client get to see."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import os

import pytest

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import request, uid
from tests.harness.waiting import PATIENCE

HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "proxy-connection",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("routing"))
    models = {
        "a": {"aliases": ["gpt-4o-mini", "other name"], "names": "a,gpt-4o-mini,other name"},
        "renamed": {"upstream_model": 'served/x"é', "aliases": ["ren"], "names": 'served/x"é'},
        "org/sl ash": {"key": "slash", "names": "org/sl ash"},
    }
    found.write(models)
    found.start()
    yield found
    found.finish()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a"}',
        b' \r\n\t {"messages":[{"role":"user","content":"{\\"model\\":\\"b\\"}"}], "model" : "a" }  ',
        b'{"nested":{"model":"zzz"},"list":[{"model":"yyy"}],"model":"a"}',
        b'{"model":"nope","model":"a"}',
        b'{"model":"nope","mod\\u0065l":"a"}',
        b'{"model":"\\u0061"}',
        b'{"x":"\\"model\\":\\"q\\"","model":"a","y":"}{"}',
        b'{"model":"a","n":1e400,"f":1.000000000000000000001}',
        b'{"model":"a","deep":' + b"[" * 500 + b"]" * 500 + b"}",
        '{"é\U0001f600":"\\ud83d\\ude00","model":"a"}'.encode(),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", None, "application/x-www-form-urlencoded"])
async def test_json_bodies_reach_the_engine_byte_for_byte(lab, body, kind):
    headers = [("Content-Type", kind)] if kind else []
    answer = await lab.raw(request("POST", "/v1/chat/completions", headers=headers, body=body))
    assert answer.status == 200, answer.body
    assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert answer.json()["engine"] == "a"


async def test_the_last_of_duplicate_keys_wins_even_when_unknown(lab):
    answer = await lab.raw(request("POST", "/v1/x", body=b'{"model":"a","model":"nope"}'))
    assert answer.status == 404
    assert "nope" in answer.json()["error"]["message"]


async def test_a_body_without_a_length(lab):
    body = json.dumps({"model": "a", "pad": "x" * 70000}).encode()
    parts = [body[i : i + 9001] for i in range(0, len(body), 9001)]
    data = request("POST", "/v1/completions", headers=[("Transfer-Encoding", "chunked")], body=b"")
    chunked = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
    answer = await lab.raw(data + chunked)
    assert answer.status == 200
    assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()


async def test_expect_continue_is_answered(lab):
    body = b'{"model":"a"}'
    data = request("POST", "/v1/x", headers=[("Expect", "100-continue"), ("Content-Length", str(len(body)))])
    async with await lab.wire() as line:
        await line.send(data)
        head = await asyncio.wait_for(line.reader.readuntil(b"\r\n\r\n"), PATIENCE)
        assert head.startswith(b"HTTP/1.1 100")
        answer = await line.ask(body)
        assert answer.status == 200
        assert answer.json()["body_size"] == len(body)


async def test_multipart_names_the_model(lab):
    boundary = "xX--boundary"
    audio = os.urandom(300_000)
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    ).encode() + audio + (
        f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--{boundary}--\r\n'
    ).encode()  # fmt: skip
    kind = f'multipart/form-data; boundary="{boundary}"'
    answer = await lab.raw(
        request("POST", "/v1/audio/transcriptions", headers=[("Content-Type", kind)], body=body)
    )
    assert answer.status == 200, answer.body
    assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert answer.json()["engine"] == "a"


async def test_multipart_with_a_renamed_model_changes_the_name_only(lab):
    boundary = "b"
    parts = (
        '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n'
        '--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nrenamed\r\n--b--\r\n'
    )
    kind = f"multipart/form-data; boundary={boundary}"
    data = request("POST", "/v1/audio/x", headers=[("Content-Type", kind)], body=(parts % "renamed").encode())
    answer = await lab.raw(data)
    assert answer.status == 200, answer.body
    assert base64.b64decode(answer.json()["body"]) == (parts % 'served/x"é').encode()


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT", "PATCH"])
async def test_the_query_names_the_model(lab, method):
    answer = await lab.ask(method, "/v1/files/7?x=1&model=org%2Fsl+ash&y")
    assert answer.status == 200, answer.body
    assert answer.json()["target"] == "/v1/files/7?x=1&model=org%2Fsl+ash&y"
    assert answer.json()["engine"] == "slash"
    assert answer.json()["method"] == method


async def test_the_body_goes_before_the_query(lab):
    answer = await lab.post("/v1/x?model=renamed", body={"model": "a"})
    assert answer.json()["engine"] == "a"


async def test_head_requests(lab):
    answer = await lab.ask("HEAD", "/v1/x?model=a")
    assert answer.status == 200
    assert int(answer.get("Content-Length")) > 10


async def test_an_alias_arrives_as_the_client_wrote_it(lab):
    for name in ("gpt-4o-mini", "other name"):
        answer = await lab.chat(name)
        assert (answer.status, answer.json()["model"]) == (200, name)
        assert answer.json()["engine"] == "a"


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [ 1.0,1e5, "é" ],"model" :\t"%s" ,"z":"\\u00e9", "model_x":"renamed","n":12345678901234567}',
        '{"model":"nope","a":{"model":"renamed"},"mod\\u0065l":"%s"}',
        '  {"model":"%s"}\n\n',
    ],
)
@pytest.mark.parametrize("name", ["renamed", "ren", "r\\u0065named"])
async def test_upstream_model_replaces_only_the_value(lab, body, name):
    sent = (body % name).encode()
    answer = await lab.raw(
        request("POST", "/v1/chat/completions", body=sent, headers=[("Content-Type", "application/json")])
    )
    assert answer.status == 200, answer.body
    got = base64.b64decode(answer.json()["body"])
    before, after = body.encode().split(b"%s")
    assert got.startswith(before), got
    assert got.endswith(after), got
    assert json.loads(b'"' + got[len(before) : len(got) - len(after)] + b'"') == 'served/x"é'
    assert answer.json()["body_size"] == len(got)
    lengths = [v for n, v in answer.seen_headers() if n.lower() == "content-length"]
    assert lengths in ([str(len(got))], [])


async def test_upstream_model_in_a_large_body(lab):
    body = b'{"image":"' + b"A" * 3_000_000 + b'","model":"renamed","t":1}'
    answer = await lab.raw(request("POST", "/v1/chat/completions", body=body))
    wanted = body.replace(b'"renamed"', json.dumps('served/x"é').encode())
    wanted2 = body.replace(b'"renamed"', json.dumps('served/x"é', ensure_ascii=False).encode())
    assert answer.json()["body_sha256"] in {hashlib.sha256(w).hexdigest() for w in (wanted, wanted2)}


@pytest.mark.parametrize("first", [True, False])
async def test_twenty_megabytes(lab, first):
    image = base64.b64encode(os.urandom(15_000_000))
    body = b'{"model":"a","image":"' + image + b'"}' if first else b'{"image":"' + image + b'","model":"a"}'
    answer = await lab.raw(request("POST", "/v1/chat/completions", body=body))
    assert answer.status == 200
    assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    "target",
    [
        "/v1/a%2Fb?model=a&a=%20b&&c",
        "/v1//double///x?model=a",
        "/v1/x?&model=a&=&%41=%7e",
        "/v1/%7euser/(x)!*'?model=a&q=%C3%A9+%2B",
        "/v1/x?model=a&q=a/../b;c\\d",
        "/v1/caf%C3%A9?model=a",
        "/v1/x%3Fy%23z?model=a",
        "/v1/UPPER/lower?model=a&r=http://x/y?z",
    ],
)
async def test_the_target_is_passed_on_byte_for_byte(lab, target):
    answer = await lab.post(target, body=b"")
    assert answer.status == 200, answer.body
    assert answer.json()["target"] == target


async def test_headers_pass_and_nothing_is_added(lab):
    headers = [
        ("Authorization", "Bearer secret"),
        ("X-Api-Key", "k"),
        ("Cookie", "a=b; c=d"),
        ("X-Dup", "1"),
        ("x-dup", "2"),
        ("X-Bytes", "caf\xe9"),
        ("anthropic-version", "2023-06-01"),
        ("X-Forwarded-For", "1.2.3.4"),
        ("Accept", "text/x"),
        ("User-Agent", "me/1"),
    ]
    answer = await lab.chat("a", headers=headers)
    got = answer.seen_headers()
    plain = [(n.lower(), v) for n, v in got]
    for name, value in headers:
        assert (name.lower(), value) in plain, (name, plain)
    assert [v for n, v in plain if n == "x-dup"] == ["1", "2"]
    known = {n.lower() for n, _ in headers} | {"host", "x-request-id", "x-uid", "content-type", "content-length"}
    extra = {n for n, _ in plain} - known - {"connection"}
    assert not extra
    assert len([1 for n, _ in plain if n == "host"]) == 1
    assert dict(plain)["host"] in (f"127.0.0.1:{lab.ports['a']}", f"localhost:{lab.ports['a']}")


async def test_no_default_headers_appear(lab):
    answer = await lab.raw(request("POST", "/v1/x?model=a", body=b""))
    names = {n.lower() for n, _ in answer.seen_headers()}
    assert not names & {"accept", "accept-encoding", "user-agent", "content-type", "x-forwarded-for", "via"}


async def test_accept_encoding_of_the_client_passes(lab):
    answer = await lab.chat("a", headers=[("Accept-Encoding", "br, gzip;q=0.3")])
    assert [v for n, v in answer.seen_headers() if n.lower() == "accept-encoding"] == ["br, gzip;q=0.3"]


async def test_hop_by_hop_headers_stay_here(lab):
    headers = [
        ("Connection", "keep-alive, X-Private"),
        ("X-Private", "1"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic x"),
        ("X-Public", "1"),
    ]
    answer = await lab.chat("a", headers=headers)
    assert answer.status == 200
    got = {n.lower(): v for n, v in answer.seen_headers()}
    assert "x-public" in got
    assert "x-private" not in got
    for name in HOP - {"connection"}:
        assert name not in got, name
    assert "private" not in got.get("connection", "").lower()


async def test_hop_by_hop_headers_of_the_answer_stay_there(lab):
    answer = await lab.chat(
        "a",
        do={
            "headers": [
                ["Connection", "X-Secret, keep-alive"],
                ["X-Secret", "1"],
                ["Keep-Alive", "timeout=1"],
                ["Proxy-Authenticate", "Basic"],
                ["X-Fine", "2"],
                ["Set-Cookie", "a=1"],
                ["Set-Cookie", "b=2"],
                ["Server", "engine/1"],
                ["Date", "Thu, 01 Jan 1970 00:00:00 GMT"],
            ]
        },
    )
    assert answer.get("X-Fine") == "2"
    assert answer.get("X-Secret") is None
    assert answer.get("Keep-Alive") is None
    assert answer.get("Proxy-Authenticate") is None
    assert answer.all("Set-Cookie") == ["a=1", "b=2"]
    assert answer.all("Server") == ["engine/1"]
    assert answer.all("Date") == ["Thu, 01 Jan 1970 00:00:00 GMT"]


async def test_request_ids(lab):
    mine = "!" + "x" * 126 + "~"
    answer = await lab.chat("a", headers=[("X-Request-ID", mine)])
    assert answer.all("X-Request-ID") == [mine]
    assert [v for n, v in answer.seen_headers() if n.lower() == "x-request-id"] == [mine]
    for bad in ("x" * 129, "caf\xe9"):
        answer = await lab.chat("a", headers=[("X-Request-ID", bad)])
        (given,) = answer.all("X-Request-ID")
        assert given not in ("", bad)
        assert [v for n, v in answer.seen_headers() if n.lower() == "x-request-id"] == [given]
    first, second = [(await lab.chat("a")).get("X-Request-ID") for _ in range(2)]
    assert first
    assert second
    assert first != second


async def test_a_request_id_of_the_engine_does_not_double_ours(lab):
    answer = await lab.chat("a", headers=[("X-Request-ID", "mine")], do={"headers": [["X-Request-Id", "theirs"]]})
    assert answer.all("X-Request-ID") == ["mine"]


async def test_compressed_answers_stay_as_they_are(lab):
    data = gzip.compress(b'{"hello":"world"}' * 100)
    headers = [["Content-Encoding", "gzip"], ["Content-Type", "application/json"]]
    answer = await lab.chat("a", do={"body": b64(data), "headers": headers})
    assert answer.body == data
    assert answer.get("Content-Encoding") == "gzip"
    assert answer.get("Content-Length") == str(len(data))
    parts = [b64(data[:10]), b64(data[10:])]
    answer = await lab.chat("a", do={"chunks": parts, "headers": headers})
    assert answer.body == data
    assert answer.get("Content-Encoding") == "gzip"


async def test_a_lie_about_the_encoding_passes(lab):
    answer = await lab.chat("a", do={"body": b64(b"not gzip"), "headers": [["Content-Encoding", "gzip"]]})
    assert answer.body == b"not gzip"


@pytest.mark.parametrize("status", [201, 400, 401, 404, 418, 422, 429, 500, 502, 503, 599])
async def test_the_engines_own_status_passes_untouched(lab, status):
    answer = await lab.chat(
        "a", do={"status": status, "body": b64(b"its own words"), "headers": [["Retry-After", "7"], ["X-E", "1"]]}
    )
    assert (answer.status, answer.body, answer.get("X-E")) == (status, b"its own words", "1")
    assert answer.all("Retry-After") == ["7"]


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body(lab, status):
    raw = f"HTTP/1.1 {status} Nothing\r\nX-E: 1\r\n\r\n".encode()
    async with await lab.wire() as line:
        for _ in range(2):
            data = request("POST", "/v1/x", body={"model": "a"}, do={"raw": [b64(raw)]})
            answer = await line.ask(data)
            assert (answer.status, answer.get("X-E")) == (status, "1")


async def test_an_answer_that_ends_with_its_connection(lab):
    raw = [b64(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"), b64(b"part one "), b64(b"part two")]
    answer = await lab.chat("a", do={"raw": raw, "raw_close": True, "interval": 0.02})
    assert answer.status == 200
    assert answer.body == b"part one part two"
    assert answer.whole


async def test_an_http_10_engine(lab):
    raw = [b64(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")]
    answer = await lab.chat("a", do={"raw": raw, "raw_close": True})
    assert (answer.status, answer.body) == (200, b"ok")
    assert (await lab.chat("a")).status == 200


async def test_informational_answers_are_no_answers(lab):
    raw = [
        b64(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
        b64(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    ]
    answer = await lab.chat("a", do={"raw": raw, "interval": 0.02})
    assert (answer.status, answer.body) == (200, b"ok")


async def test_an_answer_in_tiny_pieces(lab):
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-E: 1\r\n\r\n"
    raw += b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX-Trailer: 1\r\n\r\n"
    answer = await lab.chat("a", do={"raw": [b64(raw[i : i + 1]) for i in range(len(raw))], "interval": 0.001})
    assert (answer.status, answer.body, answer.get("X-E")) == (200, b"abcde", "1")
    assert (await lab.chat("a")).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"NOT HTTP AT ALL\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n",
        b"HTTP/1.1 999999 OK\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
    ],
)
async def test_an_engine_that_talks_rubbish_is_a_502(lab, raw):
    answer = await lab.chat("a", do={"raw": [b64(raw)], "raw_close": True})
    assert answer.status == 502
    assert answer.json()["error"]["message"]
    assert (await lab.chat("a")).status == 200


async def test_every_answer_says_who_and_how_long(lab):
    for answer in [
        await lab.chat("a"),
        await lab.chat("nope"),
        await lab.get("/health"),
        await lab.get("/ready"),
        await lab.get("/metrics"),
        await lab.get("/v1/models"),
        await lab.get("/llmux/status"),
        await lab.get("/nowhere"),
        await lab.get("/llmux/nowhere"),
        await lab.post("/v1/x", body=b"not json"),
        await lab.ask("OPTIONS", "/v1/chat/completions"),
        await lab.ask("PUT", "/health"),
        await lab.chat("a", do={"fail": "eof"}),
    ]:
        assert len(answer.all("X-Request-ID")) == 1, answer
        (seconds,) = answer.all("X-LLMux-Queue-Seconds")
        assert 0 <= float(seconds) < 60


async def test_a_connection_is_kept_and_pipelining_works(lab):
    async with await lab.wire() as line:
        one, two = (request("POST", "/v1/x", body={"model": "a", "n": n}) for n in (1, 2))
        await line.send(one + two)
        for data in (one, two):
            answer = await line.body(await line.head())
            assert answer.status == 200
            assert uid(data) in answer.seen.decode()


async def test_http_10_clients(lab):
    body = json.dumps({"model": "a"}).encode()
    answer = await lab.raw(request("POST", "/v1/x", body=body, version="1.0"))
    assert answer.status == 200
    assert answer.json()["body_size"] == len(body)
    answer = await lab.raw(request("POST", "/v1/x", body=body, version="1.0", do={"sse": 3}))
    assert answer.body.endswith(b"[DONE]\n\n")
    assert b"\r\n" not in answer.body


async def test_a_slow_reader_neither_stalls_others_nor_loses_bytes(lab):
    async with await lab.wire() as line:
        await line.send(request("POST", "/v1/x", body={"model": "a"}, do={"sse": 20000}))
        head = await line.head()
        assert (await lab.chat("a")).status == 200
        await asyncio.sleep(0.2)
        answer = await line.body(head)
    assert answer.whole
    assert answer.body.count(b"data: ") == 20001


async def test_event_streams_say_do_not_buffer(lab):
    answer = await lab.chat("a", do={"sse": 2})
    assert answer.get("X-Accel-Buffering") == "no"
    assert (await lab.chat("a")).get("X-Accel-Buffering") is None


async def test_upstream_route_names_the_model_in_the_path(lab):
    answer = await lab.get("/upstream/a/props?x=%20")
    assert answer.status == 200, answer.body
    assert answer.json()["target"] == "/props?x=%20"
    assert answer.json()["engine"] == "a"

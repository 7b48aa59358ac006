"""What is never forwarded, whatever the spelling; and requests that are no HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import Gone, request

DENIED = [
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/release_memory_occupation",
    "/resume_memory_occupation", "/models/load", "/models/unload", "/v1/models/load", "/v1/models/unload",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter",
    "/start_profile", "/stop_profile", "/v1/start_profile", "/reset_prefix_cache", "/v1/reset_prefix_cache",
    "/flush_cache", "/v1/sleep", "/v1/wake_up", "/v1/collective_rpc", "/lora-adapters",
    "/update_weights_from_disk",
    "/release_memory", "/resume_memory", "/v1/model/load", "/v1/model/unload", "/slots/0?action=erase", "/props",
    "/metrics/x", "/shutdown", "/api/generate", "/v2/repository/models/m/unload", "/server_info",
]  # fmt: skip
TRICKS = [
    "/v1/../sleep",
    "//sleep",
    "///v1/..//sleep",
    "/v1/%2e%2e/wake_up",
    "/v1/%2E%2e/sleep",
    "/v1/.%2e/sleep",
    "/v1/%252e%252e/sleep",
    "/v1/%25252e%25252e/sleep",
    "/v1;x/..;/sleep",
    "/v1/..;/sleep",
    "/v1/..;a=b/sleep",
    "/v1/x/..%2f..%2fsleep",
    "/v1/..%5csleep",
    "/v1\\..\\sleep",
    "/v1/x\\..\\..\\sleep",
    "/\\sleep",
    "/%73leep",
    "/%2573leep",
    "/SLEEP",
    "/V1/Sleep",
    "/v1/SLEEP",
    "/v1/./sleep",
    "/v1/sleep/",
    "/v1/sleep;x",
    "/v1//sleep",
    "/v1/%2fsleep",
    "/v1/sleep%2f",
    "/v1%2fload_lora_adapter",
    "/v1/LOAD_lora_adapter",
    "/v1/load%5Flora_adapter",
    "/v1/models%2fload",
    "/v1/chat/../models/load",
    "/v1/chat/completions/../../../sleep",
    "/v1/chat/completions/..",
    "/v1/.",
    "/v1/..",
    "/v1/chat;x/completions",
    "/v1/chat\\completions",
    "/v1/chat/%2e/completions",
    "/v1/sleep#/x",
    "/sleep#/v1/x",
    "/v1/load_lora_adapter#x",
    "/sleep/../v1/x",
    "/upstream/a/sleep/../../x",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    found = Lab(tmp_path_factory.mktemp("paths"))
    found.write("a b")
    found.start()
    yield found
    found.finish()


def reached(lab: Lab) -> list[str]:
    return [line["path"] for line in lab.journal("request")]


async def refused(answer) -> None:
    assert answer.status == 404, (answer.status, answer.body)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert len(answer.all("X-Request-ID")) == 1
    assert len(answer.all("X-LLMux-Queue-Seconds")) == 1


@pytest.mark.parametrize("target", DENIED + TRICKS)
async def test_control_paths_are_refused(lab, target):
    before = reached(lab)
    await refused(await lab.raw(request("POST", target, body={"model": "a"})))
    joiner = "&" if "?" in target else "?"
    if "#" not in target:
        await refused(await lab.raw(request("POST", f"{target}{joiner}model=a", body=b"")))
    assert reached(lab) == before


@pytest.mark.parametrize("target", ["/v1/../sleep", "//sleep", "/sleep", "/v1/models/load", "/v1/x/%2e%2e/y"])
async def test_absolute_targets_are_no_way_round(lab, target):
    before = reached(lab)
    for authority in ("http://127.0.0.1:1", f"http://127.0.0.1:{lab.ports['a']}", "http://x", "HTTPS://u:p@h"):
        await refused(await lab.raw(request("POST", authority + target, body={"model": "a"})))
    assert reached(lab) == before


async def test_an_absolute_target_that_is_fine_is_served(lab):
    answer = await lab.raw(request("POST", "http://elsewhere:99/v1/chat/completions?q=%20", body={"model": "a"}))
    assert answer.status == 200
    assert answer.json()["target"] in (
        "/v1/chat/completions?q=%20",
        "http://elsewhere:99/v1/chat/completions?q=%20",
    )
    host = {n.lower(): v for n, v in answer.seen_headers()}["host"]
    assert host.endswith(f":{lab.ports['a']}")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/x%00y",
        "/v1/x%0d%0aX:%20y",
        "/v1/%7f",
        "/v1/x%1f",
        "/v1/%",
        "/v1/%4",
        "/v1/%zz",
        "/v1/x%250a",
        "/v1/%u0041",
    ],
)
async def test_control_characters_and_broken_escapes_are_400(lab, target):
    before = reached(lab)
    answer = await lab.raw(request("POST", target + "?model=a", body={"model": "a"}))
    assert answer.status == 400, (answer.status, answer.body)
    assert answer.json()["error"]["message"]
    assert reached(lab) == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/anything/at/all", "/completion", "/completions", "/chat/completions", "/infill", "/embedding",
        "/embeddings", "/rerank", "/reranking", "/v2/rerank", "/score", "/pooling", "/classify", "/tokenize",
        "/detokenize", "/apply-template", "/sdapi/v1/txt2img",
    ],
)  # fmt: skip
async def test_the_usual_paths_are_forwarded(lab, path):
    answer = await lab.post(path, body={"model": "a"})
    assert (answer.status, answer.json()["target"]) == (200, path)


@pytest.mark.parametrize("length", [0, 1 << 20])  # on the fast path, and not
async def test_a_redirect_of_an_engine_leads_to_llmux(lab, length):
    there = f"http://127.0.0.1:{lab.ports['a']}/v1/x"
    do = {"X-Do": json.dumps({"status": 307, "headers": [["Location", there]]})}
    for path, leads in (("/v1/x/", "/v1/x"), ("/upstream/a/v1/x/", "/upstream/a/v1/x")):
        for _ in range(2):
            answer = await lab.post(path, body={"model": "a", "x": "x" * length}, headers=[*do.items()])
            assert (answer.status, answer.all("Location")) == (307, [leads])


async def test_the_page_of_an_engine_is_below_the_name_of_its_model(lab):
    before = reached(lab)
    browser = [("Accept", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")]
    for method in ("GET", "HEAD"):
        answer = await lab.ask(method, "/upstream/a?b=c", headers=browser)
        assert (answer.status, answer.get("Location")) == (308, "./a/?b=c")
    assert reached(lab) == before
    for path in ("/upstream/a?b=c", "/upstream/a/?b=c"):
        assert (await lab.get(path, headers=[("Accept", "*/*")])).json()["target"] == "/?b=c"
    assert (await lab.get("/upstream/a/", headers=browser)).json()["target"] == "/"
    assert (await lab.post("/upstream/a")).json()["target"] == "/"


@pytest.mark.parametrize("path", ["/v1/models/a", "/v1/models", "/health", "/ready", "/metrics", "/llmux/status"])
async def test_own_paths_are_answered_here(lab, path):
    before = reached(lab)
    answer = await lab.get(f"{path}?model=b")
    assert answer.status == 200
    assert reached(lab) == before


MALFORMED = [
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /v1/x y HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1x\r\n\r\n",
    b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n: novalue\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 64 + b"\r\n\r\n",
]


@pytest.mark.parametrize("data", MALFORMED)
async def test_malformed_http_is_400_with_both_headers(lab, data):
    lines = lab.log.count("\n")
    answer = await lab.raw(data)
    assert answer.status == 400, (answer.status, answer.body)
    assert len(answer.all("X-Request-ID")) == 1
    assert len(answer.all("X-LLMux-Queue-Seconds")) == 1
    assert "Traceback" not in answer.body.decode(errors="replace")
    await lab.until(lambda: lab.log.count("\n") > lines)
    assert "Traceback" not in lab.log
    assert (await lab.get("/health")).status == 200


async def test_a_malformed_chunk_is_400(lab):
    data = request("POST", "/v1/x", headers=[("Transfer-Encoding", "chunked")], body=b"zz\r\nnope\r\n0\r\n\r\n")
    answer = await lab.raw(data)
    assert answer.status == 400
    assert len(answer.all("X-Request-ID")) == 1
    assert "Traceback" not in lab.log


async def test_header_fields_up_to_32_kib(lab):
    answer = await lab.chat("a", headers=[("X-Long", "y" * 32000)])
    assert answer.status == 200
    assert ("X-Long", "y" * 32000) in answer.seen_headers()
    answer = await lab.raw(request("POST", "/v1/x", headers=[("X-Long", "y" * 70000)], body={"model": "a"}))
    assert answer.status in (400, 431)
    assert len(answer.all("X-Request-ID")) == 1
    assert len(answer.all("X-LLMux-Queue-Seconds")) == 1


async def test_long_targets(lab):
    answer = await lab.post("/v1/x?model=a&q=" + "z" * 7000)
    assert answer.status == 200
    assert answer.json()["target"].endswith("z" * 7000)


async def test_a_client_that_says_nothing_harms_nobody(lab):
    async with await lab.wire() as line:
        await line.send(b"POST /v1/x HTTP/1.1\r\nHo")
        assert (await lab.get("/health")).status == 200
    async with await lab.wire() as line:
        line.writer.write_eof()
        with pytest.raises((Gone, ConnectionError)):
            await line.head()


async def test_smuggling_bytes_do_not_become_a_second_request(lab):
    before = len(reached(lab))
    data = request(
        "POST", "/v1/x", headers=[("Transfer-Encoding", "chunked"), ("Content-Length", "3")],
        body=b'0\r\n\r\nPOST /v1/evil HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n{"model":"a"}',
    )  # fmt: skip
    async with await lab.wire() as line:
        await line.send(data)
        answer = await line.head()
    assert answer.status == 400
    await asyncio.sleep(0.05)
    assert len(reached(lab)) == before

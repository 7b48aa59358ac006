"""A gateway before real hosts: what happens when these are killed, frozen, restarted; engines keep a journal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import anthropic
import openai
import pytest

from tests.harness import launcher
from tests.harness.lease.bad_days import Days
from tests.harness.lease.fleet import Door
from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import HOST, request, uid
from tests.harness.sdks import anthropic_client, openai_client

HELLO = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture
async def door(tmp_path: Path):
    found = Door(tmp_path)
    yield found
    found.finish()


def dead(lab: Lab) -> None:
    """The host is killed, and what it had started is not: its engines go on."""
    lab.kill()


# ---- the official SDKs


async def test_the_official_sdks(door):
    await door.up()
    url = f"http://{HOST}:{door.port}"
    async with openai_client(url) as one:
        plain = await one.chat.completions.with_raw_response.create(model="a", messages=HELLO)
        assert plain.headers["x-llmux-host"] in door.hosts
        assert plain.parse().choices[0].message.content == "a"
        do = {"X-Do": '{"sse": 5}'}
        stream = await one.chat.completions.create(model="a", messages=HELLO, stream=True, extra_headers=do)
        words = [chunk.choices[0].delta.content async for chunk in stream]
        assert words == [f"t{number} " for number in range(5)]
        assert sorted([model.id async for model in one.models.list()]) == ["a", "b"]
        with pytest.raises(openai.NotFoundError):
            await one.chat.completions.create(model="nothing", messages=HELLO)
    async with anthropic_client(url) as other:
        async with other.messages.stream(model="a", max_tokens=9, messages=HELLO, extra_headers=do) as stream:
            assert await stream.get_final_text() == "t0 t1 t2 t3 t4 "
        with pytest.raises(anthropic.NotFoundError):
            await other.messages.create(model="nothing", max_tokens=9, messages=HELLO)


# ---- hosts that die


async def test_a_host_killed_before_its_answer_is_502_and_never_sent_again(door):
    await door.up()
    lab, other = door.holder(await door.chat("a"))
    line = await door.begin("a", do={"hold": "never"})
    await lab.until(lambda: [entry for entry in lab.journal("request") if entry["path"].startswith("POST")][1:])
    dead(lab)
    answer = await line.body(await line.head())
    assert (answer.status, answer.json()["error"]["code"]) == (502, "host_lost")
    assert not other.journal("request")
    # From now on all goes to the other one; no request is tried on the dead one first.
    for _ in range(3):
        assert (await door.chat("a")).get("X-LLMux-Host") != answer.get("X-LLMux-Host")
    assert len(other.journal("request")) == 3
    (lab.root / "ctl" / "release.never").touch()


async def test_killed_in_mid_stream_the_answer_breaks_off_and_no_other_begins(door):
    await door.up()
    lab, other = door.holder(await door.chat("a"))
    line = await door.begin("a", do={"sse": 9, "hold_after": [3, "never"]})
    head = await line.head()
    assert head.status == 200
    seen = b""
    while b"t2" not in seen:
        seen += await line.reader.read(1000)
    dead(lab)
    rest = await line.reader.read()
    assert b'"code": "engine_lost"' in rest
    assert b"t0 " not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert not other.journal("request")
    (lab.root / "ctl" / "release.never").touch()


async def test_sdks_raise_when_a_stream_breaks_off(door):
    await door.up()
    lab, _ = door.holder(await door.chat("a"))
    do = {"X-Do": '{"sse": 9, "hold_after": [3, "never"]}'}
    async with openai.AsyncOpenAI(base_url=f"http://{HOST}:{door.port}/v1", api_key="x", max_retries=0) as one:
        stream = await one.chat.completions.create(model="a", messages=HELLO, stream=True, extra_headers=do)

        async def read() -> None:
            async for chunk in stream:
                if chunk.choices[0].delta.content == "t2 ":
                    dead(lab)

        with pytest.raises(openai.APIError):
            await read()
    (lab.root / "ctl" / "release.never").touch()


async def test_a_killed_host_that_is_started_again_takes_requests_again(door):
    await door.up("one")
    await door.chat("a")
    dead(door.hosts["one"])
    await door.until_hosts(one="unreachable")
    door.hosts["one"].start()
    await door.until_hosts(one="ready")
    assert (await door.chat("a")).status == 200


async def test_a_frozen_host_gets_nothing_new_once_its_report_is_too_old(door):
    await door.up(fleet={"report_every": "500ms"})
    lab, other = door.holder(await door.chat("a"))
    lab.signal(signal.SIGSTOP)
    try:
        stuck = await door.begin("a")  # its report is still believed
        name = next(name for name, each in door.hosts.items() if each is lab)

        async def given_up():
            return (await door.fleet())["hosts"][name]["state"] != "ready"

        await door.until(given_up, every=0.1)
        for _ in range(3):
            assert (await door.chat("a")).status == 200
        assert len(other.journal("request")) == 3
    finally:
        lab.signal(signal.SIGCONT)
    assert (await stuck.body(await stuck.head())).status == 200  # it was never sent elsewhere


async def test_under_load_a_dead_host_loses_no_request_that_had_not_begun_there(door):
    """What was sent to the host when it died gets 502; all others are served, and none runs twice."""
    await door.up("one two three")
    lab = door.hosts["two"]
    results: list[tuple[str, int]] = []

    async def client(number: int) -> None:
        for _ in range(12):
            model = "ab"[number % 2]
            line = await door.wire()
            data = request("POST", CHAT, body={"model": model, "messages": []}, do={"delay": 0.01})
            with contextlib.suppress(ConnectionError):
                answer = await line.ask(data)
                results.append((uid(data), answer.status))
            await line.close()

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    await door.until(lambda: len(results) > 20)
    dead(lab)
    await asyncio.gather(*clients)
    assert len(results) == 96
    failed = [word for word, status in results if status != 200]
    assert {status for _, status in results} <= {200, 502}
    assert len(failed) <= 8
    assert all(len(door.ran(word)) == 1 for word, status in results if status == 200)


# ---- the process


def command(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it said, in one line."""
    code, said = launcher.run(arguments, cwd=cwd, env={**os.environ, "NO_COLOR": "1"})
    return code, " ".join(said.split())


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("hosts:\n  one: {url: 'http://h:1'}\n  two: {url: 'http://h:1/'}\n", 3, "is the address of one, too"),
        ("hosts:\n  one: {url: 'http://h:1'}\n  one: {url: 'http://h:2'}\n", 3, "one"),
        ("hosts:\n  one: {url: 'ftp://h'}\n", 2, "write it as http://gpu1:3000"),
        ("hosts:\n  one: {url: 'unix:sock'}\n", 2, "names no socket"),
        ("hosts:\n  one: {url: 'http://h', key: '$argon2id$v=19$x'}\n", 2, "show the key itself"),
        ("hosts:\n  one: {url: 'http://h', kee: x}\n", 2, "did you mean `key`?"),
        ("port: 4000\nhosts: {}\n", 2, "hosts"),
        ("host: 0.0.0.0\nhosts: {one: {url: 'http://h'}}\n", 1, "without `api_keys`"),
        (
            "hosts: {one: {url: 'http://h'}}\napi_keys:\n  - {key: k, name: n, weight: 2}\n",
            3,
            "held by hosts only",
        ),
        (
            (
                "hosts: {one: {url: 'http://h'}}\nprices: {models: {a: {input: 1}}}\nroles:\n"
                "  free: {models: ['*'], budget: {eur: 1}}\n"
            ),
            4,
            "is in eur, but `prices.currency` is usd",
        ),
    ],
)
def test_a_wrong_configuration_is_said_with_its_line(tmp_path, text, line, words):
    (tmp_path / "gateway.yaml").write_text(text)
    code, said = command("check", "gateway.yaml", cwd=tmp_path)
    assert code == 2
    assert f"gateway.yaml:{line}:" in said
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("{use: nothing}", "shipped are least_wait"),
        ("{use: random, options: {x: 1}}", "takes no options"),
        ("{use: affinity, options: {bund: 2}}", "route.options.bund: unknown option"),
        ("{use: affinity, options: {bound: 0}}", "route.options.bound"),
        ("{use: './mine.py:Route'}", "cannot be loaded"),
    ],
)
def test_a_wrong_route_too(tmp_path, route, words):
    (tmp_path / "gateway.yaml").write_text(f"hosts: {{one: {{url: 'http://h'}}}}\nroute: {route}\n")
    for arguments in (("check", "gateway.yaml"), ("gateway", "-c", "gateway.yaml", "-p", "0")):
        code, said = command(*arguments, cwd=tmp_path)
        assert code == 2
        assert words in said


def test_a_gateways_file_is_told_from_a_hosts(tmp_path):
    (tmp_path / "gateway.yaml").write_text("hosts: {one: {url: 'http://h'}}\n")
    code, said = command("serve", "-c", "gateway.yaml", cwd=tmp_path)
    assert code == 2
    assert "llmux gateway -c" in said


async def test_an_own_route_from_a_file_is_followed_and_reloaded(door):
    route = "class Only:\n    def place(self, model, fleet):\n        return fleet.hosts.get('NAME')\n"
    file = door.root / "mine.py"
    file.write_text(route.replace("NAME", "one"))
    await door.up(route={"use": "./mine.py:Only"})
    assert (await door.chat("a")).get("X-LLMux-Host") == "one"
    file.write_text(route.replace("NAME", "two"))
    door.signal(signal.SIGHUP)
    await door.until(lambda: '"config_reloaded"' in door.log)
    assert (await door.chat("a")).get("X-LLMux-Host") == "two"


async def test_the_start_is_told_and_a_wrong_reload_changes_nothing(door):
    await door.up("one")
    assert '"event": "started"' in door.log
    assert '"hosts": ["one"]' in door.log
    door.file.write_text("hosts: {one: {url: nonsense}}\n")
    door.signal(signal.SIGHUP)
    await door.until(lambda: '"config_rejected"' in door.log)
    assert (await door.chat("a")).status == 200
    door.add("two", "c")
    door.write_gateway()
    door.signal(signal.SIGHUP)
    await door.until_hosts_are(two="ready")
    assert (await door.chat("c")).get("X-LLMux-Host") == "two"


async def test_term_lets_answers_end_and_tells_what_waits(door):
    await door.up("one")
    line = await door.begin("a", do={"sse": 4, "hold_after": [2, "go"]})
    assert (await line.head()).status == 200
    door.signal(signal.SIGTERM)
    await door.until(lambda: '"stopping"' in door.log)
    refused = await door.chat("a")
    assert (refused.status, refused.json()["error"]["code"]) == (503, "stopping")
    door.hosts["one"].release("go")
    assert (await line.reader.read()).endswith(b"0\r\n\r\n")
    assert door.ended() == 0


async def test_a_host_behind_a_unix_socket(door):
    """As ssh -R makes it: bytes both ways."""
    lab = door.add("one")
    path = door.root / "gpu.sock"

    async def serve(reader, writer):
        up_reader, up_writer = await asyncio.open_connection(HOST, lab.port)

        async def copy(source, sink):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    server = await asyncio.start_unix_server(serve, path)
    door.write_gateway({"one": {"url": f"unix:{path}"}})
    door.start(ready=False)  # the socket is served by this loop
    await door.until_hosts(one="ready")
    assert (await door.chat("a", do={"sse": 3})).body.count(b"data: ") == 4
    assert await asyncio.to_thread(door.end) == 0
    server.close()


async def test_commands_for_the_fleet(door):
    await door.up()
    where = ("--url", f"http://{HOST}:{door.port}")
    cwd = door.root
    _, shown = await asyncio.to_thread(command, "fleet", "status", *where, cwd=cwd)
    assert "2 of 2 hosts ready" in shown
    drained = await asyncio.to_thread(command, "fleet", "drain", "one", "--for", "1h", *where, cwd=cwd)
    assert drained == (0, "one drains: it takes nothing new")
    await door.until_hosts(one="leased")
    assert {(await door.chat("a")).get("X-LLMux-Host") for _ in range(3)} == {"two"}
    code, again = await asyncio.to_thread(command, "fleet", "drain", "one", *where, cwd=cwd)
    assert (code, "leased already" in again) == (5, True)
    assert (await asyncio.to_thread(command, "fleet", "undrain", "one", *where, cwd=cwd))[0] == 0
    await door.until_hosts(one="ready")


# ---- how soon


async def test_how_soon_a_dead_host_is_left_alone(door):
    """At once: the end of its reports is noticed, and at the latest the first refused connection."""
    await door.up()
    lab, _ = door.holder(await door.chat("a"))
    dead(lab)
    statuses = [(await door.chat("a")).status for _ in range(10)]
    assert statuses == [200] * 10
    text = (await door.get("/metrics")).body.decode()
    name = next(name for name, each in door.hosts.items() if each is lab)
    assert f'llmux_fleet_ejected_total{{host="{name}"}} 1.0' in text


async def test_bad_days(tmp_path):
    """For a moment: CI has 45 seconds of them before the tests, and `python -m tests.soak.fleet 600` more."""
    days = Days(tmp_path, seed=7)
    try:
        found = await days.run(1.5)
        # In so short a time it may be chance which hosts serve.
        assert [wrong for wrong in found if not wrong.endswith("has served nothing")] == []
        assert days.ends["200"] > 0
    finally:
        await days.finish()

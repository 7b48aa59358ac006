"""``llmux explain``: from a running llmux, and from its record."""

import asyncio
import json
import socket

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from tests.server.house import until


async def explain(*words, **environ):
    return await asyncio.to_thread(CliRunner().invoke, app, ["explain", *map(str, words)], env=environ)


async def test_a_running_llmux_and_its_record(house):
    await house.open(record="record.jsonl", policy={"use": "idle"})
    url = f"http://127.0.0.1:{house.port}"
    assert "no switch yet" in (await explain("--url", url)).output
    house.engine.go.clear()
    for name in "ab":
        assert (await house.chat(name)).status == 200
    async with house.switcher.hold("b"):
        waiting = await house.begin("POST", "/v1/x", {"model": "a"})
        await until(lambda: house.queued("a"))
        done = await explain("--url", f"{url}/")
        assert done.exit_code == 0, done.output
        assert "now: b stays (1 in flight): the awake model is busy; 1 waiting for a" in done.output
        more = " ".join((await explain("--url", url, "-v", "-n", 1, COLUMNS="200")).output.split())
        assert "· awake: b, 1 in flight, 0 waiting · 1 waiting for a: longest" in more
        assert "· policy: the awake model is idle" in more
        found = json.loads((await explain("--url", url, "--json", "-n", 1)).stdout)
    assert [(each["id"], each["from"], each["to"], each["by"]) for each in found["switches"]] == [
        (2, "a", "b", "policy")
    ]
    assert found["now"]["kind"] == "stay"
    assert "details" not in found["switches"][0]
    await waiting.reply()
    await house.close()
    done = await explain(house.folder / "record.jsonl", "--json")
    found = json.loads(done.stdout)
    assert [(each["from"], each["to"], each["result"]) for each in found["switches"]] == [
        ("idle", "a", "success"),
        ("a", "b", "success"),
        ("b", "a", "success"),
    ]
    assert all(each["cost"] > 0 for each in found["switches"])
    assert "a → b: 1 waiting" in " ".join((await explain(house.folder / "record.jsonl")).output.split())
    more = " ".join((await explain(house.folder / "record.jsonl", "-v", COLUMNS="200")).output.split())
    assert "· policy: the awake model is idle" in more


async def test_a_key(house):
    await house.open(api_keys=["user"])
    url = f"http://127.0.0.1:{house.port}"
    done = await explain("--url", url)
    assert done.exit_code == 1
    assert "an API key suffices, in LLMUX_API_KEY" in done.output
    assert (await explain("--url", url, "--key", "user")).exit_code == 0
    assert (await explain("--url", url, LLMUX_API_KEY="user")).exit_code == 0


NO_LLMUX = [
    b"",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 404 No\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\n\r\n[]",
    b'HTTP/1.1 200 OK\r\n\r\n{"decisions": [7]}',
]


@pytest.mark.parametrize("answer", NO_LLMUX)
async def test_what_is_no_llmux(answer):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        async with await asyncio.start_server(serve, sock=sock):
            done = await explain("--url", f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert done.exit_code == 1, done.output
    assert "llmux" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 2, "nowhere: No such file or directory"),
        (["--url", "file:///etc/passwd"], 2, "write --url http://HOST:PORT"),
        (["--url", "llama"], 2, "write --url http://HOST:PORT"),
        (["--url", "http://[::1"], 2, "write --url http://HOST:PORT"),
        (["--url", "http://127.0.0.1:99999"], 2, "write --url http://HOST:PORT"),
        (["--key", "a\nb"], 2, "--key contains no key"),
        (["-n", "0"], 2, "greater than or equal to 1"),
    ],
)
async def test_nonsense(words, code, message):
    done = await explain(*words)
    assert done.exit_code == code
    assert message in done.output


async def test_nobody_there():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        done = await explain("--url", f"http://127.0.0.1:{sock.getsockname()[1]}")
    assert done.exit_code == 1
    assert "does llmux run there?" in done.output

"""Keys, as the official SDKs and the command line know them; and that they are written nowhere."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import anthropic
import openai
import pytest

from tests.harness import launcher
from tests.harness.lease.lab import Lab
from tests.harness.waiting import PATIENCE

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def laptop():
    code, said = launcher.run(["key", "new", "--name", "laptop", "--json"], env=os.environ)
    assert code == 0, said
    return json.loads(said)


@pytest.fixture(scope="module")
def root():
    key = "correct-horse-battery"
    command = [sys.executable, "-m", "llmux", "key", "hash", "--json"]
    done = subprocess.run(command, input=f"{key}\n", capture_output=True, text=True, check=True)
    return json.loads(done.stdout) | {"key": key}


async def both(lab: Lab, key: str, **more) -> None:
    """Ask with both SDKs, streaming and not."""
    options = {"api_key": key, "max_retries": 0, "timeout": PATIENCE}
    url = f"http://127.0.0.1:{lab.port}"
    sse = {"X-Do": json.dumps({"sse": 3})}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", **options) as client:
        create = client.chat.completions.create
        assert (await create(model="a", messages=HELLO, **more)).model
        assert [chunk async for chunk in await create(model="a", messages=HELLO, stream=True, extra_headers=sse)]
        assert [model.id async for model in client.models.list()] == ["a"]
    async with anthropic.AsyncAnthropic(base_url=url, **options) as client:
        assert (await client.messages.create(model="a", messages=HELLO, max_tokens=9)).id
        stream = await client.messages.create(
            model="a", messages=HELLO, max_tokens=9, stream=True, extra_headers=sse
        )
        assert [event async for event in stream]
    async with anthropic.AsyncAnthropic(base_url=url, **options | {"api_key": None}, auth_token=key) as client:
        assert (await client.messages.create(model="a", messages=HELLO, max_tokens=9)).id


async def test_both_sdks_are_let_in_with_a_key_and_raise_without(lab, laptop):
    lab.write("a", api_keys=[{"name": "laptop", "key": laptop["hash"]}])
    lab.start()
    await both(lab, laptop["key"])
    for wrong in ("nope", laptop["hash"], laptop["key"][:-1]):
        options = {"api_key": wrong, "max_retries": 0, "timeout": PATIENCE}
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{lab.port}/v1", **options) as client:
            with pytest.raises(openai.AuthenticationError, match="No valid API key"):
                await client.chat.completions.create(model="a", messages=HELLO)
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="a", messages=HELLO, stream=True)
        async with anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{lab.port}", **options) as client:
            with pytest.raises(anthropic.AuthenticationError, match="No valid API key"):
                await client.messages.create(model="a", messages=HELLO, max_tokens=9)


async def test_keys_are_written_nowhere(lab, laptop, root):
    """Not into the log (at debug), the state, the record, what the engine or its hooks get, or an error."""
    lab.write(
        {"a": {"wake": "env; sh ./hook.sh wake"}},
        api_keys=[laptop["hash"], "plain-text-key"],
        admin_key=root["hash"],
        access_log=True,
        log_level="debug",
        record="record.jsonl",
    )
    lab.start()
    said = []
    for key in (laptop["key"], "plain-text-key", root["key"], "wrong-key-of-somebody"):
        for header in ("Authorization", "X-API-Key"):
            shown = [(header, f"Bearer {key}" if header == "Authorization" else key)]
            answers = (
                await lab.chat("a", headers=shown),
                await lab.chat("nobody", headers=shown),
                await lab.post("/llmux/models/a/wake", headers=shown),
                await lab.get("/llmux/status", headers=shown),
                await lab.get("/metrics", headers=shown),
            )
            said += [answer.body for answer in answers]
    lab.file.write_text(lab.file.read_text() + "api_keys: [not-to-be-seen, 'no good']\n")
    lab.signal(signal.SIGHUP)
    await lab.until(lambda: "config_rejected" in lab.log)
    assert lab.end() == 0
    secrets = [laptop["key"], "plain-text-key", root["key"], "wrong-key-of-somebody", "not-to-be-seen", "no good"]
    secrets += [laptop["hash"], root["hash"]]
    files = [path for path in lab.root.rglob("*") if path.is_file() and path != lab.file]
    assert {"llmux.log", "record.jsonl", "s.json", "journal.jsonl"} <= {path.name for path in files}
    for text in [*(path.read_bytes() for path in files), *said]:
        assert not [secret for secret in secrets if secret.encode() in text]


async def test_it_does_not_listen_beyond_this_machine_without_keys(lab, laptop):
    lab.write("a", host="0.0.0.0")
    process = lab.spawn("-c", str(lab.file))
    assert await asyncio.to_thread(process.wait, 15) == 2
    for words in ("host: is 0.0.0.0", "`api_keys`", "llmux key new", "`insecure: true`"):
        assert words in lab.log
    lab.write("a", host="0.0.0.0", api_keys=[laptop["hash"]])
    lab.start()
    assert (await lab.get("/v1/models")).status == 401
    assert (await lab.get("/health")).status == 200


async def test_a_reload_changes_keys_at_once_and_never_opens_a_host(lab, laptop):
    lab.write("a", host="0.0.0.0", api_keys=[laptop["hash"]])
    lab.start()
    shown = [("X-API-Key", laptop["key"])]
    assert (await lab.chat("a", headers=shown)).status == 200
    lab.write("a", host="0.0.0.0", api_keys=["another"])
    lab.signal(signal.SIGHUP)
    await lab.until(lambda: "config_reloaded" in lab.log)
    assert (await lab.chat("a", headers=shown)).status == 401
    assert (await lab.chat("a", headers=[("X-API-Key", "another")])).status == 200
    # Another `host` takes a restart, so this would leave the old one open to all.
    lab.write("a", host="127.0.0.1")
    lab.signal(signal.SIGHUP)
    await lab.until(lambda: "llmux listens on an address that is 0.0.0.0, beyond this machine" in lab.log)
    assert "config_rejected" in lab.log
    assert (await lab.chat("a")).status == 401


async def test_a_flood_of_wrong_keys_does_not_hold_up_those_who_are_known(lab, laptop, root):
    lab.write("a", api_keys=[laptop["hash"], root["hash"]])
    lab.start()
    shown = [("X-API-Key", laptop["key"])]
    assert (await lab.chat("a", headers=shown)).status == 200
    flood = [asyncio.create_task(lab.chat("a", headers=[("X-API-Key", f"wrong-{n}")])) for n in range(200)]
    for _ in range(20):
        assert (await lab.chat("a", headers=shown)).status == 200
    answered = [answer for answer in flood if answer.done()]
    assert {answer.result().status for answer in answered} <= {401, 429}
    assert len(answered) > 100, "nobody is left to wait who is not looked at"
    for answer in flood:
        answer.cancel()

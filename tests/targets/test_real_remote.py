"""A llama.cpp server behind TLS as a remote, and llmux as a process, with the official SDKs."""

from __future__ import annotations

import asyncio
import contextlib
import shutil

import pytest

from tests.engine.mux import Engine, Mux
from tests.engine.real import foreground
from tests.harness.ports import free_port
from tests.harness.sdks import anthropic_client, openai_client
from tests.targets.remote_host import KEY, make_certificates

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")

QUESTION = [{"role": "user", "content": "wake up"}]
TOKENS = 12


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """Run the engine; return its port, and the certificates."""
    port = free_port()
    with foreground("theirs", port):
        yield port, make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def tls(far):
    """Put TLS in front of the engine, and return the port."""
    port, certificates = far

    async def pipe(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=certificates.context())
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def mux(far, tls, tmp_path):
    _, certificates = far
    where = {"url": f"https://localhost:{tls}", "key": KEY, "ca": certificates.authority}
    remotes = {
        "far": {**where, "models": {"m": "theirs"}},
        "plain": {**where, "apis": ["chat"], "models": {"m": "theirs"}},
    }
    spill = {"spill": {"to": "far/m", "over": "5s"}, "cost": {"wake": "60s"}}
    mux = Mux(tmp_path, {"here": Engine(settings=spill)}, remotes=remotes, remotes_for_all=True)
    await asyncio.to_thread(mux.start)
    try:
        yield mux
        assert await asyncio.to_thread(mux.stop) == 0
        assert "Traceback" not in mux.said()
        assert KEY not in mux.said()
    finally:
        mux.clean_up()


async def test_the_sdks_at_a_real_engine_on_another_host(mux):
    async with openai_client(mux.url) as gpt:
        fields = {"max_tokens": TOKENS, "messages": QUESTION, "temperature": 0.0}
        whole = await gpt.chat.completions.create(model="far/m", **fields)
        assert whole.usage.completion_tokens == TOKENS
        stream = await gpt.chat.completions.create(model="far/m", **fields, stream=True)
        pieces = [piece.choices[0].delta.content or "" async for piece in stream if piece.choices]
        assert len(pieces) > 1
        assert "".join(pieces) == whole.choices[0].message.content
        # Its wake is expected to take a minute: it goes there.
        answer = await gpt.chat.completions.with_raw_response.create(model="here", **fields)
        assert answer.headers["x-llmux-served-by"] == "far/m"
        assert answer.parse().choices[0].message.content == whole.choices[0].message.content
    async with anthropic_client(mux.url) as claude:
        fields |= {"extra_body": {"temperature": fields.pop("temperature")}}
        for model in ("far/m", "plain/m"):  # passed through, and translated
            async with claude.messages.stream(model=model, **fields) as events:
                text = "".join([piece async for piece in events.text_stream])
            assert text == whole.choices[0].message.content
            assert (await events.get_final_message()).usage.output_tokens == TOKENS
    status = await asyncio.to_thread(mux.status)
    assert status["awake"] == []
    assert {name: remote["requests"] for name, remote in status["remotes"].items()} == {
        "far": {"ok": 4},
        "plain": {"ok": 1},
    }

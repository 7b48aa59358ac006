"""What `llmux init` writes runs as it is: a real engine answers."""

from __future__ import annotations

import asyncio
import subprocess

import openai

from examples.quickstart.tiny_gguf import cached
from tests.engine.mux import LLMUX, Mux
from tests.engine.real import LLAMA_SERVER, TINY
from tests.harness.ports import free_port


async def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PID_DIR", str(tmp_path / "pids"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LLAMA_SERVER", LLAMA_SERVER)  # hooks inherit what llmux has
    mux = Mux.on(tmp_path / "config.yaml", free_port())
    command = [
        LLMUX,
        "init",
        "--yes",
        "--model",
        f"org/tiny one={cached(TINY)}",
        "-o",
        tmp_path,
        "-p",
        str(mux.port),
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    try:
        await asyncio.to_thread(mux.start)
        async with openai.AsyncOpenAI(base_url=f"{mux.url}/v1", api_key="none", max_retries=0) as client:
            messages = [{"role": "user", "content": "wake up"}]
            answer = await client.chat.completions.create(model="org/tiny one", messages=messages, max_tokens=3)
            assert answer.model == "org/tiny one"
        assert mux.stop() == 0
    finally:
        mux.clean_up()

"""Completion in the shell: commands, and the models of the llmux that runs."""

import pytest

from llmux.cli import options
from tests.cli.invoking import llmux
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE
from tests.server.house import HOST


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(options, "COMPLETION_TIMEOUT", PATIENCE)


async def complete(house, words, *, shell="bash", **environ):
    env = {"_LLMUX_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = await llmux(house, **{**env, "_TYPER_COMPLETE_ARGS": words, **environ})
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return [line for line in done.output.split("\n") if line]


async def test_commands():
    assert await complete(None, "llmux unp") == ["unpin"]
    assert {"status", "switch", "sleep", "simulate", "schema", "serve"} <= set(await complete(None, "llmux s"))


@pytest.mark.parametrize("command", ["switch", "wake", "sleep", "pin", "unpin", "reset", "logs"])
async def test_models_and_aliases(house, command):
    await house.open(models={"llama": {"aliases": ["gpt-4o"]}, "llava": {}, "qwen": {}})
    assert await complete(house, f"llmux {command} ll") == ["llama", "llava"]
    assert await complete(house, f"llmux {command} g") == ["gpt-4o"]
    assert await complete(house, f"llmux {command} x") == []


async def test_zsh_is_told_their_state(house):
    await house.open(models={"llama": {"aliases": ["gpt-4o"]}, "qwen": {}})
    assert (await house.chat("qwen")).status == 200
    shown = " ".join(await complete(house, "llmux pin ", shell="zsh"))
    assert '"qwen":"awake"' in shown
    assert '"gpt-4o":"llama, asleep"' in shown


async def test_the_address_may_be_given_before(house):
    await house.open(models={"llama": {}})
    words = f"llmux switch --url http://{HOST}:{house.port} ll"
    assert await complete(None, words, LLMUX_URL="") == ["llama"]


async def test_keys(house):
    await house.open(models={"llama": {}}, api_keys=["user"])
    assert await complete(house, "llmux switch l") == []
    assert await complete(house, "llmux switch l", LLMUX_API_KEY="user") == ["llama"]


async def test_without_llmux_there_is_nothing():
    for url in (f"http://{HOST}:{free_port()}", "nonsense"):
        assert await complete(None, "llmux switch l", LLMUX_URL=url) == []

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.quickstart.tiny_gguf import cached
from llmux.cli.hooks import copy
from tests.engine.real import LLAMA_SERVER, TINY, Hook

PROCESS_COMMAND = f'{LLAMA_SERVER} --model "$MODEL" --port "$LLMUX_PORT" --alias "$LLMUX_MODEL"'


@pytest.fixture
def make_hook(tmp_path: Path) -> Iterator[Callable[..., Hook]]:
    made: list[Hook] = []

    def make(script: str, model: str = "tiny", **env: str) -> Hook:
        file = copy(script, tmp_path / "my hooks")  # to prove that one file is enough
        env = {"MODEL": str(cached(TINY)), "LLAMA_SERVER": LLAMA_SERVER, "COMMAND": PROCESS_COMMAND} | env
        made.append(Hook(file, tmp_path, model, **env))
        return made[-1]

    yield make
    for hook in made:
        hook.clean_up()


@pytest.fixture(params=["llama-cpp.sh", "process.sh"])
def hook(request, make_hook) -> Hook:
    return make_hook(request.param)


@pytest.fixture
def shell(request, tmp_path) -> str:
    """A shell that the scripts have to work under."""
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"no {request.param} here")
    if request.param != "busybox":
        return found
    tools = tmp_path / "busybox"  # all that busybox has, and what the scripts want besides
    tools.mkdir()
    for applet in (
        "ash",
        "awk",
        "cat",
        "cksum",
        "cut",
        "du",
        "grep",
        "md5sum",
        "mkdir",
        "mv",
        "rm",
        "sed",
        "setsid",
        "sleep",
        "tail",
        "timeout",
        "tr",
    ):
        (tools / applet).symlink_to(found)
    os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
    return str(tools / "ash")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])


def live(hook: Hook, asleep: Callable[[], None] = lambda: None) -> None:
    """Go through a hook's whole life; an engine may be there already, asleep. Then ``asleep`` is called."""
    hook.fails("alive")
    hook.ok("verify")
    hook.ok("sleep")  # nothing is awake: nothing to do
    hook.ok("wake")
    assert "already" in hook.ok("wake")
    hook.ok("alive")
    hook.fails("verify")
    hook.ok("sleep")
    hook.fails("alive")
    hook.ok("verify")
    asleep()
    hook.ok("sleep")
    assert "already" not in hook.ok("wake")  # it slept on
    hook.ok("alive")


@pytest.fixture(name="live")
def _live():
    return live

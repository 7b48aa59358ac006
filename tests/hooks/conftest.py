from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.quickstart.tiny_gguf import cached
from tests.engine.real import LLAMA_SERVER, ROOT, TINY, Hook

PROCESS_COMMAND = f'{LLAMA_SERVER} --model "$MODEL" --port "$LLMUX_PORT" --alias "$LLMUX_MODEL"'


@pytest.fixture
def make_hook(tmp_path: Path) -> Iterator[Callable[..., Hook]]:
    made: list[Hook] = []

    def make(script: str, model: str = "tiny", **env: str) -> Hook:
        # A copy, to prove that one file is enough.
        copy = tmp_path / "my hooks" / script
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / "hooks" / script).read_bytes())
        env = {"MODEL": str(cached(TINY)), "LLAMA_SERVER": LLAMA_SERVER, "COMMAND": PROCESS_COMMAND} | env
        made.append(Hook(copy, tmp_path, model, **env))
        return made[-1]

    yield make
    for hook in made:
        hook.clean_up()


@pytest.fixture(params=["llama-cpp.sh", "process.sh"])
def hook(request, make_hook) -> Hook:
    return make_hook(request.param)

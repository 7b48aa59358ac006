"""From what was found to models that can be served, and to the configuration that serves them."""

from pathlib import Path

import pytest
import yaml

from llmux.cli.hooks import shipped
from llmux.config import Config
from llmux.config.setting_types import is_name
from llmux.survey.draft import Draft, Recipe
from llmux.survey.host import Container, Engine, Gpu, Machine, Served
from llmux.survey.model_files import Candidate, Gguf, candidates, gibibytes, of_file, unique

ALL = {"llama-cpp", "llama-cpp-router", "vllm-process", "vllm-sleep", "sglang", "ollama", "tabbyapi", "docker"}
FILE = Gguf(Path("/m/q.gguf"), 5 * 2**30, "qwen3")
RECIPES = {name: recipe for name, script in shipped().items() if (recipe := Recipe.of(script.example))}


def one(engine, machine=None, scripts=ALL):
    found, left = candidates([], [engine], machine or Machine(), scripts)
    return found[0] if found else left[0]


class TestWhatRuns:
    def test_ollama(self):
        engine = Engine(11434, "Ollama", (Served("llama3:8b"),))
        found = one(engine)
        assert (found.script, found.source, found.port, found.remark) == ("ollama", "llama3:8b", 11434, "")

    def test_llama_server(self):
        found = one(Engine(8080, "llama.cpp", (Served("/m/some q.gguf", "/m/some q.gguf"),)))
        assert (found.name, found.script, found.source, found.port) == (
            "some q",
            "llama-cpp",
            "/m/some q.gguf",
            8080,
        )
        assert "end it once by hand" in found.remark

    def test_llama_servers_router(self):
        found = one(Engine(8080, "llama.cpp", (Served("q"),), router=True))
        assert (found.script, found.source, found.port) == ("llama-cpp-router", "q", 8080)

    def test_vllm(self):
        awake = Engine(8000, "vLLM", (Served("q", "Qwen/Qwen3-8B"),))
        assert (one(awake).script, one(awake).source) == ("vllm-process", "Qwen/Qwen3-8B")
        sleeper = Engine(8000, "vLLM", (Served("q", "Qwen/Qwen3-8B"),), sleeps=True)
        assert (one(sleeper).script, one(sleeper).remark) == ("vllm-sleep", "")

    def test_one_in_a_container(self):
        machine = Machine(containers=[Container("box", "vllm/vllm-openai", (8000,))])
        found = one(Engine(8000, "vLLM", (Served("q"),)), machine)
        assert (found.name, found.script, found.source, found.env) == ("q", "docker", "box", {"EXPECT": '"q"'})
        sleeper = one(Engine(8000, "vLLM", (Served("q", "Qwen/Q"),), sleeps=True), machine)
        assert (sleeper.script, sleeper.source) == ("vllm-sleep", "")  # which must not start another one
        machine = Machine(containers=[Container("box", "ollama/ollama", (11434,))])
        assert one(Engine(11434, "Ollama", (Served("q"),)), machine).script == "ollama"

    @pytest.mark.parametrize(
        ("engine", "said"),
        [
            (Engine(1234, "LM Studio", (Served("q"),)), "no hook script for it"),
            (Engine(8080, "llama-swap", (Served("q"),)), "llmux import llama-swap"),
            (Engine(3000, "llmux", (Served("q"),)), "one llmux is enough"),
            (Engine(5000, "unknown", locked=True), "wants a key"),
            (Engine(8080, "llama.cpp", (Served("q"),)), "no hook script"),  # it does not say from which file
            (Engine(11434, "Ollama"), "Ollama on port 11434"),
        ],
    )
    def test_what_cannot_be_served_is_named(self, engine, said):
        assert said in one(engine)

    def test_without_its_script(self):
        assert "no hook script" in one(Engine(11434, "Ollama", (Served("q"),)), scripts={"llama-cpp"})


def test_files_come_after_engines_and_not_again():
    engine = Engine(8080, "llama.cpp", (Served("q", "/m/q.gguf"),))
    other = Gguf(Path("/m/r.gguf"), 1000, "qwen3")
    found, _ = candidates([FILE, other], [engine], Machine(), ALL)
    assert [one.name for one in found] == ["q", "r"]


def test_names_are_made_different():
    same = Candidate("q", "llama-cpp", "x", "")
    assert [one.name for one in unique([same, same, same])] == ["q", "q-2", "q-3"]


@pytest.mark.parametrize(("size", "text"), [(5 * 2**30, "5.0 GiB"), (3 * 2**20, "3 MiB")])
def test_sizes(size, text):
    assert gibibytes(size) == text


# ---- the configuration


def load(tmp_path, chosen, machine=None, **options) -> Config:
    draft = Draft(chosen, RECIPES, machine or Machine(), **{"port": 3000} | options)
    (tmp_path / "config.yaml").write_text(draft.text)
    return Config.from_file(tmp_path / "config.yaml", environ={})


NAMES = [
    "", "  ", "a ", "\u3000a", "a\tb", "a\n", "a\x85b", "a\u2028b", "\ud83d", "\ufeffa", "\0",
    "x" * 256, "x" * 257, "1e3", "+.1", "0o17", "null", "<<", "~", "- a", "a: b", "#a", "a\"'b", "${HOME}",
    "${X:-", "$${", "a;b", "..", "größe",
]  # fmt: skip
KINDS = [("llama.cpp", False), ("llama.cpp", True), ("vLLM", False), ("Ollama", False), ("TabbyAPI", False)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "router"), KINDS)
def test_whatever_an_engine_s_models_are_called_the_configuration_is_taken(tmp_path, kind, router, name):
    engine = Engine(8001, kind, (Served(name, "/m/x.gguf"), Served("b", "/m/x.gguf")), router=router)
    chosen, left = candidates([], [engine], Machine(), ALL)
    models = load(tmp_path, chosen, left=left).models
    alone = kind in {"llama.cpp", "vLLM"} and not router
    if is_name(name):
        assert list(models) == [name, "b"][: 1 if alone else 2]
        assert left == (
            [f"{kind} on port 8001 has other names, too: b; make them `aliases` of {name}"] if alone else []
        )
    elif kind == "llama.cpp" and not router:  # which answers to any
        assert len(models) == 1
    else:
        assert list(models) == ["b"]
        assert left == [f"{kind} on port 8001: {name!r}: no names for llmux; let the engine use others"]
    for known, model in models.items():
        assert model.upstream_model == (None if alone else known)
        assert ("/m/x.gguf" if alone else known) in model.env.values()


@pytest.mark.parametrize("name", ["x" * 250, "a\udcffb", " a ", "a\tb", "1e3", "${HOME}"])
def test_whatever_a_file_is_called_the_configuration_is_taken(tmp_path, name):
    found, _ = candidates(
        [Gguf(Path(f"/m/{folder}/{name}.gguf"), 1000) for folder in range(12)], [], Machine(), ALL
    )
    models = load(tmp_path, found).models
    assert [model.env["MODEL"] for model in models.values()] == [
        f"/m/{folder}/{name}.gguf" for folder in range(12)
    ]


def test_every_script_for_an_engine_can_be_used(tmp_path):
    assert {"llama-cpp", "process"} <= set(RECIPES)
    for script in RECIPES:
        chosen = [Candidate("one", script, "the source", "about it"), Candidate("two", script, "another", "")]
        config = load(tmp_path, chosen)
        model = config.models["one"]
        assert "the source" in model.env.values()
        assert f"./hooks/{script}.sh" in model.wake
        assert model.upstream_model in (None, "the source")


def test_scripts_that_are_for_no_engine_are_not():
    assert not {"gpu-free", "prefetch"} & set(RECIPES)


def test_ports_are_free_ones(tmp_path):
    chosen = [of_file(FILE), of_file(FILE, "b"), Candidate("c", "llama-cpp", "x", "", port=8002)]
    ports = [model.port for model in load(tmp_path, chosen, taken=[8001], port=8003).models.values()]
    assert ports[2] == 8002
    assert len({*ports, 8001, 8003}) == 5


@pytest.mark.parametrize(
    "name",
    ["org/mödel: x", "${HOME} #1", "- dash", "true", "1.10", "'", '"', "{a}", "a\tb", "null", "@x", "trailing "],
)
def test_strange_names_and_paths_stay_what_they_are(tmp_path, name):
    called = name.replace("\t", " ").strip()  # as `init` calls what it finds
    chosen = [Candidate(called, "llama-cpp", f"/m/{name}.gguf", f"about {name}\n  evil: yes")]
    (model,) = load(tmp_path, chosen).models.items()
    assert (model[0], model[1].env["MODEL"]) == (called, f"/m/{name}.gguf")


def test_gpus_are_said_in_comments_that_hold_once_uncommented():
    chosen = [of_file(FILE), of_file(FILE, "b")]
    for gpus, key in (
        ([Gpu("0", "RTX", 24 * 2**30)], "capacity"),
        ([Gpu(str(n), "X\ny", 2**36) for n in (0, 1)], "gpus"),
    ):
        text = Draft(chosen, RECIPES, Machine(gpus=gpus), port=3000).text
        assert f"\n# {key}: " in text
        settings = yaml.safe_load(text.replace(f"\n# {key}: ", f"\n{key}: "))
        assert settings[key]


def test_what_was_found_but_not_used_is_in_the_file():
    text = Draft([of_file(FILE)], RECIPES, Machine(), port=3000, left=["LM Studio on port 1234"]).text
    assert "# - LM Studio on port 1234\n" in text


def test_a_script_that_is_only_in_a_comment_comes_too():
    example = """models:
  q:
    port: 1
    wake: ./hooks/llama-cpp.sh wake
    sleep: ./hooks/llama-cpp.sh sleep
    alive: ./hooks/llama-cpp.sh alive
    verify: ./hooks/gpu-free.sh
    env: {MODEL: x}
"""
    recipes = {"llama-cpp": Recipe.of(example)}
    draft = Draft([of_file(FILE)], recipes, Machine(gpus=[Gpu("0", "RTX", 2**34)]), port=3000)
    assert "  # verify: ./hooks/gpu-free.sh" in draft.text
    assert draft.scripts == ["gpu-free", "llama-cpp"]

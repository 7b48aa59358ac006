"""`llmux import litellm`: what becomes of a configuration of LiteLLM's proxy, and that all else is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llmux.cli import app
from llmux.config import Config
from llmux.config.problems import ConfigErrors
from llmux.litellm import PROVIDERS, page, translate

# As people write it: local engines, clouds, several deployments of one name, fallbacks, aliases, limits, defaults.
EVERYTHING = """
model_list:
  - model_name: gpt-4o
    litellm_params:
      model: openai/gpt-4o
      api_key: os.environ/OPENAI_API_KEY
      rpm: 6
      input_cost_per_token: 0.0000025
      output_cost_per_token: 0.00001
  - model_name: claude
    litellm_params: {model: claude-sonnet-4-5, timeout: 120, stream_timeout: 20}
    model_info: {mode: chat, supports_vision: true}
  - model_name: qwen
    litellm_params: {model: hosted_vllm/Qwen/Qwen3-32B, api_base: "http://localhost:8002/v1", order: 1}
  - model_name: qwen
    litellm_params: {model: openrouter/qwen/qwen3-32b, api_key: os.environ/OR_KEY, order: 2, temperature: 0.2}
  - model_name: small
    litellm_params: {model: ollama_chat/llama3.2:3b, max_parallel_requests: 4}
    model_info: {description: quick, max_input_tokens: 8192, supports_function_calling: true}
  - model_name: embedder
    litellm_params: {model: openai/bge-m3, api_base: "http://gpu7:8080", api_key: 'sk-literal-${x}'}
  - model_name: azure-model
    litellm_params: {model: azure/gpt-4o-eu, api_base: "https://x.openai.azure.com", api_version: "2024-02"}
  - model_name: "anthropic/*"
    litellm_params: {model: "anthropic/*"}
router_settings:
  routing_strategy: least-busy
  model_group_alias: {gpt-4: gpt-4o, tiny: {model: small, hidden: true}, lost: nowhere}
  fallbacks: [{claude: [gpt-4o]}, {small: [qwen, missing]}]
  num_retries: 3
litellm_settings:
  drop_params: true
  set_verbose: true
  success_callback: [langfuse]
  cache: false
general_settings:
  master_key: os.environ/MASTER
  database_url: postgres://u:p@h/db
environment_variables: {X: y}
"""
SET = {"OPENAI_API_KEY": "sk-o", "ANTHROPIC_API_KEY": "sk-a", "OR_KEY": "sk-r", "MASTER": "sk-master"}


KEYS = {each.variable: "k" for each in PROVIDERS.values() if each.variable}


class Imported:
    def __init__(self, folder: Path, text: str, environ=None, **options) -> None:
        environ = SET if environ is None else environ
        file = folder / "litellm.yaml"
        file.write_text(text)
        self.translation = translate(file, environ, **options)
        self.text = page(self.translation)
        target = folder / "config.yaml"
        target.write_text(self.text)
        self.config = Config.from_file(target, environ={**KEYS, **SET, **environ})
        self.written = yaml.safe_load(self.text)

    def notes(self, *, lost: bool) -> dict[str, str]:
        notes = [note for note in self.translation.notes if note.lost is lost]
        return {str(note).partition(": ")[0]: note.message for note in notes}


@pytest.fixture
def load(tmp_path):
    return lambda text, environ=None, **options: Imported(tmp_path, text, environ, **options)


HERE = "  - {model_name: here, litellm_params: {model: ollama/x}}\n"


def one(params: str, more: str = HERE) -> str:
    return f"model_list:\n  - model_name: m\n    litellm_params: {params}\n{more}"


def test_everything(load):
    got = load(EVERYTHING)
    config = got.config
    assert set(config.models) == {"qwen here", "small here"}
    assert config.models["qwen here"].address.url == "http://127.0.0.1:8002"
    assert config.models["qwen here"].upstream_model == "Qwen/Qwen3-32B"
    small = config.models["small here"]
    assert (small.address.url, small.upstream_model, small.max_in_flight) == (
        "http://127.0.0.1:11434", "llama3.2:3b", 4,
    )  # fmt: skip
    assert small.env == {"NAME": "llama3.2:3b"}
    assert "ollama.sh" in small.wake
    assert small.info.model_dump(exclude_defaults=True) == {
        "description": "quick", "context": 8192, "capabilities": ("tools",),
    }  # fmt: skip
    remotes = {name: (each.url, each.apis, dict(each.models), each.lossy) for name, each in config.remotes.items()}
    assert remotes == {
        "openai": (
            "https://api.openai.com:443/v1",
            ("chat", "completions", "responses", "embeddings"),
            {"gpt-4o": "gpt-4o"},
            True,
        ),
        "anthropic": (
            "https://api.anthropic.com:443",
            ("messages", "count_tokens"),
            {"claude-sonnet-4-5": "claude-sonnet-4-5"},
            True,
        ),
        "openrouter": (
            "https://openrouter.ai:443/api/v1",
            ("chat", "completions"),
            {"qwen/qwen3-32b": "qwen/qwen3-32b"},
            True,
        ),
        "gpu7": (
            "http://gpu7:8080",
            ("chat", "completions", "responses", "embeddings"),
            {"bge-m3": "bge-m3"},
            True,
        ),
    }
    assert {name: dict(each)["first"] for name, each in config.virtual.items()} == {
        "gpt-4o": ("openai/gpt-4o",),
        "claude": ("anthropic/claude-sonnet-4-5", "openai/gpt-4o"),
        "qwen": ("qwen here", "openrouter/qwen/qwen3-32b"),
        "small": ("small here", "qwen here", "openrouter/qwen/qwen3-32b"),
        "embedder": ("gpu7/bge-m3",),
        "gpt-4": ("gpt-4o",),
        "tiny": ("small",),
    }
    timeouts = config.remotes["anthropic"].timeouts
    assert (timeouts.total, timeouts.first_byte) == (120.0, 20.0)
    price = config.prices.models["openai/gpt-4o"]
    assert (price.input, price.output) == (2.5, 10.0)
    assert config.log_level == "debug"


def test_what_is_lost_is_named_with_its_line(load):
    got = load(EVERYTHING)
    lost = got.notes(lost=True)
    assert set(lost) == {
        "model_list[0].litellm_params.rpm",
        "model_list[1].model_info.mode",
        "model_list[1].model_info.supports_vision",
        "model_list[3].litellm_params.temperature",
        "model_list[6].litellm_params.model",
        "model_list[6].litellm_params.api_version",
        "model_list[7].model_name",
        "router_settings.routing_strategy",
        "router_settings.model_group_alias.lost",
        "router_settings.model_group_alias.tiny.hidden",
        "router_settings.fallbacks[1].small",
        "router_settings.num_retries",
        "litellm_settings.success_callback",
        "general_settings.database_url",
        "environment_variables",
    }
    assert set(got.notes(lost=False)) == {"model_list", "model_list[2]", "model_list[5].litellm_params.api_base"}
    lines = {str(note).partition(": ")[0]: note.line for note in got.translation.notes}
    assert lines["model_list[0].litellm_params.rpm"] == 7
    assert any(note.lost for note in got.translation.notes)
    for said in lost:
        assert said in got.text


def test_keys_stay_variables_and_literal_ones_stay_what_they_are(load):
    got = load(EVERYTHING, {})
    remotes = got.written["remotes"]
    assert remotes["openai"]["key"] == "${OPENAI_API_KEY}"
    assert got.written["admin_key"] == "${MASTER}"
    assert got.written["api_keys"] == [{"name": "master", "key": "${MASTER}", "remote": True}]
    assert got.config.remotes["gpu7"].secret == "sk-literal-${x}"
    assert set(got.translation.variables) == set(SET)
    assert "sk-o" not in got.text


def test_a_name_with_one_deployment_here_is_a_model_with_its_aliases(load):
    more = "router_settings: {model_group_alias: {x: m}}\n"
    got = load(one('{model: hosted_vllm/served, api_base: "http://127.0.0.1:8001"}', more), {})
    model = got.config.models["m"]
    assert (model.upstream_model, model.aliases, model.address.url) == ("served", ("x",), "http://127.0.0.1:8001")
    assert not got.config.virtual
    assert not got.config.remotes
    assert not got.config.remotes_for_all
    assert "remotes" not in got.text
    assert not any(note.lost for note in got.translation.notes)
    assert list(got.notes(lost=False)) == ["model_list[0]"]


def test_a_file_without_a_deployment_here(load):
    config = load(one("{model: openai/x}", "")).config
    assert not config.models
    assert config.remotes["openai"].models == {"x": "x"}


def test_without_a_master_key_requests_may_leave_as_they_did(load):
    got = load(one("{model: gpt-4o}"), {})
    assert got.config.remotes_for_all
    assert not got.config.api_keys
    assert got.written["remotes"]["openai"]["key"] == "${OPENAI_API_KEY}"  # as LiteLLM finds it


@pytest.mark.parametrize(
    ("params", "remote", "theirs"),
    [
        ("{model: gpt-4o-mini}", "openai", "gpt-4o-mini"),
        ("{model: claude-opus-4-1}", "anthropic", "claude-opus-4-1"),
        ("{model: groq/llama-3.3-70b}", "groq", "llama-3.3-70b"),
        ("{model: openrouter/qwen/qwen3}", "openrouter", "qwen/qwen3"),
        ("{model: qwen/qwen3, custom_llm_provider: openrouter}", "openrouter", "qwen/qwen3"),
        ("{model: openrouter/qwen/qwen3, custom_llm_provider: openrouter}", "openrouter", "qwen/qwen3"),
        ("{model: org/name, api_base: 'https://h.example/v1', api_key: k}", "h.example", "org/name"),
        ("{model: litellm_proxy/x, base_url: 'http://other:4000', api_key: k}", "other", "x"),
    ],
)
def test_which_endpoint_a_model_is_at(load, params, remote, theirs):
    got = load(one(params), {})
    assert {name: list(each.models.values()) for name, each in got.config.remotes.items()} == {remote: [theirs]}


def test_endpoints_are_one_remote_only_where_all_is_the_same(load):
    text = (
        "model_list:\n"
        + HERE
        + "".join(
            f"  - {{model_name: {name}, litellm_params: {{model: openai/{model}, api_key: {key}}}}}\n"
            for name, model, key in (("a", "x", "k1"), ("b", "y", "k1"), ("c", "x", "k1"), ("d", "x", "k2"))
        )
    )
    got = load(text)
    assert {name: dict(each.models) for name, each in got.config.remotes.items()} == {
        "openai": {"x": "x", "y": "y"},
        "openai-2": {"x": "x"},
    }
    assert got.config.virtual["c"].first == ("openai/x",)
    assert got.config.virtual["d"].first == ("openai-2/x",)


def here(*each: str, port: int = 8001) -> str:
    """Return a list of deployments at one engine: NAME MODEL, and other parameters."""
    deployments = (one.split(None, 2) for one in each)
    return "model_list:\n" + "".join(
        f"  - {{model_name: {name}, litellm_params: {{model: {model}, api_base: 'http://localhost:{port}/v1'}}"
        f"{''.join(more)}}}\n"
        for name, model, *more in deployments
    )


def test_one_engine_with_several_names_is_one_model(load):
    got = load(here("gpt-4o openai/served", "claude openai/served", "small hosted_vllm/served"), {})
    model = got.config.models["gpt-4o"]
    assert (list(got.config.models), model.upstream_model) == (["gpt-4o"], "served")
    assert {name: each.first for name, each in got.config.virtual.items()} == {
        "claude": ("gpt-4o",),
        "small": ("gpt-4o",),
    }
    assert not any(note.lost for note in got.translation.notes)
    assert list(got.notes(lost=False)) == ["model_list[0]"]


def test_what_its_names_say_of_one_engine_is_said_once(load):
    got = load(
        here(
            "a openai/x , model_info: {max_tokens: 4096}",
            "b openai/x , model_info: {max_tokens: 8192}",
            "c openai/x",
            "d openai/x , model_info: {max_tokens: 4096}",
        )
    )
    assert got.config.models["a"].info.context == 4096
    assert got.notes(lost=True) == {
        "model_list[1].model_info": "the same engine is there as 'a', which says otherwise"
    }


def test_an_engine_with_several_models_serves_each(load):
    """As llama-swap, LM Studio or Ollama do, each behind one address."""
    got = load(here("coding openai/coding", "chat openai/chat", "big openai/a-big-one", port=9090))
    assert {name: each.upstream_model for name, each in got.config.models.items()} == {
        "coding": "coding",
        "chat": "chat",
        "big": "a-big-one",
    }


def test_engines_that_all_run_do_not_take_turns(load):
    other = here("embedder openai/e", port=8002).partition("\n")[2]
    got = load(here("chat openai/c") + other + HERE)
    group = got.config.groups["here"]
    assert (group.models, group.together) == (("chat", "embedder", "here"), True)
    assert not load(here("chat openai/c")).config.groups


def test_settings_of_a_wrong_type_are_named_and_the_rest_is_carried_over(load):
    got = load("""
model_list:
  - model_name: m
    litellm_params: {model: openai/x, api_key: k, drop_params: [tools], timeout: 9, max_parallel_requests: 0}
    model_info: quick
router_settings: [a]
litellm_settings: {fallbacks: [{m: [{model: y}]}], set_verbose: true}
general_settings: {master_key: [k]}
""")
    assert got.config.remotes["openai"].timeouts.total == 9
    assert got.config.log_level == "debug"
    lost = got.notes(lost=True)
    assert lost["model_list[0].litellm_params.drop_params"] == "must be true or false, not a list"
    assert set(lost) == {
        "model_list[0].litellm_params.drop_params",
        "model_list[0].litellm_params.max_parallel_requests",
        "model_list[0].model_info",
        "router_settings",
        "litellm_settings.fallbacks",
        "general_settings.master_key",
    }
    assert {note.line for note in got.translation.notes} == {4, 5, 6, 7, 8}


def test_of_a_section_that_is_there_twice_the_last_counts(load):
    """To LiteLLM as to most programs; people add to a file at its end."""
    sections = "litellm_settings: {set_verbose: true}\nlitellm_settings:\n  request_timeout: 7\n"
    got = load(one("{model: openai/x, api_key: k}", sections))
    assert got.config.log_level == "info"
    assert got.config.remotes["openai"].timeouts.total == 7
    (note,) = [note for note in got.translation.notes if note.lost]
    assert (note.line, str(note)) == (
        5, "litellm_settings: not carried over: is there twice, first on line 4; keep one of them"
    )  # fmt: skip


def test_only_what_is_wrong_is_said_of_a_list(load):
    with pytest.raises(ConfigErrors) as refused:
        load("model_list:\n  - {model_name: a}\n")
    assert "at least one entry" not in str(refused.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("{model: gemini/x, api_base: 'https://h.example'}", "'gemini' has an API"),
        ("{model: brand_new/x}", "'brand_new' is not known here; if it speaks OpenAI's API"),
    ],
)
def test_why_a_provider_is_not_carried_over(load, params, said):
    assert said in load(one(params)).text.replace("\n# ", " ")


def test_fallbacks_of_each_other_are_no_circle(load):
    text = """
model_list:
  - {model_name: a, litellm_params: {model: openai/x, api_key: k}}
  - {model_name: b, litellm_params: {model: groq/y, api_key: k}}
  - {model_name: here, litellm_params: {model: ollama/x}}
litellm_settings: {fallbacks: [{a: [b]}, {b: [a]}], default_fallbacks: [a]}
"""
    got = load(text)
    assert got.config.virtual["a"].first == ("openai/x", "groq/y")
    assert got.config.virtual["b"].first == ("groq/y", "openai/x")


def test_a_name_whose_own_deployments_are_lost_is_served_by_its_fallbacks(load):
    text = """
model_list:
  - {model_name: big, litellm_params: {model: azure/gpt}}
  - {model_name: other, litellm_params: {model: bedrock/x}}
  - {model_name: small, litellm_params: {model: openai/x, api_key: k}}
litellm_settings: {fallbacks: [{big: [small]}, {nowhere: [small]}]}
router_settings: {model_group_alias: {gpt: big}}
"""
    got = load(text)
    assert {name: each.first for name, each in got.config.virtual.items()} == {
        "big": ("openai/x",),
        "small": ("openai/x",),
        "gpt": ("big",),
    }
    assert got.notes(lost=False) == {"model_list[0]": "'big' is served by its fallbacks alone"}
    assert "litellm_settings.fallbacks[0].big" not in got.notes(lost=True)
    assert "litellm_settings.fallbacks[1].nowhere" in got.notes(lost=True)


def test_an_address_in_the_environment(load):
    got = load(one("{model: openai/x, api_base: os.environ/BASE, api_key: k}"), {"BASE": "https://h.example/v1"})
    assert got.config.remotes["h.example"].url == "https://h.example:443/v1"
    with pytest.raises(ConfigErrors, match=r"litellm_params\.api_base.*BASE is not set"):
        load(one("{model: openai/x, api_base: os.environ/BASE}"), {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("[]", "must be a mapping"),
        ("model_list: []", "model_list"),
        ("models: {}", "model_list"),
        ("model_list: [{model_name: a}]", r"model_list\[0\]\.litellm_params"),
        ("model_list: [{model_name: a, litellm_params: {api_base: x}}]", r"litellm_params\.model"),
        ("model_list: 5", "model_list"),
        (one("{model: openai/x, api_base: 'ftp://x'}"), "api_base"),
        (one("{model: openai/x, api_key: k, timeout: soon}"), "not a number of seconds"),
        (one("{model: azure/x}", ""), "'azure' has an API, or a way to sign requests, of its own"),
        (one("{model: hosted_vllm/x}", ""), "where its endpoint is, is not known"),
        (
            "model_list: [{model_name: a, litellm_params: {model: [x], timeout: {}}}]",
            r"litellm_params\.model: must",
        ),
        ("model_list: [", "litellm.yaml"),
    ],
)
def test_a_file_that_cannot_be_used(load, text, said):
    with pytest.raises(ConfigErrors, match=said):
        load(text)


@pytest.mark.parametrize("provider", [name for name, each in PROVIDERS.items() if each.url is not None])
def test_each_provider_by_its_name(load, provider):
    got = load(
        one(f"{{model: {provider}/x}}"), {name: "k" for each in PROVIDERS.values() if (name := each.variable)}
    )
    config = got.config
    assert ("m" in config.models) + len(config.remotes) == 1
    url = PROVIDERS[provider].url
    assert url.startswith("https://") == bool(config.remotes)


def run(*words: object, **environ: str):
    return CliRunner().invoke(app, [str(word) for word in words], env={"NO_COLOR": "1", **SET, **environ})


def test_the_command(tmp_path):
    file, out = tmp_path / "litellm.yaml", tmp_path / "out"
    file.write_text(EVERYTHING)
    done = run("import", "litellm", file, "-o", out, "-p", "3456")
    assert done.exit_code == 1, done.output
    assert (
        f"{file}:7: model_list[0].litellm_params.rpm: not carried over: a deployment has no limit" in done.output
    )
    assert "with 2 models and 4 remotes" in done.output
    assert "not carried over: 15 settings" in done.output
    target = out / "config.yaml"
    assert target.stat().st_mode & 0o777 == 0o600  # it holds a key
    assert Config.from_file(target, environ=SET).port == 3456
    assert run("check", target).exit_code == 0
    again = run("import", "litellm", file, "-o", out)
    assert again.exit_code == 2
    assert "there already" in again.output
    assert run("import", "litellm", file, "-o", out, "--force").exit_code == 1
    assert run("import", "litellm", tmp_path / "nothing.yaml").exit_code == 2


def test_json_and_nothing_lost(tmp_path):
    file = tmp_path / "litellm.json"
    entry = {"model_name": "m", "litellm_params": {"model": "groq/x", "api_key": "k-literal"}}
    here = {"model_name": "here", "litellm_params": {"model": "ollama/x"}}
    file.write_text(json.dumps({"model_list": [entry, here]}))
    done = run("import", "litellm", file, "-o", tmp_path / "out")
    assert (done.exit_code, "not carried over" in done.output) == (0, False)
    assert (tmp_path / "out" / "config.yaml").stat().st_mode & 0o777 == 0o600


def test_an_address_is_written_as_it_is(load):
    got = load(one("{model: openai/x, api_base: 'https://h.example/${X:-', api_key: k}"))
    assert got.config.remotes["h.example"].url == "https://h.example:443/${X:-"

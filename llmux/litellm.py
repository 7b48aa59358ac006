"""Converts a configuration of LiteLLM's proxy to one of llmux.

A deployment on this machine becomes a model, whose engine LiteLLM neither starts nor stops; any other becomes a
model of a remote. A name with one deployment, which is on this machine, is that model's own name. Any other name
becomes a virtual model, which uses the ``first`` available one of its deployments, and after them those of its
fallbacks. Settings without an equivalent in llmux are listed in notes, with their lines.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from llmux.config.load import literal, read_document
from llmux.config.model_settings import LONGEST_DESCRIPTION
from llmux.config.problems import Path, Problem, explain, raise_all
from llmux.config.setting_types import Address, format_duration, is_loopback, parse_address
from llmux.llama_swap.conversion import Settings, Translation, as_yaml, comments, in_order, own_port
from llmux.llama_swap.source import Note, Part

_ENV = "os.environ/"
_VARIABLE = re.compile(r"os\.environ/([A-Za-z_][A-Za-z0-9_]*)\Z")
_MILLION = 1_000_000
_VERSION = re.compile(r"/v\d+[a-z0-9]*(?:/openai)?/?\Z")
_LOCAL = frozenset({"localhost", "0.0.0.0", "host.docker.internal"})  # noqa: S104 - recognised, not bound

_OPENAI = ("chat", "completions", "responses", "embeddings")
_CHAT = ("chat",)
_EMBEDS = ("chat", "embeddings")
_MOST = ("chat", "completions", "embeddings")


class Provider(NamedTuple):
    """An endpoint that LiteLLM knows: its address, its APIs, and the variable with its key."""

    url: str | None = None
    apis: tuple[str, ...] | None = None  # None: any
    variable: str | None = None


PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider("https://api.openai.com/v1", _OPENAI, "OPENAI_API_KEY"),
    "text-completion-openai": Provider("https://api.openai.com/v1", _OPENAI, "OPENAI_API_KEY"),
    "anthropic": Provider("https://api.anthropic.com", ("messages", "count_tokens"), "ANTHROPIC_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", ("chat", "completions"), "OPENROUTER_API_KEY"),
    "groq": Provider("https://api.groq.com/openai/v1", _CHAT, "GROQ_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", ("chat", "embeddings"), "MISTRAL_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", _CHAT, "DEEPSEEK_API_KEY"),
    "xai": Provider("https://api.x.ai/v1", _CHAT, "XAI_API_KEY"),
    "cerebras": Provider("https://api.cerebras.ai/v1", ("chat", "completions"), "CEREBRAS_API_KEY"),
    "together_ai": Provider("https://api.together.xyz/v1", _MOST, "TOGETHERAI_API_KEY"),
    "fireworks_ai": Provider("https://api.fireworks.ai/inference/v1", _MOST, "FIREWORKS_AI_API_KEY"),
    "nvidia_nim": Provider("https://integrate.api.nvidia.com/v1", _MOST, "NVIDIA_NIM_API_KEY"),
    "ollama": Provider("http://localhost:11434", None),
    "ollama_chat": Provider("http://localhost:11434", None),
    "hosted_vllm": Provider(None, None, "HOSTED_VLLM_API_KEY"),
    "lm_studio": Provider(None, None, "LM_STUDIO_API_KEY"),
    "llamafile": Provider("http://127.0.0.1:8080", None),
    "litellm_proxy": Provider(None, None, "LITELLM_PROXY_API_KEY"),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai", _EMBEDS, "GEMINI_API_KEY"),
    "cohere": Provider("https://api.cohere.ai/compatibility/v1", _EMBEDS, "COHERE_API_KEY"),
    "cohere_chat": Provider("https://api.cohere.ai/compatibility/v1", _EMBEDS, "COHERE_API_KEY"),
    "deepinfra": Provider("https://api.deepinfra.com/v1/openai", _EMBEDS, "DEEPINFRA_API_KEY"),
    "dashscope": Provider("https://dashscope.aliyuncs.com/compatible-mode/v1", _EMBEDS, "DASHSCOPE_API_KEY"),
    "featherless_ai": Provider("https://api.featherless.ai/v1", _CHAT, "FEATHERLESS_AI_API_KEY"),
    "hyperbolic": Provider("https://api.hyperbolic.xyz/v1", _CHAT, "HYPERBOLIC_API_KEY"),
    "moonshot": Provider("https://api.moonshot.ai/v1", _CHAT, "MOONSHOT_API_KEY"),
    "nebius": Provider("https://api.studio.nebius.ai/v1", _EMBEDS, "NEBIUS_API_KEY"),
    "novita": Provider("https://api.novita.ai/v3/openai", _CHAT, "NOVITA_API_KEY"),
    "sambanova": Provider("https://api.sambanova.ai/v1", _CHAT, "SAMBANOVA_API_KEY"),
    "vercel_ai_gateway": Provider("https://ai-gateway.vercel.sh/v1", _CHAT, "VERCEL_AI_GATEWAY_API_KEY"),
    "volcengine": Provider("https://ark.cn-beijing.volces.com/api/v3", _CHAT, "VOLCENGINE_API_KEY"),
    "zai": Provider("https://api.z.ai/api/paas/v4", _CHAT, "ZAI_API_KEY"),
    "custom_openai": Provider(None, _MOST),
    "openai_like": Provider(None, _MOST),
    "xinference": Provider(None, _MOST),
    "infinity": Provider(None, ("embeddings",)),
}
"""Those whose endpoints speak OpenAI's or Anthropic's API as it is."""
_BESIDE = frozenset({"gemini", "cohere", "cohere_chat"})
"""Those which speak OpenAI's API beside one of their own; LiteLLM speaks that, so their `api_base` leads to it."""
_OLLAMA = frozenset({"ollama", "ollama_chat"})
_BY_NAME = (("claude", "anthropic"), ("gpt", "openai"), ("o1", "openai"), ("o3", "openai"), ("o4", "openai"),
            ("chatgpt", "openai"), ("text-embedding", "openai"), ("deepseek", "deepseek"))  # fmt: skip


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text)]
Seconds = Annotated[float, Field(ge=0)]
Fallbacks = tuple[Mapping[str, tuple[str, ...]], ...]


class Params(Part):
    """How a deployment is reached."""

    model: Text
    api_base: Text = ""
    base_url: Text = ""
    api_key: Text = ""
    custom_llm_provider: Text = ""
    max_parallel_requests: int | None = Field(default=None, ge=1)
    timeout: Seconds | Text | None = None
    stream_timeout: Seconds | Text | None = None
    order: int | None = None
    input_cost_per_token: float | None = Field(default=None, ge=0)
    output_cost_per_token: float | None = Field(default=None, ge=0)
    cache_read_input_token_cost: float | None = Field(default=None, ge=0)
    drop_params: bool = False


class Info(Part):
    """Information about a model."""

    description: Text = ""
    max_input_tokens: int | None = None
    max_tokens: int | None = None
    supports_vision: bool = False
    supports_function_calling: bool = False
    supports_reasoning: bool = False


class Deployment(Part):
    """One way to reach a model."""

    model_name: Text
    litellm_params: Params
    model_info: Info = Field(default_factory=Info)


class Alias(Part):
    """Another name for a model, in the long form."""

    model: Text
    hidden: bool = False


class RouterSettings(Part):
    """How a deployment is chosen for a request."""

    model_group_alias: Mapping[str, Text | Alias] = Field(default_factory=dict)
    fallbacks: Fallbacks = ()
    default_fallbacks: tuple[str, ...] = ()
    timeout: Seconds | None = None


class LiteLLMSettings(Part):
    """Settings of the library."""

    fallbacks: Fallbacks = ()
    default_fallbacks: tuple[str, ...] = ()
    drop_params: bool = False
    request_timeout: Seconds | None = None
    set_verbose: bool = False
    master_key: Text = ""


class GeneralSettings(Part):
    """Settings of the proxy."""

    master_key: Text = ""


class LiteLLM(Part):
    """The whole file."""

    model_list: tuple[Deployment, ...] = Field(min_length=1)
    router_settings: RouterSettings = Field(default_factory=RouterSettings)
    litellm_settings: LiteLLMSettings = Field(default_factory=LiteLLMSettings)
    general_settings: GeneralSettings = Field(default_factory=GeneralSettings)


def translate(file: FilePath, environ: Mapping[str, str], *, port: int | None = None) -> Translation:
    """Convert LiteLLM's ``file``. llmux will listen on ``port``; None: 3000, or the next that no engine has.

    Raises:
        ConfigErrors: the file cannot be used; the message says where and why.

    """
    document = read_document(file, last_wins=True)  # as LiteLLM reads it
    problems = [problem for problem in document.problems if problem not in document.repeated]
    twice = [Note(problem.path, problem.message, line=problem.line) for problem in document.repeated]
    config: LiteLLM | None = None
    notes: list[Note] = []
    if isinstance(document.data, Mapping):
        data = {key: value for key, value in document.data.items() if value is not None}
        config, notes, more = _validate(data)
        problems += more
    elif not problems:
        problems = [Problem((), "must be a mapping: `model_list:` and other settings at the top level")]
    raise_all(problems, file=str(file), lines=document.lines)
    assert config is not None
    translator = _Translator(file, config, data, environ)
    translator.notes += [*twice, *notes]
    raise_all(translator.problems, file=str(file), lines=document.lines)
    result = translator.result
    result.settings = {"port": own_port(port, translator.addresses), **result.settings}
    result.notes = in_order(translator.notes, document.lines)
    result.variables = list(dict.fromkeys(translator.variables))
    return result


def _validate(data: dict[str, Any]) -> tuple[LiteLLM | None, list[Note], list[Problem]]:
    """Validate ``data``. LiteLLM takes a file with settings of a wrong type: they are removed, and named."""
    notes: list[Note] = []
    while True:
        try:
            return LiteLLM.model_validate(data), notes, []
        except ValidationError as error:
            problems = explain(error, LiteLLM)
        # Of a list with an invalid entry pydantic also says that it has too few.
        inner = {problem.path[:1] for problem in problems if len(problem.path) > 1}
        problems = [problem for problem in problems if problem.path not in inner]
        settings = {_setting(problem.path): problem for problem in reversed(problems)}
        if () in settings:
            return None, [], problems
        for path, problem in reversed(settings.items()):
            around: Any = data
            for part in path[:-1]:
                around = around[part]
            del around[path[-1]]
            notes.append(Note(path, problem.message))


def _setting(path: Path) -> Path:
    """Return which optional setting ``path`` is or is in; empty: none, LiteLLM does not do without."""
    if path[0] != "model_list":
        return path[:2]
    here = path[2:4]
    return () if not here or here[-1] in ("model_name", "litellm_params", "model") else path[:4]


class _Translator:
    """Converts the deployments, then the names, then the general settings."""

    def __init__(
        self, file: FilePath, config: LiteLLM, raw: Mapping[str, Any], environ: Mapping[str, str]
    ) -> None:
        self.config = config
        self.raw = raw
        self.environ = environ
        self.notes: list[Note] = []
        self.problems: list[Problem] = []
        self.variables: list[str] = []
        self.addresses: dict[str, Address] = {}
        self.engines: dict[tuple[str, str], str] = {}  # a model's address and name there → its name here
        self.result = Translation(file)
        self.prices: dict[str, Settings] = {}
        self.remotes: dict[str, Settings] = {}
        self.by_settings: dict[str, str] = {}  # a remote's settings without its models → its name
        self.models = self.result.models
        self.groups: dict[str, list[tuple[int, str]]] = defaultdict(list)  # (order, target) of each name
        self.lossy = config.litellm_settings.drop_params
        count = defaultdict[str, int](int)
        for deployment in config.model_list:
            count[deployment.model_name] += 1
        self.alone = {name for name, number in count.items() if number == 1} - set(self.fallbacks())
        for index, deployment in enumerate(config.model_list):
            self.deployment(("model_list", index), deployment, raw["model_list"][index])
        if not self.models and not self.remotes and not self.problems:
            self.problems.append(Problem(("model_list",), _NONE_HERE))
            self.problems += [Problem(note.path, note.message) for note in self.notes if note.lost]
        self.names()
        self.whole()

    # ---- deployments

    def deployment(self, at: Path, deployment: Deployment, raw: Mapping[str, Any]) -> None:
        params, name = deployment.litellm_params, deployment.model_name
        self.notes += _leftovers(at, raw, known=_DEPLOYMENT)
        self.notes += _leftovers((*at, "litellm_params"), raw["litellm_params"], known=_PARAMS, reasons=_OF_PARAMS)
        self.notes += _leftovers((*at, "model_info"), raw.get("model_info") or {}, known=_INFO)
        if "*" in name or "*" in params.model:
            self.notes.append(Note((*at, "model_name"), "a pattern; here, each model has a name of its own"))
            return
        provider, model = _provider(params)
        known = PROVIDERS.get(provider)
        if known is None or (provider in _BESIDE and (params.api_base or params.base_url)):
            place = (*at, "litellm_params", "model")
            said = _OWN_API if provider in {*_FOREIGN, *_BESIDE} else _UNKNOWN
            self.notes.append(Note(place, f"{provider!r} {said}"))
            return
        address = self.address((*at, "litellm_params"), params, known)
        if address is None:
            return
        if is_loopback(address.host) or address.host.lower() in _LOCAL:
            target = self.here(at, deployment, provider, model, address)
        else:
            target = self.there(at, deployment, provider, model, address)
        self.groups[name].append((params.order or 0, target))
        if price := _price(params):
            self.prices[target] = price

    def address(self, at: Path, params: Params, provider: Provider) -> Address | None:
        word = "base_url" if params.base_url and not params.api_base else "api_base"
        url = self.filled((*at, word), params.api_base or params.base_url) or provider.url
        if url is None:
            if not any(problem.path == (*at, word) for problem in self.problems):
                self.notes.append(Note((*at, "model"), "has no `api_base`: where its endpoint is, is not known"))
            return None
        try:
            return parse_address(url)
        except ValueError as error:
            self.problems.append(Problem((*at, word), str(error)))
            return None

    def here(self, at: Path, deployment: Deployment, provider: str, model: str, address: Address) -> str:
        """Make a deployment a model, or find the one that it is already; return its name."""
        params, name = deployment.litellm_params, deployment.model_name
        base = _VERSION.sub("", address.base_path)
        url = replace(address, host=_host(address.host), base_path=base).url
        own = self.engines.get((url, model))
        if own is None:
            own = self.free(name if name in self.alone else f"{name} here")
            self.engines[url, model] = own
            self.addresses[own] = address
            self.models[own] = {"url": url}
            if provider in _OLLAMA:
                self.models[own] |= {"hooks": "ollama", "env": {"NAME": literal(model)}}
            else:
                self.models[own] |= _HOOKS
                self.notes.append(Note(at, _UNMANAGED, lost=False))
            self.models[own]["upstream_model"] = literal(model)
        if params.max_parallel_requests:
            self.once(
                (*at, "litellm_params", "max_parallel_requests"),
                own,
                "max_in_flight",
                params.max_parallel_requests,
            )
        if info := _info(deployment.model_info):
            self.once((*at, "model_info"), own, "info", info)
        if params.api_key:
            self.notes.append(Note((*at, "litellm_params", "api_key"), _ENGINE_KEY))
        for word in ("timeout", "stream_timeout"):
            if getattr(params, word) is not None:
                self.notes.append(Note((*at, "litellm_params", word), _NO_TIMEOUT))
        return own

    def once(self, at: Path, own: str, word: str, value: Any) -> None:
        """Set what a model has, unless another of its names says otherwise."""
        if self.models[own].setdefault(word, value) != value:
            self.notes.append(Note(at, f"the same engine is there as {own!r}, which says otherwise"))

    def there(self, at: Path, deployment: Deployment, provider: str, model: str, address: Address) -> str:
        """Make a deployment a model of a remote, and return its name."""
        params = deployment.litellm_params
        settings: Settings = {"url": address.url}
        key = params.api_key
        known = PROVIDERS[provider]
        if not key and known.variable is not None and (known.url is not None or known.variable in self.environ):
            key = _ENV + known.variable
        if key:
            settings["key"] = self.secret(key)
        if known.apis is not None:
            settings["apis"] = list(known.apis)
        if params.drop_params or self.lossy:
            settings["lossy"] = True
        if timeouts := self.timeouts((*at, "litellm_params"), params):
            settings["timeouts"] = timeouts
        if params.max_parallel_requests:
            settings["max_in_flight"] = params.max_parallel_requests
        if provider not in ("anthropic", *_OLLAMA) and not _VERSION.search(address.base_path):
            self.notes.append(Note((*at, "litellm_params", "api_base"), _VERSIONED, lost=False))
        for word in deployment.model_info.model_fields_set:
            self.notes.append(Note((*at, "model_info", word), _REMOTE_INFO))
        remote = self.remote(provider, settings, address)
        models = self.remotes[remote]["models"]
        ours = next((ours for ours, theirs in models.items() if theirs == literal(model)), None)
        if ours is None:
            ours = model if model not in models else f"{model} {len(models)}"
            models[ours] = literal(model)
        return f"{remote}/{ours}"

    def remote(self, provider: str, settings: Settings, address: Address) -> str:
        """Return the name of the remote with these settings, an existing or a new one."""
        same = repr(sorted(settings.items()))
        name = self.by_settings.get(same)
        if name is None:
            known = PROVIDERS[provider].url
            of_its_own = known is None or parse_address(known) != address
            base = address.host if of_its_own else provider.removesuffix("_chat")
            base = re.sub(r"[^A-Za-z0-9._-]", "-", base).strip("-._") or "remote"
            taken = {*self.remotes}
            name = next(each for each in _numbered(base) if each not in taken)
            self.by_settings[same] = name
            self.remotes[name] = {**settings, "models": {}}
        return name

    def timeouts(self, at: Path, params: Params) -> Settings:
        found: Settings = {}
        for word, ours in (("timeout", "total"), ("stream_timeout", "first_byte")):
            value = getattr(params, word)
            if isinstance(value, str):
                value = self.filled((*at, word), value)
                try:
                    value = None if value is None else float(value)
                except ValueError:
                    self.problems.append(Problem((*at, word), f"{value!r} is not a number of seconds"))
                    value = None
            if value:
                found[ours] = format_duration(value)
        overall = self.config.router_settings.timeout or self.config.litellm_settings.request_timeout
        if overall and "total" not in found:
            found["total"] = format_duration(overall)
        return found

    # ---- names

    def fallbacks(self) -> dict[str, list[str]]:
        """Return, for each name, the names that serve its requests if it fails."""
        router, whole = self.config.router_settings, self.config.litellm_settings
        found: dict[str, list[str]] = {}
        for each in (*router.fallbacks, *whole.fallbacks):
            for name, others in each.items():
                found.setdefault(name, []).extend(others)
        default = [*router.default_fallbacks, *whole.default_fallbacks]
        for deployment in self.config.model_list if default else ():
            name = deployment.model_name
            found.setdefault(name, []).extend(other for other in default if other != name)
        return found

    def names(self) -> None:
        virtual: dict[str, Settings] = {}
        fallbacks = self.fallbacks()
        declared = {deployment.model_name for deployment in self.config.model_list}
        for name in dict.fromkeys([*self.groups, *fallbacks]):
            targets = self.groups.get(name, [])
            after = [target for other in fallbacks.get(name, ()) for target in self.in_order(other)]
            first = list(dict.fromkeys([*self.in_order(name), *after]))
            if first in ([name], []) or name not in declared:
                continue
            if not targets:
                self.notes.append(Note(self.place(name), f"{name!r} is served by its fallbacks alone", lost=False))
            if len(targets) > 1:
                self.notes.append(Note(self.place(name), _SPREAD, lost=False))
            virtual[name] = {"first": [literal(target) for target in first]}
        for place, name, others in self.missing({*self.groups, *virtual}):
            self.notes.append(Note(place, f"{name!r} or {others} is not one of the names that were carried over"))
        for alias, meant in self.config.router_settings.model_group_alias.items():
            self.alias(alias, meant if isinstance(meant, Alias) else Alias(model=meant), virtual)
        if len(self.models) > 1:
            self.result.groups = {"here": {"models": [literal(name) for name in self.models], "together": True}}
            self.notes.append(Note(("model_list",), _TOGETHER, lost=False))
        if self.remotes:
            self.result.settings["remotes"] = self.remotes
        if virtual:
            self.result.settings["virtual"] = virtual

    def in_order(self, name: str) -> list[str]:
        """Return the targets of a name; those without an ``order`` as in the file."""
        return [target for _, target in sorted(self.groups.get(name, []), key=lambda each: each[0])]

    def alias(self, alias: str, meant: Alias, virtual: dict[str, Settings]) -> None:
        at, name = ("router_settings", "model_group_alias", alias), meant.model
        if alias in self.groups or alias in self.models:
            self.notes.append(Note(at, f"{alias!r} is a model's name already, which goes first"))
        elif name not in self.groups and name not in virtual:
            self.notes.append(Note(at, f"{name!r} is not one of the names that were carried over"))
        elif name in self.models:  # its aliases are not listed, hidden or not
            self.models[name].setdefault("aliases", []).append(literal(alias))
        else:
            virtual[alias] = {"first": [literal(name)]}
            if meant.hidden:
                self.notes.append(Note((*at, "hidden"), "`/v1/models` lists all virtual models"))

    def missing(self, served: Collection[str]) -> Iterator[tuple[Path, str, str]]:
        for section in ("router_settings", "litellm_settings"):
            for index, each in enumerate(getattr(self.config, section).fallbacks):
                for name, others in each.items():
                    unknown = [other for other in others if other not in self.groups]
                    if name not in served or unknown:
                        yield (section, "fallbacks", index, name), name, ", ".join(map(repr, unknown or others))

    def place(self, name: str) -> Path:
        index = next(at for at, each in enumerate(self.config.model_list) if each.model_name == name)
        return ("model_list", index)

    def free(self, wanted: str) -> str:
        taken = {*self.models, *(set(self.groups) - self.alone)}
        return next(name for name in _numbered(wanted, " ") if name not in taken)

    # ---- general settings

    def whole(self) -> None:
        settings = self.result.settings
        key = self.config.general_settings.master_key or self.config.litellm_settings.master_key
        if key:
            said = self.secret(key)
            settings["admin_key"] = said
            settings["api_keys"] = [{"name": "master", "key": said, **({"remote": True} if self.remotes else {})}]
        elif self.remotes:
            settings["remotes_for_all"] = True
        if self.config.litellm_settings.set_verbose:
            settings["log_level"] = "debug"
        if self.prices:
            settings["prices"] = {"models": self.prices}
        for section, (known, reasons) in _SECTIONS.items():
            given = self.raw.get(section)
            if isinstance(given, Mapping):
                self.notes += _leftovers((section,), given, known=known, reasons=reasons)
        self.notes += _leftovers((), self.raw, known=_TOP, reasons=_OF_TOP)

    # ---- texts

    def secret(self, text: str) -> str:
        """Return a key as written to the file: a variable stays one."""
        found = _VARIABLE.match(text)
        if found is None:
            return literal(text)
        self.variables.append(found[1])
        return f"${{{found[1]}}}"

    def filled(self, at: Path, text: str) -> str | None:
        """Return a text, or the value of the variable that it names; None, and a problem, if that is not set."""
        found = _VARIABLE.match(text)
        if found is None:
            return text or None
        value = self.environ.get(found[1])
        if value is None:
            said = f"is {text}, and the variable {found[1]} is not set; set it for the import"
            self.problems.append(Problem(at, said))
        return value


def _provider(params: Params) -> tuple[str, str]:
    """Return the provider of a deployment, and the model's name there."""
    first, slash, rest = params.model.partition("/")
    if params.custom_llm_provider:
        own = params.custom_llm_provider
        return own, rest if slash and first == own else params.model
    if slash and (first in PROVIDERS or not (params.api_base or params.base_url)):
        return first, rest
    if params.api_base or params.base_url:
        return ("openai_like", params.model) if first not in _FOREIGN else (first, rest)
    return next((name for prefix, name in _BY_NAME if params.model.startswith(prefix)), params.model), params.model


def _host(host: str) -> str:
    return "127.0.0.1" if host.lower() in _LOCAL else host


def _price(params: Params) -> Settings:
    costs = {
        "input": params.input_cost_per_token,
        "output": params.output_cost_per_token,
        "cached": params.cache_read_input_token_cost,
    }
    return {name: round(cost * _MILLION, 6) for name, cost in costs.items() if cost is not None}


def _info(info: Info) -> Settings:
    """Return what clients are told about a model."""
    can = {
        "tools": info.supports_function_calling,
        "vision": info.supports_vision,
        "reasoning": info.supports_reasoning,
    }
    found = {
        "description": literal(info.description.strip()[:LONGEST_DESCRIPTION]),
        "context": info.max_input_tokens or info.max_tokens,
        "capabilities": [name for name, able in can.items() if able],
    }
    return {name: value for name, value in found.items() if value}


def _numbered(base: str, gap: str = "-") -> Iterator[str]:
    yield base
    number = 2
    while True:
        yield f"{base}{gap}{number}"
        number += 1


_HOOKS = {
    "wake": ":",
    "sleep": ":",
    "alive": 'curl -fsS -o /dev/null "$LLMUX_URL/v1/models"',
}
_NONE_HERE = "has no deployment that can be carried over"
_OWN_API = "has an API, or a way to sign requests, of its own"
_UNKNOWN = "is not known here; if it speaks OpenAI's API, write `openai/` and its `api_base`"
_UNMANAGED = (
    "LiteLLM neither starts nor ends its engine; nor does llmux, until you write its `wake` and `sleep` (see"
    " `llmux hooks list`)"
)
_TOGETHER = "to LiteLLM, all engines run at once; so they do in the group `here`, and take turns without it"
_REMOTE_INFO = "`/v1/models` says nothing of what a remote's model can do"
_ENGINE_KEY = "here, an engine gets the client's own key, or none; let it listen on loopback without one"
_NO_TIMEOUT = "llmux does not limit how long an engine takes to answer; a client may say `X-LLMux-Deadline`"
_VERSIONED = "there, the path goes on without a version; here, /v1 is put between"
_SPREAD = "there, requests are spread over the deployments; here, the first that can be had takes them"
_LIMITS = "a deployment has no limit of its own here; keys have, see `limits` of `api_keys` and `roles`"
_DEFAULT = "a default for a parameter; write it as a variant's `default` (see `variants`)"
_RETRIES = "each target is tried once, and clients' SDKs try again; see `first`"
_COOLDOWN = "a breaker per remote does so by itself"
_DATABASE = "keys are in the configuration here (`api_keys`, `llmux key`), and what they used in `ledger`"
_CALLBACKS = "see `ledger`, `captures`, `otlp` and `/metrics`"
_CACHE = "llmux keeps no answers"

_DEPLOYMENT = frozenset({*Deployment.model_fields})
_INFO = frozenset({*Info.model_fields, "id", "db_model", "mode", "base_model", "max_output_tokens"})
_PARAMS = frozenset({*Params.model_fields})
_OF_PARAMS = {
    **dict.fromkeys(("rpm", "tpm"), _LIMITS),
    **dict.fromkeys(("weight",), _SPREAD),
    **dict.fromkeys(("max_retries", "num_retries"), _RETRIES),
    **dict.fromkeys(("cooldown_time", "allowed_fails"), _COOLDOWN),
    **dict.fromkeys(
        ("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "frequency_penalty",
         "presence_penalty", "reasoning_effort", "thinking", "extra_body", "user", "response_format", "tools"),
        _DEFAULT,
    ),
    **dict.fromkeys(
        ("extra_headers", "headers", "organization", "api_version"), "a remote gets its key, and what clients send"
    ),
}  # fmt: skip
_FOREIGN = frozenset(
    {
        "azure", "azure_ai", "bedrock", "vertex_ai", "vertex_ai_beta", "gemini", "sagemaker", "cohere",
        "cohere_chat", "huggingface", "replicate", "watsonx", "databricks", "predibase", "vllm", "petals", "ai21",
        "nlp_cloud", "aleph_alpha", "palm", "perplexity", "deepinfra", "cloudflare", "oci", "snowflake", "github",
        "github_copilot",
    }
)  # fmt: skip
_ROUTER = frozenset({*RouterSettings.model_fields})
_OF_ROUTER = {
    "routing_strategy": _SPREAD,
    **dict.fromkeys(("num_retries", "retry_after", "retry_policy", "max_fallbacks"), _RETRIES),
    **dict.fromkeys(("allowed_fails", "cooldown_time", "disable_cooldowns", "allowed_fails_policy"), _COOLDOWN),
    **dict.fromkeys(
        ("redis_host", "redis_port", "redis_password", "redis_url"),
        "one llmux counts by itself; for several see `fleet`",
    ),
    **dict.fromkeys(
        ("context_window_fallbacks", "enable_pre_call_checks"), "see `routes`: `{when: {tokens_over: …}, to: …}`"
    ),
    **dict.fromkeys(("cache_responses", "cache_kwargs"), _CACHE),
}
_WHOLE = frozenset({*LiteLLMSettings.model_fields, "json_logs", "telemetry"})
_OF_WHOLE = {
    **dict.fromkeys(("num_retries",), _RETRIES),
    **dict.fromkeys(("callbacks", "success_callback", "failure_callback", "service_callback"), _CALLBACKS),
    **dict.fromkeys(("cache", "cache_params"), _CACHE),
    **dict.fromkeys(("max_budget", "budget_duration"), "see `budget` of `roles` and `api_keys`"),
    "context_window_fallbacks": _OF_ROUTER["context_window_fallbacks"],
}
_OF_GENERAL = {
    **dict.fromkeys(
        ("database_url", "store_model_in_db", "database_connection_pool_limit", "disable_spend_logs", "alerting"),
        _DATABASE,
    ),
}
_SECTIONS: Mapping[str, tuple[frozenset[str], Mapping[str, str]]] = {
    "router_settings": (_ROUTER, _OF_ROUTER),
    "litellm_settings": (_WHOLE, _OF_WHOLE),
    "general_settings": (frozenset(GeneralSettings.model_fields), _OF_GENERAL),
}
_TOP = frozenset({*LiteLLM.model_fields})
_OF_TOP = {
    "environment_variables": "set them in llmux's environment",
    "include": "import these files by themselves",
    "callback_settings": _CALLBACKS,
}
_NOTHING: tuple[Any, ...] = (None, False, "", {}, [])


def _leftovers(
    at: Path, given: Mapping[str, Any], *, known: frozenset[str], reasons: Mapping[str, str] | None = None
) -> Iterator[Note]:
    """Yield the settings that are not carried over."""
    for key, value in given.items():
        if key not in known and value not in _NOTHING:
            yield Note((*at, key), (reasons or {}).get(key, "llmux has no such setting"))


def page(translation: Translation) -> str:
    """Return the text of the file."""
    return "\n".join(_parts(translation))


def _parts(translation: Translation) -> Iterator[str]:
    yield comments(_head(translation))
    yield as_yaml(translation.settings)
    if translation.groups:
        yield as_yaml({"groups": translation.groups})
    if translation.models:
        yield as_yaml({"models": translation.models})


def _head(translation: Translation) -> Iterable[str]:
    yield f"Made by `llmux import litellm` from {translation.file.name}."
    yield "llmux listens on this machine only; `host: 0.0.0.0` (and `api_keys`) open it."
    if translation.variables:
        yield f"Its environment has to hold {', '.join(translation.variables)}."
    if translation.notes:
        yield ""
        yield from map(str, translation.notes)

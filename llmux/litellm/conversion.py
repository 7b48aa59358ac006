"""Converts LiteLLM's settings to llmux's: the deployments, then the names, then the general settings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from llmux.config.load import literal, read_document
from llmux.config.model_settings import LONGEST_DESCRIPTION
from llmux.config.problems import Path, Problem, raise_all
from llmux.config.setting_types import Address, format_duration, is_loopback, parse_address
from llmux.litellm.leftovers import DEPLOYMENT, INFO, OF_PARAMS, OF_TOP, PARAMS, SECTIONS, SPREAD, TOP, leftovers
from llmux.litellm.providers import BESIDE, FOREIGN, OLLAMA, PROVIDERS, Provider, provider_of
from llmux.litellm.source import Alias, Deployment, Info, LiteLLM, Params, validate
from llmux.llama_swap.conversion import Settings, Translation, as_yaml, comments, in_order, own_port
from llmux.llama_swap.source import Note

_ENV = "os.environ/"
_VARIABLE = re.compile(r"os\.environ/([A-Za-z_][A-Za-z0-9_]*)\Z")
_MILLION = 1_000_000
_VERSION = re.compile(r"/v\d+[a-z0-9]*(?:/openai)?/?\Z")
_LOCAL = frozenset({"localhost", "0.0.0.0", "host.docker.internal"})  # noqa: S104 - recognised, not bound


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
        config, notes, more = validate(data)
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
        self.notes += leftovers(at, raw, known=DEPLOYMENT)
        self.notes += leftovers((*at, "litellm_params"), raw["litellm_params"], known=PARAMS, reasons=OF_PARAMS)
        self.notes += leftovers((*at, "model_info"), raw.get("model_info") or {}, known=INFO)
        if "*" in name or "*" in params.model:
            self.notes.append(Note((*at, "model_name"), "a pattern; here, each model has a name of its own"))
            return
        provider, model = provider_of(params)
        known = PROVIDERS.get(provider)
        if known is None or (provider in BESIDE and (params.api_base or params.base_url)):
            place = (*at, "litellm_params", "model")
            said = _OWN_API if provider in {*FOREIGN, *BESIDE} else _UNKNOWN
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
            self.models[own] = {"url": literal(url)}
            if provider in OLLAMA:
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
        settings: Settings = {"url": literal(address.url)}
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
        if provider not in ("anthropic", *OLLAMA) and not _VERSION.search(address.base_path):
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
                self.notes.append(Note(self.place(name), SPREAD, lost=False))
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
        for section, (known, reasons) in SECTIONS.items():
            given = self.raw.get(section)
            if isinstance(given, Mapping):
                self.notes += leftovers((section,), given, known=known, reasons=reasons)
        self.notes += leftovers((), self.raw, known=TOP, reasons=OF_TOP)

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

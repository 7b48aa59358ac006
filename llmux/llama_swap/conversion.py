"""From llama-swap's settings to llmux's, and to a file for people to read.

With the settings that have no equivalent in llmux, and a note about each.
"""

from __future__ import annotations

import glob
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import yaml

from llmux.config.load import literal
from llmux.config.model_settings import LONGEST_DESCRIPTION, LONGEST_TITLE
from llmux.config.problems import Lines, Path, Problem, line_of, raise_all
from llmux.config.setting_types import Address, covers, format_duration, parse_address
from llmux.config.targets import FIELD
from llmux.config.yaml_document import Dumper
from llmux.llama_swap import source
from llmux.llama_swap.engine_command import Engine, text
from llmux.llama_swap.groups import Groups, Residency
from llmux.llama_swap.source import LlamaSwap, Model, Note, variables

OWN_PORT = 3000
_LOOPBACK = "127.0.0.1"
_LOG_LEVELS = {"debug": "debug", "info": "info", "warn": "warning", "error": "error"}

_LOADING = "there, words in what the model seems to think; here, comments in the stream, which keep it open"

_CHOICES = {
    "warm": ("awake", "here, a conversation stays with its model while that is awake"),
    "spillover": ("first", "there, a target gets so many requests before the next; here, until it cannot be had"),
}

Settings = dict[str, Any]


@dataclass(slots=True)
class Translation:
    """llmux's settings. ``variables`` must be set in its environment."""

    file: FilePath
    settings: Settings = field(default_factory=dict)
    models: dict[str, Settings] = field(default_factory=dict)
    groups: Groups = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)


def translate(file: FilePath, environ: Mapping[str, str], *, port: int | None = None) -> Translation:
    """Convert llama-swap's ``file``. llmux will listen on ``port``; None: 3000, or the next that no engine has.

    Raises:
        ConfigErrors: the file cannot be used; the message says where and why.

    """
    read = source.read(file, environ)
    translator = _Translator(read)
    raise_all(translator.problems, file=str(file), lines=read.lines)
    result = translator.result
    result.settings = {"port": own_port(port, translator.addresses), **_whole(read.config), **result.settings}
    result.variables = list(dict.fromkeys(variables(_all_text(read.config))))
    result.notes = in_order([*leftovers(read.raw, read.config), *translator.notes], read.lines)
    return result


class _Translator:
    """Converts the models, then the settings about them elsewhere in the file."""

    def __init__(self, read: source.Source) -> None:
        self.read = read
        self.config = read.config
        self.notes: list[Note] = []
        self.problems: list[Problem] = []
        self.addresses: dict[str, Address] = {}
        self.known: dict[str, str] = {}
        self.elsewhere: dict[str, str] = {}  # names of peers' models: their names here
        self.remotes: dict[str, Settings] = {}
        self.virtual: dict[str, Settings] = {}
        self.filtered: dict[str, str] = {}  # models whose own name changes a request: the variant that does
        self.routes: list[Settings] = []
        self.result = Translation(read.file)
        engines = {name: self.engine(name, model) for name, model in self.config.models.items()}
        found = {name: engine for name, engine in engines.items() if engine}
        self.known.update({name: name for name in found})
        for name, engine in found.items():
            self.result.models[name] = self.model(name, self.config.models[name], engine)
        if not found and not self.config.peers:
            self.problems.append(Problem(("models",), "has no model that can be carried over"))
            self.problems += [Problem(note.path, note.message) for note in self.notes if note.lost]
        self.share()
        if (level := self.config.logLevel) and _log_level(self.config) is None:
            self.notes.append(Note(("logLevel",), f"{level!r} means info, there and here", lost=False))
        if self.config.sendLoadingState:
            self.notes.append(Note(("sendLoadingState",), _LOADING, lost=False))
        if self.routes:
            self.result.settings["routes"] = self.routes
        self.peer()
        self.select()
        self.preload()
        residency = Residency(self.config, self.known)
        self.result.groups = residency.groups
        self.notes += residency.notes
        self.problems += residency.problems
        self.prioritize()

    def engine(self, name: str, model: Model) -> Engine | None:
        engine = Engine(name, model, port=self.read.ports.get(name), folder=self.read.file.absolute().parent)
        if engine.address is None:
            self.notes += engine.notes
            return None
        self.addresses[name] = engine.address
        return engine

    def model(self, name: str, model: Model, engine: Engine) -> Settings:
        at = ("models", name)
        raw = self.read.raw["models"][name]
        self.notes += model_leftovers(name, raw, loading_state=self.config.sendLoadingState)
        settings: Settings = {**engine.where}
        if model.useModelName:
            settings["upstream_model"] = literal(model.useModelName)
        aliases = self.aliases(name, model)
        variants = self.variants(name, model, aliases)
        own = f"{name}:filtered"
        if (rules := self.rules(name, model, name)) and own not in self.known:
            # No variant may have its model's name: a route leads there.
            self.known[own] = name
            self.filtered[name] = own
            variants[own] = {**rules, "unlisted": True}
            self.routes.append({"when": {"model": literal(glob.escape(name))}, "to": literal(own)})
        aliases = [alias for alias in aliases if alias not in variants]
        if aliases:
            settings["aliases"] = [literal(alias) for alias in aliases]
        if variants:
            settings["variants"] = variants
        if info := _info(model):
            settings["info"] = info
        if model.concurrencyLimit > 0:
            settings["max_in_flight"] = model.concurrencyLimit
            self.notes.append(
                Note((*at, "concurrencyLimit"), "there, more get 429; here, more wait in the queue", lost=False)
            )
        if model.ttl > 0:
            settings["idle_sleep"] = format_duration(float(model.ttl))
        elif model.ttl == 0 and self.config.globalTTL:
            settings["idle_sleep"] = None
        grace = model.unloadTimeout or self.config.unloadTimeout
        timeouts = engine.timeouts(self.config.healthCheckTimeout, grace)
        if timeouts:
            settings["timeouts"] = timeouts
        settings["env"] = engine.env(grace)
        self.notes += engine.notes
        return settings

    def aliases(self, name: str, model: Model) -> list[str]:
        by_id = ("models", name, "filters", "setParamsByID")
        places: list[tuple[Path, str]] = [
            (("models", name, "aliases", index), alias) for index, alias in enumerate(model.aliases)
        ]
        places += [((*by_id, alias), alias) for alias in model.filters.setParamsByID if alias != name]
        aliases: list[str] = []
        for place, alias in places:
            owner = self.known.get(alias)
            if not alias:
                continue  # no client can ask for it
            if alias in self.config.models:
                if alias != name:
                    self.notes.append(Note(place, f"{alias!r} is the name of a model, which goes first"))
            elif owner not in (None, name):
                self.problems.append(Problem(place, f"{alias!r} is already an alias of {owner}; keep one of them"))
            elif owner is None:
                self.known[alias] = name
                aliases.append(alias)
        return aliases

    def variants(self, name: str, model: Model, aliases: Iterable[str]) -> Settings:
        """Return the aliases that change requests, each with its rules."""
        found = {alias: self.rules(name, model, alias) for alias in aliases}
        listed = self.config.includeAliasesInList and not model.unlisted
        return {alias: rules if listed else {**rules, "unlisted": True} for alias, rules in found.items() if rules}

    def rules(self, name: str, model: Model, asked: str) -> Settings:
        """Return the changes to requests for one name of a model."""
        at, filters = ("models", name, "filters"), model.filters
        stripped = [param.strip() for param in (filters.stripParams or filters.strip_params).split(",")]
        of_its_own = filters.setParamsByID.get(asked)
        given = {**filters.setParams, **(of_its_own if isinstance(of_its_own, Mapping) else {})}
        wanted = {param: value for param, value in given.items() if param != "model"}
        away = [param for param in dict.fromkeys(stripped) if param not in ("", "model", *wanted)]
        kept, lost = _carried([*wanted, *away])
        self.notes += [
            Note(at, f"{param!r} of {asked!r} is not a field that a variant can change") for param in lost
        ]
        rules = {
            "set": {param: _literals(value) for param, value in wanted.items() if param in kept},
            "strip": [param for param in away if param in kept],
        }
        return {rule: params for rule, params in rules.items() if params}

    # ---- settings elsewhere

    def share(self) -> None:
        """Let models on one port take turns, as in llama-swap, where only one runs at a time."""
        at: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, address in self.addresses.items():
            at[(*address.endpoint, address.base_path)].append(name)
        for names in at.values():
            if len(names) > 1 and not all(self.config.models[name].useModelName for name in names):
                for name in names:
                    self.result.models[name]["shared_address"] = True

    def peer(self) -> None:
        """Make the peers remotes, and their models virtual models, where those names are free."""
        for name, peer in self.config.peers.items():
            at = ("peers", name)
            remote = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64] or "peer"
            for key in ("filters", "timeouts"):
                self.notes += peer_leftovers((*at, key), self.read.raw["peers"][name].get(key) or {})
            if not peer.models or remote in self.remotes:
                self.notes.append(
                    Note(at, "serves no model" if not peer.models else f"{remote!r} is a peer already")
                )
                continue
            try:
                parse_address(peer.proxy)
            except ValueError as error:
                self.problems.append(Problem((*at, "proxy"), str(error)))
                continue
            limits = {"connect": peer.timeouts.connect, "first_byte": peer.timeouts.responseHeader}
            timeouts = {step: format_duration(float(limit)) for step, limit in limits.items() if limit}
            settings: Settings = {"url": literal(peer.proxy)}
            if peer.apiKey:
                settings["key"] = text(peer.apiKey)
            models = {model: literal(model) for model in peer.models}
            self.remotes[remote] = {**settings, "models": models, "timeouts": timeouts}
            for index, model in enumerate(peer.models):
                self.elsewhere[f"{name}/{model}"] = target = f"{remote}/{model}"
                if model in self.known or model in self.elsewhere:
                    self.notes.append(
                        Note((*at, "models", index), f"{model!r} is served already, which goes first")
                    )
                else:
                    self.elsewhere[model] = model
                    self.virtual[model] = {"first": [literal(target)]}
        if self.remotes:
            self.result.settings["remotes"] = self.remotes
            if not self.config.apiKeys:
                self.result.settings["remotes_for_all"] = True

    def select(self) -> None:
        for name, selector in self.config.selectors.items():
            at = ("selectors", name)
            targets = [
                self.filtered.get(each, each) if each in self.known else self.elsewhere.get(each)
                for each in selector.targets
            ]
            chosen = [literal(each) for each in dict.fromkeys(targets) if each is not None]
            if name in self.known or name in self.elsewhere:
                continue
            if selector.strategy == "pin" and targets and targets[0] is not None:
                self.pin(name, targets[0])
            elif selector.strategy in _CHOICES and targets and None not in targets:
                kind, note = _CHOICES[selector.strategy]
                self.virtual[name] = {kind: chosen}
                self.notes.append(Note(at, note, lost=False))
            elif selector.strategy not in ("pin", *_CHOICES):
                self.notes.append(Note(at, f"{selector.strategy!r} is not known here; see `virtual`"))
            else:
                self.notes.append(Note(at, "one of its targets is not carried over"))
        if self.virtual:
            self.result.settings["virtual"] = self.virtual

    def pin(self, name: str, target: str) -> None:
        """Make a selector's name mean its first target."""
        model = self.known.get(target)
        if model is None or target in self.result.models[model].get("variants", {}):
            self.virtual[name] = {"first": [literal(target)]}
        else:
            self.known[name] = model
            self.result.models[model].setdefault("aliases", []).append(literal(name))

    def preload(self) -> None:
        for index, name in enumerate(self.config.hooks.on_startup.preload):
            at = ("hooks", "on_startup", "preload", index)
            model = self.known.get(name.strip())
            if model is None:
                self.notes.append(Note(at, f"{name!r} is not one of the models"))
            else:
                self.result.models[model]["preload"] = True

    def prioritize(self) -> None:
        scheduler = self.config.routing.scheduler
        at = ("routing", "scheduler", "settings", "fifo", "priority")
        if scheduler.use != "fifo":
            self.notes.append(Note((*at[:2], "use"), f"{scheduler.use!r} is not known here; see `policy`"))
        priorities: dict[str, int] = {}
        for name, number in scheduler.settings.fifo.priority.items():
            model = self.known.get(name)
            if model is None:
                self.notes.append(Note((*at, name), f"{name!r} is not one of the models"))
            else:
                priorities[model] = number
        if any(priorities.values()):
            options = {"priorities": priorities, "default": 0}
            self.result.settings["policy"] = {"use": "priority", "options": options}
            self.notes.append(
                Note(at, "there, strictly; here, a waiter's priority grows by 1 every 30 s (`ageing`)", lost=False)
            )


def _carried(params: Iterable[str]) -> tuple[set[str], list[str]]:
    """Return the fields that rules can name, and those that they cannot, or which are part of another."""
    kept: set[str] = set()
    lost: list[str] = []
    for param in sorted(params, key=lambda param: param.count(".")):
        within = any(param.startswith(f"{other}.") for other in kept)
        if FIELD.match(param) and not within:
            kept.add(param)
        else:
            lost.append(param)
    return kept, lost


def _literals(value: Any) -> Any:
    """Escape the texts in a value so that nothing in them is filled in."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, Mapping):
        return {key: _literals(inner) for key, inner in value.items()}
    return [_literals(inner) for inner in value] if isinstance(value, list) else value


# As llama-swap derives them from the kinds of input and output.
_ABILITIES = (
    ("vision", "image", "text"),
    ("transcription", "audio", "text"),
    ("speech", "text", "audio"),
    ("images", "text", "image"),
    ("image_edit", "image", "image"),
)


def _info(model: Model) -> Settings:
    """Return what clients are told about a model."""
    can = model.capabilities
    # It calls a model with image input a vision model, whatever its output.
    gives = can.out or ("text",)
    found = [ability for ability, takes, out in _ABILITIES if takes in can.takes and out in gives]
    found = (["tools"] if can.tools else []) + found + (["rerank"] if can.reranker else [])
    info = {
        "name": literal(model.name.strip()[:LONGEST_TITLE]),
        "description": literal(model.description.strip()[:LONGEST_DESCRIPTION]),
        "context": can.context,
        "capabilities": found,
        "unlisted": model.unlisted,
    }
    return {name: value for name, value in info.items() if value}


def _log_level(config: LlamaSwap) -> str | None:
    return _LOG_LEVELS.get(config.logLevel.strip().lower())


def _whole(config: LlamaSwap) -> Settings:
    settings: Settings = {}
    if config.globalTTL:
        settings["idle_sleep"] = format_duration(float(config.globalTTL))
    if level := _log_level(config):
        settings["log_level"] = level
    if config.logRequests:
        settings["access_log"] = True
    if config.sendLoadingState:
        settings["progress"] = True
    if config.includeAliasesInList:
        settings["list_aliases"] = True
    if config.apiKeys:
        keys = [text(key) for key in config.apiKeys]
        settings["api_keys"] = [{"key": key, "remote": True} for key in keys] if config.peers else keys
    return settings


def own_port(wanted: int | None, addresses: Mapping[str, Address]) -> int:
    """Return llmux's own port: the one ``wanted``, else the first from 3000 on that no engine has."""
    taken = {address.port for address in addresses.values() if covers(_LOOPBACK, address.host)}
    if wanted is not None:
        return wanted
    return next(port for port in range(OWN_PORT, OWN_PORT + len(taken) + 1) if port not in taken)


def _all_text(config: LlamaSwap) -> str:
    used = [piece for model in config.models.values() for piece in (model.cmd, model.cmdStop, *model.env)]
    return "\n".join([*used, *config.apiKeys, *(peer.apiKey for peer in config.peers.values())])


def in_order(notes: list[Note], lines: Lines) -> list[Note]:
    """Return notes with their lines in the file, in the order of these."""
    located = [replace(note, line=note.line or line_of(note.path, lines)) for note in notes]
    return sorted(located, key=lambda note: note.line or 0)


_LIST = "`/v1/models` shows a model's name here, its state, and its `info`"
_TIMEOUTS = "llmux does not limit how long an engine takes to answer"
_PROGRESS = "`progress` is for all models, for a key, or for one request (`X-LLMux-Progress`)"

_UNKNOWN = "is an unknown setting of llama-swap"
# Values without effect: no note is needed.
_NOTHING: tuple[Any, ...] = (None, False, 0, "", {}, [])
_MODEL = {
    "metadata": _LIST,
    "timeouts": _TIMEOUTS,
    "compat": "a WebSocket wakes its model, and keeps it awake while it is open",
}
_GLOBAL = {
    "logTimeFormat": "log lines carry the time as ISO 8601",
    "logToStdout": "the log goes to stderr; what an engine prints goes to its own file, named in hooks/process.sh",
    "metricsMaxInMemory": "see `record` for what is kept of requests, and `/metrics`",
    "captureBuffer": "llmux keeps no prompts and no answers",
    "store": "see `record` for a file with a line for each request",
    "ui": "llmux's page is of its own",
    "performance": "see `/metrics`; for the GPU itself use a GPU exporter",
    "profiles": "a name leads to the same model always; change `aliases` and send HUP",
    "upstream": "what reaches an engine is told by `forward`; `/upstream/MODEL/` is for operators",
}
_DEFAULTS = {"logToStdout": ("proxy",), "captureBuffer": (5,), "metricsMaxInMemory": (1000,)}
_KNOWN_MODEL = frozenset({*Model.model_fields, *_MODEL, "macros", "sendLoadingState"})
_KNOWN = frozenset({*LlamaSwap.model_fields, *_GLOBAL, "macros"})


def leftovers(raw: Mapping[str, Any], config: source.LlamaSwap) -> Iterator[Note]:
    """Yield the settings at the top level, and within its sections, that are not carried over."""
    yield from _named((), raw, _GLOBAL, _KNOWN)
    for path in source.unknown_within(config):
        told = path[0] == "selectors" or (path[0] == "peers" and path[-1] in _PEER)  # each with its own reason
        if not told:
            yield Note(path, _UNKNOWN)


def model_leftovers(name: str, model: Mapping[str, Any], *, loading_state: bool) -> Iterator[Note]:
    """Yield a model's settings that are not carried over; ``loading_state`` is that of the whole file."""
    at = ("models", name)
    if model.get("sendLoadingState", loading_state) not in (None, loading_state):
        yield Note((*at, "sendLoadingState"), _PROGRESS)
    yield from _named(at, model, _MODEL, _KNOWN_MODEL)
    if name == "comfyui_auto":
        yield Note(at, "the path `/comfyui`; use `/upstream/comfyui_auto/`", lost=True)


_PEER = {
    **dict.fromkeys(
        ("stripParams", "strip_params", "setParams", "setParamsByID"), "a remote's requests stay as they are"
    ),
    **dict.fromkeys(("keepalive", "tlsHandshake", "idleConn"), "see `timeouts` of a remote"),
}
_PEER_DEFAULTS = {"keepalive": (30,), "tlsHandshake": (10,), "idleConn": (90,)}


def peer_leftovers(at: Path, settings: Mapping[str, Any]) -> Iterator[Note]:
    """Yield a peer's settings, in one of its mappings, that are not carried over."""
    for key, value in settings.items():
        if key in _PEER and value not in _NOTHING and value not in _PEER_DEFAULTS.get(key, ()):
            yield Note((*at, key), _PEER[key])


def _named(
    at: Path, settings: Mapping[str, Any], reasons: Mapping[str, str], known: frozenset[str]
) -> Iterator[Note]:
    for key, value in settings.items():
        if key in reasons and value not in _NOTHING and value not in _DEFAULTS.get(key, ()):
            yield Note((*at, key), reasons[key])
        elif key not in known and not key.startswith("x-"):
            yield Note((*at, key), _UNKNOWN)


WIDTH = 115
SCRIPT = "process"
"""The name of the hook script that starts and ends what llama-swap did."""

_ORDER = (
    "port", "url", "upstream_model", "aliases", "variants", "info", "shared_address", "max_in_flight",
    "idle_sleep", "preload", "timeouts", "env",
)  # fmt: skip
_HOOKS = f"""\
x-hooks: &hooks
  wake: ./hooks/{SCRIPT}.sh wake
  sleep: ./hooks/{SCRIPT}.sh sleep
  alive: ./hooks/{SCRIPT}.sh alive
  stop: ./hooks/{SCRIPT}.sh stop
"""
_POLICY = """\
# As llama-swap switches: when the awake model is idle. Without this line llmux's default decides: `adaptive`
# weighs what waits against what a switch costs; `llmux simulate` compares them.
policy: {use: idle}
"""


class _Dumper(Dumper):
    """Writes texts of several lines as blocks, and indents lists within mappings."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 (its signature)
        return super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    lines = "\n" in value and value.replace("\n", "").replace("\t", "").isprintable()
    style = "|" if lines else None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def page(translation: Translation) -> str:
    """Return the text of the file."""
    return "\n".join(_parts(translation))


def _parts(translation: Translation) -> Iterator[str]:
    yield comments(_head(translation))
    yield as_yaml(translation.settings)
    if "policy" not in translation.settings:
        yield _POLICY
    if translation.groups:
        said = [note for note in translation.notes if _place(note, translation) == "groups"]
        yield comments(map(str, said)) + as_yaml({"groups": translation.groups})
    if translation.models:
        yield _HOOKS
        yield "models:\n" + "\n".join(
            textwrap.indent(_model(name, settings, translation.notes), "  ")
            for name, settings in translation.models.items()
        )


def _head(translation: Translation) -> Iterator[str]:
    yield f"Made by `llmux import llama-swap` from {translation.file.name}."
    yield (
        "llmux listens on this machine only; `host: 0.0.0.0` (and `api_keys`) open it. llama-swap's own address"
        " is not in its file."
    )
    if translation.variables:
        yield f"Its environment has to hold {', '.join(translation.variables)}."
    elsewhere = [note for note in translation.notes if _place(note, translation) == "head"]
    if elsewhere:
        yield ""
        yield from map(str, elsewhere)


def _place(note: Note, translation: Translation) -> str:
    """Return where a note belongs: with its model, with the groups, or at the top."""
    section, *rest = note.path
    if section == "models" and rest and rest[0] in translation.models:
        return "models"
    return "groups" if translation.groups and section in ("groups", "matrix", "routing") else "head"


def _model(name: str, settings: Settings, notes: Iterable[Note]) -> str:
    mine = [str(replace(note, path=note.path[2:])) for note in notes if note.path[:2] == ("models", name)]
    ordered = {key: settings[key] for key in _ORDER if key in settings}
    key = as_yaml({name: 0}).rpartition(":")[0]
    body = textwrap.indent(f"<<: *hooks\n{as_yaml(ordered)}", "  ")
    return f"{comments(mine)}{key}:\n{body}"


def comments(lines: Iterable[str]) -> str:
    """Format lines as comments."""
    return "".join(_comment(lines))


def _comment(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        # Unprintable characters, such as line breaks, must not end the comment.
        plain = "".join(character if character.isprintable() else "?" for character in line)
        for piece in textwrap.wrap(plain, WIDTH - 10, break_long_words=False, break_on_hyphens=False) or [""]:
            yield f"# {piece}".rstrip() + "\n"


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Format settings as YAML; empty without any."""
    if not settings:
        return ""
    written: str = yaml.dump(
        dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
    return written

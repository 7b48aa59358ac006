"""A configuration for the models chosen, as a file with comments."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from llmux.config.load import literal, parse_yaml
from llmux.config.yaml_document import Dumper
from llmux.core.spec import HookKind
from llmux.survey.host import HOST, Machine
from llmux.survey.model_files import Candidate, gibibytes

FIRST_PORT = 8001
_USED = re.compile(r"\./hooks/([\w-]+)\.sh")
_HOOKS = tuple(kind.value for kind in HookKind)
REQUIRED = frozenset({HookKind.WAKE.value, HookKind.SLEEP.value, HookKind.ALIVE.value})
_KEPT = ("shared_address", "levels")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to use a hook script, from the example in its first lines: its hooks, and its variables."""

    hooks: Mapping[str, str]
    told: str
    port: int | None
    settings: Mapping[str, Any]
    verify: str = ""

    @classmethod
    def of(cls, example: str) -> Recipe | None:
        """Read an example of a configuration; None if it has no engine."""
        document = parse_yaml(example)
        models = document.data.get("models") if isinstance(document.data, Mapping) else None
        if document.problems or not models:
            return None
        model: dict[str, Any] = next(iter(models.values()))
        env = model.get("env") or {}
        hooks = {kind: model[kind] for kind in _HOOKS if kind in model}
        if not set(hooks) >= REQUIRED or not env:
            return None
        verify = hooks.pop("verify", "")
        if not verify or _USED.findall(verify) == _USED.findall(hooks["wake"]):
            hooks |= {"verify": verify} if verify else {}
            verify = ""
        settings = {key: model[key] for key in _KEPT if key in model}
        told = next(iter(env))
        # A script that takes the NAME of a model is for a server that runs all the time.
        return cls(hooks, told, model.get("port") if told == "NAME" else None, settings, verify)

    @property
    def short(self) -> dict[str, str]:
        """The hooks as written: in one line, for those that are one script called with the hook's name."""
        script = self.hooks["wake"].removesuffix(f" {HookKind.WAKE}")
        rest = {kind: text for kind, text in self.hooks.items() if text != f"{script} {kind}"}
        if len(script.split()) != 1 or not rest.keys().isdisjoint(REQUIRED):
            return dict(self.hooks)
        return {"hooks": script} | rest

    @property
    def stays(self) -> bool:
        """Whether it is for a server that runs all the time, on a port of its own."""
        return self.port is not None


class Draft:
    """The text of a configuration, and the scripts that it needs."""

    def __init__(
        self,
        chosen: Iterable[Candidate],
        recipes: Mapping[str, Recipe],
        machine: Machine,
        *,
        port: int,
        left: Iterable[str] = (),
        taken: Collection[int] = (),
    ) -> None:
        """Take the choice; ``taken`` are ports that engines may not use."""
        self.chosen = list(chosen)
        self.recipes = recipes
        self.machine = machine
        self.port = port
        self.left = list(left)
        self.explained: set[str] = set()
        fixed = {one.port or recipes[one.script].port for one in self.chosen}
        self.taken = {port, *taken, *(number for number in fixed if number)}

    @property
    def scripts(self) -> list[str]:
        """Every script in the text, even in comments: so uncommenting a line is enough."""
        return sorted(set(_USED.findall(self.text)))

    @cached_property
    def text(self) -> str:
        """The file."""
        ports = (port for port in range(FIRST_PORT, 65536) if port not in self.taken and is_free(port))
        models = [self._model(one, ports) for one in self.chosen]
        return "\n".join([self._head(), "models:\n" + "\n".join(models)])

    def _head(self) -> str:
        lines = [
            "# Made by `llmux init`. All settings are in REFERENCE.md; `llmux schema` prints them for an editor.",
            "",
            f"port: {self.port}",
            "# Only this machine reaches llmux. To open it, make a key with `llmux key new`, and give",
            "# host: 0.0.0.0",
            "# api_keys: […]",
            "",
            *self._memory(),
            "",
            "# Put a model to sleep that no request has asked for in this time:",
            "# idle_sleep: 10m",
            "",
            "# When to switch: see `policy` in REFERENCE.md.",
            "# policy: {use: adaptive, max_wait: 10m}",
        ]
        if self.left:
            lines += ["", "# Found, but not used:", *(f"# - {_plain(what)}" for what in self.left)]
        return "\n".join(lines) + "\n"

    def _memory(self) -> Iterator[str]:
        gpus = self.machine.gpus
        if not gpus:
            yield "# One model is awake at a time. To have those awake together that fit, say what there is and"
            yield "# what each takes: `capacity: 24GiB` here, and `memory: 6GiB` for every model."
            return
        for gpu in gpus:
            yield f"# GPU {gpu.index}: {_plain(gpu.name)}, {gibibytes(gpu.memory)}"
        yield "# One model is awake at a time. To have those awake together that fit, say what each takes, as"
        yield "# `memory: 6GiB`, and what there is:"
        if len(gpus) == 1:
            yield f"# capacity: {gpus[0].memory // 2**30}GiB"
        else:
            sizes = ", ".join(f"{gpu.index}: {gpu.memory // 2**30}GiB" for gpu in gpus)
            yield f"# gpus: {{{sizes}}}   # and for each model `gpus: [{gpus[0].index}]`"

    def _model(self, one: Candidate, ports: Iterator[int]) -> str:
        recipe = self.recipes[one.script]
        settings: dict[str, Any] = {"port": one.port or recipe.port or next(ports)}
        if recipe.stays:
            settings["upstream_model"] = literal(one.source)
        settings |= recipe.settings
        settings |= recipe.short
        env = ({recipe.told: one.source} if one.source else {}) | one.env
        lines = [f"# {_plain(text)}" for text in (one.about, one.remark) if text]
        if one.script not in self.explained:
            self.explained.add(one.script)
            lines += self._explanation(one.script)
        lines.append(f"{_scalar(one.name)}:")
        lines += [f"  {key}: {_scalar(value)}" for key, value in settings.items()]
        if recipe.verify and self.machine.gpus:
            lines.append(f"  # verify: {recipe.verify}   # is the memory really free? See its first lines")
        if env:
            lines += ["  env:", *(f"    {name}: {_scalar(literal(text))}" for name, text in env.items())]
        return "".join(f"  {line}\n" for line in lines)

    def _explanation(self, script: str) -> Iterator[str]:
        yield f"# hooks/{script}.sh says in its first lines what else `env` may hold"
        if script == "llama-cpp" and "llama-server" not in self.machine.programs:
            yield "# llama-server is not on the PATH: say where it is with LLAMA_SERVER"


def is_free(port: int) -> bool:
    """Return whether llmux, or an engine, could listen on a port of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
    return True


def _scalar(value: Any) -> str:
    """Write one value on one line."""
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(text: str) -> str:
    """Keep a comment on one line, whatever a file is called."""
    return "".join(character if character.isprintable() else "?" for character in text)

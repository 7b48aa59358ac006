"""The tree of commands. Without a command llmux serves, as llmux 2.x did.

Each command is imported when it is run: most need a fraction of llmux, and `llmux --version`, `status` or a
completion must start faster than a server. They do not import pydantic either, which typer needs only for values
that are not plain: see `_Plain`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from llmux.cli.options import ConfigOption, PortOption, VerboseOption
from llmux.cli.terminal import usable_streams
from llmux.version import __version__

GARBAGE_AT = 50_000  # new objects; serving sets its own

COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("serve:serve", "Run llmux until TERM or INT; HUP reads the configuration again."),
    "check": (
        "check:check",
        "Check a configuration, its policy included; print what it means, or what is wrong with it.",
    ),
    "schema": ("check:schema", "Print the JSON schema of the configuration."),
    "status": ("status:status", "Show which models hold the GPU, what waits, and what stands in the way."),
    "top": (
        "status:top",
        "Show what each model does now: answers and tokens a second, queues, the GPUs' memory and load.",
    ),
    "requests": (
        "status:requests",
        "Show the last requests: their model, wait, first byte, tokens, status and id; the newest last.",
    ),
    "activity": (
        "keys:activity",
        "Show the last requests with the key that sent each, and with -f those that end from now on.",
    ),
    "usage": (
        "keys:usage",
        "Show what each key used: requests, tokens, times and cost by key, model, day or hour, out of the ledger.",
    ),
    "logs": (
        "status:logs",
        "Show what hooks print, of one model or of all: the last lines, and with -f what they do from now on.",
    ),
    "switch": ("operate:switch", "Wake a model whether or not requests wait for it; return when it is awake."),
    "wake": (
        "operate:wake",
        "Have a model woken, whether or not requests wait for it; return at once (switch waits).",
    ),
    "sleep": (
        "operate:sleep",
        "Put a model to sleep once its answers have ended; return when it sleeps. With --all, every one.",
    ),
    "pin": (
        "operate:pin",
        "Keep a model awake, waking it if need be; models that cannot be awake beside it get 503 meanwhile.",
    ),
    "unpin": ("operate:unpin", "End the pin of a model."),
    "reset": (
        "operate:reset",
        "Report a model as repaired: its failures are forgotten; faulted or lost, it counts as asleep.",
    ),
    "cancel": ("operate:cancel", "End one request, whether it waits or is being answered."),
    "lease": ("operate:lease", "Put all models to sleep, and keep them asleep: the GPU is for another job."),
    "release": ("operate:release", "Give the leased GPU back."),
    "manual": ("operate:manual", "Leave all switching to operators, or to the policy again."),
    "simulate": (
        "simulate:run",
        "Replay traffic under several policies in virtual time, and recommend one.",
    ),
    "explain": (
        "explain:run",
        "Explain the last switches, with their reasons, and what holds now.",
    ),
    "gateway": (
        "serve:gateway",
        "Place requests on many hosts, each an llmux with a GPU of its own, until TERM or INT; HUP reloads.",
    ),
    "fleet": ("fleet:app", "The hosts behind a running gateway: look at them, drain one, take it back."),
    "init": (
        "init:run",
        "Look at this machine and write config.yaml, with comments, and the hook scripts that it needs.",
    ),
    "hooks": ("hooks:app", "The hook scripts that come with llmux."),
    "key": ("keys:app", "Keys for clients and operators, and their hashes."),
    "import": ("importing:app", "Write a configuration from that of another proxy."),
}
"""By name: the module in this package and in it a function, or the app of a group of commands; and its help in
short, which lists it without importing it."""


class _Plain:
    """Replaces the way in which typer converts a parameter's value: handles valid values and paths itself."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value in the parameter's type."""
        wanted, single = param.type_descriptor.annotation, not param.multiple and param.nargs == 1
        if single and value is None:
            return None
        if single and param.type_descriptor.parameter_info.parser is None:
            if type(value) is wanted:
                return value
            if wanted is Path and isinstance(value, str):
                return Path(value)
        param._runtime_param = None  # noqa: SLF001 - typer makes its own
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


def _plain(parameters: list[Any]) -> list[Any]:
    """Convert parameters without pydantic, which typer would use to convert their values."""
    for parameter in parameters:
        if getattr(parameter, "_runtime_param", parameter) is None:
            parameter._runtime_param = _Plain()  # noqa: SLF001 - a release of typer without it goes its own way
    return parameters


class Command(TyperCommand):
    """One command, which imports pydantic only for values that are not plain."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options and arguments, with those that typer has added."""
        return _plain(super().get_params(ctx))


def _without_plugins() -> None:
    """Keep pydantic from searching all packages for plugins, which takes longer than Python takes to start."""
    loader = ModuleType("pydantic.plugin._loader")
    vars(loader)["get_plugins"] = tuple
    sys.modules.setdefault(loader.__name__, loader)


@functools.cache
def _made(name: str, found: Any) -> Any:
    """Make a command of its function, or of an application: once, for a process that runs many."""
    alone = typer.Typer(add_completion=False)
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=name)
    else:
        alone.command(name, cls=Command)(found)
    return get_group(alone).commands[name]


class _Imported(Mapping[str, Any]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = COMMANDS[name][0].partition(":")
        if module == "check":
            _without_plugins()
        return _made(name, getattr(import_module(f"llmux.cli.{module}"), attribute))

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """The root: its commands are listed from the table, and imported when they are run or completed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = cast("dict[str, Any]", _Imported())

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, with those that typer has added."""
        return _plain(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the base class's signature
        """Return the names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the base class's signature
        """Return the placeholder of a command in a list."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command itself."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and self.commands[listed.name or ""], rest


app = typer.Typer(
    cls=Commands,
    help="One GPU, many models, one OpenAI- and Anthropic-compatible endpoint.",
    add_completion=True,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmux {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    config: ConfigOption = None,
    port: PortOption = None,
    verbose: VerboseOption = False,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One GPU, many models, one OpenAI- and Anthropic-compatible endpoint."""
    context.obj = (config, port, verbose)
    if context.invoked_subcommand is None:
        from llmux.cli import serve  # noqa: PLC0415 - all of llmux

        serve.run(config, port, verbose=verbose)


def _in_utf8() -> None:
    """Start anew in UTF-8 mode if files' names, and hooks, have another encoding: a configuration's are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - itself


def main() -> None:
    """Run the command line."""
    _in_utf8()
    if "LLMUX_HOOK" in os.environ:
        os.environ.pop("LLMUX_URL", None)  # in a hook, and in an engine that it has started, this is the engine's
    # A command that ends soon makes little garbage: collecting it, at the exit too, took a seventh of its time.
    gc.set_threshold(GARBAGE_AT, 10, 10)
    atexit.register(gc.freeze)
    with usable_streams():
        app(prog_name="llmux")

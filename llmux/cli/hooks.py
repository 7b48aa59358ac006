"""``llmux hooks``: the hook scripts that come with llmux, and tests of a model's hooks.

A script reads the functions that it shares with others from ``lib/`` beside it. A copy contains them, so that it
needs no other file.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from llmux.cli.terminal import Exit, fail, terminal
from llmux.config import Config
from llmux.config.model_settings import hook_folder
from llmux.errors import LLMuxError

if TYPE_CHECKING:
    from llmux.cli.hook_check import HookCheck, Step

# ruff: noqa: PLC0415 - most commands need no server

EXECUTABLE = 0o755

_LIBRARY = re.compile(r'^lib=.*?^}\n((?:\. "\$lib/[a-z]+\.sh"\n)+)', re.MULTILINE | re.DOTALL)
_PART = re.compile(r"/([a-z]+\.sh)")
# As in the library: on one line, or up to a brace at the beginning of one.
_FUNCTION = re.compile(r"^(\w+)\(\) \{(?:.*\}(?: #.*)?| #.*\n(?:.*\n)*?\}|\n(?:.*\n)*?\})\n\n?", re.MULTILINE)


class HookScriptError(LLMuxError):
    """A script does not exist, or cannot be copied."""


@dataclass(frozen=True, slots=True)
class HookScript:
    """One script. Its summary and its example are in its first lines."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        """The script as a complete file: with the parts of the library that it uses.

        Raises:
            HookScriptError: a part is missing, or cannot be read.

        """
        try:
            return complete(self.path)
        except OSError as error:
            raise HookScriptError(f"{error.filename} cannot be read: {error.strerror}") from None

    @property
    def summary(self) -> str:
        """Its purpose, in a sentence."""
        header = self._header()
        paragraph = " ".join(line.removeprefix("# ") for line in header[: header.index("#")])
        return re.split(r"(?<=[.?]) ", paragraph)[0]

    @property
    def example(self) -> str:
        """The lines of a configuration that use it, from its header, beginning with ``models:``."""
        lines = self._header()
        begin = lines.index("#   models:")
        end = lines.index("#", begin)
        return "\n".join(line.removeprefix("#   ") for line in lines[begin:end])

    @property
    def others(self) -> list[str]:
        """The names of other scripts in these lines."""
        return sorted(set(re.findall(r"\./hooks/([a-z-]+)\.sh", self.example)) - {self.name})

    def example_in(self, folder: Path) -> str:
        """Return these lines for a copy in a folder other than ``hooks``."""
        outside = folder.is_absolute() or folder.parts[:1] == ("..",)
        place = str(folder) if outside else "/".join((".", *folder.parts))

        def moved(line: re.Match[str]) -> str:
            key, script, rest = line.groups()
            path = f"{place.removesuffix('/')}/{script}"
            command = f"{shlex.quote(path)}{rest}"
            return key + (command if shlex.quote(path) == path else json.dumps(command, ensure_ascii=False))

        return re.sub(r"(?m)^( +[a-z]+: +)\./hooks/(\S+)(.*)$", moved, self.example)

    def _header(self) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines()[1:]
        end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        return lines[:end]


def shipped() -> dict[str, HookScript]:
    """Return the scripts by name, sorted."""
    files = sorted(hook_folder().glob("*.sh"), key=lambda file: file.stem)
    return {file.stem: HookScript(file.stem, file) for file in files}


def complete(path: Path) -> str:
    """Return the text of a script, with the functions of ``lib/`` that it uses inserted."""
    text = path.read_text(encoding="utf-8")
    found = _LIBRARY.search(text)
    if found is None:
        return text
    own = text[: found.start()] + text[found.end() :]
    parts = [(path.parent / "lib" / name).read_text(encoding="utf-8") for name in _PART.findall(found[1])]
    library = "\n".join(part.partition("\n")[2] for part in parts)  # without shellcheck's line
    return text[: found.start()] + _used(library, own) + text[found.end() :]


def _used(library: str, script: str) -> str:
    # Without functions that neither the script nor another function which it needs uses.
    functions = {found[1]: found[0] for found in _FUNCTION.finditer(library)}
    needed: set[str] = set()
    pending = [script, _FUNCTION.sub("", library)]
    while pending:
        named = functions.keys() & set(re.findall(r"\w+", pending.pop())) - needed
        needed |= named
        pending += [functions[name] for name in named]
    kept = _FUNCTION.sub(lambda found: found[0] if found[1] in needed else "", library)
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n") + "\n"


def find(name: str) -> HookScript:
    """Return a script by its name, with or without ``.sh``; HookScriptError lists the names that exist."""
    scripts = shipped()
    found = scripts.get(name.removesuffix(".sh"))
    if found is None:
        near = difflib.get_close_matches(name, scripts, n=1)
        mean = f" (did you mean {near[0]}?)" if near else ""
        raise HookScriptError(f"there is no hook script {name!r}{mean}; known: {', '.join(scripts)}")
    return found


def copy(name: str, folder: Path, *, force: bool = False) -> Path:
    """Copy a script into a folder, which is created if need be, and return its path there.

    If the script itself is already there, as in llmux's own folder, it stays. HookScriptError if there is none of
    that name, if another file is in its place (unless ``force``), or if it cannot be written.
    """
    script = find(name)
    target = folder / script.path.name
    content = script.text.encode()
    try:
        if target.exists() and target.samefile(script.path):
            return target
        if target.exists() and target.read_bytes() != content and not force:
            raise HookScriptError(f"{target} exists and differs: move it away, or replace it with --force")
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(EXECUTABLE)
    except OSError as error:
        raise HookScriptError(f"{target} cannot be written: {error.strerror}") from None
    return target


app = typer.Typer(help="The hook scripts that come with llmux.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The script's name, as `llmux hooks list` shows it.")]


@app.command("list")
def list_all() -> None:
    """List the scripts: their names, and what each says of itself."""
    scripts = shipped()
    width = max(map(len, scripts))
    for name, script in scripts.items():
        typer.echo(f"{name:<{width}}  {script.summary}")


@app.command()
def show(
    name: Name,
    path: Annotated[bool, typer.Option("--path", help="Print where it is instead.")] = False,
) -> None:
    """Print a script, complete in one file; its first lines say what it needs and reads."""
    try:
        script = find(name)
        typer.echo(str(script.path) if path else script.text, nl=path)
    except HookScriptError as error:
        fail(error)


@app.command("copy")
def copy_one(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Where to.")] = Path("hooks"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that differs.")] = False,
) -> None:
    """Write a script as one complete file, and one for verify where it wants one; print the lines that use it."""
    try:
        script = find(name)
        target = copy(name, folder, force=force)
        for other in script.others:
            if not (folder / f"{other}.sh").exists():  # a script of the user's own serves as well
                copy(other, folder)
    except HookScriptError as error:
        fail(error)
    terminal(stderr=True).print(f"{target} is there; in the configuration:")
    typer.echo(script.example_in(folder))


FOUND = 1  # exit code

_MARKS = {True: ("ok", "green"), False: ("wrong", "red"), None: ("-", "dim")}


class UntriedError(LLMuxError):
    """The hooks cannot be tested now."""


@app.command("test")
def check_hooks(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name, or an alias.", show_default=False)],
    file: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration file [default: config.yaml].")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even while llmux runs with it, or another model is awake.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 for warnings, too.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the hooks print.")] = False,
) -> None:
    """Try a model's hooks: wake it, ask it something, put it to sleep, and say what is wrong with them."""
    console = terminal()
    root = context.find_root().obj or (None,)
    try:
        config = Config.from_file(file or root[0] or Path("config.yaml"))
        name = _named(config, model)
        with _unowned(config, force=force):
            check = asyncio.run(_try(config, name, console, force=force, verbose=verbose))
    except LLMuxError as error:
        fail(error)
    except KeyboardInterrupt:
        terminal(stderr=True).print(f"interrupted: {model} may be awake", style="red")
        raise typer.Exit(Exit.INTERRUPTED) from None
    _conclude(check, console)
    if any(strict or not finding.warning for finding in check.findings):
        raise typer.Exit(FOUND)


async def _try(config: Config, model: str, console: Console, *, force: bool, verbose: bool) -> HookCheck:
    from llmux.cli.hook_check import HookCheck
    from llmux.hookrunner.hook_process import adopting_orphans

    with adopting_orphans() as adopts:
        check = HookCheck(config, model, adopts_orphans=adopts)
        await _follow(check, console, force=force, verbose=verbose)
        return check


async def _follow(check: HookCheck, console: Console, *, force: bool, verbose: bool) -> None:
    awake = await check.awake_others()
    if awake and not force:
        await check.close()
        raise UntriedError(
            f"{', '.join(awake)}: awake, and may hold the GPU; put it to sleep first, or go on with --force"
        )
    columns = "step", "", Column("seconds", justify="right"), ""
    table = Table(*columns, title=f"the hooks of {check.model}", title_justify="left", box=None)
    with Live(table, console=console, auto_refresh=False) as live:

        def on_step(step: Step) -> None:
            mark, style = _MARKS[step.ok]
            table.add_row(step.name, Text(mark, style), f"{step.seconds:.2f}", Text(step.said[:200], "dim"))
            live.refresh()

        def on_line(hook: str, line: str) -> None:
            if verbose:
                live.console.print(Text(f"{hook}: {line}", "dim"))

        check.on_step, check.on_line = on_step, on_line
        await check.run()


def _conclude(check: HookCheck, console: Console) -> None:
    for finding in check.findings:
        kind, style = ("warning", "yellow") if finding.warning else ("error", "red")
        console.print()
        console.print(Text(f"{kind}: {finding.wrong}", f"bold {style}"))
        console.print(Text(f"  {finding.seen}"), soft_wrap=True)
        console.print(Text(f"  {finding.repair}", "italic"), soft_wrap=True)
    if not check.findings:
        console.print("\nThese hooks do what llmux relies on.", style="green")


def _named(config: Config, name: str) -> str:
    for known, settings in config.models.items():
        if name == known or name in settings.aliases:
            return known
    near = difflib.get_close_matches(name, config.models, n=1)
    mean = f" (did you mean {near[0]}?)" if near else ""
    raise UntriedError(f"there is no model {name!r}{mean}; known: {', '.join(config.models)}")


@contextlib.contextmanager
def _unowned(config: Config, *, force: bool) -> Iterator[None]:
    """Keep llmux off during the test: fails if one runs; one that starts meanwhile fails."""
    if force:
        yield
        return
    from llmux.cli.hook_probes import is_open
    from llmux.observability.state_file import StateFile
    from llmux.runtime.engine_locks import controlled, engines_of

    if is_open(config.host, config.port):
        raise UntriedError(
            f"something listens on {config.host}:{config.port}: if it is llmux with these models, stop it first,"
            " or go on with --force"
        )
    for engine in engines_of(config):
        if (other := controlled(engine)) is not None:
            raise UntriedError(f"{engine} is controlled by {other}: stop it first, or go on with --force")
    store = StateFile(config.state_path) if config.state_path is not None else None
    if store is not None:
        try:
            store.open()
        except OSError as error:
            raise UntriedError(f"{config.state_path} cannot be used: {error.strerror}") from None
    try:
        yield
    finally:
        if store is not None:
            store.close()

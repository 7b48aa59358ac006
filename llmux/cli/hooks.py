"""``llmux hooks``: the hook scripts that come with llmux."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmux.cli.hook_check import Step, Trial
from llmux.cli.hook_probes import is_open
from llmux.cli.hook_scripts import HookScriptError, copy, find, shipped
from llmux.cli.terminal import complain, terminal
from llmux.config import Config
from llmux.errors import LLMuxError
from llmux.hookrunner.process_groups import adopting_orphans
from llmux.observability.state_file import StateFile

USAGE = 2

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
        _fail(error)


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
            if not (folder / f"{other}.sh").exists():  # the user's own is as good
                copy(other, folder)
    except HookScriptError as error:
        _fail(error)
    terminal(stderr=True).print(f"{target} is there; in the configuration:")
    typer.echo(script.example_in(folder))


def _fail(error: HookScriptError) -> NoReturn:
    complain(str(error))
    raise typer.Exit(USAGE) from None


FOUND = 1
INTERRUPTED = 130

_MARKS = {True: ("ok", "green"), False: ("wrong", "red"), None: ("-", "dim")}


class UntriedError(LLMuxError):
    """The hooks cannot be tried now."""


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
            trial = asyncio.run(_try(config, name, console, force=force, verbose=verbose))
    except LLMuxError as error:
        complain(str(error))
        raise typer.Exit(USAGE) from None
    except KeyboardInterrupt:
        terminal(stderr=True).print(f"interrupted: {model} may be awake", style="red")
        raise typer.Exit(INTERRUPTED) from None
    _conclude(trial, console)
    if any(strict or not finding.warning for finding in trial.findings):
        raise typer.Exit(FOUND)


async def _try(config: Config, model: str, console: Console, *, force: bool, verbose: bool) -> Trial:
    with adopting_orphans() as adopts:
        trial = Trial(config, model, adopts_orphans=adopts)
        await _follow(trial, console, force=force, verbose=verbose)
        return trial


async def _follow(trial: Trial, console: Console, *, force: bool, verbose: bool) -> None:
    awake = await trial.awake_others()
    if awake and not force:
        await trial.close()
        raise UntriedError(
            f"{', '.join(awake)}: awake, and may hold the GPU; put it to sleep first, or go on with --force"
        )
    table = Table("step", "", "seconds", "", title=f"the hooks of {trial.model}", title_justify="left", box=None)
    table.columns[2].justify = "right"
    with Live(table, console=console, auto_refresh=False) as live:

        def on_step(step: Step) -> None:
            mark, style = _MARKS[step.ok]
            table.add_row(step.name, Text(mark, style), f"{step.seconds:.2f}", Text(step.said[:200], "dim"))
            live.refresh()

        def on_line(hook: str, line: str) -> None:
            if verbose:
                live.console.print(Text(f"{hook}: {line}", "dim"))

        trial.on_step, trial.on_line = on_step, on_line
        await trial.run()


def _conclude(trial: Trial, console: Console) -> None:
    for finding in trial.findings:
        kind, style = ("warning", "yellow") if finding.warning else ("error", "red")
        console.print()
        console.print(Text(f"{kind}: {finding.wrong}", f"bold {style}"))
        console.print(Text(f"  {finding.seen}"), soft_wrap=True)
        console.print(Text(f"  {finding.repair}", "italic"), soft_wrap=True)
    if not trial.findings:
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
    """Keep llmux off while the hooks are tried: a running one is refused, one that starts meanwhile refuses."""
    if force:
        yield
        return
    if is_open(config.host, config.port):
        raise UntriedError(
            f"something listens on {config.host}:{config.port}: if it is llmux with these models, stop it first,"
            " or go on with --force"
        )
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

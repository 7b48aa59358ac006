"""``llmux hooks``: the hook scripts that come with llmux."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from llmux.cli import trying
from llmux.cli.hook_scripts import HookScriptError, copy, find, shipped
from llmux.cli.terminal import complain, terminal

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
            if not (folder / f"{other}.sh").exists():  # somebody's own is as good
                copy(other, folder)
    except HookScriptError as error:
        _fail(error)
    terminal(stderr=True).print(f"{target} is there; in the configuration:")
    typer.echo(script.example_in(folder))


app.command("test")(trying.run)


def _fail(error: HookScriptError) -> NoReturn:
    complain(str(error))
    raise typer.Exit(USAGE) from None

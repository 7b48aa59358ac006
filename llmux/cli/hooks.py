"""``llmux hooks``: the hook scripts that come with llmux."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

USAGE = 2

app = typer.Typer(help="The hook scripts that come with llmux.", no_args_is_help=True)


def folder() -> Path:
    """Return where the scripts are: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "hooks"
    return installed if installed.is_dir() else package.parent / "hooks"


def scripts() -> dict[str, Path]:
    """Return the scripts by name."""
    return {file.stem: file for file in sorted(folder().glob("*.sh"))}


@app.command("list")
def list_all() -> None:
    """List the scripts: their names, and what each says of itself."""
    for name, file in scripts().items():
        comments = (line for line in file.read_text().splitlines()[1:] if line.startswith("# "))
        typer.echo(f"{name:<12} {next(comments, '').removeprefix('# ')}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The script's name, as `llmux hooks list` shows it.")],
    path: Annotated[bool, typer.Option("--path", help="Print where it is instead.")] = False,
) -> None:
    """Print a script, to be copied: ``llmux hooks show llama-cpp > hooks/llama-cpp.sh``."""
    known = scripts()
    file = known.get(name.removesuffix(".sh"))
    if file is None:
        near = difflib.get_close_matches(name, known, n=1)
        mean = f"; did you mean {near[0]}?" if near else ""
        typer.echo(f"no hook script {name!r}{mean} Known: {', '.join(known)}", err=True)
        raise typer.Exit(USAGE)
    typer.echo(str(file) if path else file.read_text(), nl=path)

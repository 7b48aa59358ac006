"""``llmux import``: a configuration from that of another proxy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmux.cli.init import HOOKS, write
from llmux.cli.terminal import fail, terminal
from llmux.errors import ConfigError, LLMuxError

if TYPE_CHECKING:
    from llmux.llama_swap.source import Note

# ruff: noqa: PLC0415 - the two share little
from llmux.llama_swap import translate

INCOMPLETE = 1  # exit code

app = typer.Typer(help="Write a configuration from that of another proxy.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Write a configuration from that of another proxy."""


FileArgument = Annotated[Path, typer.Argument(help="The other proxy's configuration.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
PortOption = Annotated[int | None, typer.Option("--port", "-p", min=0, max=65535, help="llmux's own port.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command("llama-swap")
def llama_swap(
    file: FileArgument, out: OutOption = Path(), port: PortOption = None, force: ForceOption = False
) -> None:
    """Write config.yaml, and the hook script that it needs, from a configuration of llama-swap.

    Exit code 0: everything was carried over. 1: it is written, but something was not carried over; stderr says
    what, and so do comments in the file. 2: nothing is written.
    """
    from llmux.llama_swap.conversion import SCRIPT, page

    try:
        _exists(file)
        result = translate(file, os.environ, port=port)
        target = write(page(result), out, [SCRIPT], force=force, unset=result.variables, spare=file)
    except LLMuxError as error:
        fail(error)
    what = f"{_count(len(result.models), 'model')}, and {target.parent / HOOKS / SCRIPT}.sh"
    _conclude(file, target, what, result.notes)


@app.command("litellm")
def litellm(
    file: FileArgument, out: OutOption = Path(), port: PortOption = None, force: ForceOption = False
) -> None:
    """Write config.yaml from a configuration of LiteLLM's proxy: its `model_list`, names and keys.

    Deployments on this machine become models, all others remotes. Exit codes as for llama-swap.
    """
    from llmux.litellm import page, translate

    try:
        _exists(file)
        result = translate(file, os.environ, port=port)
        target = write(page(result), out, [], force=force, unset=result.variables, spare=file)
    except LLMuxError as error:
        fail(error)
    remotes = result.settings.get("remotes", {})
    what = f"{_count(len(result.models), 'model')} and {_count(len(remotes), 'remote')}"
    _conclude(file, target, what, result.notes)


def _exists(file: Path) -> None:
    if not os.path.exists(file):  # noqa: PTH110 - of a longer name than there can be, pathlib raises an error
        raise ConfigError("there is no such file", file=str(file))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _conclude(file: Path, target: Path, what: str, notes: Sequence[Note]) -> None:
    """Print what was written and what was not; exit with 1 if anything was not."""
    stderr = terminal(stderr=True, soft_wrap=True)
    for note in notes:
        where = f"{file}:{note.line}" if note.line else str(file)
        stderr.print(f"{where}: {note}", style="yellow" if note.lost else None)
    lost = sum(note.lost for note in notes)
    typer.echo(f"wrote {target} with {what}")
    if lost:
        typer.echo(f"not carried over: {_count(lost, 'setting')}, named above and in the file")
    quoted = shlex.quote(str(target))
    typer.echo(f"now: llmux check {quoted} && llmux -c {quoted}")
    if lost:
        raise typer.Exit(INCOMPLETE)

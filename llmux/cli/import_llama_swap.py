"""``llmux import``: a configuration from that of another proxy."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from llmux.cli.config_writer import HOOKS, write
from llmux.cli.terminal import terminal
from llmux.errors import ConfigError, LLMuxError
from llmux.llama_swap import Translation, translate
from llmux.llama_swap.conversion import SCRIPT, page

INCOMPLETE = 1
USAGE = 2

app = typer.Typer(help="Write a configuration from that of another proxy.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Write a configuration from that of another proxy."""


@app.command("llama-swap")
def llama_swap(
    file: Annotated[Path, typer.Argument(help="llama-swap's configuration.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path(),
    port: Annotated[int | None, typer.Option("--port", "-p", min=0, max=65535, help="llmux's own port.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write config.yaml, and the hook script that it needs, from a configuration of llama-swap.

    Exit code 0: everything was carried over. 1: it is written, but something was not carried over; stderr says
    what, and so do comments in the file. 2: nothing is written.
    """
    stderr = terminal(stderr=True, soft_wrap=True)
    try:
        if not file.exists():
            raise ConfigError("there is no such file", file=str(file))
        result = translate(file, os.environ, port=port)
        target = write(page(result), out, [SCRIPT], force=force, unset=result.variables, spare=file)
    except LLMuxError as error:
        stderr.print(str(error), style="red")
        raise typer.Exit(USAGE) from None
    for note in result.notes:
        where = f"{file}:{note.line}" if note.line else str(file)
        stderr.print(f"{where}: {note}", style="yellow" if note.lost else None)
    typer.echo(_summary(result, target))
    if not result.complete:
        raise typer.Exit(INCOMPLETE)


def _summary(result: Translation, target: Path) -> str:
    models = f"{len(result.models)} model{'s' * (len(result.models) != 1)}"
    lost = sum(note.lost for note in result.notes)
    lines = [f"wrote {target} with {models}, and {target.parent / HOOKS / SCRIPT}.sh"]
    if lost:
        lines.append(f"not carried over: {lost} setting{'s' * (lost != 1)}, named above and in the file")
    quoted = shlex.quote(str(target))
    return "\n".join([*lines, f"now: llmux check {quoted} && llmux -c {quoted}"])

"""``llmux key``: keys for clients and operators, and their hashes."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from llmux.config.access import ApiKeyConfig, hash_of, new_key

USAGE = 2

app = typer.Typer(help="Keys for clients and operators, and their hashes.", no_args_is_help=True)

NameOption = Annotated[str | None, typer.Option("--name", "-n", help="Whose it is; the access log says it.")]
AdminOption = Annotated[bool, typer.Option("--admin", help="For `admin_key`, in place of `api_keys`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: key, hash and name.")]


@app.command()
def new(name: NameOption = None, admin: AdminOption = False, as_json: JsonOption = False) -> None:
    """Make a key; print it, once, and the lines for the configuration, which hold its hash only."""
    _check(name)
    key = new_key()
    _tell(key, hash_of(key), name, admin=admin, as_json=as_json, known=False)


@app.command("hash")
def make_hash(name: NameOption = None, admin: AdminOption = False, as_json: JsonOption = False) -> None:
    """Read a key of your own from standard input; print the lines for the configuration."""
    _check(name)
    if sys.stdin.isatty():
        key = typer.prompt("Key", hide_input=True, err=True)
    else:
        key = sys.stdin.readline().rstrip("\r\n")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        _fail("a key is printable ASCII without spaces, at least one character; a header carries it")
    _tell(key, hash_of(key), name, admin=admin, as_json=as_json, known=True)


def _check(name: str | None) -> None:
    try:
        ApiKeyConfig(key="k", name=name)  # type: ignore[arg-type]
    except ValueError:
        _fail("--name must be 1 to 256 printable characters")


def _tell(key: str, hashed: str, name: str | None, *, admin: bool, as_json: bool, known: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"key": None if known else key, "hash": hashed, "name": name}))
        return
    if not known:
        typer.echo(f"key, shown this once: {key}\n\nfor the configuration:")
    entry = json.dumps(hashed) if name is None else f"{{name: {json.dumps(name)}, key: {json.dumps(hashed)}}}"
    typer.echo(f'admin_key: "{hashed}"' if admin else f"api_keys:\n  - {entry}")


def _fail(message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(USAGE)

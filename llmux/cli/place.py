"""Where a running llmux is, and with which key it is spoken to: the options that all such commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

import typer

from llmux import control
from llmux.cli.exits import CommandError, Exit

DEFAULT_URL = "http://127.0.0.1:3000"
UNIX = "unix:"  # the address of a socket
KEYS = ("LLMUX_ADMIN_KEY", "LLMUX_API_KEY")

UrlOption = Annotated[str, typer.Option("--url", envvar="LLMUX_URL", help="Where the running llmux is.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="LLMUX_ADMIN_KEY_FILE",
        help="File with the admin key. Without it: LLMUX_ADMIN_KEY, or to look only LLMUX_API_KEY.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Place:
    """A running llmux."""

    url: str
    key: str | None
    socket: Path | None = None  # its control socket, where that is on this host


def place(url: str, key_file: Path | None) -> Place:
    """Return what the options mean. Raises CommandError for an address or a key that is none."""
    key, source = _key(key_file)
    check_key(key, source)
    if url.startswith(UNIX):
        path = Path("/" + url.removeprefix(UNIX).lstrip("/"))
        return Place(f"{UNIX}{path}", key, path)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise CommandError(Exit.USAGE, f"{url!r} is no address of a llmux; write --url http://HOST:PORT")
    return Place(url.rstrip("/"), key, _socket(parts))


def _socket(parts: SplitResult) -> Path | None:
    """Return the socket of the llmux that an address means, when it runs on this host as the same user."""
    if parts.scheme != "http" or parts.path.strip("/"):
        return None
    here = control.found(parts.hostname or "", parts.port or 80, os.environ)
    return next(filter(control.answers, here), None)


def check_key(key: str | None, source: str) -> None:
    """Raise CommandError for a key that no header takes."""
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise CommandError(Exit.USAGE, f"{source} holds no key: a key is printable ASCII, without spaces")


def _key(file: Path | None) -> tuple[str | None, str]:
    if file is not None:
        try:
            text = file.read_text().strip()
        except OSError as error:
            raise CommandError(Exit.USAGE, f"{file}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            text = "\0"
        if not text:
            raise CommandError(Exit.USAGE, f"{file} is empty; it should hold the admin key")
        return text, str(file)
    for name in KEYS:
        text = os.environ.get(name, "").strip()
        if text:
            return text, name
    return None, ""

"""The options and arguments that several commands have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_URL = "http://127.0.0.1:3000"
COMPLETION_TIMEOUT = 1.0  # seconds for a completion

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file (default: config.yaml).")
]
PortOption = Annotated[int | None, typer.Option("--port", "-p", min=0, max=65535, help="Listen on this port.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log at debug level.")]
DEFAULT_CONFIG = Path("config.yaml")


def address(context: typer.Context, url: str) -> str:
    """Return the address of what runs with the configuration and port given before the command, else ``url``.

    Only the command's own ``--url`` takes precedence over these.
    """
    file, port, _ = context.find_root().obj or (None, None, False)
    source = context.get_parameter_source("url")
    if (file is None and port is None) or (source is not None and source.name == "COMMANDLINE"):
        return url
    if file is None:
        return f"http://127.0.0.1:{port}"
    from llmux.cli.configuration import address_of  # noqa: PLC0415 - brings all of the configuration along

    return address_of(file, port)


UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="LLMUX_URL",
        callback=address,
        help="Address of the running llmux. Default: that of `llmux -c FILE` or `llmux -p PORT`, where given.",
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="LLMUX_ADMIN_KEY_FILE",
        help="File with the admin key. Default: LLMUX_ADMIN_KEY, or LLMUX_API_KEY, which may only look.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ForOption = Annotated[
    str | None, typer.Option("--for", metavar="DURATION", help="As 90s, 10m or 2h. Default: no end.")
]
ReasonOption = Annotated[str | None, typer.Option("--reason", "-r", help="Why; shown to others.")]


def duration(text: str | float) -> float:
    """Return the seconds of an option's value."""
    from llmux.config.setting_types import parse_duration  # noqa: PLC0415 - brings all of the configuration along

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        parser=duration,
        metavar="DURATION",
        help="How long to wait, as 90s or 10m; then exit code 7. Default: no limit.",
        show_default=False,
    ),
]


def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the models whose names or aliases begin so, with their state; nothing if no llmux answers."""
    from llmux.cli.client import models  # noqa: PLC0415 - needed only for a completion

    given = context.params
    found = models(given.get("url") or DEFAULT_URL, given.get("key_file"), COMPLETION_TIMEOUT)
    try:
        return [(name, state) for name, state in _names(found) if name.startswith(incomplete)]
    except (LookupError, TypeError, AttributeError):
        return []


def _names(models: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for entry in models.get("data", ()):
        yield str(entry["id"]), str(entry["llmux"]["state"])
        for alias in entry["llmux"]["aliases"]:
            yield str(alias), f"{entry['id']}, {entry['llmux']['state']}"


OptionalModelArgument = Annotated[
    str | None, typer.Argument(help="The model's name, or an alias.", autocompletion=complete, show_default=False)
]
ModelArgument = Annotated[
    str, typer.Argument(help="The model's name, or an alias.", autocompletion=complete, show_default=False)
]

"""The configuration file that a command is given, and the llmux that runs with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmux.cli.terminal import fail
from llmux.config import Config
from llmux.config.load import read_document
from llmux.config.problems import with_lines
from llmux.errors import ConfigError, LLMuxError, PolicyLoadError

if TYPE_CHECKING:
    from llmux.config.gateway import GatewayConfig

_MODELS = re.compile(rb"(?m)^[\"']?models[\"']?[ \t]*:")  # of a host; a gateway's are deeper, in its `prices`


def is_gateway(file: Path) -> bool:
    """Return whether a file configures a gateway. It is parsed only if it may be one."""
    try:
        if not file.is_file():  # a pipe (`-c <(…)`) can be read once only
            return False
        text = file.read_bytes()
        if _MODELS.search(text) or not (b"hosts" in text or b"fleet" in text):
            return False
    except OSError:
        return False
    from llmux.config.gateway import is_gateway as has_hosts  # noqa: PLC0415 - a host's needs no gateway

    return has_hosts(file)


def _is_host(file: Path) -> bool:
    try:
        return "models" in read_document(file).data
    except (LLMuxError, OSError, TypeError):
        return False


def load_config(file: Path, port: int | None) -> Config:
    """Read a configuration, with another port if one is given; exit with a message if it is invalid."""
    if is_gateway(file):
        fail(f"{file} is the configuration of a gateway; run `llmux gateway -c {file}`")
    try:
        config = Config.from_file(file)
        return config if port is None else config.with_port(port)
    except LLMuxError as error:
        fail(error)


def load_gateway(file: Path, port: int | None) -> GatewayConfig:
    """Read a gateway's configuration; exit with a message if it is invalid."""
    from llmux.config.gateway import GatewayConfig  # noqa: PLC0415 - a host has no use for it

    try:
        config = GatewayConfig.from_file(file)
    except LLMuxError as error:
        fail(f"{file} is the configuration of a host; run `llmux -c {file}`" if _is_host(file) else error)
    return config if port is None else config.with_port(port)


def address_of(file: Path, port: int | None) -> str:
    """Return the address of what runs with a configuration; exit with a message if it cannot be determined."""
    config = load_gateway(file, port) if is_gateway(file) else load_config(file, port)
    if config.port == 0:
        fail(f"{file}: llmux listens on any free port (`port: 0`); give its address with --url")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "localhost"}.get(config.host, config.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


def located(error: LLMuxError, file: Path) -> str:
    """Return the message of an error, with the file, and the line if it names a setting of ``file`` alone."""
    if not isinstance(error, ConfigError | PolicyLoadError) or (isinstance(error, ConfigError) and error.file):
        return str(error)
    said = with_lines(str(error).splitlines(), read_document(file).lines)
    return "\n".join(text if line is None else f"{file}:{line}: {text}" for text, line in said)

"""The log: structlog on top of the standard library's logging.

``get_logger`` works without ``configure``: events then reach whatever logging the host application has set
up, under the loggers ``llmux.*``, as ``name key=value …``. Only the command line calls ``configure``.

A line's message is the event's name (``switch_started``), the rest are its fields. Times are ISO 8601,
UTC. What is not printable in a value is escaped: a model's name, a path or a hook's output cannot forge a line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog

from llmux.observability.writer import ThreadedHandler

Format = Literal["auto", "console", "json"]
_NO_FIELDS = frozenset({"event", "exc_info"})
_MULTILINE = frozenset({"exception", "stack"})


def escape(text: str) -> str:
    r"""Return the text with everything that is not printable as ``\n``, ``\x1b``, ``\u202e``."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


def _escaped(value: object) -> object:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(str(key)): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_escaped(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return escape(str(value))


def _escape_values(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if key in _MULTILINE and isinstance(value, str):
            event[key] = "\n".join(escape(line.expandtabs(4)) for line in value.splitlines())
        else:
            event[key] = _escaped(value)
    return event


class _Fields(dict[str, Any]):
    """An event on its way through logging; as text it is one line."""

    def __str__(self) -> str:
        fields = " ".join(f"{key}={_escaped(value)}" for key, value in self.items() if key not in _NO_FIELDS)
        return f"{escape(str(self.get('event', '')))} {fields}".rstrip()


def _to_logging(
    logger: logging.Logger, name: str, event: MutableMapping[str, Any]
) -> tuple[tuple[_Fields], dict[str, Any]]:
    """Hand an event to the standard logger, so that any formatter can show it."""
    extra = {"_logger": logger, "_name": name}
    return (_Fields(event),), {"exc_info": event.get("exc_info"), "extra": extra}


def get_logger(name: str = "llmux") -> structlog.stdlib.BoundLogger:
    """Return a logger on the standard one of that name. It depends on no global structlog setting."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, _to_logging],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    ).bind()  # the logger itself: the proxy would be resolved anew at every event
    return logger


def formatter(style: Format, stream: TextIO) -> logging.Formatter:
    """Return the formatter of a style; ``auto`` is console on a terminal, JSON elsewhere."""
    terminal = stream.isatty()
    json = style == "json" or (style == "auto" and not terminal)
    shared: list[Any] = [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.add_log_level,
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
    ]
    if json:
        shared += [_ordered, structlog.processors.JSONRenderer()]  # JSON escapes by itself
    else:
        shared += [_escape_values, structlog.dev.ConsoleRenderer(colors=terminal, sort_keys=False)]
    return structlog.stdlib.ProcessorFormatter(processors=shared)


def _ordered(_logger: object, _name: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {**first, **event}


def configure(
    level: int | str = logging.INFO, style: Format = "auto", stream: TextIO | None = None
) -> logging.Handler:
    """Send every log of the process to ``stream`` (stderr), from ``level`` on.

    Called by the command line only. Returns the handler: its ``close`` writes what is left.
    """
    stream = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
    handler = ThreadedHandler(stream)
    handler.setFormatter(formatter(style, stream))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        if isinstance(old, ThreadedHandler):
            old.close()
    root.addHandler(handler)
    # What asyncio and aiohttp say at debug is about themselves, not about llmux.
    root.setLevel(max(number, logging.INFO))
    logging.getLogger("llmux").setLevel(number)
    # It would tell of every file that changes in the configuration's folder: the log itself may be one.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    return handler

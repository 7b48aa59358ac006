"""The log: every event of it, and how it is written, with structlog on top of the standard library's logging.

``get_logger`` works without ``configure``: events then reach whatever logging the host application has set
up, under the loggers ``llmux.*``, as ``name key=value …``. Only the command line calls ``configure``.

A line's message is the event's name (``switch_started``), the rest are its fields. Times are ISO 8601,
UTC. What is not printable in a value is escaped: a model's name, a path or a hook's output cannot forge a line.

The names and fields that the original had are kept: ``switch_started`` (from, to), ``model_activated`` (model,
from, duration_secs), ``switch_failed`` (model, from, error), ``sleep_hook_failed`` (model, to, error),
``request_timeout`` (model, timeout_secs), ``hook_completed`` and ``hook_failed`` (model, hook, exit_code,
duration_secs, stderr).

The reader of the log may stop reading (a paused terminal, a full pipe), and a write that blocks would stop the
event loop, hence every request. So lines wait in a bounded queue for a thread of their own; what does not fit is
counted and dropped.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple, TextIO

import structlog

Format = Literal["auto", "console", "json"]
SELDOM = 600.0  # seconds
_KINDS = 100  # that are remembered at most
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
        # It finds the traceback as text; older ones warn at each, unless told to leave it plain.
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(colors=terminal, sort_keys=False, exception_formatter=plain)
        shared += [_escape_values, console]
    return structlog.stdlib.ProcessorFormatter(processors=shared)


def _ordered(_logger: object, _name: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {**first, **event}


class _Seldom(logging.Filter):
    """Lets each kind of what OpenTelemetry logs through once in ``SELDOM``.

    It logs every try, for as long as no collector answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to let it through."""
        if not record.name.startswith("opentelemetry."):
            return True
        kind, now = (record.name, str(record.msg)), time.monotonic()
        if now - self._told.get(kind, -SELDOM) < SELDOM:
            return False
        if len(self._told) >= _KINDS:
            self._told.clear()
        self._told[kind] = now
        return True


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
    handler.addFilter(_Seldom())
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


_DEBUG, _INFO, _WARNING, _ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


class LogEvent(NamedTuple):
    """How loud an event is, and what it means."""

    level: int
    meaning: str


CATALOGUE: dict[str, LogEvent] = {
    # start, stop, configuration
    "started": LogEvent(
        _INFO,
        "llmux listens: where, which clients may operate it, which event loop runs (uvloop or asyncio), "
        "and what passes streams on (native or python).",
    ),
    "control_socket_unavailable": LogEvent(
        _WARNING, "The llmux command on this host has no socket to come by: it takes the way over TCP."
    ),
    "listening_on_loopback": LogEvent(_INFO, "Only this machine can connect; says how to open llmux to others."),
    "open_files_limit": LogEvent(_INFO, "The limit on open files was raised, or could not be."),
    "ready": LogEvent(_INFO, "Every model's first `alive` has ended; `adopted` were found running."),
    "stopping": LogEvent(_INFO, "A signal came: nothing new is admitted, what runs may finish."),
    "stopped": LogEvent(_INFO, "Nothing is in flight and no hook runs; llmux exits."),
    "config_reloaded": LogEvent(_INFO, "A new configuration is in force."),
    "config_rejected": LogEvent(_ERROR, "A new configuration has an error; the old one stays in force."),
    "restart_needed": LogEvent(_WARNING, "A changed setting only takes effect after a restart."),
    "config_warning": LogEvent(_WARNING, "A setting is allowed, but probably not meant."),
    "original_difference": LogEvent(_WARNING, "The configuration relies on something that llmux 2 did otherwise."),
    "internal_error": LogEvent(_ERROR, "An error in llmux itself, with its traceback. Please report it."),
    "loop_stalled": LogEvent(_WARNING, "The event loop did not run for a while; every request waited."),
    # a gateway's hosts
    "host_followed": LogEvent(_INFO, "A host reports: its version and its models."),
    "host_lost": LogEvent(_WARNING, "A host does not report any more, or not yet; the gateway goes on trying."),
    "names_differ": LogEvent(
        _WARNING,
        "A name stands for `model`, but for `others` on some hosts: a request for it is placed by the first, and "
        "may be served by any. Give it one meaning.",
    ),
    "host_ejected": LogEvent(_WARNING, "Nothing is sent to a host until it answers a probe, after `pause_secs`."),
    "host_restored": LogEvent(_INFO, "A host that was ejected takes requests again."),
    "host_broke_off": LogEvent(
        _WARNING, "A host ended a connection before its answer; the request is not sent again, its client got 502."
    ),
    "report_refused": LogEvent(
        _WARNING, "A host's report was not taken in: it was overtaken, of another instance, or not understood."
    ),
    "store_lost": LogEvent(
        _WARNING, "The store that hosts and gateways share cannot be used: why, and what to do. Requests go on."
    ),
    "store_restored": LogEvent(_INFO, "The store answers again, or does so for the first time."),
    "store_started": LogEvent(_INFO, "The embedded store runs: its process, its socket, and which server it is."),
    "store_ended": LogEvent(_WARNING, "The embedded store has died, with what it wrote; it is started again."),
    "view_stale": LogEvent(
        _WARNING, "No host with the model has reported in time: requests go by the gateway's own counts."
    ),
    "route_overruled": LogEvent(
        _WARNING, "The route raised an error, or named a host that may not be used; logged once for each answer."
    ),
    # switches and models
    "switch_started": LogEvent(_INFO, "A switch has begun: those in `from` drain, then sleep, then `to` wakes."),
    "switch_drained": LogEvent(_INFO, "Those that leave have finished their requests; their sleep hooks start."),
    "switch_ended": LogEvent(_INFO, "A switch is over: its result, and what it cost after the drain."),
    "switch_failed": LogEvent(_ERROR, "A switch did not reach its target."),
    "model_activated": LogEvent(_INFO, "The model is awake; without `duration_secs` it was found running."),
    "model_deactivated": LogEvent(_INFO, "The model no longer is awake; `active_secs` says how long it was."),
    "model_deepened": LogEvent(
        _INFO, "A model that sleeps was put into a deeper level, as the host memory was short."
    ),
    "model_lost": LogEvent(_WARNING, "The model's engine is gone; its sleep hook cleans up."),
    "model_faulted": LogEvent(
        _ERROR,
        "It is unknown whether the model still holds the GPU. Repair it by hand, and run the command in `repair`.",
    ),
    "model_assumed_asleep": LogEvent(
        _WARNING, "Every cleanup failed, but so did `alive`: the model counts as asleep. `unproven` says what."
    ),
    "model_reset": LogEvent(_INFO, "An operator has cleared the model's backoff and fault."),
    "model_removed": LogEvent(_INFO, "A model that left the configuration is gone."),
    "sleep_hook_failed": LogEvent(_ERROR, "A sleep hook failed, or `verify` never passed after it."),
    "backoff_started": LogEvent(_WARNING, "After failures in a row the model is left alone for a while."),
    "pin_set": LogEvent(_INFO, "A model is pinned, or no longer."),
    "lease_set": LogEvent(_INFO, "The GPU is lent to a foreign job, or came back."),
    "lease_held": LogEvent(_INFO, "Nothing holds the GPU any more: the job that leased it may begin."),
    "manual_set": LogEvent(_INFO, "Manual mode began: only operators switch. Or it ended."),
    "command_answered": LogEvent(_DEBUG, "An operator's command was accepted, or why not."),
    # policy
    "policy_decided": LogEvent(
        _DEBUG, "What the policy answered, when it differs from its last answer or a switch came between."
    ),
    "policy_overruled": LogEvent(
        _WARNING, "The policy's answer cannot be followed; first come, first served was used instead."
    ),
    "policy_adopted": LogEvent(
        _INFO, "`use: auto` has another of its policies decide; `reason` says what the last hour showed."
    ),
    "policy_look_failed": LogEvent(
        _WARNING, "`use: auto` could not look back on the last hour; the policy that decides stays."
    ),
    "shadow_dropped": LogEvent(_WARNING, "A shadow policy failed or was too slow; it is asked no more."),
    # requests
    "request_queued": LogEvent(_DEBUG, "A request waits for its model."),
    "request_finished": LogEvent(
        _INFO,
        "A request was answered: status, wait, duration, and the `code` of an error of llmux's (`access_log`).",
    ),
    "request_rejected": LogEvent(
        _WARNING, "Requests are refused; one line for each model and reason in 10 s, `more` counts the others."
    ),
    "request_timeout": LogEvent(_WARNING, "A request waited longer than `request_timeout`."),
    "requests_cut": LogEvent(_WARNING, "Requests in flight were ended: the drain's deadline, or llmux stops."),
    "request_cancelled": LogEvent(_INFO, "An operator has ended a request that waited or was in flight."),
    "client_left": LogEvent(_DEBUG, "A client left before its answer was complete."),
    "malformed_request": LogEvent(_WARNING, "A request was not HTTP, or too large for llmux; answered with 4xx."),
    "too_many_connections": LogEvent(_WARNING, "More clients than `max_connections`; told once in 10 s."),
    "bodies_full": LogEvent(
        _WARNING, "A body cannot be kept: `max_buffered`, or no room for temporary files; told once in 10 s."
    ),
    "path_refused": LogEvent(_DEBUG, "A path that is not forwarded."),
    "origin_refused": LogEvent(_WARNING, "A web page that is not in `cors` tried to use llmux."),
    "host_refused": LogEvent(
        _WARNING, "A request called llmux by a name that is not in `hosts`, as DNS rebinding does."
    ),
    "engine_broke_off": LogEvent(_WARNING, "The engine's connection ended before the answer was complete."),
    # remotes
    "remote_failed": LogEvent(_WARNING, "A request to a remote failed before its answer: the remote, and how."),
    "remote_left_alone": LogEvent(
        _WARNING, "A remote failed several times in a row, or asked for a rest: nothing is sent to it for a while."
    ),
    "remote_is_back": LogEvent(_INFO, "A remote answers again."),
    # hooks
    "hook_started": LogEvent(_DEBUG, "A hook was started."),
    "hook_completed": LogEvent(_INFO, "A hook succeeded (debug for `alive` and `verify`)."),
    "hook_failed": LogEvent(
        _ERROR, "A hook failed (debug for `alive` and `verify`, which fail whenever the answer is no)."
    ),
    "hook_killed": LogEvent(_WARNING, "A hook is ended: its timeout has passed, or llmux stops."),
    "holder_unknown": LogEvent(
        _WARNING,
        "A model that is configured no more may hold the GPU, and its hooks are unknown: see to it by hand.",
    ),
    "engine_controlled_twice": LogEvent(
        _WARNING,
        "Another llmux on this machine controls the same engines, and wakes and stops them, too: stop one.",
    ),
    "prefetch_ended": LogEvent(_INFO, "A prefetch that still ran when its switch was over is ended."),
    "leftover_hook_ended": LogEvent(_WARNING, "A hook of a llmux that was killed still ran, and was ended."),
    "hook_output": LogEvent(_INFO, "A line that a hook printed (debug for `alive` and `verify`)."),
    "hook_output_truncated": LogEvent(_WARNING, "A hook printed more than is kept."),
    "hook_left_pipe_open": LogEvent(
        _WARNING, "A hook's child keeps its output open: that engine does not survive llmux's own end."
    ),
    # state file and log
    "state_file_set_aside": LogEvent(_WARNING, "The state file is damaged or not llmux's: renamed, start afresh."),
    "state_file_unreadable": LogEvent(_WARNING, "The state file cannot be read; llmux starts without it."),
    "state_file_unwritable": LogEvent(
        _WARNING,
        "Cannot write the state file: a crash now forgets which model holds the GPU (a gateway: what was spent).",
    ),
    "record_lines_lost": LogEvent(
        _WARNING, "The record's disk is too slow; lines are missing, and the file says how many."
    ),
    "record_unwritable": LogEvent(_WARNING, "The record cannot be written. Told once, until it can be again."),
    "price_unknown": LogEvent(
        _WARNING,
        "What a model of a remote costs is neither in `prices` nor listed by genai-prices; its requests count as"
        " costing nothing. Told once for each.",
    ),
    "ledger_unwritable": LogEvent(
        _ERROR, "The ledger cannot be written; its rows wait, and requests are served. Told once, until it can be."
    ),
    "ledger_rows_lost": LogEvent(
        _ERROR, "More rows wait for the ledger than are kept: `count` at first, then more."
    ),
    "ledger_set_aside": LogEvent(_ERROR, "The ledger's file is damaged: renamed, and a new one begun."),
    "reservations_settled": LogEvent(
        _WARNING,
        "llmux was killed with requests under way: what budgets reserved for them counts as spent.",
    ),
    "budget_unknown": LogEvent(
        _ERROR, "What a key has spent cannot be read from the ledger; it is counted from here on."
    ),
    "audit_unwritable": LogEvent(
        _ERROR, "The audit cannot be written; its lines wait, and requests are served. Told once, until it can be."
    ),
    "audit_lines_lost": LogEvent(_ERROR, "More lines wait for the audit than are kept; its file says how many."),
    "captures_unwritable": LogEvent(
        _ERROR, "A capture cannot be written; requests are served. Told once, until one can be."
    ),
    "captures_lost": LogEvent(_ERROR, "More captures are under way than fit into memory; told once."),
    "log_lines_dropped": LogEvent(_WARNING, "The reader of the log is too slow; `count` lines are missing."),
}

_CLOSE_WAITS = 2.0  # seconds for the last lines at exit


class ThreadedHandler(logging.Handler):
    """Formats where it is called, writes in a thread."""

    def __init__(self, stream: TextIO, *, limit: int = 10_000) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(limit)
        self._dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="llmux-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line."""
        try:
            self._lines.put_nowait(self.format(record) + "\n")
        except queue.Full:
            self._dropped += 1
        except Exception:  # noqa: BLE001  # as every handler of the standard library does
            self.handleError(record)

    def flush(self) -> None:
        """Wait for what is queued, a little."""
        reached = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put(reached, timeout=_CLOSE_WAITS)
            if self._thread.is_alive():
                reached.wait(_CLOSE_WAITS)

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=_CLOSE_WAITS)
            self._thread.join(_CLOSE_WAITS)
        super().close()

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if line is None:
                return
            if isinstance(line, threading.Event):
                line.set()
                continue
            if self._dropped:
                count, self._dropped = self._dropped, 0
                line += self._about_dropped(count)
            with contextlib.suppress(OSError, ValueError):  # the reader has gone: there is nowhere to report it
                self._stream.write(line)
                self._stream.flush()

    def _about_dropped(self, count: int) -> str:
        fields = {"msg": f"log_lines_dropped count={count}", "levelname": "WARNING", "levelno": logging.WARNING}
        return self.format(logging.makeLogRecord(fields)) + "\n"

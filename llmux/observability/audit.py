"""The audit: a JSON line for every act of an operator, every reload and every event of a key.

Imported only if `audit` is set. Its own thread appends the lines, which are on the disk (``fsync``) a moment
later; the event loop never waits for that. The file is opened for each batch, so it may be moved away at any time.
If it cannot be written, it is tried again every ``PAUSE`` seconds, while up to ``KEPT`` lines wait; further lines
are counted, logged, and reported in the file by a line of their own.

A flood of wrong keys, or of refused commands, must not fill the disk: of these, ``REFUSALS`` lines in a minute are
written, and the next one says how many were left out in between.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from llmux.config import Config
from llmux.errors import ConfigError
from llmux.observability.metrics import HELP
from llmux.observability.record import ends_whole

KEPT = 10_000  # lines that are not written yet
PAUSE = 1.0  # seconds between two tries
CLOSE_WAITS = 2.0  # seconds for the last lines
REFUSALS = 10  # lines about what is refused in a minute
MINUTE = 60.0  # seconds
LONGEST = 300  # characters of a text
MOST_OPTIONS = 20

_LOST = "llmux_audit_lines_lost_total"


class Audit(Collector):
    """Appends lines to ``path``. Its thread calls ``tell(event, **fields)`` when something goes wrong."""

    def __init__(self, path: Path, tell: Callable[..., None]) -> None:
        """Begin. Raises ConfigError when the file cannot be written."""
        self.path = path
        self.lost = 0  # lines, since the start; counted on the event loop
        self._tell = tell
        self._lines: deque[bytes] = deque()
        self._said = 0  # lost lines that the file mentions; counted in the thread
        self._failed = False
        self._wake = threading.Event()
        self._ending = False
        self._refused: deque[float] = deque(maxlen=REFUSALS)
        self._passed_over = 0
        try:
            file = _open(path)
            self._torn = os.fstat(file).st_size > 0 and not ends_whole(path)
            os.close(file)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(
                f"{path} cannot be written: {why}; give another file, or null", path="audit"
            ) from error
        self._thread = threading.Thread(target=self._run, name="llmux-audit", daemon=True)
        self._thread.start()

    # ---- the event loop's side

    def operated(self, method: str, path: str, **fields: Any) -> None:
        """Append a line about a request for one of llmux's own paths that changes something."""
        self.put("operated", **act_of(method, path), **fields)

    def reloaded(self, because: str, before: Config, after: Config) -> None:
        """Append a line about a reload, and one for each key that it changed."""
        self.put("reloaded", because=because, changed=changed_settings(before, after))
        for event, fields in key_events(before, after):
            self.put(event, **fields)

    def put(self, event: str, **fields: Any) -> None:
        """Append a line about something that happened now; fields that are None are left out."""
        if len(self._lines) >= KEPT:
            self.lost += 1
            if self.lost - self._said == 1:
                self._tell("audit_lines_lost", path=str(self.path))
            return
        self._lines.append(_line(event, fields))
        self._wake.set()

    def refused(self, event: str, **fields: Any) -> None:
        """Append a line about a request that is refused for its key, unless there were too many lately."""
        now = time.monotonic()
        if len(self._refused) == REFUSALS and now - self._refused[0] < MINUTE:
            self._passed_over += 1
            return
        self._refused.append(now)
        more, self._passed_over = self._passed_over, 0
        self.put(event, **fields, more=more or None)

    def moved(self, to: Audit | None, registry: CollectorRegistry) -> None:
        """End this one, for another one or none; nothing is waited for."""
        self.put("moved", to=None if to is None else str(to.path))
        registry.unregister(self)
        if to is not None:
            registry.register(to)
        threading.Thread(target=self.close, name="llmux-audit-close", daemon=True).start()

    def close(self) -> None:
        """Write what is pending; waits for that, but not long."""
        self._ending = True
        self._wake.set()
        self._thread.join(CLOSE_WAITS)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield how many lines are lost."""
        yield CounterMetricFamily(_LOST.removesuffix("_total"), HELP[_LOST], value=self.lost)

    # ---- the thread

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._lines or self.lost > self._said:
                if self._write():
                    continue
                if self._ending:
                    return
                time.sleep(PAUSE)
            if self._ending:
                return

    def _write(self) -> bool:
        count, unsaid = len(self._lines), self.lost - self._said
        lines = [self._lines[at] for at in range(count)]
        if unsaid:  # the lost lines are later than the kept ones
            lines.append(_line("lines_lost", {"lines": unsaid}))
        data, written = b"".join(lines), 0
        try:
            file = _open(self.path)
            try:
                if self._torn:
                    os.write(file, b"\n")
                    self._torn = False
                while written < len(data):
                    written += os.write(file, data[written:])
                _sync(file)
            finally:
                os.close(file)
        except OSError as error:
            whole = data.count(b"\n", 0, written)
            self._torn = self._torn or (written > 0 and data[written - 1 : written] != b"\n")
            self._take(min(whole, count))
            if not self._failed:
                self._failed = True
                self._tell("audit_unwritable", path=str(self.path), error=error.strerror or str(error))
            return False
        self._take(count)
        self._said += unsaid
        self._failed = False
        return True

    def _take(self, count: int) -> None:
        for _ in range(count):
            self._lines.popleft()


def _sync(file: int) -> None:
    """Have it on the disk; a pipe, as ``/dev/stdout`` of a container, is none."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)


def _line(event: str, fields: Mapping[str, Any]) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
    told = {name: _bounded(value) for name, value in fields.items() if value is not None}
    return json.dumps({"time": now, "event": event, **told}, default=str).encode() + b"\n"


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[:LONGEST] + "…"
    if isinstance(value, Mapping):
        few = list(value.items())[:MOST_OPTIONS]
        return {str(name)[:LONGEST]: _bounded(one) for name, one in few}
    if isinstance(value, list | tuple):
        return [_bounded(one) for one in value]
    return value if isinstance(value, bool | int | float | None) else str(value)[:LONGEST]


def act_of(method: str, path: str) -> dict[str, str]:
    """Return the act of a request for one of llmux's own paths: ``{"act": "pin", "model": "qwen"}``."""
    parts = path.removeprefix("/llmux/").split("/")
    for kind, name in (("models", "model"), ("requests", "request"), ("fleet", "host")):
        if len(parts) > 2 and parts[0] == kind:  # noqa: PLR2004 - something between the kind and the act
            return {"act": parts[-1], name: "/".join(parts[1:-1])}
    act = "/".join(parts)
    return {"act": f"end {act}" if method == "DELETE" else act}


def changed_settings(before: Config, after: Config) -> list[str]:
    """Return the top-level settings that a reload has changed."""
    return [name for name in type(after).model_fields if getattr(before, name) != getattr(after, name)]


def key_events(before: Config, after: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the keys that a reload has added, removed or changed, by their names."""
    if before.admin_key != after.admin_key:
        kind = "added" if before.admin_key is None else "removed" if after.admin_key is None else "changed"
        yield f"key_{kind}", {"key": "admin_key", "changed": ["key"] if kind == "changed" else None}
    old, new = ({entry.name: entry for entry in config.api_keys if entry.name} for config in (before, after))
    for name in old.keys() - new.keys():
        yield "key_removed", {"key": name}
    for name, entry in new.items():
        if name not in old:
            yield "key_added", {"key": name, "role": entry.role}
            continue
        differs = [
            field for field in type(entry).model_fields if getattr(old[name], field) != getattr(entry, field)
        ]
        if differs:
            yield "key_changed", {"key": name, "changed": [field.rstrip("_") for field in differs]}
    nameless = [[entry.key for entry in config.api_keys if not entry.name] for config in (before, after)]
    gone = sum(key not in nameless[1] for key in nameless[0])
    came = sum(key not in nameless[0] for key in nameless[1])
    for kind, count in (("removed", gone), ("added", came)):
        if count:
            yield f"key_{kind}", {"without_name": count}

"""Captures: what requests of some keys said, and their answers, one file each. Off unless configured.

Theory of operation
===================

A ``Capture`` keeps the client's request, and collects the answer as it passes: up to ``MOST`` bytes of each, and
``HELD`` bytes of all captures together. When the request has ended, a thread writes a document with both to
``FOLDER/YYYY-MM-DD/HHMMSS.ffffff-REQUEST_ID.json``, mode 0600 in folders of mode 0700. Nothing waits for it; what
it cannot write is counted and logged.

Credentials are never written: header fields and JSON fields whose names say that they hold one, and those listed
in `remove`, are replaced by ``REMOVED``; so is the client's key wherever it occurs. Therefore only what can be
parsed field by field is kept: JSON and event streams. For everything else (forms, audio, unknown codings, larger
bodies) the file has the size and the reason why it is left out.

The files are bounded by age and by total size: the oldest are deleted first. Only files named as above are counted
and deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from llmux.accounts.aging import Calendar
from llmux.config.accounts import CapturesConfig
from llmux.observability.metrics import HELP

MOST = 2**20  # bytes of a request, and of an answer
HELD = 64 * 2**20  # bytes of captures in progress, and of those queued for the thread
REMOVED = "(removed)"
CLEAN_EVERY = 600.0  # seconds between two clean-ups
CLOSE_WAITS = 5.0  # seconds for the last captures
YIELD = 0.001  # seconds between two captures: lets the event loop run

_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z")
_FILE = re.compile(r"(\d{6}\.\d{6})-[\w.-]{1,80}\.json\Z")
_PART = ".part"
_HEADERS = re.compile(
    r"auth|api[-_]?key|token(?!s)|secret|cookie|password|credential|session|signature", re.IGNORECASE
)
_FIELDS = frozenset(
    {
        "api_key", "apikey", "api-key", "x-api-key", "authorization", "password", "passwd", "secret",
        "client_secret", "access_token", "refresh_token", "id_token", "auth_token", "bearer_token",
        "session_token", "credentials", "private_key", "secret_key", "access_key", "cookie", "set-cookie",
        "proxy-authorization",
    }
)  # fmt: skip
_CHUNK = re.compile(rb"\s*([0-9a-fA-F]{1,8})[^\r\n]*\r\n")
_TUNNEL = 101
_DONE = "[DONE]"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")

Fields = Sequence[tuple[bytes, bytes]]


class Ended(NamedTuple):
    """How a request ended."""

    request_id: str
    key: str
    asked: str | None
    model: str | None
    status: int | None  # None: its client left
    error: str | None
    waited: float  # seconds


class Capture:
    """One request in progress."""

    __slots__ = ("_answer", "_began", "_body", "_clock", "_fields", "_line", "_sent", "_size", "_store")

    def __init__(
        self, store: Captures, line: tuple[str, str], fields: Fields, body: bytes | None, sent: int
    ) -> None:
        self._store = store
        self._line = line  # method and target
        self._fields = fields
        self._body = body
        self._sent = sent
        self._answer: list[bytes] = []
        self._size = 0  # of the answer
        self._began, self._clock = time.time(), time.monotonic()

    @property
    def held(self) -> int:
        """Return the bytes that it holds in memory, about."""
        return min(self._size, MOST) + (0 if self._body is None else len(self._body))

    def took(self, data: bytes) -> None:
        """Record data that is written to the client."""
        room = MOST - self._size
        self._size += len(data)
        if room > 0:
            kept = data if len(data) <= room else data[:room]
            self._answer.append(kept)
            self._store.held += len(kept)

    def ended(self, body: bytes | None, **fields: Any) -> None:
        """Pass it to the thread, with the fields of an ``Ended``; ``body`` is an answer made by llmux itself."""
        self._store.put(self, Ended(**fields), body)

    def document(self, ended: Ended, body: bytes | None, remover: Remover) -> dict[str, Any]:
        """Return the document to be written, without secrets. Called in the thread."""
        method, target = self._line
        sent = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._fields}
        remover = remover.with_secrets(_credentials(sent))
        path, _, query = target.partition("?")
        answer: dict[str, Any] = {"headers": {}}
        if body is not None:
            answer |= _shown(body, "application/json", "", len(body), remover)
        elif self._answer:
            answer = _answer(b"".join(self._answer), self._size, remover)
        return {
            "time": _iso(self._began),
            "request_id": remover.text(ended.request_id),
            "key": ended.key,
            "method": method,
            "path": remover.text(path),
            "query": remover.query(query) or None,
            "asked": remover.text(ended.asked),
            "model": ended.model,
            "status": ended.status,
            "error": ended.error,
            "waited_seconds": round(ended.waited, 3),
            "seconds": round(time.monotonic() - self._clock, 3),
            "request": {
                "headers": remover.headers(sent),
                **_shown(
                    self._body, sent.get("content-type", ""), sent.get("content-encoding", ""), self._sent, remover
                ),
            },
            "answer": answer,
        }


class Remover:
    """Removes secrets. ``names`` of header fields and JSON fields are in lower case."""

    def __init__(self, names: Iterable[str], secrets: Iterable[str] = ()) -> None:
        self._names = frozenset(name.lower() for name in names)
        self._secrets = tuple(secrets)

    def with_secrets(self, secrets: Iterable[str]) -> Remover:
        """Return one that removes these texts, too."""
        return Remover(self._names, secrets)

    def text(self, text: Any) -> Any:
        """Return a text without the secrets."""
        if isinstance(text, str):
            for secret in self._secrets:
                if secret in text:
                    text = text.replace(secret, REMOVED)
        return text

    def headers(self, fields: Mapping[str, str]) -> dict[str, str]:
        """Return header fields without the secrets. Their names are in lower case."""
        return {
            name: REMOVED if name in self._names or _HEADERS.search(name) else self.text(value)
            for name, value in fields.items()
        }

    def query(self, query: str) -> str:
        """Return a query without the secrets."""
        parts = []
        for part in query.split("&"):
            name, equals, _ = part.partition("=")
            secret = name.lower() in self._names or name.lower() == "key" or _HEADERS.search(name)
            parts.append(f"{name}{equals}{REMOVED}" if secret and equals else self.text(part))
        return "&".join(parts)

    def json(self, value: Any) -> Any:
        """Return a JSON value without the secrets."""
        if isinstance(value, dict):
            return {
                self.text(name): REMOVED if self._secret(name) else self.json(one) for name, one in value.items()
            }
        if isinstance(value, list):
            return [self.json(one) for one in value]
        return self.text(value)

    def _secret(self, name: str) -> bool:
        lower = name.lower()
        return lower in self._names or lower in _FIELDS


def _credentials(fields: Mapping[str, str]) -> Iterator[str]:
    """Yield what a client sent as its key."""
    for name, value in fields.items():
        if _HEADERS.search(name):
            for secret in {value, value.partition(" ")[2].strip()}:
                if len(secret) >= 4:  # noqa: PLR2004 - shorter ones would remove too much
                    yield secret


def _answer(raw: bytes, size: int, remover: Remover) -> dict[str, Any]:
    """Return the answer as it was sent."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ", 2)
    status = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    shown = {"status": status, "headers": remover.headers(fields)}
    whole = size <= len(raw)
    size -= len(head) + 4
    if status == _TUNNEL:
        return shown | {"size": size, "left_out": "a tunnel"}
    if fields.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunked(body)
        size = len(body) if whole else size
    kind, coding = fields.get("content-type", ""), fields.get("content-encoding", "")
    return shown | _shown(body, kind, coding, size, remover, whole=whole)


def _unchunked(body: bytes) -> bytes:
    """Return the contents of the chunks; the last ones may be missing."""
    found, at = [], 0
    while (size := _CHUNK.match(body, at)) and (count := int(size[1], 16)):
        found.append(body[size.end() : size.end() + count])
        at = size.end() + count
    return b"".join(found)


def _shown(
    body: bytes | None, kind: str, coding: str, size: int, remover: Remover, *, whole: bool = True
) -> dict[str, Any]:
    """Return a body if it can be parsed field by field; of a truncated event stream, the part that there is."""
    if not size:
        return {"size": 0}
    stream = kind.partition(";")[0].strip().lower() == "text/event-stream"
    try:
        if body is None or not (whole or stream):
            raise ValueError(f"larger than {MOST} bytes")  # noqa: TRY301
        text = _text(_decoded(body, coding.strip().lower()), whole=whole)
        if stream:
            return {"size": size, "events": list(_events(text, remover)), **({} if whole else {"cut": True})}
        return {"size": size, "body": remover.json(_json(text))}
    except (ValueError, zlib.error) as error:
        return {"size": size, "left_out": str(error)}
    except RecursionError:
        return {"size": size, "left_out": "nested too deeply"}


def _text(data: bytes, *, whole: bool) -> str:
    try:
        return data.decode(errors="strict" if whole else "ignore")  # a truncated text may end within a character
    except UnicodeDecodeError:
        raise ValueError("not text") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


def _decoded(body: bytes, coding: str) -> bytes:
    if coding in {"", "identity"}:
        return body
    if coding not in {"gzip", "deflate"}:
        raise ValueError(f"Content-Encoding {coding[:40]!r}")
    found = zlib.decompressobj(wbits=47 if coding == "gzip" else 15)
    plain = found.decompress(body, MOST)
    if found.unconsumed_tail:
        raise ValueError(f"larger than {MOST} bytes when it is unpacked")
    return plain


def _events(text: str, remover: Remover) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream: their fields, with ``data`` parsed if it is JSON."""
    for block in re.split(r"\r?\n\r?\n", text):
        event: dict[str, Any] = {}
        for line in block.splitlines():
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            event[name or "comment"] = f"{event[name]}\n{value}" if name in event else value
        if event.get("data", _DONE) != _DONE:
            try:
                event["data"] = _json(event["data"])
            except ValueError:  # it was truncated, perhaps within a field that would be removed
                event["data"] = "(not JSON)"
        if event:
            yield remover.json(event)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


class Captures(Collector):
    """Writes captures below ``folder``, once it is configured.

    The thread calls ``tell(event, **fields)`` when something goes wrong.
    """

    def __init__(self, folder: Path, tell: Callable[..., None]) -> None:
        self.folder = folder
        self.keep, self.most = math.inf, 0  # seconds, bytes
        self.remover = Remover(())
        self.held = 0  # bytes in memory; counted on the event loop
        self._skipped = 0  # captures for which there was no memory
        self._written = self._unwritten = 0  # counted in the thread
        self._tell = tell
        self._waiting: deque[tuple[Capture, Ended, bytes | None]] = deque()
        self._given_back: deque[int] = deque()  # bytes released by the thread
        self._files: deque[tuple[str, int]] = deque()  # day/name and size, the oldest first
        self._total = 0
        self._calendar = Calendar()
        self._failed = False
        self._ending = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmux-captures", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """How many captures were lost since the start."""
        return self._skipped + self._unwritten

    # ---- the event loop's side

    def configure(self, config: CapturesConfig) -> None:
        """Apply what may change at a reload."""
        self.keep, self.most, self.remover = config.keep, config.max, Remover(config.remove)

    def begin(
        self, method: str, target: str, fields: Fields, body: Iterable[bytes] | None, sent: int
    ) -> Capture | None:
        """Start a capture of a request whose body has ``sent`` bytes; None if there is no room."""
        while self._given_back:
            self.held -= self._given_back.popleft()
        if self.held >= HELD:
            self._skipped += 1
            if self._skipped == 1:
                self._tell("captures_lost", folder=str(self.folder))
            return None
        kept = None if body is None or sent > MOST else b"".join(body)
        self.held += 0 if kept is None else len(kept)
        return Capture(self, (method, target), fields, kept, sent)

    def put(self, capture: Capture, ended: Ended, body: bytes | None) -> None:
        """Queue an ended capture for the thread."""
        self._waiting.append((capture, ended, body))
        self._wake.set()

    def close(self) -> None:
        """Write what is pending; waits for that, but not long."""
        self._ending = True
        self._wake.set()
        self._thread.join(CLOSE_WAITS)

    def close_soon(self) -> None:
        """The same, without waiting."""
        threading.Thread(target=self.close, name="llmux-captures-close", daemon=True).start()

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield how many captures were written, and how many were lost."""
        for name, value in (("llmux_captures_total", self._written), ("llmux_captures_lost_total", self.lost)):
            yield CounterMetricFamily(name, HELP[name], value=value)

    # ---- the thread

    def _run(self) -> None:
        self._try(self._look)
        while True:
            self._wake.wait(CLEAN_EVERY)
            self._wake.clear()
            while self._waiting:
                self._one(*self._waiting.popleft())
                time.sleep(YIELD)
            self._try(self._clean)
            if self._ending and not self._waiting:
                return

    def _one(self, capture: Capture, ended: Ended, body: bytes | None) -> None:
        try:
            document = capture.document(ended, body, self.remover)
            data = json.dumps(document, ensure_ascii=False, indent=1).encode(errors="replace") + b"\n"
        except Exception as error:  # noqa: BLE001 - one odd answer must not end the thread
            self._unwritten += 1
            self._tell("internal_error", error=repr(error), exc_info=error)
        else:
            if self._try(self._write, ended.request_id, data):
                self._written += 1
            else:
                self._unwritten += 1
        finally:
            self._given_back.append(capture.held)

    def _try(self, work: Callable[..., object], *arguments: object) -> bool:
        try:
            work(*arguments)
        except OSError as error:
            if not self._failed:
                self._failed = True
                why = error.strerror or str(error)
                self._tell("captures_unwritable", folder=str(self.folder), error=why)
            return False
        else:
            self._failed = self._failed and work != self._write
            return True

    def _look(self) -> None:
        """Find the files of earlier runs; delete what a killed llmux had begun."""
        if not self.folder.is_dir():
            return
        found = []
        for day in os.scandir(self.folder):
            if not _DAY.match(day.name) or not day.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(day.path):
                if file.name.endswith(_PART) and _FILE.match(file.name.removesuffix(_PART)):
                    with contextlib.suppress(OSError):
                        os.unlink(file.path)  # noqa: PTH108 - a path as text
                elif _FILE.match(file.name) and file.is_file(follow_symlinks=False):
                    found.append((f"{day.name}/{file.name}", file.stat().st_size))
        self._files.extend(sorted(found))
        self._total = sum(size for _, size in found)

    def _write(self, request_id: str, data: bytes) -> None:
        if len(data) > self.most:
            raise OSError(27, f"a capture of {len(data)} bytes is larger than `max`")
        self._clean(len(data))
        day, at_time = _named(time.time()).split("/")  # of its end: in order
        folder = self.folder / day
        for each in (self.folder, folder):
            if not each.is_dir():
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{at_time}-{_safe(request_id)}.json"
        part = folder / (name + _PART)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(part, flags, 0o600)
            try:
                at = 0
                while at < len(data):
                    at += os.write(file, data[at:])
            finally:
                os.close(file)
            part.rename(folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        self._files.append((f"{folder.name}/{name}", len(data)))
        self._total += len(data)

    def _clean(self, coming: int = 0) -> None:
        """Delete files that are too old, and the oldest while there are too many bytes."""
        now = self._calendar.now()
        oldest, latest = _named(max(0.0, now - self.keep)), _named(now + 1.0)
        files, old = self._files, 0
        for count, (name, _) in enumerate(files, 1):
            if name < oldest:
                old = count  # files from the future before it, too: the clock was wrong
            elif name < latest:
                break
        while files and (old > 0 or self._total + coming > self.most):
            name, size = files.popleft()
            old -= 1
            self._total -= size
            path = self.folder / name
            path.unlink(missing_ok=True)
            if not files or not files[0][0].startswith(path.parent.name):
                with contextlib.suppress(OSError):  # today's is not empty soon, or another has put something there
                    path.parent.rmdir()


def _named(seconds: float) -> str:
    """Return the beginning of the names of files written at a Unix time."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d/%H%M%S.%f")


def _safe(request_id: str) -> str:
    """Return a request's ID, which clients choose, as a safe part of a file name."""
    safe = _UNSAFE.sub("_", request_id)[:60].strip(".") or "_"
    return safe if safe == request_id else f"{safe}-{hashlib.sha256(request_id.encode()).hexdigest()[:8]}"

"""The record: JSON lines in a file, written by a thread of its own; and reading it, run by run.

The event loop never waits for the disk: lines wait in a bounded queue, and further ones are counted, dropped, and
reported in the file (a line of type ``lost``) and in the log. At its bound the file becomes FILE.1, replacing an
older one, so that the two together take at most about twice the bound. A file that was moved away, removed or cut
is noticed, at the next line or within ``LOOK`` seconds, and a new one begun; what would go with a removed one is
kept for that. So is what follows a first line that could not be written. The next llmux ends a line that a crash
has torn; readers skip it (``read_record``).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import queue
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmux.errors import LLMuxError

Line = Mapping[str, Any]

WAITING = 10_000  # lines
BATCH = 200  # lines written at once
LOOK = 5.0  # seconds between two looks whether the file is still there, if nothing is written
_CLOSE_WAITS = 2.0  # seconds for the last lines


@dataclass(frozen=True, slots=True)
class _NewFile:
    """Asks the thread to begin a new file."""

    gone: bool  # only if the old one is gone


class RecordFile:
    """Appends lines to ``path``. All but the thread's own part is called from one thread.

    ``tell(event, **fields)`` is called, from the thread too, with what goes wrong; ``on_gone()`` from the thread
    when another file, or none, is at ``path``: the owner is to call ``begin_new``, as when ``full`` is set.
    """

    def __init__(self, path: Path, bound: int, tell: Callable[..., None], *, waiting: int = WAITING) -> None:
        self.path = path
        self.full = False  # the bound is reached: the owner is to call ``begin_new``
        self.on_gone: Callable[[], None] = lambda: None
        self._bound = bound
        self._tell = tell
        self._lines: queue.Queue[Line | _NewFile | None] = queue.Queue(waiting)
        # Each is counted by one thread only.
        self._dropped = 0  # lines that did not fit into the queue
        self._unwritten = 0  # lines that could not be written
        self._said = 0  # of both, those that the file tells of
        self._told = False  # that lines are lost, since the file told of some
        self._failed = False
        self._file = _open(path)
        self._size, self._torn = _end_of(self._file, path)
        self._next: int | None = None  # in the place of a file that is gone
        self._asked_at = 0.0  # when its owner was told, on the monotonic clock
        self._nowhere = False  # it is gone, and no other can be written
        self._holds = False  # until it is begun anew: it is removed, or lacks a `start` line
        self._kept: list[Line] = []  # for the file that is begun then
        self._thread = threading.Thread(target=self._run, name="llmux-record", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """How many lines are missing of which the file does not tell yet."""
        return self._dropped + self._unwritten - self._said

    def put(self, line: Line) -> None:
        """Queue a line, which must not be changed any more; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1
            if not self._told:
                self._told = True
                self._tell("record_lines_lost", path=str(self.path))

    def begin_new(self, *, gone: bool = False) -> None:
        """Have what is put from here on begin a new file; ``gone``: unless that was done since ``on_gone``."""
        self.full = False
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(_NewFile(gone))

    def close(self) -> None:
        """Write what is queued and let go of the file; waits for that, but not long."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_CLOSE_WAITS)
        self._thread.join(_CLOSE_WAITS)

    def close_soon(self) -> None:
        """Do so without waiting."""
        threading.Thread(target=self.close, name="llmux-record-close", daemon=True).start()

    # ---- the thread

    def _run(self) -> None:
        ended = False
        while not ended:
            try:
                batch = [self._lines.get(timeout=LOOK)]
            except queue.Empty:
                self._look()
                continue
            self._look()
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH:
                    batch.append(self._lines.get_nowait())
            ended = self._take(batch)
        self._write([])
        for file in (self._file, self._next):
            if file is not None:
                with contextlib.suppress(OSError):
                    os.close(file)

    def _take(self, batch: list[Line | _NewFile | None]) -> bool:
        """Write what was queued, each line into its file; return whether it is the end."""
        lines: list[Line] = []
        for each in batch:
            if isinstance(each, Mapping):
                lines.append(each)
                if not self._holds:  # behind the first line of a new file
                    lines += self._kept
                    self._kept = []
                continue
            self._write(lines)
            lines = []
            if each is None:
                return True
            if self._next is not None or not each.gone:
                self._rotate()
        self._write(lines)
        return False

    def _write(self, lines: list[Line]) -> None:
        if self._holds:
            lines = [line for line in lines if line.get("type") != "start"]  # it gets another
            room = WAITING - len(self._kept)
            self._kept += lines[:room]
            self._unwritten += len(lines[room:])
        elif lines or self.lost:
            self._append(lines)

    def _append(self, lines: list[Line]) -> None:
        lost = self.lost
        place = int(bool(lines) and lines[0].get("type") == "start")  # with which a file has to begin
        if lost:
            lines = [*lines[:place], {"type": "lost", "lines": lost}, *lines[place:]]
        data = b"".join(_encoded(line) for line in lines)
        written = 0
        try:
            if self._torn:
                data = b"\n" + data
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            self._torn = data[:written][-1:] != b"\n" if written else self._torn
            missing = lines[len(lines) - min(data.count(b"\n", written), len(lines)) :]
            told_of_loss = bool(lost) and len(missing) < len(lines) - place
            self._unwritten += len(missing) - (bool(lost) and not told_of_loss)
            self._trouble(error)
            if place and len(missing) == len(lines) and self._next is None:
                self._begin_again()
        else:
            self._torn = self._failed = False
            told_of_loss = bool(lost)
        if told_of_loss:
            self._said += lost
            self._told = False
        self._size += written
        if self._size >= self._bound:
            self.full = True

    def _begin_again(self) -> None:
        """Have the same file begun once more, with a ``start`` line, after ``LOOK`` seconds."""
        with contextlib.suppress(OSError):  # no files are left
            self._next = os.dup(self._file)
            self._holds, self._asked_at = True, time.monotonic()

    def _look(self) -> None:
        """Notice that the file was moved, removed or cut; once another can be written, have it begun."""
        if self._next is None:
            mine = os.fstat(self._file)
            there = self._is_there(mine)
            cut = there and stat.S_ISREG(mine.st_mode) and mine.st_size < self._size
            self._holds = cut or not (there or mine.st_nlink)
            if there and not cut:
                self._nowhere = False
                return
            try:
                self._next = os.dup(self._file) if cut else _open(self.path)
            except OSError as error:
                if not self._nowhere:
                    self._nowhere = True
                    self._unwritable(error)
                return
        elif time.monotonic() < self._asked_at + LOOK:
            return
        self._asked_at = time.monotonic()
        self.on_gone()

    def _is_there(self, mine: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), mine)  # noqa: PTH116 - may be text
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # nothing is known
            return True

    def _rotate(self) -> None:
        fresh, self._next = self._next, None
        if fresh is None:
            try:
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                fresh = _open(self.path)
            except OSError as error:
                self._trouble(error)
                return
        os.close(self._file)
        self._file, self._nowhere, self._holds = fresh, False, False
        self._size, self._torn = _end_of(fresh, self.path)

    def _trouble(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._unwritable(error)

    def _unwritable(self, error: OSError) -> None:
        self._tell("record_unwritable", path=str(self.path), error=error.strerror or str(error))


def _encoded(line: Line) -> bytes:
    return json.dumps(line, default=str, skipkeys=True, separators=(",", ":")).encode() + b"\n"


def _open(path: Path) -> int:
    # Not to wait for the reader of a pipe; what is written later may wait.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    os.set_blocking(file, True)
    return file


def _end_of(file: int, path: Path) -> tuple[int, bool]:
    """Return a file's size in bytes, and whether its last line was torn."""
    size = os.fstat(file).st_size
    return size, size > 0 and not ends_whole(path)


def ends_whole(path: Path) -> bool:
    """Whether a file's last line has its end: that of a killed llmux may not."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
    return True


FORMAT = 1


class RecordError(LLMuxError):
    """A record cannot be read; says where and what to do."""


Lines = list[Mapping[str, Any]]


@dataclass(slots=True)
class RecordedRun:
    """What one llmux wrote from a ``start`` line on, by type, in the order of the file."""

    start: Mapping[str, Any]
    requests: Lines = field(default_factory=list)
    switches: Lines = field(default_factory=list)
    decisions: Lines = field(default_factory=list)
    others: Lines = field(default_factory=list)
    lost: int = 0  # lines that llmux could not write


def looks_like_record(first_line: str) -> bool:
    """Say whether a file that begins like this is a record."""
    try:
        value = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "type" in value and "arrival_s" not in value


def read_record(path: Path) -> list[RecordedRun]:
    """Read the runs of a record, oldest first; ``-`` is standard input. Never returns an empty list.

    Raises:
        RecordError: it cannot be read, is no record, or has a damaged line; the message names it.

    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error):
        raise RecordError(f"{path}: the gzip data is damaged or cut off") from None
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from None
    return parse_record(str(path), data)


def parse_record(name: str, data: bytes) -> list[RecordedRun]:
    """Read the runs of a record from its bytes; as ``read_record``."""
    lines = data.split(b"\n")
    runs: list[RecordedRun] = []
    torn: int | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value = _object(line)
        kind = value.get("type") if value is not None else None
        # What a crash or a full disk tears is followed by the word of the next start or of a loss, or by nothing.
        if torn is not None and kind not in ("start", "lost"):
            raise RecordError(f"{name}:{torn}: is not a line of a record: it is not a JSON object")
        torn = number if value is None else None
        if value is None:
            continue
        if kind == "start" and value.get("format") != FORMAT:
            raise RecordError(f"{name}:{number}: format {value.get('format')!r}; this llmux reads {FORMAT}")
        if kind != "start" and not runs:
            raise RecordError(f"{name}:{number}: is not a record of llmux: it does not begin with a `start` line")
        if kind == "start":
            runs.append(RecordedRun(value))
        else:
            _add(runs[-1], kind, value)
    if not runs:
        raise RecordError(
            f"{name}: contains no record; set `record: FILE` in the configuration to have one written"
        )
    return runs


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _add(run: RecordedRun, kind: object, value: Mapping[str, Any]) -> None:
    if kind == "request":
        run.requests.append(value)
    elif kind == "switch":
        run.switches.append(value)
    elif kind == "decision":
        run.decisions.append(value)
    elif kind == "lost":
        lines = value.get("lines")
        run.lost += lines if isinstance(lines, int) else 0
    else:
        run.others.append(value)

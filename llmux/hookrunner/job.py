"""A hook to run, what it prints, and how it ended: plain values and the words for people.

What it prints is read as it comes: bounded lines for the log, and the tail for its result.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal as signals
import struct
import termios
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmux.core.spec import HookKind

QUIET_KINDS = frozenset({HookKind.ALIVE, HookKind.VERIFY})
"""Hooks that run over and over: their output belongs into the log at debug level only."""

DETAIL_LINES = 3
DETAIL_CHARS = 500


@dataclass(frozen=True, slots=True)
class HookJob:
    """One hook to run. ``id`` is unique among the hooks under way.

    ``script`` is given to ``sh -c`` in the folder ``cwd``. ``env`` is the model's own. ``switch`` is 0 and
    ``sources`` and ``target`` are empty outside a switch; ``port`` is 0 when the address has none. ``level`` is
    the sleep level to go to, or to wake from; empty where there is none.
    """

    id: int
    model: str
    kind: HookKind
    script: str
    cwd: Path | str
    env: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    port: int = 0
    switch: int = 0
    sources: tuple[str, ...] = ()
    target: str = ""
    level: str = ""

    @property
    def quiet(self) -> bool:
        """Whether its output is of interest only when something is being looked into."""
        return self.kind in QUIET_KINDS


@dataclass(frozen=True, slots=True)
class HookResult:
    """How a hook ended.

    ``exit_code`` and ``signal`` are both None when it could not be started, could not be ended, or its
    status was lost. ``duration`` is in seconds, from its start to this result. ``killed`` is the reason that
    llmux had to end it, None when it ended by itself. ``tail`` is the last 2 KiB at most that it printed
    before its exit, control characters escaped. ``detail`` tells people how it ended, with its last lines.
    """

    id: int
    model: str
    kind: HookKind
    ok: bool
    exit_code: int | None = None
    signal: int | None = None
    duration: float = 0.0
    killed: str | None = None
    tail: str = ""
    detail: str = ""


KEPT_BACK = frozenset(
    {
        "LLMUX_ADMIN_KEY",
        "LLMUX_API_KEY",
        # What speaks to systemd would speak for llmux; podman waits until its container has.
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)
SECRET = 8  # characters of a key; a shorter one is only found where it is all of a value


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """What the kernel says of a process that has exited; both None: the kernel no longer knows."""

    code: int | None = None
    signal: int | None = None

    @property
    def ok(self) -> bool:
        """Whether it exited with 0."""
        return self.code == 0


def environment(
    job: HookJob, inherited: Mapping[str, str] | None = None, secrets: Collection[str] = ()
) -> dict[str, str]:
    """Return what the hook sees: ``inherited`` (llmux's own by default), the model's ``env``, ``LLMUX_*``.

    The later wins. Names travel as values of variables, so that no shell ever reads them as text. The keys of
    operators are kept back: an engine, and what it runs, would inherit them. So are variables that
    hold one of the ``secrets``, and those by which llmux tells systemd how it is.
    """
    own = os.environ if inherited is None else inherited
    return {
        **{
            name: value
            for name, value in own.items()
            if name not in KEPT_BACK and not (secrets and any(_holds(value, secret) for secret in secrets))
        },
        **job.env,
        "LLMUX_MODEL": job.model,
        "LLMUX_HOOK": job.kind.value,
        "LLMUX_PORT": str(job.port) if job.port else "",
        "LLMUX_URL": job.url,
        "LLMUX_SWITCH_ID": str(job.switch) if job.switch else "",
        "LLMUX_FROM": ",".join(job.sources),
        "LLMUX_TO": job.target,
        "LLMUX_SLEEP_LEVEL": job.level,
    }


def _holds(value: str, secret: str) -> bool:
    # What is short could be part of anything.
    return value == secret or (len(secret) >= SECRET and secret in value)


def not_started(job: HookJob, error: Exception | str) -> HookResult:
    """Return the result of a hook that could not be started."""
    return HookResult(job.id, job.model, job.kind, ok=False, detail=f"could not be started: {error}")


def describe(
    status: ExitStatus, tail: str, *, killed: str | None = None, after: float = 0.0, unending: bool = False
) -> str:
    """Say how a hook ended.

    ``after`` (seconds) is when it was killed, ``unending`` says that even KILL did not help.
    """
    if killed == "timeout":
        ending = f"ran past its timeout of {format_seconds(after)} and was ended"
    elif killed == "stopping":
        ending = "was ended because llmux is stopping"
    elif killed is not None:
        ending = f"was ended: {killed}"
    elif status.signal is not None:
        ending = f"killed by {signal_name(status.signal)}"
    elif status.code is not None:
        ending = f"exited with {status.code}"
    else:
        ending = "exited, but how is not known (something else has waited for it)"
    if unending:
        ending += ", but its processes do not go away"
    said = last_lines(tail)
    return f"{ending}: {said}" if said else ending


def last_lines(tail: str) -> str:
    """Return the last few lines on one line, at most some 500 characters."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    said = " | ".join(lines[-DETAIL_LINES:])
    return said if len(said) <= DETAIL_CHARS else "…" + said[-DETAIL_CHARS:]


def signal_name(number: int) -> str:
    """Return ``SIGKILL`` for 9, ``signal 40`` for one without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def format_seconds(seconds: float) -> str:
    """Return ``0.2 s``, ``5 s``, ``1800 s``: with a decimal only where it says something."""
    short = 10.0
    return f"{seconds:.1f}".removesuffix(".0") + " s" if seconds < short else f"{seconds:.0f} s"


LINE_BYTES = 4 * 1024
LOG_BYTES = 64 * 1024
LOG_LINES = 1000
TAIL_BYTES = 2 * 1024
DROPPED = "… further output is dropped"

# Progress bars end their lines with a carriage return.
_END_OF_LINE = re.compile(rb"[\r\n]")
_CONTROL = [char for char in (*range(0x20), *range(0x7F, 0xA0)) if char != ord("\t")]
_ESCAPED = {**{char: f"\\x{char:02x}" for char in _CONTROL}, 0x2028: "\\u2028", 0x2029: "\\u2029"}
_ESCAPED_BUT_NEWLINE = {char: text for char, text in _ESCAPED.items() if char != ord("\n")}


class Output:
    """Takes a hook's bytes; gives lines to ``emit`` and remembers the tail.

    A line is cut at 4 KiB; blank ones are left out. After 64 KiB or 1000 lines in all, one last line says
    that the rest is dropped; the tail stays up to date. Memory is bounded by these numbers.
    """

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._unfinished = b""
        self._bytes_left = LOG_BYTES
        self._lines_left = LOG_LINES
        self._dropping = False
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Take what was read."""
        self._tail = (self._tail + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]
        if self._dropping:
            return
        kept = chunk[: self._bytes_left]
        self._bytes_left -= len(kept)
        *lines, self._unfinished = _END_OF_LINE.split(self._unfinished + kept)
        for line in lines:
            self._line(line)
        if len(kept) < len(chunk):
            self.flush()
            self._drop()

    def flush(self) -> None:
        """Give out the last line, which has no newline."""
        line, self._unfinished = self._unfinished, b""
        self._line(line)

    def tail(self) -> str:
        """Return the last 2 KiB, decoded, with newlines; other control characters are escaped."""
        data = self._tail
        if len(data) == TAIL_BYTES:  # it may begin in the middle of a character
            data = data[:4].lstrip(bytes(range(0x80, 0xC0))) + data[4:]
        text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode(errors="replace")
        return text.translate(_ESCAPED_BUT_NEWLINE)

    def _line(self, line: bytes) -> None:
        if self._dropping or not line.strip():
            return
        if self._lines_left == 0:
            self._drop()
            return
        self._lines_left -= 1
        text = line[:LINE_BYTES].decode(errors="replace").translate(_ESCAPED)
        self._emit(text if len(line) <= LINE_BYTES else text + "…")

    def _drop(self) -> None:
        if not self._dropping:
            self._dropping = True
            self._unfinished = b""
            self._emit(DROPPED)


CHUNK = 64 * 1024  # bytes per turn of the loop: what a pipe holds


class PipeReader:
    """Reads ``fd`` (which must not block), gives what comes to ``feed``, and closes it at its end.

    ``on_end`` is called once, from the loop or from ``drain``, when the last writer has gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        feed: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._feed = feed
        self._on_end = on_end
        self.open = True
        loop.add_reader(fd, self._read)

    def drain(self) -> None:
        """Read what is in the pipe at this moment; not what is written meanwhile."""
        if not self.open:
            return
        (there,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0\0\0\0"))
        while there > 0 and self.open:
            there -= self._read() or there
        if self.open:
            self._read()  # nothing there: this finds out whether the end has come

    def close(self) -> None:
        """Stop reading: a process that still writes gets SIGPIPE."""
        if self.open:
            self.open = False
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _read(self) -> int:
        if not self.open:
            return 0
        try:
            chunk = os.read(self._fd, CHUNK)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            chunk = b""
        if chunk:
            self._feed(chunk)
        else:
            self.close()
            self._on_end()
        return len(chunk)

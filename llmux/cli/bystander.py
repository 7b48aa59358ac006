"""A process that is given the number of one which has ended, to see whether hooks still mean it by that number."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")  # the next process gets the next free number
_TRIES = 40  # another process may get it first
_PAUSE = 0.05  # seconds


def leaders_of(pids: Iterable[int], ancestor: int) -> frozenset[int]:
    """Return these processes and those that they descend from, up to but without ``ancestor``.

    Of a process that does not descend from it, only itself is returned.
    """
    found = set()
    for pid in pids:
        line, at = [pid], _parent_of(pid)
        while at > 1 and at != ancestor:
            line.append(at)
            at = _parent_of(at)
        found.update(line if at == ancestor else [pid])
    return frozenset(found)


@contextlib.contextmanager
def bystander(pid: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """Run, until the block ends, a process with this number, in a group and session of its own.

    None where that cannot be done: the number stays in use for 2 s, or the system does not let us (Linux asks for
    root).
    """
    process = _start(pid)
    try:
        yield process
    finally:
        if process is not None:
            process.kill()
            process.wait()


def _start(pid: int) -> subprocess.Popen[bytes] | None:
    for _ in range(_TRIES):
        if not _is_free(pid):  # it may be the number of something short
            time.sleep(_PAUSE)
            continue
        try:
            _LAST_PID.write_text(str(pid - 1))
            process = subprocess.Popen(["/bin/sleep", "86400"], stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError:
            return None
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    return None


def _is_free(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _parent_of(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0

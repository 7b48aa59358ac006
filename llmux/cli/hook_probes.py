"""The observations of `llmux hooks test`: a first request, GPU memory, listening sockets; and a bystander.

The first request goes to an engine that was just woken, and finds the name under which it answers. Used GPU memory
is what nvidia-smi reports. /proc tells one server on a port from the next, without a request to it. A bystander is
a process that gets the number of one which has ended, to see whether hooks still use that number for the old
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

from llmux.hookrunner.hook_process import trace_of

ANSWER_TIMEOUT = 120.0  # seconds for one answer
_NOT_SPOKEN = (*range(400, 500), HTTPStatus.NOT_IMPLEMENTED)


@dataclass(frozen=True, slots=True)
class Answer:
    """The response. ``ok`` is None if the engine takes none of the requests."""

    ok: bool | None
    said: str
    names: tuple[str, ...] | None  # that the engine lists; None if it has no list


async def smoke_request(url: str, model: str) -> Answer:
    """Request a token, or a vector, in the ways that engines understand."""
    timeout = aiohttp.ClientTimeout(ANSWER_TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        names = await _names(session, url)
        for path, body in _questions(model):
            try:
                async with session.post(f"{url}{path}", json=body) as response:
                    said = await response.text()
                    status = response.status
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return Answer(ok=False, said=f"POST {path}: {str(error) or type(error).__name__}", names=names)
            if status < HTTPStatus.BAD_REQUEST:
                return Answer(ok=True, said=f"POST {path}", names=names)
            if status not in _NOT_SPOKEN:
                return Answer(ok=False, said=f"POST {path} is answered with {status}: {said[:300]}", names=names)
    return Answer(ok=None, said=f"it takes none of OpenAI's requests ({status})", names=names)


def _questions(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    messages = [{"role": "user", "content": "Say yes."}]
    yield "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 1}
    yield "/v1/completions", {"model": model, "prompt": "Say yes.", "max_tokens": 1}
    yield "/v1/embeddings", {"model": model, "input": "yes"}


async def _names(session: aiohttp.ClientSession, url: str) -> tuple[str, ...] | None:
    try:
        async with asyncio.timeout(10), session.get(f"{url}/v1/models") as response:
            if response.status != HTTPStatus.OK:
                return None
            found = await response.json(content_type=None)
        return tuple(str(entry["id"]).removesuffix(":latest") for entry in found["data"])  # Ollama's way to say m
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError):
        return None


NVIDIA_SMI_TIMEOUT = 10.0  # seconds; nvidia-smi hangs when the driver does


async def used_gpu_memory() -> int | None:
    """Return the MiB in use on all GPUs together; None if unknown."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    process = await asyncio.create_subprocess_exec(
        program,
        "--query-gpu=memory.used",
        "--format=csv,noheader,nounits",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(NVIDIA_SMI_TIMEOUT):
            said, _ = await process.communicate()
        return sum(int(line) for line in said.decode().split("\n") if line.strip()) if said.strip() else None
    except (TimeoutError, ValueError):
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


_LISTENING = "0A"  # the state in /proc/net/tcp


def sockets_on(port: int) -> frozenset[str]:
    """Return the inodes of the sockets that listen on a port; each newly started server has another."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), Path(table).open() as lines:
            next(lines, None)
            for line in lines:
                fields = line.split()
                if fields[3] != _LISTENING:  # listening sockets come first; there may be thousands of others
                    break
                if int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return frozenset(found)


def holders_of(inodes: frozenset[str]) -> frozenset[int]:
    """Return the processes that hold one of these sockets; those of other users only for root."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(file) in wanted for file in (process / "fd").iterdir()):  # noqa: PTH115 - "socket:[1]"
                found.add(int(process.name))
    return frozenset(found)


def still_run(pids: frozenset[int]) -> frozenset[int]:
    """Return the processes that have not ended; a zombie has, once none of its threads is left."""
    return frozenset(pid for pid in pids if trace_of(pid) is not None)


def is_open(host: str, port: int, patience: float = 2.0) -> bool:
    """Return whether a server accepts connections there, within ``patience`` seconds."""
    try:
        socket.create_connection((host, port), timeout=patience).close()
    except OSError:
        return False
    return True


_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")  # the next process gets the next free number
_TRIES = 40  # another process may get the number first
_PAUSE = 0.05  # seconds


def leaders_of(pids: Iterable[int], ancestor: int) -> frozenset[int]:
    """Return these processes and their ancestors, up to but without ``ancestor``.

    For a process that does not descend from it, only the process itself is returned.
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

    None if that is impossible: the number stays in use for 2 s, or the system does not permit it (Linux requires
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
            last = _LAST_PID.read_text()
            _LAST_PID.write_text(str(pid - 1))
            try:
                process = subprocess.Popen(
                    ["/bin/sleep", "86400"], stdin=subprocess.DEVNULL, start_new_session=True
                )
            finally:  # else everything on this machine would get numbers that were in use a moment ago
                _LAST_PID.write_text(last)
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

"""``llmux lease`` and ``llmux release``: have the whole GPU for another job, or for as long as a command runs."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated
from urllib.parse import quote

import typer

from llmux.cli.api_models import Leased, SeenStatus
from llmux.cli.options import (
    DEFAULT_URL,
    ForOption,
    JsonOption,
    KeyFileOption,
    ReasonOption,
    TimeoutOption,
    UrlOption,
)
from llmux.cli.remote import Remote, speak
from llmux.cli.terminal import CommandError, Exit, complain

LEASE = "/llmux/lease"
LOOK_EVERY = 0.2  # seconds
RENEWED = "5m"  # a command's lease, renewed long before its end; should this process die, it ends by itself
RENEW_EVERY = 30.0  # seconds
NOT_EXECUTABLE, NOT_FOUND, BY_SIGNAL = 126, 127, 128  # as a shell says it


class Requests(enum.StrEnum):
    """What becomes of requests."""

    WAIT = "wait"
    REJECT = "reject"


def lease(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="Run this while the GPU is leased."),
    ] = None,
    duration: ForOption = None,
    reason: ReasonOption = None,
    requests: Annotated[
        Requests | None,
        typer.Option("--requests", help="Meanwhile they wait, or get 503. Without it: as lease_requests says."),
    ] = None,
    renew: Annotated[str | None, typer.Option("--renew", metavar="ID", help="Renew this lease.")] = None,
    wait: Annotated[bool, typer.Option(help="Return when nothing holds the GPU any more; or at once.")] = True,
    timeout: TimeoutOption = None,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put all models to sleep, and keep them asleep: the GPU is for another job."""
    if command and (duration or renew or as_json or not wait):
        complain("with a COMMAND the lease lasts as long as it runs: without --for, --renew, --no-wait and --json")
        raise typer.Exit(Exit.USAGE)
    options = {
        "for": RENEWED if command else duration,
        "reason": reason or _name(command),
        "requests": requests,
        "id": renew,
    }

    async def act(remote: Remote) -> int | None:
        with _given_back_on_term():
            answer = await _take(remote, options)
            if command:
                return await _run(remote, answer.id, command, timeout)
            if wait:
                await _held(remote, answer.id, timeout, keep=renew is not None)
                answer.held = True
        typer.echo(json.dumps(asdict(answer)) if as_json else _told(answer, duration))
        return None

    speak(url, key_file, act)


def release(
    name: Annotated[
        str | None, typer.Argument(metavar="ID", help="The lease, as `llmux lease` printed it. Without it: any.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give the leased GPU back."""

    async def act(remote: Remote) -> None:
        if name == "":
            raise CommandError(Exit.USAGE, "the lease's ID is empty; leave it out to end any lease")
        answer = await give_back(remote, name)
        typer.echo(json.dumps(answer) if as_json else "the GPU is llmux's again")

    speak(url, key_file, act)


async def give_back(remote: Remote, lease: str | None) -> dict[str, object]:
    """End a lease, or any."""
    return await remote.delete(LEASE if lease is None else f"{LEASE}?id={quote(lease, safe='', errors='replace')}")


def _name(command: list[str] | None) -> str | None:
    """Return what others are told of a command: not its arguments, which may hold secrets."""
    name = os.path.basename(command[0]) if command else ""  # noqa: PTH119 - it need not be a path
    return name[:200] if name.isprintable() else None


async def _take(remote: Remote, options: dict[str, str | None]) -> Leased:
    """Lease the GPU. A command that is interrupted just then leaves no lease behind."""
    taking = asyncio.ensure_future(remote.post(LEASE, options))
    try:
        return remote.read(Leased, await asyncio.shield(taking))
    except asyncio.CancelledError:
        if options["id"] is None:
            with contextlib.suppress(CommandError):
                await give_back(remote, (await taking)["id"])
        raise


def _told(lease: Leased, duration: str | None) -> str:
    state = "nothing holds the GPU" if lease.held else "the GPU is being cleared"
    until = f"for {duration}" if duration else "until it is given back"
    return f"{state}; it is leased {until}: llmux release {lease.id}"


@contextlib.contextmanager
def _given_back_on_term() -> Iterator[None]:
    """Have TERM cancel what runs, as Ctrl-C does: else it would leave a lease behind."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    try:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    except (RuntimeError, ValueError):  # not the main thread: no signal comes here
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def _held(remote: Remote, lease: str, within: float | None, *, keep: bool = False) -> None:
    """Wait until nothing holds the GPU. What does not come to that is given back, unless it must be kept."""
    try:
        async with asyncio.timeout(within):
            while not await _look(remote, lease):  # noqa: ASYNC110 - llmux is asked
                await asyncio.sleep(LOOK_EVERY)
    except BaseException as error:
        if not keep:
            with contextlib.suppress(CommandError):
                await give_back(remote, lease)
        if isinstance(error, TimeoutError):
            after = "stays" if keep else "is given back"
            message = f"something still holds the GPU after {within:.3g} s; the lease {after}"
            raise CommandError(Exit.TIMED_OUT, message) from None
        raise


async def _look(remote: Remote, lease: str) -> bool:
    status = remote.read(SeenStatus, await remote.get("/llmux/status"))
    if status.lease is None or status.lease.id != lease:
        raise CommandError(Exit.FAILED, "the lease ended before nothing held the GPU any more")
    return status.lease.held


async def _run(remote: Remote, lease: str, command: list[str], within: float | None) -> int:
    stop = asyncio.Event()
    keeping = asyncio.create_task(_keep(remote, lease, stop))
    try:
        await _held(remote, lease, within)
        code = await _child(command, stop)
    finally:
        keeping.cancel()
    try:
        await give_back(remote, lease)
    except CommandError as error:
        complain(f"the lease could not be given back; it ends by itself within {RENEWED}: {error}")
    return code


async def _child(command: list[str], stop: asyncio.Event) -> int:
    """Run the command to its end, or to that of the lease; return its exit code as a shell says it."""
    loop = asyncio.get_running_loop()
    # Ctrl-C reaches the command by itself; here it must not end what is to give the GPU back.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    try:
        process = await asyncio.create_subprocess_exec(*command)
    except OSError as error:
        complain(f"{command[0]}: {error.strerror or error}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    ending = asyncio.create_task(_end(process, stop))
    code = await process.wait()
    ending.cancel()
    return code if code >= 0 else BY_SIGNAL - code


async def _keep(remote: Remote, lease: str, stop: asyncio.Event) -> None:
    """Renew the lease; one that is over stops the command: the GPU belongs to another lease."""
    while True:
        await asyncio.sleep(RENEW_EVERY)
        try:
            await remote.post(LEASE, {"for": RENEWED, "id": lease})
        except CommandError as error:
            complain(f"the lease cannot be renewed: {error}")
            if error.exit is Exit.REFUSED:
                stop.set()
                return


async def _end(process: asyncio.subprocess.Process, stop: asyncio.Event) -> None:
    await stop.wait()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()

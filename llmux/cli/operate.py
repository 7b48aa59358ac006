"""The commands that operate a running llmux: switch, wake, sleep, pin, reset, cancel, manual, lease and others."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

import typer

from llmux.cli.api_models import Commanded, Leased, Status
from llmux.cli.client import Event, Remote, speak
from llmux.cli.options import (
    DEFAULT_URL,
    ForOption,
    JsonOption,
    KeyFileOption,
    ModelArgument,
    OptionalModelArgument,
    ReasonOption,
    TimeoutOption,
    UrlOption,
)
from llmux.cli.terminal import CommandError, Exit, fail, print_error, terminal
from llmux.normal_path import path_of


class Mode(enum.StrEnum):
    """Whether only operators switch."""

    ON = "on"
    OFF = "off"


def switch(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Wake a model whether or not requests wait for it; return when it is awake."""

    async def act(remote: Remote) -> None:
        answer, seconds = await follow(remote, model, "wake", timeout)
        if as_json:
            typer.echo(json.dumps({**asdict(answer), "phase": "awake", "seconds": seconds}))
        else:
            when = "already" if answer.switch is None else f"after {seconds:.3g} s"
            typer.echo(f"{answer.model} is awake {when}")

    speak(url, key_file, act)


def wake(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have a model woken, whether or not requests wait for it; return at once (switch waits)."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "wake")
        words = f"switch {answer.switch} wakes {answer.model}"
        if answer.switch is None:
            words = f"{answer.model} is awake already"
        typer.echo(json.dumps(asdict(answer)) if as_json else words)

    speak(url, key_file, act)


def sleep(
    model: OptionalModelArgument = None,
    every: Annotated[bool, typer.Option("--all", help="All that are awake, one after the other.")] = False,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    timeout: TimeoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a model to sleep once its answers have ended; return when it sleeps. With --all, every one."""
    if (model is None) is not every:
        raise typer.BadParameter("say which model, or --all")

    async def act(remote: Remote) -> None:
        names = [model] if model is not None else remote.read(Status, await remote.get("/llmux/status")).awake
        ends = [(await follow(remote, name, "sleep", timeout)) for name in names]
        if as_json:
            found = [{**asdict(answer), "phase": "asleep", "seconds": seconds} for answer, seconds in ends]
            typer.echo(json.dumps(found if every else found[0]))
            return
        for answer, seconds in ends:
            when = "already" if answer.switch is None else f"after {seconds:.3g} s"
            typer.echo(f"{answer.model} sleeps {when}")
        if not ends:
            typer.echo("no model is awake")

    speak(url, key_file, act)


def pin(
    model: ModelArgument,
    duration: ForOption = None,
    reason: ReasonOption = None,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a model awake, waking it if need be; models that cannot be awake beside it get 503 meanwhile."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "pin", {"for": duration, "reason": reason})
        wakes = "" if answer.switch is None else f"; switch {answer.switch} wakes it"
        words = f"{answer.model} is pinned{f' for {duration}' if duration else ''}{wakes}"
        typer.echo(json.dumps(asdict(answer)) if as_json else words)

    speak(url, key_file, act)


def unpin(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the pin of a model."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "unpin")
        typer.echo(json.dumps(asdict(answer)) if as_json else f"unpinned {answer.model}")

    speak(url, key_file, act)


def reset(
    model: ModelArgument,
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report a model as repaired: its failures are forgotten; faulted or lost, it counts as asleep."""

    async def act(remote: Remote) -> None:
        answer = await remote.command(model, "reset")
        typer.echo(json.dumps(asdict(answer)) if as_json else f"{answer.model}: its failures are forgotten")

    speak(url, key_file, act)


def cancel(
    request: Annotated[str, typer.Argument(metavar="ID", help="What its client calls it: X-Request-ID.")],
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """End one request, whether it waits or is being answered."""

    async def act(remote: Remote) -> None:
        path = path_of("/llmux/requests", request, "cancel") if request else None
        if path is None:
            why = f"request {request!r} not found by that ID, which can stand in no path"
            raise CommandError(Exit.NO_SUCH_MODEL, why)
        answer = await remote.post(path)
        words = f"cancelled {request}: {', '.join(answer['models'])}"
        typer.echo(json.dumps(answer) if as_json else words)

    speak(url, key_file, act)


def manual(
    mode: Annotated[Mode, typer.Argument(help="on: only operators switch. off: the policy does.")],
    url: UrlOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Leave all switching to operators, or to the policy again."""

    async def act(remote: Remote) -> None:
        ask, words = remote.delete, "the policy switches"
        if mode is Mode.ON:
            ask, words = remote.post, "only operators switch"
        answer = await ask("/llmux/manual")
        typer.echo(json.dumps(answer) if as_json else words)

    speak(url, key_file, act)


# ---- following a switch to its end


async def follow(remote: Remote, model: str, verb: str, within: float | None) -> tuple[Commanded, float]:
    """Send an operator's command for a model, and wait for the end of the switch that carries it out.

    Returns the answer, and the seconds that the switch took. Raises CommandError if it fails, is cancelled, or
    takes longer than ``within`` seconds from when llmux has accepted it.
    """
    async with remote.events() as events:
        await anext(events, None)  # the status: from here on nothing is missed
        answer = await remote.command(model, verb)
        if answer.switch is None:
            return answer, 0.0
        try:
            with _told(f"switch {answer.switch} is under way") as tell:
                async with asyncio.timeout(within):
                    ended = await _end(remote, events, answer.switch, tell)
        except TimeoutError:
            raise CommandError(Exit.TIMED_OUT, f"not within {within:.3g} s; it goes on by itself") from None
    return answer, float(ended["duration_secs"])


async def _end(
    remote: Remote, events: AsyncIterator[Event], switch: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    error = ""
    async for name, fields in events:
        if fields.get("switch") != switch:
            continue
        if name == "switch_drained":
            tell(f"switch {switch}: {fields['from']} has drained and goes to sleep")
        elif name == "switch_failed":
            error = str(fields["error"])
        elif name == "switch_ended":
            if fields["result"] == "success":
                return fields
            raise CommandError(Exit.FAILED, error or "it was called off")
    raise CommandError(Exit.UNREACHABLE, f"{remote.url}: llmux stopped, or the connection broke, before the end")


@contextmanager
def _told(what: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what the command waits for."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.text import Text  # noqa: PLC0415 - only for a terminal

    console = terminal(stderr=True)
    with console.status(Text(what)) as shown:
        yield lambda text: shown.update(Text(text))


LEASE = "/llmux/lease"
LOOK_EVERY = 0.2  # seconds
RENEWED = "5m"  # a command's lease, renewed long before its end; if this process dies, it ends by itself
RENEW_EVERY = 30.0  # seconds
NOT_EXECUTABLE, NOT_FOUND, BY_SIGNAL = 126, 127, 128  # as in a shell


class Requests(enum.StrEnum):
    """What happens to requests."""

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
        fail("with a COMMAND the lease lasts as long as it runs: without --for, --renew, --no-wait and --json")
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
        typer.echo(json.dumps(asdict(answer)) if as_json else _leased(answer, duration))
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
    """Return the name of a command that others see: not its arguments, which may hold secrets."""
    name = os.path.basename(command[0]) if command else ""  # noqa: PTH119 - it need not be a path
    return name[:200] if name.isprintable() else None


async def _take(remote: Remote, options: dict[str, str | None]) -> Leased:
    """Lease the GPU. An interrupted command leaves no lease behind."""
    taking = asyncio.ensure_future(remote.post(LEASE, options))
    try:
        return remote.read(Leased, await asyncio.shield(taking))
    except asyncio.CancelledError:
        if options["id"] is None:
            with contextlib.suppress(CommandError):
                await give_back(remote, (await taking)["id"])
        raise


def _leased(lease: Leased, duration: str | None) -> str:
    state = "nothing holds the GPU" if lease.held else "the GPU is being cleared"
    until = f"for {duration}" if duration else "until it is given back"
    return f"{state}; it is leased {until}: llmux release {lease.id}"


@contextlib.contextmanager
def _given_back_on_term() -> Iterator[None]:
    """Make TERM cancel the block, like Ctrl-C: else it would leave a lease behind."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    try:
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    except (RuntimeError, ValueError):  # not the main thread: it gets no signals
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def _held(remote: Remote, lease: str, within: float | None, *, keep: bool = False) -> None:
    """Wait until nothing holds the GPU. If that fails, the lease is given back, unless it must be kept."""
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
    status = remote.read(Status, await remote.get("/llmux/status"))
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
        print_error(f"the lease could not be given back; it ends by itself within {RENEWED}: {error}")
    return code


async def _child(command: list[str], stop: asyncio.Event) -> int:
    """Run the command to its end, or to that of the lease; return its exit code as in a shell."""
    loop = asyncio.get_running_loop()
    # Ctrl-C reaches the command by itself; here it must not end the code that gives the GPU back.
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    try:
        process = await asyncio.create_subprocess_exec(*command)
    except OSError as error:
        print_error(f"{command[0]}: {error.strerror or error}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    ending = asyncio.create_task(_end_child(process, stop))
    code = await process.wait()
    ending.cancel()
    return code if code >= 0 else BY_SIGNAL - code


async def _keep(remote: Remote, lease: str, stop: asyncio.Event) -> None:
    """Renew the lease; one that is over stops the command, as the GPU belongs to another lease."""
    while True:
        await asyncio.sleep(RENEW_EVERY)
        try:
            await remote.post(LEASE, {"for": RENEWED, "id": lease})
        except CommandError as error:
            print_error(f"the lease cannot be renewed: {error}")
            if error.exit is Exit.REFUSED:
                stop.set()
                return


async def _end_child(process: asyncio.subprocess.Process, stop: asyncio.Event) -> None:
    await stop.wait()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()

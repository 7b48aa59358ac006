"""The hooks under way. Nothing here decides anything about switching.

``alive`` is asked of all models at once, at the start and now and then. Thousands of shells at once would take the
CPU from the event loop for seconds, and starting one takes the loop itself about a millisecond. So only some of
these hooks run at a time, and few are started in one turn of the loop; further ones wait. Hooks that hang keep the
others waiting only for a moment: when none has ended for that long, those that run count no longer. Other hooks
all run at once, also thousands of ``sleep``, but of them, too, few are started in one turn. A timeout counts from
the moment when the hook's process was started, whenever its caller calls ``kill``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from llmux.core.spec import HookKind
from llmux.hookrunner.hook_process import HookProcess, Trace, reap_orphans, spawn
from llmux.hookrunner.job import HookJob, HookResult, PipeReader, environment, not_started

KILL_GRACE = 5.0
"""Seconds between TERM and KILL."""

ORPHAN_AFTER = 0.2
"""Seconds that a pipe may stay open after the exit of its hook before ``on_orphan_pipe`` hears of it."""

AT_ONCE = 64
"""``alive`` hooks that run at once, beside those that hang."""

A_TURN = 8
"""``alive`` hooks, and others, that are started in one turn of the loop."""

HANGING = 0.25
"""Seconds without the end of any ``alive`` hook after which those that run count as hanging."""

SLIGHTLY = 0.1
"""Seconds by which a timeout may count from too early."""

TIMEOUT = "timeout"

REAP_EVERY = 0.1
"""Seconds between two looks for dead orphans, while hooks run and llmux adopts orphans."""


@dataclass(slots=True)
class _Waiting:
    """A hook whose turn to be started has not come yet, or had not."""

    job: HookJob
    on_finished: Callable[[HookResult], None]
    since: float  # as time.monotonic()
    late: float = 0.0  # seconds that it waited
    timeout: float | None = None  # seconds, once ``kill`` was called for it


class HookRunner:
    """Runs hooks. All methods are called from the thread of the loop that runs.

    ``on_line(job, line)`` gets what hooks print, escaped and bounded (see ``Output``); the lines of a
    ``job.quiet`` are worth a debug message only. ``on_orphan_pipe(job)`` tells that something which the hook
    has left behind holds its output: it is read on, but what writes there does not survive llmux's own death.
    ``on_started(jobs)`` tells that hooks have a process (see ``traces``), whose scripts begin when it returns.
    ``on_ending(job)`` tells that a hook has failed or is being ended, which may take a while: TERM is sent when it
    returns.
    ``kill_grace`` is the time between TERM and KILL in seconds. ``inherited`` replaces llmux's environment.
    ``adopts_orphans`` says that llmux is the parent of whatever hooks leave behind: by default, whether it is
    process 1.
    """

    def __init__(
        self,
        *,
        on_line: Callable[[HookJob, str], None] | None = None,
        on_orphan_pipe: Callable[[HookJob], None] | None = None,
        on_started: Callable[[Sequence[HookJob]], None] | None = None,
        on_ending: Callable[[HookJob], None] | None = None,
        kill_grace: float = KILL_GRACE,
        inherited: Mapping[str, str] | None = None,
        adopts_orphans: bool | None = None,
    ) -> None:
        self._on_line = on_line
        self._on_orphan_pipe = on_orphan_pipe
        self._on_started = on_started
        self._on_ending = on_ending
        self._kill_grace = kill_grace
        self._inherited = inherited
        self.secrets: frozenset[str] = frozenset()
        """Hooks see no inherited variable that holds one of these: the keys of remotes."""
        self._running: dict[int, HookJob] = {}
        self._processes: dict[int, HookProcess] = {}
        self._tasks: set[asyncio.Task[HookResult]] = set()
        self._orphans: dict[PipeReader, asyncio.TimerHandle] = {}
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()  # alive hooks, as they were asked for
        self._others: OrderedDict[int, _Waiting] = OrderedDict()  # that wait for the next turn, likewise
        self._at_once = 0  # other hooks that were started in this turn
        self._late: OrderedDict[int, _Waiting] = OrderedDict()  # those that run and have waited before
        self._counted: set[int] = set()  # those that run, but for the hanging ones
        self._turn: asyncio.Handle | None = None  # of the loop, in which more are started
        self._is_next = False  # it is the next one
        self._closed = False
        self._adopts_orphans = os.getpid() == 1 if adopts_orphans is None else adopts_orphans
        self._reaping: asyncio.TimerHandle | None = None

    @property
    def running(self) -> Mapping[int, HookJob]:
        """The hooks whose result is still owed, by id; a live view."""
        return MappingProxyType(self._running)

    def start(self, job: HookJob, on_finished: Callable[[HookResult], None]) -> None:
        """Start a hook. ``on_finished`` is called exactly once, later, from the loop, whatever happens.

        Raises ValueError when a hook with this id is under way.
        """
        if job.id in self._running:
            raise ValueError(f"hook {job.id} is under way already")
        self._running[job.id] = job
        if self._closed:
            not_run = not_started(job, "llmux is stopping")
            asyncio.get_running_loop().call_soon(self._finish, not_run, on_finished)
        elif job.kind is HookKind.ALIVE:
            self._waiting[job.id] = _Waiting(job, on_finished, time.monotonic())
            self._start_waiting_soon()
        else:
            if not self._at_once:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._others[job.id] = _Waiting(job, on_finished, time.monotonic())
            if self._at_once < A_TURN:
                self._at_once += 1
                self._start([self._others.popitem(last=False)[1]])

    def _next_turn(self) -> None:
        """Start some of the other hooks that wait; the rest in the turns that follow."""
        self._at_once = min(A_TURN, len(self._others))
        if self._at_once and not self._closed:
            asyncio.get_running_loop().call_soon(self._next_turn)
            self._start([self._others.popitem(last=False)[1] for _ in range(self._at_once)])

    def _start(self, hooks: Iterable[_Waiting]) -> None:
        self._reap_orphans()
        started = [hook for hook in hooks if self._spawn(hook)]
        if started:
            self._tell(
                "on_started", self._on_started, [hook.job for hook in started]
            )  # all at once: it takes long
        for hook in started:
            self._follow(hook)

    def _spawn(self, hook: _Waiting) -> bool:
        job = hook.job
        hook.late = time.monotonic() - hook.since
        try:
            spawned = spawn(job.script, job.cwd, environment(job, self._inherited, self.secrets))
            tell_line = functools.partial(self._line, job)
            tell_ending = functools.partial(self._tell, "on_ending", self._on_ending)
            process = HookProcess(job, spawned, tell_line, self._kill_grace, tell_ending)
        except (OSError, ValueError, RuntimeError) as error:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._finish, not_started(job, error), hook.on_finished)
            return False
        self._processes[job.id] = process
        return True

    def _follow(self, hook: _Waiting) -> None:
        loop, job, process = asyncio.get_running_loop(), hook.job, self._processes[hook.job.id]
        process.begin()
        if hook.late > SLIGHTLY:
            self._late[job.id] = hook
        if hook.timeout is not None:
            loop.call_later(hook.timeout, self.kill, job.id, TIMEOUT)
        task = loop.create_task(process.follow(), name=f"hook {job.id}: {job.kind} of {job.model}")
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._followed(process, task, hook.on_finished))

    def _start_waiting_soon(self, pause: float = 0.0) -> None:
        if self._is_next:
            return
        if self._turn is not None:
            self._turn.cancel()
        loop = asyncio.get_running_loop()
        self._is_next = not pause
        self._turn = loop.call_later(pause, self._hanging) if pause else loop.call_soon(self._start_waiting)

    def _start_waiting(self) -> None:
        """Start some of the ``alive`` hooks that wait; the rest when others have ended, or hang."""
        self._turn, self._is_next = None, False
        count = max(0, min(A_TURN, len(self._waiting), AT_ONCE - len(self._counted)))
        hooks = [self._waiting.popitem(last=False)[1] for _ in range(count)]
        self._counted.update(hook.job.id for hook in hooks)
        if hooks:
            self._start(hooks)
        if self._waiting:
            self._start_waiting_soon(HANGING if len(self._counted) >= AT_ONCE else 0.0)

    def _hanging(self) -> None:
        self._counted.clear()
        self._start_waiting()

    async def run(self, job: HookJob, timeout: float | None = None) -> HookResult:  # noqa: ASYNC109
        """Run a hook to its end, ``timeout`` seconds at most (None: as long as it takes)."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[HookResult] = loop.create_future()

        def finished(ended: HookResult) -> None:
            if not result.done():  # else nothing waits any more
                result.set_result(ended)

        self.start(job, finished)
        timer = None if timeout is None else loop.call_later(timeout, self.kill, job.id, TIMEOUT)
        try:
            return await result
        except asyncio.CancelledError:
            self.kill(job.id, "cancelled")
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def traces(self) -> tuple[Trace, ...]:
        """Return how the next llmux recognises the hooks that run."""
        found = (process.trace() for process in self._processes.values())
        return tuple(trace for trace in found if trace is not None)

    def kill(self, hook_id: int, reason: str) -> bool:
        """End a hook: TERM to its group, the grace, KILL. Its result is still owed.

        Returns whether it is being ended for this reason: there is no effect on a hook that is unknown, has
        exited, or is being ended already. ``reason`` is ``timeout``, ``stopping`` or words for people.
        """
        queue = next((each for each in (self._waiting, self._others) if hook_id in each), self._late)
        late = queue.get(hook_id)
        if late is not None and reason == TIMEOUT and late.timeout is None and self._has_time_left(late):
            return False
        if late is not None and queue is not self._late:
            del queue[hook_id]
            words = "llmux is stopping" if reason == "stopping" else reason
            never = replace(not_started(late.job, words), killed=reason)
            asyncio.get_running_loop().call_soon(self._finish, never, late.on_finished)
            return True
        process = self._processes.get(hook_id)
        return process is not None and process.kill(reason)

    def _has_time_left(self, late: _Waiting) -> bool:
        """Whether it was started so late that it has time left; then it is ended later."""
        timeout = time.monotonic() - late.since
        if late.job.id in self._waiting or late.job.id in self._others:
            late.timeout = timeout
        elif late.late > SLIGHTLY:
            late.timeout = timeout
            asyncio.get_running_loop().call_later(late.late, self.kill, late.job.id, TIMEOUT)
        return late.timeout is not None

    def kill_all_now(self, reason: str = "stopping") -> None:
        """End every hook under way with KILL. Their results are still owed, if the loop goes on."""
        for hook in [*self._waiting, *self._others]:
            self.kill(hook, reason)
        for process in self._processes.values():
            process.kill_now(reason)

    async def close(self) -> None:
        """End every hook under way with KILL, wait for the results, let go of all pipes; start nothing more.

        A process that a successful hook has left behind stays, but loses the pipe if it holds it.
        """
        self._closed = True
        self.kill_all_now()
        if self._turn is not None:
            self._turn.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0)  # the results of those that had not been started
        for pipe, timer in self._orphans.items():
            timer.cancel()
            pipe.close()
        self._orphans.clear()
        if self._reaping is not None:
            self._reaping.cancel()

    def _followed(
        self, process: HookProcess, task: asyncio.Task[HookResult], on_finished: Callable[[HookResult], None]
    ) -> None:
        job = process.job
        self._tasks.discard(task)
        del self._processes[job.id]
        error = asyncio.CancelledError("cancelled") if task.cancelled() else task.exception()
        if error is None:
            result = task.result()
            self._watch_pipe(process)
        else:
            process.abandon()
            detail = f"could not be followed to its end: {error!r}"
            result = HookResult(job.id, job.model, job.kind, ok=False, killed="cancelled", detail=detail)
        self._finish(result, on_finished)

    def _finish(self, result: HookResult, on_finished: Callable[[HookResult], None]) -> None:
        del self._running[result.id]
        self._late.pop(result.id, None)
        if result.id in self._counted:
            self._counted.discard(result.id)
            if self._waiting:
                self._start_waiting_soon()
        try:
            on_finished(result)
        except Exception as error:  # noqa: BLE001  (the runner outlives its callers' bugs)
            self._report("on_finished", error)

    def _watch_pipe(self, process: HookProcess) -> None:
        """Follow a pipe that outlives its hook."""
        for pipe in [pipe for pipe in self._orphans if not pipe.open]:
            del self._orphans[pipe]
        if process.pipe.open:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(ORPHAN_AFTER, self._warn, process.job, process.pipe)
            self._orphans[process.pipe] = timer

    def _reap_orphans(self) -> None:
        # While hooks run, that is: one may wait for the end of an engine.
        if self._reaping is not None:
            self._reaping.cancel()
            self._reaping = None
        if self._adopts_orphans:
            reap_orphans(process.pid for process in self._processes.values())
            if self._running and not self._closed:
                self._reaping = asyncio.get_running_loop().call_later(REAP_EVERY, self._reap_orphans)

    def _warn(self, job: HookJob, pipe: PipeReader) -> None:
        if pipe.open and self._on_orphan_pipe is not None:
            self._on_orphan_pipe(job)

    def _tell(self, name: str, callback: Callable[[Any], None] | None, about: object) -> None:
        if callback is not None:
            try:
                callback(about)
            except Exception as error:  # noqa: BLE001  (its bug must stop neither the hook nor its ending)
                self._report(name, error)

    def _line(self, job: HookJob, line: str) -> None:
        if self._on_line is not None:
            try:
                self._on_line(job, line)
            except Exception as error:  # noqa: BLE001  (its bug must not stop the reading)
                self._report("on_line", error)

    def _report(self, callback: str, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"{callback} of the hook runner raised", "exception": error}
            )

"""One hook from its start to its result.

::

    start ─┬─ exits with 0 ───────────────────────────▶ result, at once; the group is left alone
           ├─ exits otherwise ─┐
           └─ kill() ──────────┴─▶ TERM to the group ── grace ─▶ KILL ── the group is empty ─▶ result

The exit of the shell counts, never the end of the pipe: a wake hook leaves an engine behind that holds it.
After a failure whatever the hook has started is gone before anybody hears of it, so that a cleanup never
races with a stray engine. Only a process that put itself into another session or group escapes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

from llmux.hookrunner.group import group_is_empty, signal_group
from llmux.hookrunner.job import ExitStatus, HookJob, HookResult, describe
from llmux.hookrunner.leftover import Trace, trace_of
from llmux.hookrunner.output import Output
from llmux.hookrunner.pipe import PipeReader
from llmux.hookrunner.spawn import Spawned
from llmux.hookrunner.watch import ExitWatch

UNENDING_AFTER = 10.0
"""Seconds after KILL when waiting is given up: a process deep in a driver may not die at all."""

FIRST_LOOK, CLOSE_LOOK, LAST_LOOK = 0.002, 0.016, 0.1
"""Seconds between two looks at a group that should become empty: the pause doubles, the looks grow closer."""


class HookProcess:
    """A hook that runs.

    ``kill_grace`` is the time between TERM and KILL in seconds; ``on_ending`` is called once TERM has been sent.
    Raises OSError or RuntimeError when the system has nothing left to watch it with; it has been ended then.
    """

    def __init__(
        self,
        job: HookJob,
        spawned: Spawned,
        emit: Callable[[str], None],
        kill_grace: float,
        on_ending: Callable[[HookJob], None] = lambda _job: None,
    ) -> None:
        self.job = job
        self.pid = spawned.pid
        self._trace = trace_of(self.pid)
        self._on_ending = on_ending
        self._kill_grace = kill_grace
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()  # uvloop's clock counts whole milliseconds, and only once a turn
        self._output = Output(emit)
        self._ended = self._loop.create_future()  # it exited, or is given up
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False  # signals have been sent
        self._killed: str | None = None
        self._killed_after = 0.0
        self._given_up = False
        self._over = False
        self.pipe = PipeReader(self._loop, spawned.output, self._output.feed, self._output.flush)
        try:
            self._watch = ExitWatch(self._loop, spawned.pid, self._exited)
        except BaseException:
            self.pipe.close()
            signal_group(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise

    def trace(self) -> Trace | None:
        """Return what the next llmux recognises it by, None where that cannot be known."""
        return self._trace and self._trace._replace(ending=self._ending)

    def kill(self, reason: str) -> bool:
        """End its group: TERM, the grace, KILL. False, and no effect, when that is under way or it has exited."""
        if self._ending or self._watch.poll() is not None:
            return False
        self._mark(reason)
        self._terminate()
        return True

    def kill_now(self, reason: str) -> None:
        """End its group with KILL, also when ``kill`` is under way."""
        status = self._watch.poll()
        if self._over or (status is not None and status.ok and not self._ending):
            return  # when it has succeeded, what it left behind stays
        if status is None:
            self._mark(reason)
        self._kill()

    def abandon(self) -> None:
        """End it after ``follow`` was cut short: the loop is being torn down, and no hook outlives llmux."""
        self._over = False
        self.kill_now("cancelled")
        self._stop_timer()
        self._given_up = True  # should the loop go on, the exit still finds somebody who reaps
        self.pipe.close()

    async def follow(self) -> HookResult:
        """Wait for its end, and return the result. The pipe may still be open afterwards."""
        try:
            await self._ended
            self.pipe.drain()
            self._output.flush()
            tail = self._output.tail()
            status = self._watch.poll() or ExitStatus()
            ok = status.ok and self._killed is None
            if not ok:
                await self._end_group()
        finally:
            self._over = True
            self._stop_timer()
            if self._watch.poll() is not None:
                self._watch.reap()
        return HookResult(
            self.job.id,
            self.job.model,
            self.job.kind,
            ok=ok,
            exit_code=status.code,
            signal=status.signal,
            duration=time.monotonic() - self._started,
            killed=self._killed,
            tail=tail,
            detail=describe(status, tail, killed=self._killed, after=self._killed_after, unending=self._given_up),
        )

    def _exited(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
        elif self._given_up:
            self._watch.reap()

    def _mark(self, reason: str) -> None:
        if self._killed is None:
            self._killed = reason
            self._killed_after = time.monotonic() - self._started

    async def _end_group(self) -> None:
        if not self._ending:
            self._terminate()  # before the leader is reaped: the group's id is still its own
        if self._watch.poll() is not None:
            self._watch.reap()
        pause = FIRST_LOOK
        while not self._given_up and not group_is_empty(self.pid, look_closely=pause >= CLOSE_LOOK):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)

    def _terminate(self) -> None:
        self._ending = True
        # A stopped process takes TERM only when it continues.
        signal_group(self.pid, signal.SIGTERM, signal.SIGCONT)
        self._on_ending(self.job)
        self._timer = self._loop.call_later(self._kill_grace, self._kill)

    def _kill(self) -> None:
        self._ending = True
        self._stop_timer()
        allowed = signal_group(self.pid, signal.SIGKILL)
        self._timer = self._loop.call_later(UNENDING_AFTER if allowed else 0, self._give_up)

    def _give_up(self) -> None:
        self._given_up = True
        if not self._ended.done():
            self._ended.set_result(None)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

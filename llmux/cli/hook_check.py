"""Tests the hooks of one model, with the hook runner that llmux uses.

``alive → wake → alive → wake → a request → sleep → verify → sleep → alive → sleep``; each step checks the
requirements of a good hook. During the last sleep, another process has the engine's process number. In the end the
model is asleep, if its sleep hook works. Each possible fault has a name, and a repair.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from llmux.cli.hook_probes import (
    bystander,
    holders_of,
    is_open,
    leaders_of,
    smoke_request,
    sockets_on,
    still_run,
    used_gpu_memory,
)
from llmux.config import Config, ModelConfig, to_specs
from llmux.config.setting_types import is_loopback
from llmux.core.effects import RunHook
from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob, HookResult, HookRunner
from llmux.hookrunner.hook_process import group_is_empty
from llmux.hookrunner.runner import ORPHAN_AFTER
from llmux.runtime.switcher import job_for


class Wrong(enum.Enum):
    """A mistake that hooks make, and its repair."""

    WAKE_FAILS = "Run it by hand, with the model's `env`, until it exits with 0 once the engine answers."
    WAKE_STAYS = (
        "Give the command as `cmd`; or let wake start it with `setsid … </dev/null >engine.log 2>&1 &`, wait "
        "until it answers, and exit: llmux sends it nothing before. If it loads or warms up meanwhile, let alive "
        "fail until it is done."
    )
    WAKE_TOO_EARLY = (
        "Let wake wait until the engine answers, as `until curl -fs $LLMUX_URL/health; do sleep 0.2; done`: "
        "llmux sends it requests as soon as wake has ended."
    )
    WAKE_LIES = "Let wake fail when the engine does not come up, and look whether `port` is the engine's own."
    WAKE_NOT_IDEMPOTENT = (
        "Let wake ask first whether the engine is awake, and exit with 0 then: llmux may wake what it only "
        "believes to be asleep."
    )
    WAKE_RESTARTS = "Let wake leave an engine alone that is awake: the answers under way would be cut."
    CANARY_FAILS = "See the engine's own log; wake may have to wait for more than its health."
    WRONG_SERVER = (
        "If it is yours, name it so (`--alias`, `--served-model-name`), or set `upstream_model` to what it is "
        "called there; if not, give the engine a port of its own."
    )
    PIPE_LEFT_OPEN = (
        "Start what stays with `setsid … </dev/null >engine.log 2>&1 &`: with llmux's pipe as its output it "
        "dies when llmux ends."
    )
    IN_HOOKS_GROUP = "Start it with `setsid`, so that it does not belong to the hook."
    SLEEP_FAILS = "Run it by hand, with the model's `env`, until it exits with 0 once the GPU is free."
    SLEEP_TOO_EARLY = (
        "Let sleep wait for the process, as `while kill -0 $pid; do sleep 0.1; done`: a port that is closed "
        "is no memory that is free."
    )
    SLEEP_NOT_IDEMPOTENT = (
        "Let sleep exit with 0 when nothing is awake: llmux runs it to clean up after engines that have crashed."
    )
    SLEEP_ENDS_ANOTHER = (
        "A number that is free is given to the next process. Let sleep remove its pid file once the engine has "
        "ended, and compare when the process was started before it signals it, as hooks/process.sh does."
    )
    CANNOT_GO_DEEPER = (
        "A model with `levels` is put to sleep again, deeper, while it sleeps: let sleep do that without the "
        "GPU, or leave that level out."
    )
    ALIVE_AFTER_SLEEP = (
        "Either sleep does nothing, and hides that (`|| true`), or alive does not look at the engine. Let "
        "alive ask the engine itself, and for its model."
    )
    ALIVE_TAKES_A_STRANGER = "Let alive look for the model's name in `/v1/models`, or for the process."
    MEMORY_NOT_FREED = (
        "Let sleep wait until nvidia-smi no longer shows it, or give `verify: ./hooks/gpu-free.sh`; if it is "
        "never freed, end the process."
    )
    VERIFY_FAILS = "See what holds the memory; `timeouts.verify` may be too short, or verify's limit too strict."
    VERIFY_ALWAYS_PASSES = "Let verify fail while the memory is in use: it may look at another GPU."

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


WARNINGS = frozenset({Wrong.IN_HOOKS_GROUP, Wrong.ALIVE_TAKES_A_STRANGER, Wrong.VERIFY_ALWAYS_PASSES})
"""What works, but not on every day; the others are errors."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault, and what was observed."""

    wrong: Wrong
    seen: str

    @property
    def warning(self) -> bool:
        """Whether a model can be run with it."""
        return self.wrong in WARNINGS

    @property
    def repair(self) -> str:
        """How to repair it."""
        return self.wrong.value


VERIFY_EVERY = 0.5  # seconds, as in llmux
STAYS = 120.0  # seconds that a wake may go on after alive says that the engine is ready: some say so too early
ASK_EVERY = 0.5  # seconds
LINGER = 10.0  # seconds to see whether a state that a hook reported is reached later
SETTLED = 1.0  # seconds after which an engine that still listens will go on listening
LOOK = 0.05
MEMORY_PATIENCE = 10.0  # seconds in which a sleep hook without verify may still free memory
MEMORY_SLACK = 256  # MiB of variation that is ignored


@dataclass(frozen=True, slots=True)
class Step:
    """One step, its result (``ok`` is None if it could not be made), and how many seconds it took."""

    name: str
    ok: bool | None
    seconds: float
    said: str = ""


_TOLD = {  # the meaning of an exit code other than 0, and of 0
    HookKind.ALIVE: ("asleep", "awake"),
    HookKind.VERIFY: ("memory taken", "memory free"),
}


@dataclass
class HookCheck:
    """The test of one model's hooks. ``on_step`` is called for each step, ``on_line`` for the output of hooks.

    ``adopts_orphans`` says that orphaned children of hooks become children of this process.
    """

    config: Config
    model: str
    on_step: Callable[[Step], None] = lambda _step: None
    on_line: Callable[[str, str], None] = lambda _hook, _line: None
    adopts_orphans: bool = False
    steps: list[Step] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._settings: ModelConfig = self.config.models[self.model]
        self._runner = HookRunner(
            on_line=lambda job, line: self.on_line(job.kind.value, line),
            on_orphan_pipe=self._left_open,
            adopts_orphans=self.adopts_orphans,
        )
        self._levels = [*self._settings.levels] or [""]
        self._definitions = {spec.name: spec.definition for spec in to_specs(self.config)[0]}
        self._ids = itertools.count(1)
        self._group = 0  # of the hook that was started last
        self._may_be_awake = False
        self._engine: frozenset[int] = frozenset()  # its processes when it was put to sleep

    async def run(self) -> None:
        """Make all the steps. Every fault becomes a finding."""
        try:
            await self._try()
            if self._may_be_awake:
                await self._clean_up()
            await asyncio.sleep(ORPHAN_AFTER + LOOK)  # the same for the last hooks
        finally:
            await self.close()

    async def close(self) -> None:
        """End what may still run; has no effect after ``run``."""
        await self._runner.close()

    async def awake_others(self) -> list[str]:
        """Return the other models whose ``alive`` succeeds."""
        others = [name for name in self.config.models if name != self.model]
        results = await asyncio.gather(
            *(self._run(HookKind.ALIVE, name, self.config.models[name].timeouts.alive) for name in others)
        )
        return [name for name, result in zip(others, results, strict=True) if result.ok]

    async def _try(self) -> None:
        if (await self._hook(HookKind.ALIVE, "alive", expected=None)).ok:
            await self._hook(HookKind.SLEEP, "sleep, for it was awake")
            if (await self._hook(HookKind.ALIVE, "alive", expected=False)).ok:
                self._found(Wrong.ALIVE_AFTER_SLEEP, "alive says yes at the start, and still after sleep")
                return
        memory_before = await used_gpu_memory()
        if not await self._wake():
            return
        await self._wake_again()
        await self._request()
        memory_awake = await used_gpu_memory()
        if self._settings.verify is not None and memory_awake is not None:  # without a GPU it may well pass
            await self._verify_while_awake()
        if not await self._sleep():
            return
        await self._verify(memory_before, memory_awake)
        harmless = await self._sleep_again()
        await self._sleep_beside_another(harmless=harmless)
        await self._stranger()

    async def _clean_up(self) -> None:
        if not (await self._hook(HookKind.SLEEP, "sleep, to clean up")).ok and self._settings.stop is not None:
            await self._hook(HookKind.STOP, "stop, to clean up")

    async def _wake(self) -> bool:
        self._may_be_awake = True
        watching = asyncio.create_task(self._end_if_it_stays())
        try:
            wake = await self._hook(HookKind.WAKE, "wake")
        finally:
            watching.cancel()
        group = self._group
        if watching.done() and not watching.cancelled():
            self._found(Wrong.WAKE_STAYS, f"alive says that the engine is ready, and wake goes on for {STAYS:g} s")
            return False
        if not wake.ok:
            self._found(Wrong.WAKE_FAILS, f"wake {wake.detail}")
            return False
        address = self._settings.address
        listens = await asyncio.to_thread(is_open, address.host, address.port)
        alive = await self._hook(HookKind.ALIVE, "alive")
        if not listens or not alive.ok:
            seen = f"alive {alive.detail}" if listens else f"nothing listens at {address.url}"
            started = time.monotonic()
            if not await self._becomes_ready():
                self._found(
                    Wrong.WAKE_LIES, f"wake has exited with 0, but {seen}, and that stays so for {LINGER:g} s"
                )
                return False
            later = time.monotonic() - started
            self._found(
                Wrong.WAKE_TOO_EARLY, f"wake has exited with 0, but {seen}; {later:.1f} s later it is ready"
            )
        if not group_is_empty(group, look_closely=True):
            self._found(Wrong.IN_HOOKS_GROUP, "what wake has started is in the hook's own process group")
        await asyncio.sleep(ORPHAN_AFTER + LOOK)  # the runner reports an open pipe only then
        return True

    async def _end_if_it_stays(self) -> None:
        """End a wake that goes on although the engine is ready, as one that is the engine itself."""
        address, ready = self._settings.address, math.inf
        while time.monotonic() - ready < STAYS:
            await asyncio.sleep(ASK_EVERY)
            there = await asyncio.to_thread(is_open, address.host, address.port)
            if not there or not (await self._run(HookKind.ALIVE, self.model, self._settings.timeouts.alive)).ok:
                ready = math.inf
            elif ready == math.inf:
                ready = time.monotonic()
        for number, job in self._runner.running.items():
            if job.kind is HookKind.WAKE:
                self._runner.kill(number, "it does not return")

    async def _becomes_ready(self) -> bool:
        address = self._settings.address
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline:
            if await asyncio.to_thread(is_open, address.host, address.port):
                result = await self._run(HookKind.ALIVE, self.model, self._settings.timeouts.alive)
                if result.ok:
                    return True
            await asyncio.sleep(LOOK)
        return False

    async def _wake_again(self) -> None:
        before = self._sockets()
        again = await self._hook(HookKind.WAKE, "wake again")
        if not again.ok:
            self._found(Wrong.WAKE_NOT_IDEMPOTENT, f"the second wake of an engine that is awake {again.detail}")
        elif before and self._sockets() != before:
            self._found(Wrong.WAKE_RESTARTS, "after the second wake another server listens on the port")

    async def _request(self) -> None:
        settings, started = self._settings, time.monotonic()
        answer = await smoke_request(settings.address.url, settings.upstream_model or self.model)
        seconds = time.monotonic() - started
        if answer.ok is False:
            self._found(Wrong.CANARY_FAILS, f"the engine is awake, but {answer.said}")
        self._step(Step("request", answer.ok, seconds, answer.said))
        names = (settings.upstream_model,) if settings.upstream_model else (self.model, *settings.aliases)
        expected = {name.removesuffix(":latest") for name in names}
        if answer.names is not None and not expected & set(answer.names):
            served = ", ".join(answer.names) or "no model"
            wanted = " or ".join(sorted(expected))
            self._found(
                Wrong.WRONG_SERVER, f"what answers at {settings.address.url} serves {served}, not {wanted}"
            )

    async def _verify_while_awake(self) -> None:
        verify = await self._hook(HookKind.VERIFY, "verify, while awake", expected=False)
        if verify.ok:
            self._found(Wrong.VERIFY_ALWAYS_PASSES, "verify says that the memory is free while the model is awake")

    def _sockets(self) -> frozenset[str]:
        """Return the sockets that listen on the engine's port, if it is on this machine."""
        address = self._settings.address
        return sockets_on(address.port) if is_loopback(address.host) else frozenset()

    async def _sleep(self) -> bool:
        processes = await asyncio.to_thread(holders_of, self._sockets())
        self._engine = leaders_of(processes, os.getpid())
        sleep = await self._hook(HookKind.SLEEP, "sleep")
        if not sleep.ok:
            self._found(Wrong.SLEEP_FAILS, f"sleep {sleep.detail}")
            return False
        await self._look_who_is_left(processes)
        return True

    async def _look_who_is_left(self, processes: frozenset[int]) -> None:
        """Check if processes that had the port end only now; they stay if the engine sleeps as a process."""
        started, left = time.monotonic(), still_run(processes)

        def for_(seconds: float) -> bool:
            return time.monotonic() - started < seconds

        while left and self._sockets() and still_run(left) == left and for_(SETTLED):  # noqa: ASYNC110 - others'
            await asyncio.sleep(LOOK)
        if left and not (self._sockets() and still_run(left) == left):
            pids = ", ".join(map(str, sorted(left)))
            while still_run(left) and for_(LINGER):  # noqa: ASYNC110 - others' processes
                await asyncio.sleep(LOOK)
            how_long = "for long" if still_run(left) else f"for {time.monotonic() - started:.1f} s"
            seen = f"sleep has exited with 0, but process {pids}, which had the port, lives on {how_long}"
            self._found(Wrong.SLEEP_TOO_EARLY, seen)

    async def _verify(self, before: int | None, awake: int | None) -> None:
        limit = self._settings.timeouts.verify
        started = time.monotonic()
        if self._settings.verify is not None:
            while True:
                left = limit - (time.monotonic() - started)
                result = await self._run(HookKind.VERIFY, self.model, max(left, LOOK))
                if result.ok or left <= 0:
                    break
                await asyncio.sleep(VERIFY_EVERY)
            self._step(
                Step(
                    "verify",
                    result.ok,
                    time.monotonic() - started,
                    "expected: memory free ✓" if result.ok else result.detail,
                )
            )
            if not result.ok:
                self._found(Wrong.VERIFY_FAILS, f"for {limit:g} s after sleep, verify {result.detail}")
        if before is None or awake is None or awake - before < MEMORY_SLACK:
            said = "no GPU figures" if before is None or awake is None else "it takes no GPU memory to speak of"
            self._step(Step("GPU memory", None, 0.0, said))
            return
        while True:
            now = await used_gpu_memory()
            free = now is not None and now - before < max(MEMORY_SLACK, (awake - before) // 4)
            if free or time.monotonic() - started > max(limit if self._settings.verify else 0.0, MEMORY_PATIENCE):
                break
            await asyncio.sleep(VERIFY_EVERY)
        said = f"{before} MiB in use before, {awake} awake, {now} after sleep"
        self._step(Step("GPU memory", free, time.monotonic() - started, said))
        if not free:
            self._found(Wrong.MEMORY_NOT_FREED, f"GPU memory: {said}")

    async def _sleep_again(self) -> bool:
        harmless = True
        again = await self._hook(HookKind.SLEEP, "sleep again")
        if not again.ok:
            harmless = False
            self._found(Wrong.SLEEP_NOT_IDEMPOTENT, f"the second sleep, with nothing awake, {again.detail}")
        for level in self._levels[1:]:
            deeper = await self._hook(HookKind.SLEEP, f"sleep, on to level {level}", level=level)
            if not deeper.ok:
                harmless = False
                self._found(Wrong.CANNOT_GO_DEEPER, f"sleep, with LLMUX_SLEEP_LEVEL={level}, {deeper.detail}")
        if (await self._hook(HookKind.ALIVE, "alive", expected=False)).ok:
            self._found(Wrong.ALIVE_AFTER_SLEEP, "alive says yes after sleep has succeeded")
        else:
            self._may_be_awake = False
        return harmless

    async def _sleep_beside_another(self, *, harmless: bool) -> None:
        """Run sleep again while other processes have the numbers of the engine's processes.

        ``harmless`` says that the second sleep was harmless, as far as it showed.
        """
        gone = sorted(self._engine - still_run(self._engine))
        if self._may_be_awake or not gone:
            return
        name = "sleep, number reused"
        with contextlib.ExitStack() as stack:
            given = [await asyncio.to_thread(stack.enter_context, bystander(pid)) for pid in gone]
            others = [other for other in given if other is not None]
            if not others:
                said = "the engine's number cannot be given to another process here; mostly, that takes root"
                self._step(Step(name, None, 0.0, said))
                return
            result = await self._run(HookKind.SLEEP, self.model, self._settings.timeouts.sleep, self._levels[-1])
            hit = [str(other.pid) for other in others if other.poll() is not None]
        self._step(Step(name, result.ok and not hit, result.duration, "" if result.ok else result.detail))
        if hit:
            seen = f"the engine had ended, and sleep has ended process {', '.join(hit)}, which has its number now"
            self._found(Wrong.SLEEP_ENDS_ANOTHER, seen)
        elif harmless and not result.ok:
            seen = f"sleep, when another process has the number that the engine had, {result.detail}"
            self._found(Wrong.SLEEP_NOT_IDEMPOTENT, seen)

    async def _stranger(self) -> None:
        """Let another server answer on the port: alive should not mistake it for the engine."""
        address = self._settings.address
        if self._may_be_awake or address.tls or not is_loopback(address.host) or self._sockets():
            return
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", _another_server)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, address.host, address.port, reuse_address=True).start()
            alive = await self._hook(HookKind.ALIVE, "alive, with a stranger", expected=False)
        except OSError:
            return
        finally:
            await runner.cleanup()
        if alive.ok:
            self._found(Wrong.ALIVE_TAKES_A_STRANGER, "alive says yes to any server that answers 200 on the port")

    async def _hook(
        self, kind: HookKind, name: str, *, expected: bool | None = True, level: str | None = None
    ) -> HookResult:
        """Run a hook as a step; ``expected`` None: either result is fine."""
        if level is None:
            level = self._levels[0] if kind is HookKind.SLEEP else ""
        result = await self._run(kind, self.model, getattr(self._settings.timeouts, kind.value), level)
        fine = expected is None or result.ok == expected
        told = _TOLD.get(kind)
        if told is None:
            said = "" if result.ok else result.detail
        elif fine:
            said = told[result.ok] if expected is None else f"expected: {told[result.ok]} ✓"
        else:
            said = f"{told[result.ok]}, expected: {told[not result.ok]}"
            said += "" if result.ok else f"; {result.detail}"
        self._step(Step(name, fine, result.duration, said))
        return result

    async def _run(self, kind: HookKind, name: str, timeout: float, level: str = "") -> HookResult:  # noqa: ASYNC109
        hook = RunHook(
            next(self._ids),
            name,
            kind,
            self._definitions[name],
            switch=1 if kind in (HookKind.WAKE, HookKind.SLEEP) else 0,
            sources=(name,) if kind is HookKind.SLEEP else (),
            target=name if kind is HookKind.WAKE else "",
            level=level,
        )
        running = asyncio.ensure_future(self._runner.run(job_for(hook), timeout))
        await asyncio.sleep(0)
        self._group = next((trace.pid for trace in self._runner.traces()), self._group)
        return await running

    def _left_open(self, job: HookJob) -> None:
        seen = f"something that {job.kind.value} has started holds the hook's output"
        if not any(finding.wrong is Wrong.PIPE_LEFT_OPEN and finding.seen == seen for finding in self.findings):
            self._found(Wrong.PIPE_LEFT_OPEN, seen)

    def _found(self, wrong: Wrong, seen: str) -> None:
        self.findings.append(Finding(wrong, seen))

    def _step(self, step: Step) -> None:
        self.steps.append(step)
        self.on_step(step)


async def _another_server(_request: web.Request) -> web.Response:
    return web.json_response(
        {"object": "list", "data": [{"id": "another-model", "object": "model"}], "status": "ok"}
    )

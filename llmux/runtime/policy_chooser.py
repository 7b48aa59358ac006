"""``use: auto``: chooses the policy beside serving, by replaying the traffic of the last hour.

Of each request it keeps the arrival, the model, the bytes of it and its answer, and how long it waited and was
served: no content, in memory, bounded. Every few minutes a separate process, at the lowest priority, replays them
through the production core under each candidate, and reports the best. The report is checked, and adopted by an
event to the core. Whatever happens to that process, serving continues unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from llmux.core.events import PolicyChosen
from llmux.estimates import costs_of
from llmux.observability.metrics import Looks
from llmux.observability.state_file import dump_costs
from llmux.runtime.recorder import model_line, outcome_of, rules_line

if TYPE_CHECKING:
    from llmux.runtime.request_handle import Outcome, Ticket
    from llmux.runtime.switcher import Switcher

MOST = 20_000  # requests that are kept; with more, they cover a shorter time
LIMIT = 120.0  # seconds that the process may take
SHARE = 0.05  # of one core, at most, over time
POLL = 0.05  # seconds between two polls of the process
ANSWER = 64 * 1024  # bytes: a longer answer is not read
REASON = 500  # characters
SURE, GAIN = 0.5, 0.0  # the least figures of an answer with which a policy is adopted


class LookError(Exception):
    """The process failed, took too long or gave an impossible answer; the message says which."""


class Exchange(NamedTuple):
    """What is kept of one request. Times are on the core's clock, in seconds."""

    arrived: float
    model: str
    waited: float
    served: float | None
    first: float | None  # from its arrival
    sent: int
    got: int
    outcome: str

    def line(self, origin: float) -> dict[str, Any]:
        """Return it as a record has it."""
        return {
            "model": self.model,
            "arrival_s": self.arrived - origin,
            "wait_s": self.waited,
            "service_s": self.served,
            "first_byte_s": self.first,
            "prompt_bytes": self.sent,
            "answer_bytes": self.got,
            "outcome": self.outcome,
        }


class Traffic:
    """The requests of the last ``past`` seconds."""

    def __init__(self, past: float) -> None:
        self.past = past
        self.requests: deque[Exchange] = deque(maxlen=MOST)

    def add(self, made: Exchange, now: float) -> None:
        """Add a request that has ended, and forget the ones that are too old."""
        self.requests.append(made)
        while self.requests and self.requests[0].arrived < now - self.past:
            self.requests.popleft()


class Chooser:
    """Evaluates policies every few minutes while the configured policy chooses among others."""

    def __init__(self, switcher: Switcher) -> None:
        self.command: Sequence[str] = (sys.executable, "-P", "-X", "utf8", "-m", "llmux.simulator.look_back")
        self.limit = LIMIT
        self.traffic: Traffic | None = None
        self.counts = {"adopted": 0, "kept": 0, "failed": 0}  # evaluations, by result
        self.cpu = 0.0  # CPU seconds of all of them
        self.last: dict[str, Any] | None = None  # the last answer
        self.memory: Any = None  # what evaluations have found so far, in their own format
        self.error: str | None = None  # why the last one failed
        self.due: float | None = None
        self._switcher = switcher
        self._task: asyncio.Task[None] | None = None
        self._policy: Any = None

    # ---- life

    def follow(self) -> None:
        """Begin, end or restart, depending on whether the policy in force chooses among others."""
        policy: Any = self._switcher.core.state.policy
        if policy is self._policy:
            return
        self.end()
        if hasattr(policy, "makers"):
            self._policy = policy
            self.traffic = Traffic(policy.options.past)
            self._task = asyncio.get_running_loop().create_task(self._go_on(policy), name="auto")
            self._switcher.on_left(self.request)

    def end(self) -> None:
        """Evaluate no more, and end the process if one runs."""
        if self._task is not None:
            self._task.cancel()
        self._task = self._policy = self.traffic = self.last = self.memory = self.error = self.due = None
        self._switcher.off_left(self.request)

    async def close(self) -> None:
        """End it, and wait until it has ended."""
        task = self._task
        self.end()
        if task is not None:
            await asyncio.wait([task])

    # ---- what is seen

    def request(self, ticket: Ticket, status: int | None, outcome: Outcome | None, sent: int) -> None:
        """Record what became of a request; see ``Switcher.leave``."""
        traffic, now = self.traffic, self._switcher.now()
        if traffic is None:
            return
        admitted = ticket.admission is not None
        served = max(0.0, now - ticket.arrived - ticket.waited) if admitted else None
        waited = ticket.waited if admitted else now - ticket.arrived
        first = None if outcome is None else outcome.first_byte_at
        got = 0 if outcome is None else outcome.bytes_out
        word = outcome_of(ticket, status, outcome)
        began = None if first is None else first - ticket.arrived
        traffic.add(Exchange(ticket.arrived, ticket.model, waited, served, began, sent, got, word), now)

    # ---- looking back

    async def _go_on(self, policy: Any) -> None:
        every = float(policy.options.every)
        pause = max(every, float(policy.options.past))  # before that there is not an hour of evidence
        while True:
            self.due = self._switcher.now() + pause
            await asyncio.sleep(pause)
            self.due = None
            before = self.cpu
            try:
                await self.look(policy)
                self.error = None
            except Exception as error:  # noqa: BLE001 - whatever it is, serving goes on unchanged
                self.counts["failed"] += 1
                self.error = str(error) or repr(error)
                self._switcher.log.emit("policy_look_failed", error=self.error)
            pause = max(every, (self.cpu - before) / SHARE)

    async def look(self, policy: Any) -> None:
        """Evaluate once, and let the policy adopt the best. LookError: nothing has changed."""
        traffic = self.traffic
        assert traffic is not None
        answer = await self._ask(self._question(policy, traffic))
        if answer is None:
            return
        choice = checked(answer, policy.candidates, policy.chosen)
        self.last, self.memory = {**choice, "time": time.time()}, answer.get("memory")
        adopted = choice["name"] != choice["before"]
        self.counts["adopted" if adopted else "kept"] += 1
        if adopted:
            self._switcher.post(PolicyChosen(choice["name"], choice["reason"]))

    def _question(self, policy: Any, traffic: Traffic) -> dict[str, Any]:
        s, config = self._switcher.core.state, self._switcher.config
        return {
            "use": config.policy.use,
            "options": dict(config.policy.options),
            "folder": str(config.folder),
            "chosen": policy.chosen,
            "anticipate": s.rules.anticipate,
            "rules": rules_line(s.rules),
            "models": [model_line(model) for model in s.models.values() if not model.removed],
            "costs": dump_costs(costs_of(s)),
            "guesses": {name: list(guess) for name, guess in s.costs.guesses.items()},
            "memory": self.memory,
            "requests": (list(traffic.requests), self._switcher.now() - traffic.past),
        }

    async def _ask(self, question: dict[str, Any]) -> Any:
        """Run a process for the answer; None if the question is not worth it. Its CPU time is counted."""
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answered:
            beginning = asyncio.ensure_future(asyncio.to_thread(self._begin, question, asked, answered))
            try:
                process = await asyncio.shield(beginning)
            except asyncio.CancelledError:  # a thread cannot be cancelled, but its process can be ended
                with contextlib.suppress(Exception):
                    self._kill(await beginning)
                raise
            status = await self._wait(process)
            if status != 0:
                answered.seek(0)
                told = answered.read(ANSWER).decode(errors="replace").strip().rpartition("\n")[2]
                raise LookError(f"the process ended with {status}" + (f": {told[:REASON]}" if told else ""))
            answered.seek(0)
            text = answered.read(ANSWER + 1)
        if len(text) > ANSWER:
            raise LookError(f"the answer is longer than {ANSWER} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise LookError(f"the answer is not JSON: {text[:80]!r}") from None

    def _begin(self, question: dict[str, Any], asked: IO[bytes], answered: IO[bytes]) -> subprocess.Popen[bytes]:
        requests, origin = question["requests"]
        question["since"] = origin
        question["requests"] = [each.line(origin) for each in requests if each.arrived >= origin]
        asked.write(json.dumps(question, default=str).encode())
        asked.seek(0)
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(  # noqa: S603 - llmux's own program
            self.command,
            stdin=asked,
            stdout=answered,
            stderr=answered,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )

    async def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for its end, at most ``limit`` seconds, and count its CPU time; nothing of it is left."""
        began = time.monotonic()
        try:
            while time.monotonic() < began + self.limit:
                if (status := self._reaped(process, os.WNOHANG)) is not None:
                    return status
                await asyncio.sleep(POLL)
        finally:
            self._kill(process)
        raise LookError(f"the process took longer than {self.limit:g} s")

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it and its children; waiting for its own end takes microseconds."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            self._reaped(process, 0)

    def _reaped(self, process: subprocess.Popen[bytes], options: int) -> int | None:
        pid, status, used = os.wait4(process.pid, options)
        if pid == 0:
            return None
        self.cpu += used.ru_utime + used.ru_stime
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode

    # ---- what operators see

    def document(self) -> dict[str, Any] | None:
        """Return its part of ``/llmux/status``; None while the policy does not choose."""
        policy = self._policy
        if policy is None:
            return None
        now = self._switcher.now()
        return {
            "chosen": policy.chosen,
            "among": list(policy.candidates),
            "objective": policy.options.objective,
            "last": self.last,
            "error": self.error,
            "next_in": None if self.due is None else max(0.0, self.due - now),
            "looks": dict(self.counts),
            "cpu_seconds": self.cpu,
            "requests": len(self.traffic.requests) if self.traffic is not None else 0,
        }

    def looks(self) -> Looks:
        """Return its metrics; nothing while the policy does not choose."""
        policy = self._policy
        if policy is None:
            return Looks()
        return Looks({name: name == policy.chosen for name in policy.candidates}, self.counts, self.cpu)


def checked(answer: Any, candidates: Sequence[str], chosen: str) -> dict[str, Any]:
    """Return an answer after checking it: names that exist, and figures that are numbers and agree with it.

    Raises:
        LookError: it is not valid; says why.

    """
    if not isinstance(answer, Mapping):
        raise LookError("the answer is not an object")
    name, before, reason, requests = (answer.get(key) for key in ("name", "before", "reason", "requests"))
    if name not in candidates:
        raise LookError(f"the answer names {str(name)[:80]!r}, which is not a candidate")
    if before != chosen:
        raise LookError(f"the answer is about {str(before)[:80]!r}, but {chosen!r} decides")
    if not isinstance(reason, str) or isinstance(requests, bool) or not isinstance(requests, int):
        raise LookError("the answer gives no reason")
    scores = {}
    for each in answer.get("scores") or ():
        if not isinstance(each, Mapping) or each.get("name") not in candidates:
            raise LookError("the answer has a score of what is not a candidate")
        figures: list[Any] = [each.get(key) for key in ("value", "sure")]
        if not all(isinstance(one, int | float) and math.isfinite(one) and one >= 0 for one in figures):
            raise LookError(f"the answer has a score of {each['name']} that is not a number")
        scores[each["name"]] = {"value": float(figures[0]), "sure": min(1.0, float(figures[1]))}
    if set(scores) != set(candidates):
        raise LookError("the answer lacks the score of a candidate")
    if name != before and not (scores[name]["value"] < scores[before]["value"] and scores[name]["sure"] > SURE):
        raise LookError(f"the answer would adopt {name}, which its own figures do not call better")
    shown = "".join(char if char.isprintable() else " " for char in reason)[:REASON]
    ordered = [{"name": each, **scores[each]} for each in candidates]
    return {"name": name, "before": before, "reason": shown, "requests": requests, "scores": ordered}

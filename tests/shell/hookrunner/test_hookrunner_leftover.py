"""Hooks that a killed llmux has left behind are ended by the next one."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from llmux.hookrunner.leftover import Trace, end_leftovers, trace_of


@contextlib.contextmanager
def hook(script: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sh", "-c", script], process_group=0, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        yield process


async def test_it_is_ended_with_its_group():
    with hook("echo; sleep 60 & wait") as process:
        trace = trace_of(process.pid)
        assert trace is not None
        assert await end_leftovers([trace], grace=5) == [trace]
        assert process.wait() == -15
        assert process.stdout.read() == b""  # the sleeper, who held the pipe, is gone too


async def test_one_that_ignores_term_is_killed():
    with hook("trap '' TERM; echo; while :; do sleep 0.05; done") as process:
        assert await end_leftovers([trace_of(process.pid)], grace=0.1)
        assert process.wait() == -9


async def test_another_process_with_the_same_number_is_left_alone():
    with hook("echo; sleep 60") as process:
        trace = trace_of(process.pid)
        others = [trace._replace(started=trace.started - 1), trace._replace(boot="another")]
        assert await end_leftovers(others) == []
        assert process.poll() is None
        process.kill()
        process.wait()
        assert await end_leftovers([trace]) == []


async def test_what_leads_no_group_is_left_alone():
    assert await end_leftovers([trace_of(os.getpid()), Trace(1, 0, ""), Trace(0, 0, "")]) == []

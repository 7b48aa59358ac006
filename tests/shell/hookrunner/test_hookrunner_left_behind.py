"""What a hook leaves behind when it succeeds: an engine that goes on living, writing and being read."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace

from tests.harness.waiting import PATIENCE

# Writes on when it is told to, as an engine does when a request comes; says so afterwards through a fifo.
ENGINE = "(read go < go; head -c 10000000 /dev/zero; echo; echo still here; echo $? > done; sleep 1000) &"


def with_fifos(bench) -> None:
    os.mkfifo(bench.folder / "go")
    os.mkfifo(bench.folder / "done")


async def test_an_engine_that_holds_the_pipe(bench, is_alive, strays):
    with_fifos(bench)
    result = await bench.run(f"{ENGINE} echo engine $!; echo ready")
    strays.append(await bench.pid("engine"))
    assert result.ok
    assert result.tail.endswith("ready\n")
    assert bench.orphans == []  # the warning has not delayed the result
    await bench.until(lambda: bench.orphans)
    assert [job.id for job in bench.orphans] == [result.id]

    await asyncio.to_thread((bench.folder / "go").write_text, "go\n")
    async with asyncio.timeout(PATIENCE):
        status = await asyncio.to_thread((bench.folder / "done").read_text)
    assert status == "0\n"  # all 10 MB were taken, and SIGPIPE hit nobody
    assert is_alive(strays[0])
    assert sum(len(line) for line in bench.lines) < 300_000
    assert bench.lines[-1] == "… further output is dropped"
    assert len(bench.results) == len(bench.orphans) == 1


async def test_its_output_is_logged_after_the_result(bench, strays):
    with_fifos(bench)
    assert (await bench.run("(read go < go; echo engine says hello; sleep 1000) & echo pid $!")).ok
    strays.append(await bench.pid("pid"))
    await asyncio.to_thread((bench.folder / "go").write_text, "go\n")
    assert await bench.said("engine") == ["says", "hello"]


async def test_the_pipe_is_let_go_when_the_engine_ends(bench, open_files, gone, turns_until):
    before = open_files()
    assert (await bench.run("sleep 1000 & echo pid $!")).ok
    engine = await bench.pid("pid")
    assert open_files() > before
    os.kill(engine, signal.SIGTERM)
    await gone(engine)
    await turns_until(lambda: open_files() == before)
    assert bench.orphans == []


async def test_an_engine_without_the_pipe_needs_no_warning(bench, is_alive, open_files, strays, turns_until):
    before = open_files()
    result = await bench.run("sleep 1000 > engine.log 2>&1 & echo pid $!")
    strays.append(await bench.pid("pid"))
    assert result.ok
    await turns_until(lambda: open_files() == before)  # the engine's shell may be late to redirect its output
    assert bench.orphans == []
    assert is_alive(strays[0])


async def test_an_engine_in_its_own_session_is_not_touched(bench, is_alive, strays):
    result = await bench.run("setsid sleep 1000 > /dev/null 2>&1 & echo pid $!")
    strays.append(await bench.pid("pid"))
    assert result.ok
    await bench.runner.close()
    assert is_alive(strays[0])


async def test_closing_leaves_engines_alive_and_lets_go_of_their_pipes(bench, is_alive, open_files, strays):
    before = open_files()
    assert (await bench.run("sleep 1000 & echo pid $!")).ok
    strays.append(await bench.pid("pid"))
    await bench.runner.close()
    assert is_alive(strays[0])
    assert open_files() == before


async def test_no_descriptor_is_lost(bench, open_files, gone):
    before = open_files()
    for _ in range(10):
        await bench.run("true")
        await bench.run("sleep 1000 & exit 1")
        await bench.run("nonsense", cwd="/nowhere")
        job, future = bench.start("sleep 1000")
        bench.runner.kill(job.id, "timeout")
        await future
    assert (await bench.run("sleep 1000 & echo pid $!")).ok
    engine = await bench.pid("pid")
    os.kill(engine, signal.SIGKILL)
    await gone(engine)
    await bench.runner.close()
    assert open_files() == before


async def test_an_engine_that_never_stops_printing(bench, is_alive, strays):
    result = await bench.run("yes & echo $! > pid")
    strays.append(int((bench.folder / "pid").read_text()))
    assert result.ok
    assert result.duration < PATIENCE / 2
    await bench.until(lambda: bench.orphans)
    assert (await bench.run("echo others still run")).ok
    assert is_alive(strays[0])


async def test_a_pipe_which_closed_in_time_is_no_orphan_s(bench):
    job = bench.job("true")
    for still_open in (False, True):
        bench.runner._warn(job, SimpleNamespace(open=still_open))
        assert bench.orphans == [job] * still_open

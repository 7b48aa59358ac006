"""``llmux lease -- COMMAND`` and ``llmux status --watch``, as processes: they get signals."""

import asyncio
import os
import signal
import sys

import pytest

from llmux.cli.terminal import Exit
from tests.cli.invoking import CLEAN
from tests.server.house import HOST, until

OFTEN = "from llmux.cli import main, operate; operate.RENEW_EVERY = 0.05; main()"


@pytest.fixture
async def start(house, monkeypatch):
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)
    started = []

    async def go(*words, code="from llmux.cli import main; main()"):
        monkeypatch.setenv("LLMUX_URL", f"http://{HOST}:{house.port}")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, *words, stdout=pipe, stderr=pipe, cwd=house.folder, process_group=0
        )
        started.append(process)
        return process

    yield go
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()  # it is not gone for asyncio before its output has been read


def lease_of(house):
    return house.switcher.core.state.lease


async def test_a_command_has_the_gpu_as_long_as_it_runs(house, start):
    await house.open()
    assert (await house.chat("a")).status == 200
    script = "ls *.up; touch runs; until [ -e release.x ]; do sleep 0.01; done; exit 5"
    process = await start("lease", "-r", "training", "--", "sh", "-c", script, code=OFTEN)
    await until((house.folder / "runs").exists)
    assert lease_of(house).reason == "training"
    until_then = lease_of(house).until
    await until(lambda: lease_of(house).until > until_then)  # renewed
    assert (await house.chat("a")).status == 503
    house.release("x")
    assert await process.wait() == 5
    assert await process.stdout.read() == b""
    assert lease_of(house) is None
    assert (await house.chat("a")).status == 200


async def test_a_command_whose_lease_is_taken_away_is_ended(house, start):
    await house.open()
    process = await start("lease", "--", "sh", "-c", "touch runs; exec sleep 100", code=OFTEN)
    await until((house.folder / "runs").exists)
    assert lease_of(house).reason == "sh"
    assert (await house.ask("DELETE", "/llmux/lease")).status == 202
    assert await process.wait() == 128 + signal.SIGTERM
    assert b"the lease cannot be renewed: the GPU is not leased" in await process.stderr.read()


async def test_ctrl_c_ends_the_command_and_gives_the_gpu_back(house, start):
    await house.open()
    process = await start("lease", "--", "sh", "-c", "trap 'exit 9' INT; touch runs; while :; do sleep 0.01; done")
    await until((house.folder / "runs").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert await process.wait() == 9
    assert lease_of(house) is None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, Exit.TERMINATED)]
)
async def test_a_lease_that_is_still_waited_for_is_given_back(house, start, number, code):
    await house.open()
    async with house.switcher.hold("a"):
        process = await start("lease", "--", "touch", "runs")
        await until(lambda: lease_of(house))
        process.send_signal(number)
        assert await process.wait() == code
    assert lease_of(house) is None
    assert not (house.folder / "runs").exists()


async def test_a_command_that_is_none(house, start):
    await house.open()
    process = await start("lease", "--", "./none")
    assert await process.wait() == 127
    assert b"./none: No such file or directory" in await process.stderr.read()
    assert lease_of(house) is None


async def row(process, *words):
    """Read until a line of the table holds these."""
    async for line in process.stdout:
        if all(word in line.split() for word in words):
            return
    raise AssertionError(await process.stderr.read())


async def test_in_a_hook_the_engine_is_not_taken_for_llmux(house, start, monkeypatch):
    monkeypatch.setenv("LLMUX_HOOK", "wake")
    await house.open()
    process = await start("status")
    assert b"http://127.0.0.1:3000" in b"".join(await process.communicate())
    process = await start("status", "--url", f"http://{HOST}:{house.port}")
    assert await process.wait() == Exit.DONE


async def test_the_status_is_watched(house, start):
    await house.open()
    process = await start("status", "--watch", "--every", "0.1")
    await row(process, b"a", b"asleep")
    assert (await house.chat("a")).status == 200
    await row(process, b"a", b"awake")
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert process.returncode == Exit.INTERRUPTED
    assert b"Traceback" not in errors

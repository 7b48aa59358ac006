"""What hooks print: bounded, escaped, and never a reason to stall."""

from __future__ import annotations

import asyncio
import resource

import pytest

from llmux.core.spec import HookKind
from llmux.hookrunner import HookJob
from llmux.hookrunner.job import DROPPED, LINE_BYTES, LOG_LINES, TAIL_BYTES, Output
from tests.harness.waiting import PATIENCE


@pytest.fixture
def lines():
    return []


@pytest.fixture
def output(lines):
    return Output(lines.append)


def test_lines_are_put_together_from_chunks(output, lines):
    for chunk in (b"one\ntw", b"o", b"\n\n  \nthree\r\nfo", b"ur"):
        output.feed(chunk)
    assert lines == ["one", "two", "three"]
    output.flush()
    output.flush()
    assert lines == ["one", "two", "three", "four"]
    assert output.tail() == "one\ntwo\n\n  \nthree\nfour"


def test_a_progress_bar(output, lines):
    output.feed(b"loading 1%\rloading 50%\rloading 100%\n")
    assert lines == ["loading 1%", "loading 50%", "loading 100%"]


def test_control_characters_cannot_forge_log_lines(output, lines):
    output.feed("\x1b[31mred\x1b[0m\tnul\0 del\x7f next\x85 sep\u2028ä\n".encode())
    expected = "\\x1b[31mred\\x1b[0m\tnul\\x00 del\\x7f next\\x85 sep\\u2028ä"
    assert lines == [expected]
    assert output.tail() == expected + "\n"


def test_bytes_that_are_no_text(output, lines):
    output.feed(bytes(range(256)))
    output.flush()
    assert "".join(lines).count("\ufffd") == 128
    assert output.tail().count("\ufffd") == 128


def test_a_long_line_is_cut(output, lines):
    output.feed(b"x" * 10_000 + b"\nnext\n")
    assert lines == ["x" * LINE_BYTES + "…", "next"]


def test_too_many_lines(output, lines):
    output.feed(b"x\n" * (LOG_LINES + 50))
    output.feed(b"last words\n")
    assert lines == ["x"] * LOG_LINES + [DROPPED]
    assert output.tail().endswith("x\nlast words\n")


def test_too_many_bytes(output, lines):
    for _ in range(65):
        output.feed(b"y" * 1023 + b"\n")
    output.feed(b"last words")
    output.flush()
    assert lines == ["y" * 1023] * 64 + [DROPPED]
    assert output.tail().endswith("y\nlast words")


def test_exactly_as_much_as_is_logged_drops_nothing(output, lines):
    output.feed((b"z" * 1023 + b"\n") * 64)
    output.flush()
    assert lines == ["z" * 1023] * 64


def test_a_tail_that_begins_inside_a_character(output):
    output.feed("ä".encode() * TAIL_BYTES + b"!")
    assert output.tail() == "ä" * (TAIL_BYTES // 2 - 1) + "!"


async def test_everything_printed_before_the_exit_is_in_the_result(bench):
    result = await bench.run("head -c 60000 /dev/zero | tr '\\0' a; printf end")
    assert result.tail == "a" * (TAIL_BYTES - 3) + "end"
    assert bench.lines[-1] == "a" * LINE_BYTES + "…"


async def test_an_exit_that_is_noticed_before_the_output(bench):
    job, future = bench.start("head -c 60000 /dev/zero | tr '\\0' a; printf end")
    process = bench.runner._processes[job.id]
    asyncio.get_running_loop().remove_reader(process.pipe._fd)
    assert (await future).tail == "a" * (TAIL_BYTES - 3) + "end"
    assert not process.pipe.open


async def test_binary_output(bench):
    result = await bench.run("printf 'a\\377\\376\\000b'; exit 1")
    assert result.tail == "a\ufffd\ufffd\\x00b"
    assert result.detail == "exited with 1: a\ufffd\ufffd\\x00b"
    assert bench.lines == [result.tail]


async def test_a_hundred_megabytes(bench):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, future = bench.start("yes 0123456789abcdef | head -c 100000000; echo; echo done")
    async with asyncio.timeout(PATIENCE):
        result = await future
    assert result.tail.endswith("\ndone\n")
    assert bench.lines[-1] == DROPPED
    assert len(bench.lines) == LOG_LINES + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB


@pytest.mark.parametrize("kind", HookKind)
def test_probes_are_quiet(kind):
    job = HookJob(1, "m", kind, "true", "/")
    assert job.quiet == (kind in {HookKind.ALIVE, HookKind.VERIFY})

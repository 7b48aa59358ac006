"""How many Python calls a request makes in llmux, and where: on the fast path, the long one, with a switch.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.hops

Two models on one engine, in this process, with hooks that do next to nothing; counts every call of a function in
llmux's files with ``sys.setprofile``, from before the request is sent until its answer has been read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Self

import llmux
from tests.server.house import House, Line

OK = 200
PACKAGE = str(Path(llmux.__file__).parent)


class Hops:
    """Counts calls while it is entered."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Self:
        """Begin to count."""
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            self.calls[code.co_filename.removeprefix(PACKAGE + "/"), code.co_name] += 1

    def report(self, name: str, rows: int) -> None:
        """Print the count, and where most is spent."""
        files: Counter[str] = Counter()
        folders: Counter[str] = Counter()
        for (file, _), count in self.calls.items():
            files[file] += count
            folders[file.rpartition("/")[0] or "."] += count
        print(f"{name}: {sum(files.values())} calls in {len(files)} files")
        print("   ", ", ".join(f"{folder} {count}" for folder, count in folders.most_common()))
        for (file, function), count in self.calls.most_common(rows):
            print(f"    {count:5} {file}:{function}")


async def _measure(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with House(Path(folder)) as house:
            await house.open()
            for model in ("a", "b", "a", "a"):
                assert (await house.chat(model)).status == 200
            # What came in chunks, aiohttp has to parse: a connection for each, so that it has the other's no more.
            fast, long = await house.line(), await house.line()
            for name, line, model in (("fast", fast, "a"), ("long", long, "a"), ("switching", fast, "b")):
                data = _request(model, chunked=line is long)
                if model == "a":  # once before: what is remembered of a connection is there then
                    assert await _status(line, data) == OK
                with Hops() as hops:
                    assert await _status(line, data) == OK
                hops.report(name, rows)


def _request(model: str, *, chunked: bool) -> bytes:
    body = json.dumps({"model": model, "messages": []}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    if chunked:
        return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


async def _status(line: Line, data: bytes) -> int:
    line.send(data)
    return (await line.reply()).status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=15)
    asyncio.run(_measure(parser.parse_args().rows))

"""How many Python calls a request takes through llmux, and where: for an awake model, and for one that is asleep.

    PYTHONPATH=. .venv/bin/python -m tests.benchmarks.hops

Two models on one engine, in this process, with hooks that do next to nothing; every call of a function whose file
lies in llmux is counted with ``sys.setprofile``, from before the request is sent until its answer has been read.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Self

import llmux
from tests.server.house import House

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
            for name, model in (("awake", "a"), ("switching", "b")):
                with Hops() as hops:
                    assert (await house.chat(model)).status == 200
                hops.report(name, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=15)
    asyncio.run(_measure(parser.parse_args().rows))

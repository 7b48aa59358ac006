"""How much GPU memory is in use, as nvidia-smi says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil

PATIENCE = 10.0  # seconds; nvidia-smi hangs when the driver does


async def used() -> int | None:
    """Return the MiB that are in use on all GPUs together; None where that cannot be told."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    process = await asyncio.create_subprocess_exec(
        program,
        "--query-gpu=memory.used",
        "--format=csv,noheader,nounits",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(PATIENCE):
            said, _ = await process.communicate()
        return sum(int(line) for line in said.decode().split("\n") if line.strip()) if said.strip() else None
    except (TimeoutError, ValueError):
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

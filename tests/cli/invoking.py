"""The command line of an operator, against a real llmux in the same process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from typer.testing import CliRunner, Result

from llmux.cli import app
from tests.server.house import House

CLEAN = {"NO_COLOR": "1", "COLUMNS": "200", "LLMUX_ADMIN_KEY": "", "LLMUX_API_KEY": "", "LLMUX_ADMIN_KEY_FILE": ""}


async def llmux(house: House | None, *words: object, **environ: str) -> Result:
    """Run a command to its end."""
    url = {} if house is None else {"LLMUX_URL": f"http://127.0.0.1:{house.port}"}
    env = {**CLEAN, **url, **environ}
    return await asyncio.to_thread(
        CliRunner().invoke, app, [str(word) for word in words], env=env, prog_name="llmux"
    )


async def said(house: House, *words: object, exit_code: int = 0, **environ: str) -> str:
    """Return what a command prints, all on one line."""
    done = await llmux(house, *words, **environ)
    assert done.exit_code == exit_code, (done.exit_code, done.output, done.exception)
    return " ".join(done.output.split())


async def answered(house: House, *words: object) -> Any:
    """Return the JSON that a command prints."""
    done = await llmux(house, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)

"""What the llmux of before wrote is read as it was: see ``older/make.py`` for how these files were made."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux.app import FRONT, build_app
from llmux.cli import app
from llmux.observability.state_file import StateFile, dump_costs
from llmux.simulator.recorded import read_recorded, replay
from tests.server.house import until

OLDER = Path(__file__).with_name("older")


@pytest.fixture(params=["fifo", "idle"])
def record(request, tmp_path):
    """A record, unpacked."""
    path = tmp_path / "record.jsonl"
    path.write_bytes(gzip.decompress((OLDER / f"{request.param}.jsonl.gz").read_bytes()))
    return path


def test_an_older_record_is_replayed_exactly(record):
    found = replay(read_recorded(record))
    assert len(found.recorded) > 20
    assert [each.way for each in found.replayed] == [each.way for each in found.recorded]
    assert found.exact
    assert found.apart < 1e-6
    assert found.limits == []


@pytest.mark.parametrize("words", [("simulate", "--json"), ("explain", "--json"), ("explain",)])
def test_the_commands_read_an_older_record(record, words):
    command, *options = words
    done = CliRunner().invoke(app, [command, str(record), *options])
    assert done.exit_code == 0, done.output


async def test_an_older_state_file_is_taken_over(house):
    text = (OLDER / "state.json").read_text()
    (house.folder / "state.json").write_text(text)
    kept = json.loads(text)
    models = {name: {"levels": [{"ram": "1GiB"}, "disk"]} if name != "c" else {} for name in "abcd"}
    config = house.config(models, host_memory="1GiB")
    application, house.switcher = build_app(config, log=house.log, store=StateFile(house.folder / "state.json"))
    house.front = application[FRONT]
    await house.serve(application)
    s = house.switcher.core.state
    await until(lambda: s.ready)
    assert dump_costs(s.costs) == kept["costs"]
    assert s.models["c"].pin.reason == "it is shown to guests"
    assert s.manual
    assert {name: model.level.name for name, model in s.models.items() if model.level} == kept["levels"]
    # It was on the GPU, and is not alive: it is cleaned up before its pin has it woken.
    await until(lambda: s.models["c"].phase.value == "awake")
    await asyncio.to_thread((house.folder / "c.up").stat)
    assert not house.log.named("state_file_unreadable")

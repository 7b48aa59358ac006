"""The record of a running llmux: a line for each request, switch and decision."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from llmux.errors import ConfigError
from llmux.observability import record
from llmux.observability.record import read_record
from llmux.simulator.recorded import read_recorded
from llmux.simulator.spilling import Spill
from tests.server.house import until


async def finished(house, **more):
    """Close llmux and return the runs in its record."""
    await house.close()
    return read_record(house.folder / "record.jsonl", **more)


async def test_every_request_switch_and_decision_has_a_line(house):
    await house.open(record="record.jsonl")
    assert (await house.chat("a")).status == 200
    assert (await house.chat("a")).status == 200
    assert (await house.chat("b")).status == 200
    (run,) = await finished(house)
    assert run.start["because"] == "start"
    assert run.start["policy"] == {"use": house.switcher.config.policy.use, "options": {}}
    assert [(model["name"], model["phase"]) for model in run.start["models"]] == [("a", "asleep"), ("b", "asleep")]
    first, second, third = run.requests
    assert [line["model"] for line in run.requests] == ["a", "a", "b"]
    assert {line["outcome"] for line in run.requests} == {"answered"}
    assert [line["switch"] for line in run.requests] == [1, 1, 2]
    assert first["prompt_bytes"] == len(json.dumps({"model": "a"}))
    assert first["answer_bytes"] > 0
    assert second["wait_s"] == 0
    assert 0 < first["first_byte_s"] <= first["wait_s"] + first["service_s"] + 1e-9  # each is rounded
    assert third["wait_s"] > 0
    cold, warm = run.switches
    assert (cold["id"], cold["from"], cold["to"], cold["result"]) == (1, [], "a", "success")
    assert (warm["id"], warm["from"], warm["to"]) == (2, ["a"], "b")
    assert [(hook["model"], hook["hook"], hook["ok"]) for hook in warm["hooks"]] == [
        ("a", "sleep", True),
        ("b", "wake", True),
    ]
    assert sum(hook["seconds"] for hook in warm["hooks"]) == pytest.approx(warm["cost_s"], abs=0.05)
    assert warm["reason"].startswith("a → b: ")
    assert warm["reason"] == run.decisions[-1]["reason"]
    assert [line["switch"] for line in run.decisions] == [1, 2]
    assert [line["type"] for line in run.others] == ["event", "stop"]


async def test_outcomes(house):
    await house.open(
        models={
            "a": {"max_queued": 1, "wake": "while ! test -e release.a; do sleep 0.01; done; touch a.up"},
            "b": {},
        },
        record="record.jsonl",
    )
    waiting = await house.begin("POST", "/v1/x", {"model": "a"})
    await until(lambda: house.queued("a"))
    assert (await house.chat("a")).status == 429
    waiting.abort()
    await until(lambda: not house.queued("a"))
    house.release("a")
    await until(lambda: house.switcher.core.state.switch is None)
    async with house.switcher.hold("a"):
        pass
    await house.ask("POST", "/llmux/models/a/pin")
    assert (await house.chat("b")).status == 503
    (run,) = await finished(house)
    assert [line["outcome"] for line in run.requests] == ["refused", "left", "held", "refused"]
    assert [line["status"] for line in run.requests] == [429, 499, None, 503]
    assert run.requests[0]["service_s"] is None
    assert [line["event"] for line in run.others if line["type"] == "event"] == ["pin", "stopping"]


async def test_the_record_can_be_turned_on_moved_and_off(house):
    switcher = await house.open()
    assert switcher.recorder is None
    await house.chat("a")
    switcher.replace(house.config(record="record.jsonl"))
    await house.chat("a")
    switcher.replace(house.config(record="record.jsonl", alive_failures=5))
    switcher.replace(house.config(record="other.jsonl"))
    await house.chat("a")
    switcher.replace(house.config())
    assert switcher.recorder is None
    assert not switcher._driver.subscribers
    await house.chat("a")
    await until(lambda: b'"stop"' in (house.folder / "other.jsonl").read_bytes())
    first, second = await finished(house)
    assert (first.start["because"], second.start["because"]) == ("turned on", "reload")
    assert [len(run.requests) for run in (first, second)] == [1, 0]
    (other,) = read_record(house.folder / "other.jsonl")
    assert len(other.requests) == 1


async def test_a_record_that_cannot_be_written_changes_nothing(house):
    switcher = await house.open()
    before = switcher.config
    with pytest.raises(ConfigError, match=r"record: .*nowhere.*cannot be written: No such file"):
        switcher.replace(house.config(record="nowhere/record"))
    assert switcher.config is before


async def test_the_record_is_bounded(house):
    switcher = await house.open(record="record.jsonl")
    assert (await house.chat("a")).status == 200
    switcher.recorder.file.full = True  # after 64 MiB
    assert (await house.chat("a")).status == 200
    assert (await house.chat("a")).status == 200
    (run,) = await finished(house)
    assert len(run.requests) == 1
    assert run.start["because"] == "rotated"
    assert [model["phase"] for model in run.start["models"]] == ["awake", "asleep"]
    assert len(read_record(house.folder / "record.jsonl.1")[0].requests) == 2


@pytest.mark.parametrize("how", ["moved", "removed", "replaced", "removed while idle", "cut"])
async def test_a_record_that_is_taken_away_is_begun_anew(house, how, monkeypatch):
    """As logrotate and people do; what was moved away is whole, and the new one can be understood without it."""
    if how == "removed while idle":
        monkeypatch.setattr(record, "LOOK", 0.2)
    await house.open(record="record.jsonl")
    file, moved = house.folder / "record.jsonl", house.folder / "record.0"
    assert (await house.chat("a")).status == 200
    await until(lambda: b'"request"' in file.read_bytes())
    if how.startswith("removed"):
        file.unlink()
    elif how == "cut":  # as logrotate's copytruncate does
        shutil.copy(file, moved)
        os.truncate(file, 0)
    else:
        file.rename(moved)
    if how == "replaced":
        file.touch()
    if how == "removed while idle":
        await until(file.exists)
    assert (await house.chat("b")).status == 200
    await until(lambda: file.exists() and b'"rotated"' in file.read_bytes())
    assert (await house.chat("a")).status == 200
    (run,) = await finished(house)
    assert run.start["because"] == "rotated"
    asked = [line["model"] for line in run.requests]
    if moved.exists():
        (before,) = read_record(moved)
        asked = [line["model"] for line in before.requests] + asked
        assert asked == ["a", "b", "a"]
    else:
        assert asked == ["b", "a"]
    assert not (house.folder / "record.jsonl.1").exists()


async def test_a_record_whose_folder_is_gone_is_told_once_until_it_is_back(house):
    (house.folder / "records").mkdir()
    switcher = await house.open(record="records/record.jsonl")
    shutil.rmtree(house.folder / "records")
    for _ in range(20):
        assert (await house.chat("a")).status == 200
    await until(switcher.recorder.file._lines.empty)
    assert (await house.chat("b")).status == 200  # behind what it has written
    await until(switcher.recorder.file._lines.empty)
    assert [fields["error"] for fields in house.log.named("record_unwritable")] == ["No such file or directory"]
    (house.folder / "records").write_text("no folder")
    assert (await house.chat("a")).status == 200
    await until(switcher.recorder.file._lines.empty)
    (house.folder / "records").unlink()
    (house.folder / "records").mkdir()
    assert (await house.chat("a")).status == 200
    file = house.folder / "records/record.jsonl"
    await until(lambda: file.exists() and b'"rotated"' in file.read_bytes())
    await house.switcher.stop()
    (run,) = read_record(file)
    assert (len(run.requests), run.lost) == (23, 0)


async def test_a_record_knows_the_tokens_that_answers_told_of(house):
    await house.open("a b", record="record.jsonl")
    usage = b'{"usage":{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16}}'
    house.engine.says = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(usage), usage)
    for name in "ab":
        assert (await house.chat(name)).status == 200
    house.engine.says = None
    assert (await house.chat("a")).status == 200
    await house.close()
    recorded = read_recorded(house.folder / "record.jsonl")
    assert [line.get("tokens") for line in recorded.requests] == [[11, 5], [11, 5], None]
    first, _, last = recorded.fitted_trace(recorded.fits()).jobs
    assert first.tokens == (11, 5)
    sent = recorded.requests[-1]
    assert last.tokens == (sent["prompt_bytes"] // 4, sent["answer_bytes"] // 4)
    assert Spill(0.0, (1e6, 0.0)).cost([first, replace(last, tokens=(1, 0))]) == 12.0

"""A record of a running llmux, replayed: the switches are the recorded ones."""

import asyncio
import json

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.core.phases import Phase
from llmux.simulator.recorded import read_recorded, replay
from tests.server.house import ALIVE, SLEEP, WAKE, until

LOAD = "aabacbbacaabcbca"
SLOWLY = {"wake": f"sleep 0.04; {WAKE}", "sleep": f"sleep 0.01; {SLEEP}", "alive": ALIVE}


async def load(house, models=None, **more):
    """Have a scripted load served, and return the record's file."""
    await house.open(models=models or dict.fromkeys("abc", SLOWLY), record="record.jsonl", **more)
    pending = []
    for name in LOAD:
        pending.append(asyncio.create_task(house.chat(name)))
        await asyncio.sleep(0.015)
    assert {reply.status for reply in await asyncio.gather(*pending)} == {200}
    assert (await house.ask("POST", "/llmux/models/a/sleep")).status in (202, 409)
    await house.close()
    return house.folder / "record.jsonl"


@pytest.mark.parametrize("policy", ["fifo", "adaptive"])
async def test_the_switches_of_a_replay_are_the_recorded_ones(house, policy):
    recorded = read_recorded(await load(house, policy={"use": policy}))
    found = replay(recorded)
    assert len(found.recorded) >= 4
    assert [each.way for each in found.replayed] == [each.way for each in found.recorded]
    assert found.exact
    assert found.apart < 1e-6
    assert found.limits == []


async def test_prefetches_that_end_and_that_are_ended_change_nothing_in_a_replay(house):
    models = {
        name: {**SLOWLY, "prefetch": prefetch}
        for name, prefetch in zip("abc", (":", "sleep 9", "false"), strict=True)
    }
    recorded = read_recorded(await load(house, models=models))
    kinds = [hook["hook"] for line in recorded.switches for hook in line["hooks"]]
    assert kinds.count("prefetch") >= 3
    found = replay(recorded)
    assert found.exact
    assert found.limits == []


async def test_a_stop_in_the_middle_of_a_switch_is_replayed(house):
    await house.open(models=dict.fromkeys("abc", SLOWLY), record="record.jsonl")
    assert (await house.chat("a")).status == 200
    for name in "bcb":
        await house.begin("POST", "/v1/x", {"model": name})
    await until(lambda: house.switcher.core.state.switch is not None)
    await house.close()
    recorded = read_recorded(house.folder / "record.jsonl")
    found = replay(recorded)
    assert [each.way for each in found.recorded] == ["nothing → a", "a → b"]
    assert found.exact
    assert found.limits == []


async def test_hooks_that_put_a_model_deeper_are_replayed(house):
    models = {name: {**SLOWLY, "levels": [{"ram": "1GiB"}, "disk"]} for name in "abc"}
    await house.open(models=models, record="record.jsonl", host_memory="1GiB")
    for name in "abcab":
        assert (await house.chat(name)).status == 200
    await house.close()
    recorded = read_recorded(house.folder / "record.jsonl")
    assert [hook["model"] for hook in recorded.deepenings] == ["a", "b", "c"]
    assert recorded.rules.host_memory == 2**30
    found = replay(recorded)
    assert len(found.recorded) == 5
    assert found.exact
    assert found.apart < 1e-6
    assert found.limits == []


async def test_leases_and_the_manual_mode_are_replayed(house):
    await house.open(models=dict.fromkeys("abc", SLOWLY), record="record.jsonl")
    switches = house.switcher.core.state
    assert (await house.chat("a")).status == 200
    lease = await house.ask("POST", "/llmux/lease", {"for": "1h", "requests": "wait"})
    waiter = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: switches.lease.told and house.queued("b"))
    await house.ask("POST", "/llmux/lease", {"for": 0.05, "id": lease.json()["id"]})
    assert (await waiter.reply()).status == 200
    assert (await house.ask("POST", "/llmux/manual")).status == 202
    waiter = await house.begin("POST", "/v1/x", {"model": "c"})
    await until(lambda: house.queued("c"))
    assert (await house.ask("POST", "/llmux/models/c/pin")).status == 202
    assert (await waiter.reply()).status == 200
    await house.ask("DELETE", "/llmux/manual")
    await house.close()
    found = replay(read_recorded(house.folder / "record.jsonl"))
    assert [each.way for each in found.recorded] == ["nothing → a", "a → sleep", "nothing → b", "b → c"]
    assert found.exact
    assert found.limits == []


async def test_what_ends_exactness_is_said(house):
    switcher = await house.open(models=dict.fromkeys("ab", SLOWLY), record="record.jsonl")
    assert (await house.chat("a")).status == 200
    switcher.replace(house.config(models=dict.fromkeys("abc", SLOWLY), record="record.jsonl"))
    switcher.recorder.file.full = True
    assert (await house.chat("a")).status == 200
    assert (await house.chat("b")).status == 200
    await house.close()
    (limit,) = replay(read_recorded(house.folder / "record.jsonl.1")).limits
    assert "the configuration was read again" in limit
    (limit,) = replay(read_recorded(house.folder / "record.jsonl")).limits
    assert "it begins while llmux was running" in limit


@pytest.mark.parametrize("fair", [None, {}])
async def test_turns_of_keys_are_not_replayed_and_that_is_said(house, fair):
    keys = [{"name": "n", "key": "k"}]
    await house.open(models={"a": SLOWLY}, record="record.jsonl", policy={"fair": fair}, api_keys=keys)
    assert (await house.ask("POST", "/v1/x", {"model": "a"}, Authorization="Bearer k")).status == 200
    await house.close()
    limits = replay(read_recorded(house.folder / "record.jsonl")).limits
    assert ["policy.fair" in limit for limit in limits] == ([] if fair is None else [True])


def simulate(*words):
    return CliRunner().invoke(app, ["simulate", *map(str, words)])


async def test_a_record_on_the_command_line(house):
    path = await load(house)
    done = await asyncio.to_thread(simulate, path, "--exact")
    assert done.exit_code == 0, done.output
    assert "switches are the recorded ones under " in done.output
    found = json.loads((await asyncio.to_thread(simulate, path, "--exact", "--json")).stdout)
    assert found["exact"]
    assert found["same"] == found["recorded"] == found["replayed"] >= 4
    # The same requests under several policies, with the recorded policy and costs.
    done = await asyncio.to_thread(simulate, path, "--json")
    policies = json.loads(done.stdout)["policies"]
    assert set(policies) == {"fifo", "idle", "adaptive"}
    assert {each["requests"] for each in policies.values()} == {len(LOAD)}
    assert {each["completed"] for each in policies.values()} == {len(LOAD)}
    done = await asyncio.to_thread(simulate, path)
    assert "answers take as long as they were" in done.output
    # A story that the record does not tell.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    second = next(line for line in lines if line["type"] == "switch" and line["id"] == 2)
    second["to"] = "c" if second["to"] == "b" else "b"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = await asyncio.to_thread(simulate, path, "--exact")
    assert done.exit_code == 1
    assert "1 switches are the recorded ones under " in done.output
    found = json.loads((await asyncio.to_thread(simulate, path, "--exact", "--json")).stdout)
    assert found["first_difference"]["switch"] == 2


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ('{"type": "start", "format": 1}', ["--exact"], "a line lacks what a record's has"),
        ('{"type": "start", "format": 1}', [], "a line lacks what a record's has"),
        ('{"type": "start", "format": 2}', [], "format 2; this llmux reads 1"),
        ("arrival_s,model,prompt_tokens,output_tokens\n0,a,1,1", ["--exact"], "--exact replays a record of llmux"),
        ('{"type": "stop"}', [], "does not begin with a `start` line"),
    ],
)
def test_what_cannot_be_replayed(tmp_path, text, words, message):
    path = tmp_path / "record"
    path.write_text(text + "\n")
    done = simulate(path, *words)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


async def test_a_record_that_makes_no_sense_is_no_traceback(house):
    await house.open(models=dict.fromkeys("ab", SLOWLY), record="record.jsonl")
    for name in "ab":
        assert (await house.chat(name)).status == 200
    await house.close()
    lines = [json.loads(line) for line in (house.folder / "record.jsonl").read_text().splitlines()]
    broken = house.folder / "broken.jsonl"
    for path in (
        ("start", "policy"),
        ("start", "models", 0, "phase"),
        ("switch", "id"),
        ("switch", "hooks", 0, "at"),
    ):
        number = next(number for number, line in enumerate(lines) if line["type"] == path[0])
        changed = json.loads(json.dumps(lines))
        place = changed[number]
        for key in path[1:-1]:
            place = place[key]
        place[path[-1]] = float("inf") if path[-1] == "id" else None
        broken.write_text("\n".join(map(json.dumps, changed)))
        for words in (["simulate", broken, "-p", "fifo"], ["simulate", broken, "--exact"], ["explain", broken]):
            done = CliRunner().invoke(app, list(map(str, words)))
            assert isinstance(done.exception, SystemExit | None), (path, words, done.exception)
            assert done.exit_code < 2 or "a line" in done.stderr, path


async def test_what_clients_said_of_how_long_their_models_stay_awake_is_replayed(house):
    await house.open(models=dict.fromkeys("ab", SLOWLY), record="record.jsonl")
    models = house.switcher.core.state.models
    for name, keep in (("a", "0"), ("b", "0.05"), ("a", "-1"), ("b", "10m")):
        body = {"model": name}
        assert (await house.ask("POST", "/v1/x", body, **{"X-LLMux-Keep-Alive": keep})).status == 200
        if not keep.startswith(("-", "10")):
            await until(lambda name=name: models[name].phase is Phase.ASLEEP)
    await house.close()
    recorded = read_recorded(house.folder / "record.jsonl")
    assert [line["keep_s"] for line in recorded.requests] == [0.0, 0.05, -1.0, 600.0]
    found = replay(recorded)
    ways = ["nothing → a", "a → sleep", "nothing → b", "b → sleep", "nothing → a", "a → b"]
    assert [each.way for each in found.recorded] == ways
    assert found.exact
    assert found.limits == []

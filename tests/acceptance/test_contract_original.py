"""What the original llmux promised, against a real process."""

from __future__ import annotations

import asyncio
import json
import time

import pytest


async def test_the_first_request_wakes_its_model(lab):
    lab.write("a")
    lab.start()
    answer = await lab.chat("a")
    assert answer.status == 200
    assert answer.json()["engine"] == "a"
    assert lab.order() == ["wake a"]


async def test_another_model_switches_and_the_same_one_does_not(lab):
    lab.write("a b")
    lab.start()
    assert (await lab.chat("a")).json()["engine"] == "a"
    assert (await lab.chat("a")).json()["engine"] == "a"
    assert lab.order() == ["wake a"]
    assert (await lab.chat("b")).json()["engine"] == "b"
    assert lab.order() == ["wake a", "sleep a", "wake b"]
    status = await lab.status()
    assert status["awake"] == ["b"]
    assert status["models"]["a"]["phase"].upper() == "ASLEEP"


async def test_a_switch_takes_sleep_and_wake(lab):
    lab.write({"a": {"env": {"KEY": "a", "SLEEP_DELAY": "0.2"}}, "b": {"env": {"KEY": "b", "WAKE_DELAY": "0.2"}}})
    lab.start()
    await lab.chat("a")
    before = time.monotonic()
    answer = await lab.chat("b")
    assert answer.status == 200
    assert time.monotonic() - before >= 0.4
    assert float(answer.get("X-LLMux-Queue-Seconds")) >= 0.4


async def test_ten_at_once_wake_one_model_once(lab):
    lab.write("a")
    lab.start()
    answers = await asyncio.gather(*(lab.chat("a") for _ in range(10)))
    assert [a.status for a in answers] == [200] * 10
    assert lab.order() == ["wake a"]


@pytest.mark.parametrize("names", ["ababab", "aaabbb"])
async def test_six_at_once_on_two_models(lab, names):
    lab.write("a b")
    lab.start()
    answers = await asyncio.gather(*(lab.chat(n) for n in names))
    assert [(a.status, a.json()["engine"]) for a in answers] == [(200, n) for n in names]
    assert lab.count("wake") == 2, lab.order()


async def test_alternating_one_after_the_other(lab):
    lab.write("a b")
    lab.start()
    for name in "ababab":
        assert (await lab.chat(name)).json()["engine"] == name
    assert lab.count("wake") == 6
    assert lab.count("sleep") == 5


async def test_unknown_model_names_the_known_ones(lab):
    lab.write("a b")
    lab.start()
    answer = await lab.chat("nope")
    assert answer.status == 404
    error = answer.json()["error"]
    assert "not found" in error["message"]
    assert "a" in error["message"].split("nope")[-1]
    assert "b" in error["message"].split("nope")[-1]
    assert set(error) == {"message", "type", "code", "param"}
    assert lab.order() == []


async def test_models_are_listed_sorted(lab):
    lab.write("zeta alpha mid")
    lab.start()
    listed = (await lab.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["alpha", "mid", "zeta"]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert model["owned_by"] == "llmux"
        assert isinstance(model["created"], int)
    one = await lab.get("/v1/models/mid")
    assert one.status == 200
    assert one.json()["id"] == "mid"
    assert (await lab.get("/v1/models/nope")).status == 404
    assert lab.order() == []


async def test_switch_costs_are_kept_by_direction(lab):
    lab.write("a b")
    lab.start()
    before = time.monotonic()
    for name in "aba":
        await lab.chat(name)
    took = time.monotonic() - before
    costs = (await lab.status())["switch_costs"]
    directions = {(c["from"], c["to"]): c for c in costs if c["samples"]}
    assert set(directions) == {(None, "a"), ("a", "b"), ("b", "a")}
    for cost in directions.values():
        assert set(cost) == {"from", "to", "seconds", "samples"}
        assert cost["samples"] == 1
        assert 0.005 < cost["seconds"] < took


async def test_the_cost_excludes_the_drain(lab):
    lab.write("a b")
    lab.start()
    line = await lab.begin("a", do={"hold": "x"})
    await lab.until_model("a", in_flight=1)
    other = asyncio.create_task(lab.chat("b"))
    await lab.until_phase("a", "DRAINING")
    await asyncio.sleep(0.6)
    released = time.monotonic()
    lab.release("x")
    assert (await line.head()).status == 200
    await line.close()
    assert (await other).status == 200
    took = time.monotonic() - released  # the rest of the drain, the sleep and the wake
    cost = next(c for c in (await lab.status())["switch_costs"] if (c["from"], c["to"]) == ("a", "b"))
    metrics = await lab.metrics()
    drain = metrics['llmux_switch_drain_duration_seconds_sum{from="a",to="b"}']
    whole = metrics['llmux_switch_duration_seconds_sum{from="a",to="b"}']
    assert drain >= 0.55
    assert abs(cost["seconds"] - (whole - drain)) < 0.05
    assert cost["seconds"] < took


async def test_a_file_of_the_original_runs_from_another_folder(lab):
    """Only the original's keys; hooks are relative to the file; JSON by suffix."""
    one, two = lab.model("one"), lab.model("two")
    for key, model in (("one", one), ("two", two)):
        del model["env"]
        for hook in ("wake", "sleep", "alive"):
            model[hook] = f"KEY={key} NAMES=org/one,two sh ./hook.sh {hook}"
    config = {
        "models": {"org/one": one, "two": two},
        "policy": {"request_timeout_secs": 30, "drain_before_switch": True, "min_active_secs": 0},
        "port": lab.port,
    }
    lab.file = lab.root / "config.json"
    lab.file.write_text(json.dumps(config))
    lab.cwd = "/"
    lab.start()
    assert (await lab.chat("org/one")).json()["engine"] == "one"
    assert (await lab.chat("two")).json()["engine"] == "two"
    assert {h.cwd for h in lab.hooks()} == {str(lab.root)}
    assert {h.model for h in lab.hooks()} == {"org/one", "two"}
    assert (await lab.get("/v1/models/org/one")).json()["id"] == "org/one"


async def test_the_default_file_is_config_yaml_here(lab):
    lab.write("a")
    lab.cwd = str(lab.root)
    lab.process = lab.spawn()
    await lab.until(lambda: "127.0.0.1" in lab.log or str(lab.port) in lab.log)

    async def ready():
        try:
            return (await lab.get("/ready")).status == 200
        except OSError:
            return False

    await lab.until(ready)


async def test_hooks_get_the_promised_environment(lab):
    lab.write("a b")
    lab.env["INHERITED"] = "yes"
    lab.script("b", "wake", 'echo "$INHERITED" >"$LAB/inherited"')
    lab.start()
    await lab.chat("a")
    await lab.chat("b")
    alive = lab.hooks("alive", "a")[0]
    assert (alive.source, alive.to) == ("", "")
    wake = lab.hooks("wake", "b")[0]
    assert (wake.model, wake.hook, wake.port) == ("b", "wake", str(lab.ports["b"]))
    assert wake.url == f"http://127.0.0.1:{lab.ports['b']}"
    assert (wake.source, wake.to) == ("a", "b")
    sleep = lab.hooks("sleep", "a")[0]
    assert sleep.switch == wake.switch != ""
    assert (sleep.source, sleep.to) == ("a", "b")
    assert (lab.root / "inherited").read_text() == "yes\n"


async def test_a_models_name_never_reaches_the_shell_as_text(lab):
    name = "o'dd\"; touch $LAB/pwned; `touch $LAB/pwned` $(touch $LAB/pwned) é"
    lab.write({name: {"key": "odd", "names": name}})
    lab.start()
    assert (await lab.chat(name)).status == 200
    assert lab.hooks("wake")[0].model == name
    assert not (lab.root / "pwned").exists()

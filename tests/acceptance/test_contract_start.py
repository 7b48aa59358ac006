"""Start, adoption, errors of the configuration."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess

import pytest
import yaml

from tests.harness.launcher import engines
from tests.harness.waiting import PATIENCE


async def test_health_answers_before_ready(lab):
    lab.cold = True
    lab.write("a b")
    lab.script("a", "alive", lab.hold("adopt"), times=1)
    lab.start(ready=False)
    assert (await lab.get("/health")).status == 200
    assert (await lab.get("/ready")).status == 503
    assert (await lab.status())["ready"] is False
    task = asyncio.create_task(lab.chat("a"))
    await asyncio.sleep(0.15)
    assert not task.done()
    assert lab.order() == []
    lab.release("adopt")
    assert (await task).status == 200
    assert (await lab.get("/ready")).status == 200


async def test_alive_runs_for_all_models_at_once(lab):
    # None goes on before all have begun: one after the other, each would run into its timeout.
    all_began = " && ".join(f"[ -e began.{key} ]" for key in "abcd")
    meet = f"touch began.$LLMUX_MODEL; until {all_began}; do sleep 0.02; done; touch met.$LLMUX_MODEL"
    lab.write("a b c d")
    for key in "abcd":
        lab.script(key, "alive", meet)
    lab.start()
    assert sorted(path.name for path in lab.root.glob("met.*")) == ["met.a", "met.b", "met.c", "met.d"]


async def test_what_runs_already_is_adopted(lab):
    lab.write("a b")
    lab.start()
    pid = (await lab.chat("a")).json()["pid"]
    assert lab.end() == 0
    wakes = lab.order()
    lab.start()
    assert (await lab.status())["awake"] == ["a"]
    assert (await lab.chat("a")).json()["pid"] == pid
    assert lab.order() == wakes == ["wake a"]


async def test_extras_are_put_to_sleep(labs):
    """Two engines run at the start: one is kept, the other sleeps before anything is served."""
    lab = labs("x")
    lab.allowed = {"two holders"}
    lab.check_holding = False
    lab.write("a b")
    lab.start()
    await lab.chat("b")
    assert lab.end() == 0
    wake = {**lab.model("a")["env"], "LAB": str(lab.root), "LLMUX_PORT": str(lab.ports["a"])}

    environment = {**os.environ, **wake, "ENGINES": engines()}
    subprocess.run(  # noqa: ASYNC221
        ["sh", "./hook.sh", "wake"], cwd=lab.root, env=environment, check=True
    )
    lab.start()

    async def slept():
        return lab.order()[-1] == "sleep a"

    await lab.until(slept)
    assert (await lab.status())["awake"] == ["b"], "the most recently used one stays"
    assert (await lab.chat("b")).status == 200


async def test_a_second_llmux_on_the_same_state_refuses(lab):
    lab.write("a")
    lab.start()
    config = yaml.safe_load(lab.file.read_text())
    config["port"] = lab.ports["a"] - 1 if lab.ports["a"] - 1 != lab.port else lab.port + 1
    other = lab.root / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    hooks = len(lab.hooks())
    second = lab.spawn("-c", str(other))
    assert second.wait(PATIENCE) != 0
    assert len(lab.hooks()) == hooks, "it runs no hook"
    assert (await lab.chat("a")).status == 200


async def test_a_second_llmux_with_the_same_engines_is_told_on_both_sides(lab):
    """A copy of the configuration with another port and state file is told before its first hook."""
    lab.write("a b")
    lab.start()
    pid = lab.process.pid
    config = yaml.safe_load(lab.file.read_text())
    config["state"], config["port"] = str(lab.root / "other.json"), 0
    config["models"] = {"a": config["models"]["a"]}
    other = lab.root / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    second = lab.spawn("-c", str(other))
    engine = f"127.0.0.1:{lab.ports['a']}"
    told = f'"engines": ["{engine}"], "by": "the llmux with pid '
    await lab.until(lambda: lab.log.count(told) == 2)
    first, then = (line for line in lab.log.splitlines() if told in line)
    assert {f"pid {pid} ({lab.file})" in line for line in (first, then)} == {True, False}
    assert sum(f"({other})" in line for line in (first, then)) == 1
    await lab.until(lambda: lab.log.count('"event": "ready"') == 2)
    assert lab.log.index(told) < lab.log.rindex('"event": "ready"')
    second.kill()  # as after a crash: nothing of it is left
    assert second.wait(PATIENCE) != 0
    assert (await lab.chat("a")).status == 200
    assert (await lab.status())["controlled_twice"] == []
    assert lab.end() == 0
    lab.start()
    assert lab.log.count(told) == 2, "an engine that was let go of is not told of"


async def test_a_taken_port_is_an_error_before_any_hook(lab):
    lab.write("a")
    lab.start()
    config = yaml.safe_load(lab.file.read_text())
    config["state"] = str(lab.root / "other.json")
    other = lab.root / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    hooks = len(lab.hooks())
    second = lab.spawn("-c", str(other))
    assert second.wait(PATIENCE) != 0
    assert len(lab.hooks()) == hooks
    assert str(lab.port) in lab.log


async def test_the_start_line_says_how_to_open_it(lab):
    lab.write("a", host=None)
    lab.start()
    assert "127.0.0.1" in lab.log
    assert "host" in lab.log.lower()


BAD = {
    "unknown key": ({"colour": "red"}, "colour"),
    "unknown policy key": ({"policy": {"sped": 1}}, "sped"),
    "unknown policy": ({"policy": {"use": "nosuch"}}, "nosuch"),
    "policy file that is missing": ({"policy": {"use": "./gone.py:P"}}, "gone"),
    "bad duration": ({"policy": {"max_wait": "soon"}}, "max_wait"),
    "bad port": ({"port": "x"}, "port"),
    "unset variable": ({"host": "${NOT_SET_ANYWHERE}"}, "NOT_SET_ANYWHERE"),
}


@pytest.mark.parametrize("name", BAD)
def test_config_errors_name_the_place(lab, name):
    top, word = BAD[name]
    lab.write("a", **top)
    process = lab.spawn("-c", str(lab.file))
    assert process.wait(PATIENCE) not in (0, -9)
    assert word in lab.log
    assert "Traceback" not in lab.log
    assert lab.hooks() == []


MODELS = {
    "unknown key of a model": ({"a": {"colour": "red"}}, "models.a.colour"),
    "duplicate alias": ({"a": {"aliases": ["x"]}, "b": {"aliases": ["x"]}}, "x"),
    "alias that is a model": ({"a": {"aliases": ["b"]}, "b": {}}, "b"),
    "one address": ({"a": {"port": 8001}, "b": {"port": 8001}}, "port"),
    "no wake": ({"a": {"wake": ""}}, "wake"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_errors_name_the_place(lab, name):
    models, word = MODELS[name]
    lab.write(models)
    process = lab.spawn("-c", str(lab.file))
    assert process.wait(PATIENCE) not in (0, -9)
    assert word in lab.log
    assert "Traceback" not in lab.log


async def test_variables_are_filled_in_but_never_in_hooks(lab):
    lab.write(
        {"a": {"wake": 'X=from-the-shell; echo "${X} ${UNSET_HERE:-none}" >"$LAB/said"; sh ./hook.sh wake'}},
        port="${MY_PORT}",
        policy={"max_wait": "${WAIT:-9m}"},
    )
    lab.env["MY_PORT"] = str(lab.port)
    lab.start()
    assert (await lab.chat("a")).status == 200
    assert (lab.root / "said").read_text() == "from-the-shell none\n"


async def test_a_missing_file_is_a_clear_error(lab):
    process = lab.spawn("-c", str(lab.root / "none.yaml"))
    assert process.wait(PATIENCE) not in (0, -9)
    assert "none.yaml" in lab.log


async def test_open_files_are_not_the_limit(lab):
    lab.write("a")
    lab.start()
    soft, hard = lab.open_files()
    assert soft == hard


async def test_the_default_state_file_is_under_xdg(lab):
    lab.write("a", state=None)
    lab.start()
    await lab.chat("a")
    assert lab.end() == 0
    assert [p for p in (lab.root / "xdg" / "llmux").rglob("*") if p.is_file()]


async def test_a_reload_takes_effect_and_a_bad_one_does_not(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    line = await lab.begin("a", do={"sse": 4, "hold_after": [1, "x"]})
    head = await line.head()
    good = yaml.safe_load(lab.file.read_text())
    lab.file.write_text("models: [")
    lab.signal(signal.SIGHUP)
    await lab.until(lambda: "config_rejected" in lab.log)
    assert (await lab.chat("a")).status == 200
    new = {**good, "models": {"b": {**good["models"]["b"], "aliases": ["bee"]}, "c": lab.model("c")}}
    new["models"]["b"]["env"]["NAMES"] = "b,bee"
    lab.file.write_text(yaml.safe_dump(new))
    lab.signal(signal.SIGHUP)
    await lab.until(lambda: "config_reloaded" in lab.log)
    assert (await lab.chat("a")).status == 404, "removed"
    lab.release("x")
    assert (await line.body(head)).whole, "what was in flight finishes"
    await line.close()
    await lab.until(lambda: "sleep a" in lab.order())
    assert (await lab.chat("bee")).json()["engine"] == "b"
    assert (await lab.chat("c")).status == 200

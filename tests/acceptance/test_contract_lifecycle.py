"""Start, adoption, TERM, KILL, the state file, errors of the config."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from lease.raw import Gone


async def test_health_answers_before_ready(lab):
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
    lab.write("a b c d")
    for key in "abcd":
        lab.script(key, "alive", "sleep 0.4")
    lab.start()
    starts = [h.t for h in lab.hooks("alive")]
    assert len(starts) == 4
    assert max(starts) - min(starts) < 0.35


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

    environment = {**os.environ, **wake, "PYTHON": sys.executable}
    subprocess.run(  # noqa: ASYNC221
        ["sh", "./hook.sh", "wake"], cwd=lab.root, env=environment, check=True
    )
    lab.start()

    async def one():
        return len((await lab.status())["awake"]) == 1

    await lab.until(one)
    assert (await lab.status())["awake"] == ["b"], "the most recently used one stays"
    assert lab.order()[-1] == "sleep a"
    assert (await lab.chat("b")).status == 200


async def test_kill_9_and_restart_with_the_engine_alive(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    lab.kill()
    before = lab.order()
    lab.start()
    assert (await lab.chat("a")).status == 200
    assert lab.order() == before
    assert (await lab.chat("b")).status == 200
    assert lab.order() == [*before, "sleep a", "wake b"]


async def test_kill_9_in_mid_wake_is_cleaned_up(lab):
    """The engine may hold the GPU although alive fails: it is LOST, and its sleep goes first."""
    lab.write("a b")
    lab.script("a", "wake", lab.hold("w"))
    lab.start()
    line = await lab.begin("a")
    await lab.until(lambda: lab.count("wake", "a"))
    lab.kill()
    with contextlib.suppress(Gone, OSError):
        await line.head(2)
    await line.close()
    lab.release("w")
    for pid, command in lab.processes():
        if "engine.py" not in command:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    lab.script("a", "wake", "true")
    lab.start()
    assert await lab.phase("a") in ("LOST", "AWAKE", "ASLEEP")
    assert (await lab.chat("b")).status == 200
    order = lab.order()
    assert order.index("sleep a") < order.index("wake b")


async def test_a_damaged_state_file_is_set_aside(lab):
    lab.write("a")
    path = lab.root / "state" / "s.json"
    path.parent.mkdir()
    for text in (b"{not json", b"\x00\xff\xfe", b"[]", b'{"holders": 7}', b""):
        path.write_bytes(text)
        lab.start()
        assert (await lab.chat("a")).status == 200
        assert lab.end() == 0
    asides = [p.name for p in path.parent.iterdir() if p.name != "s.json" and "lock" not in p.name]
    assert asides, "the damaged file is kept beside it"


async def test_estimates_survive_a_restart(lab):
    lab.write("a b")
    lab.start()
    for name in "aba":
        await lab.chat(name)
    before = {(c["from"], c["to"]): c["seconds"] for c in (await lab.status())["switch_costs"] if c["samples"]}
    assert lab.end() == 0
    lab.start()
    after = {(c["from"], c["to"]): c["seconds"] for c in (await lab.status())["switch_costs"] if c["samples"]}
    assert set(before) == set(after)
    for key, value in before.items():
        assert abs(after[key] - value) < 0.01


async def test_a_second_llmux_on_the_same_state_refuses(lab):
    lab.write("a")
    lab.start()
    config = yaml.safe_load(lab.file.read_text())
    config["port"] = lab.ports["a"] - 1 if lab.ports["a"] - 1 != lab.port else lab.port + 1
    other = lab.root / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    hooks = len(lab.hooks())
    second = lab.spawn("-c", str(other))
    assert second.wait(10) != 0
    assert len(lab.hooks()) == hooks, "it runs no hook"
    assert (await lab.chat("a")).status == 200


async def test_a_taken_port_is_an_error_before_any_hook(lab):
    lab.write("a")
    lab.start()
    config = yaml.safe_load(lab.file.read_text())
    config["state"] = str(lab.root / "other.json")
    other = lab.root / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    hooks = len(lab.hooks())
    second = lab.spawn("-c", str(other))
    assert second.wait(10) != 0
    assert len(lab.hooks()) == hooks
    assert str(lab.port) in lab.log


async def test_term_lets_a_stream_finish_and_ends_the_queue(lab):
    lab.write("a b")
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [2, "x"]})
    head = await line.head()
    waiting = [asyncio.create_task(lab.chat("b")) for _ in range(3)]
    await lab.until_model("b", queued=3)
    idle = await lab.wire()
    lab.signal(signal.SIGTERM)
    answers = await asyncio.wait_for(asyncio.gather(*waiting), 3)
    assert [a.status for a in answers] == [503] * 3
    assert all(a.json()["error"]["message"] for a in answers)
    assert all(a.get("X-Request-ID") for a in answers)
    with contextlib.suppress(OSError, Gone):
        assert (await lab.chat("a", wait=2)).status == 503, "no new admissions"
    lab.release("x")
    answer = await line.body(head)
    assert answer.whole
    assert answer.body.endswith(b"[DONE]\n\n")
    await line.close()
    await idle.close()
    assert lab.ended(5) == 0
    assert lab.order() == ["wake a"], "engines are left as they are"
    assert lab.journal("asleep") == []


async def test_the_grace_ends_a_stream_that_never_ends(lab):
    lab.write("a", shutdown_grace="300ms")
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [2, "never"]})
    head = await line.head()
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert not (await line.body(head)).whole
    await line.close()
    assert lab.ended(8) == 0
    assert 0.25 < time.monotonic() - before < 5


async def test_a_second_term_ends_at_once(lab):
    lab.write("a")
    lab.start()
    line = await lab.begin("a", do={"sse": 6, "hold_after": [2, "never"]})
    await line.head()
    lab.signal(signal.SIGTERM)
    await lab.until(lambda: lab.log)
    await asyncio.sleep(0.2)
    assert lab.process.poll() is None, "the stream is waited for"
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert lab.ended(5) == 0
    assert time.monotonic() - before < 2
    await line.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_wake_under_way_is_ended(lab, number):
    lab.write("a")
    lab.script("a", "wake", "sleep 60")
    lab.start()
    task = asyncio.create_task(lab.chat("a"))
    await lab.until(lambda: lab.count("wake", "a"))
    lab.signal(number)
    assert (await task).status == 503
    assert lab.ended(7) == 0
    await lab.until(lambda: not lab.leftovers(), wait=1)


async def test_a_sleep_under_way_may_finish(lab):
    lab.write("a b")
    lab.script("a", "sleep", lab.hold("s"))
    lab.start()
    await lab.chat("a")
    task = asyncio.create_task(lab.chat("b"))
    await lab.until(lambda: lab.count("sleep", "a"))
    lab.signal(signal.SIGTERM)
    assert (await task).status == 503
    await asyncio.sleep(0.2)
    assert lab.process.poll() is None
    lab.release("s")
    assert lab.ended(7) == 0
    assert [h.rc for h in lab.hooks("sleep", "a", "end")] == ["0"]
    assert lab.count("wake", "b") == 0


async def test_on_exit_sleep(lab):
    lab.write("a", on_exit="sleep")
    lab.start()
    await lab.chat("a")
    assert lab.end() == 0
    assert lab.order() == ["wake a", "sleep a"]


async def test_a_hook_at_start_is_ended_by_term(lab):
    lab.write("a")
    lab.script("a", "alive", "sleep 60")
    lab.start(ready=False)
    await lab.until(lambda: lab.count("alive"))
    before = time.monotonic()
    assert lab.end(8) == 0
    assert time.monotonic() - before < 7


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
    assert process.wait(15) not in (0, -9)
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
    assert process.wait(15) not in (0, -9)
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


async def test_term_again_and_again_ends_it_with_0(lab):
    lab.write("a")
    lab.start()
    process = lab.process
    while process.poll() is None:
        lab.signal(signal.SIGTERM)
        await asyncio.sleep(0.0005)
    lab.process = None
    assert process.returncode == 0


async def test_a_missing_file_is_a_clear_error(lab):
    process = lab.spawn("-c", str(lab.root / "none.yaml"))
    assert process.wait(15) not in (0, -9)
    assert "none.yaml" in lab.log


async def test_the_orphan_of_a_killed_llmux_wakes_nothing_later(lab):
    """kill -9 in mid-wake: the wake hook lives on by itself, and must not take the GPU beside another."""
    lab.write("a b")
    lab.script("a", "wake", lab.hold("w"))
    lab.start()
    line = await lab.begin("a")
    await lab.until(lambda: lab.count("wake", "a"))
    lab.kill()
    await line.close()
    lab.start()
    assert (await lab.chat("b")).status == 200
    lab.release("w")
    await asyncio.sleep(0.3)
    assert (await lab.chat("b")).status == 200
    order = lab.order()
    assert order.index("sleep a") < order.index("wake b")


async def test_what_ignores_term_of_a_killed_llmux_s_hook_acts_no_more(lab):
    """The shell of the sleep hook has taken TERM, its child has not; then llmux gets KILL."""
    lab.write({"a": {"sleep": "sh ./hook.sh sleep & wait", "timeouts": {"sleep": 0.3}}, "b": {}})
    lab.script("a", "sleep", "trap '' TERM; " + lab.hold("s"), times=1)
    lab.start()
    await lab.chat("a")
    line = await lab.begin("b")
    await lab.until(lambda: "hook_killed" in lab.log)
    assert [c for c in lab.leftovers() if "hook.sh sleep" in c]
    lab.kill()
    await line.close()
    lab.start()
    assert not [c for c in lab.leftovers() if "hook.sh" in c]
    assert "leftover_hook_ended" in lab.log


async def test_a_model_removed_while_llmux_was_dead_is_put_to_sleep_with_its_old_hooks(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    lab.kill()
    lab.write("b")
    lab.start()
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake b"]
    assert (await lab.chat("a")).status == 404


async def test_a_holder_that_nothing_is_known_of_is_told(lab):
    lab.write("b")
    (lab.root / "state").mkdir()
    (lab.root / "state" / "s.json").write_text('{"version": 1, "holders": ["a"], "last_use": {}, "costs": null}')
    lab.start()
    assert "holder_unknown" in lab.log


async def test_kill_9_in_mid_sleep_is_finished_first(lab):
    lab.write("a b")
    lab.script("a", "sleep", "sleep 60", times=1)
    lab.start()
    await lab.chat("a")
    line = await lab.begin("b")
    await lab.until(lambda: lab.count("sleep", "a"))
    lab.kill()
    await line.close()
    lab.start()
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "sleep a", "wake b"]


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


async def test_the_event_stream_does_not_hold_up_the_end(lab):
    lab.write("a")
    lab.start()
    line = await lab.wire()
    await line.send(b"GET /llmux/events HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await line.head()).status == 200
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert await asyncio.to_thread(lab.ended, 10) == 0
    assert time.monotonic() - before < 3
    await line.close()


async def test_an_idle_connection_does_not_hold_up_the_end(lab):
    lab.write("a")
    lab.start()
    idle, half = await lab.wire(), await lab.wire()
    await half.send(b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert await asyncio.to_thread(lab.ended, 10) == 0
    assert time.monotonic() - before < 5
    await idle.close()
    await half.close()


async def test_a_websocket_is_given_the_grace(lab):
    lab.write("a", shutdown_grace="300ms")
    lab.start()
    line = await lab.wire()
    await line.send(
        b"GET /v1/realtime?model=a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (await line.head()).status == 101
    before = time.monotonic()
    lab.signal(signal.SIGTERM)
    assert await asyncio.to_thread(lab.ended, 10) == 0
    assert 0.25 < time.monotonic() - before < 5
    await line.close()

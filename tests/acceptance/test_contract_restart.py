"""What was going on when llmux was killed, and what the state file keeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import yaml

from tests.harness.lease.raw import Gone
from tests.harness.waiting import PATIENCE


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
    with contextlib.suppress(Gone, ConnectionError):
        await line.head()
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


async def test_a_hook_finds_its_own_process_in_the_state_file(lab):
    """A llmux that is killed at any moment leaves no hook behind which the next one does not know."""
    known = 'grep -q "\\[$$," state/s.json || : >unknown; exec sh ./hook.sh'
    lab.write({name: {hook: f"{known} {hook}" for hook in ("wake", "sleep")} for name in "ab"})
    lab.start()
    for name in "abab":
        assert (await lab.chat(name)).status == 200
    assert not (lab.root / "unknown").exists()


async def test_what_ignores_term_of_a_killed_llmux_s_hook_acts_no_more(lab):
    """The shell of the sleep hook has taken TERM, its child has not; then llmux gets KILL."""
    lab.write({"a": {"sleep": "sh ./hook.sh sleep & wait", "timeouts": {"sleep": 1}}, "b": {}})
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


async def test_a_model_that_was_moved_to_another_llmux_is_left_to_that_one(lab):
    """Its old sleep hook would stop an engine which the other one has adopted, and serves."""
    lab.write("a b")
    lab.start()
    assert (await lab.chat("a")).status == 200
    lab.kill()
    config = yaml.safe_load(lab.file.read_text())
    config |= {"state": str(lab.root / "other.json"), "port": 0, "models": {"a": config["models"]["a"]}}
    other = lab.root / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    ready = '"adopted": ["a"]'
    second = lab.spawn("-c", str(other))
    await lab.until(lambda: ready in lab.log)
    before = lab.order()
    lab.write("b")
    lab.start()
    assert "holder_unknown" in lab.log
    assert (await lab.get("/v1/models")).status == 200
    assert lab.order() == before
    assert lab.end() == 0
    assert lab.order() == before
    second.terminate()
    assert second.wait(PATIENCE) == 0


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

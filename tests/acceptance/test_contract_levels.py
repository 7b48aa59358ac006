"""How deeply models sleep: what the hooks are told, when host memory is short, and over a kill."""

from __future__ import annotations

TELL = 'echo "$LLMUX_HOOK $LLMUX_MODEL ${LLMUX_SLEEP_LEVEL:--}" >>"$LAB/levels"'
LEVELS = [{"ram": "20GiB"}, "disk"]


def write(lab, **top):
    lab.write({name: {"levels": LEVELS} for name in "abc"}, host_memory="20GiB", **top)
    for name in "abc":
        for action in ("wake", "sleep"):
            lab.script(name, action, TELL)


def told(lab):
    path = lab.root / "levels"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


async def depths(lab):
    return {name: (it["phase"], it["level"]) for name, it in (await lab.status())["models"].items()}


async def test_the_least_likely_go_deeper_before_another_sleeps_and_it_is_kept_over_a_kill(lab):
    write(lab)
    lab.start()
    for name in "abc":
        assert (await lab.chat(name)).status == 200
    # When b leaves for c there is no room beside a, which sleeps deeper first.
    assert told(lab) == ["wake a -", "sleep a ram", "wake b -", "sleep a disk", "sleep b ram", "wake c -"]
    assert await depths(lab) == {"a": ("asleep", "disk"), "b": ("asleep", "ram"), "c": ("awake", None)}
    now = await lab.status()
    assert now["host_memory"] == {"limit": 20 * 2**30, "taken": 20 * 2**30}
    assert {(row["model"], row["level"], row["hook"]) for row in now["level_costs"]} == {
        ("a", "ram", "sleep"),
        ("b", "ram", "sleep"),
    }
    entries = {entry["id"]: entry["llmux"] for entry in (await lab.get("/v1/models")).json()["data"]}
    assert (entries["b"]["level"], entries["b"]["host_memory"]) == ("ram", 20 * 2**30)

    lab.kill()
    lab.start()
    assert await depths(lab) == {"a": ("asleep", "disk"), "b": ("asleep", "ram"), "c": ("awake", None)}
    assert (await lab.chat("b")).status == 200
    # b is to wake, so what it takes is not given up for c; c finds no room.
    assert told(lab) == ["sleep c disk", "wake b ram"]
    costs = {(r["model"], r["level"], r["hook"]): r["samples"] for r in (await lab.status())["level_costs"]}
    assert costs["a", "ram", "sleep"] == 1  # of the llmux that was killed
    assert costs["b", "ram", "wake"] == 1


async def test_when_going_deeper_fails_it_stays_and_the_other_goes_deeper_at_once(lab):
    write(lab)
    lab.start()
    for name in "ab":
        assert (await lab.chat(name)).status == 200
    told(lab)
    lab.script("a", "sleep", f"{TELL}; exit 3")
    assert (await lab.chat("c")).status == 200
    assert told(lab) == ["sleep a disk", "sleep b disk", "wake c -"]
    assert await depths(lab) == {"a": ("asleep", "ram"), "b": ("asleep", "disk"), "c": ("awake", None)}
    assert "sleep exited with 3" in lab.log


async def test_a_kill_while_it_goes_deeper(lab):
    write(lab)
    lab.start()
    for name in "ab":
        assert (await lab.chat(name)).status == 200
    told(lab)
    lab.script("a", "sleep", f"{TELL}; {lab.hold('deep')}")
    line = await lab.begin("c")
    await lab.until_phase("a", "DEEPENING")
    await lab.until((lab.root / "levels").exists)
    lab.kill()
    await line.close()
    lab.script("a", "sleep", TELL)
    lab.start()
    # Its hook was ended, and who knows how far it had come: it counts for what it took before.
    assert "leftover_hook_ended" in lab.log
    assert await depths(lab) == {"a": ("asleep", "ram"), "b": ("awake", None), "c": ("asleep", None)}
    assert (await lab.chat("c")).status == 200
    assert told(lab) == ["sleep a disk", "sleep a disk", "sleep b ram", "wake c -"]


async def test_a_smaller_host_memory_takes_effect_at_once(lab):
    write(lab)
    lab.start()
    for name in "ab":
        assert (await lab.chat(name)).status == 200
    told(lab)
    lab.write({name: {"levels": LEVELS} for name in "abc"}, host_memory="19GiB")
    await lab.until((lab.root / "levels").exists)
    assert told(lab) == ["sleep a disk"]
    await lab.until(lambda: "model_deepened" in lab.log)
    assert (await depths(lab))["a"] == ("asleep", "disk")

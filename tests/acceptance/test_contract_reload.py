"""The configuration changes under a running llmux: by signal and by the file itself, and nothing is dropped."""

from __future__ import annotations

import contextlib
import signal
import socket

import yaml


def read(lab) -> dict:
    return yaml.safe_load(lab.file.read_text())


def write(lab, config: dict) -> None:
    """Write it as editors do: a new file in place of the old one."""
    draft = lab.file.with_suffix(".new")
    draft.write_text(yaml.safe_dump(config, sort_keys=False))
    draft.replace(lab.file)


def times(lab, event: str) -> int:
    return lab.log.count(f'"event": "{event}"')


async def reloaded(lab, times_before: int) -> None:
    await lab.until(lambda: times(lab, "config_reloaded") > times_before)


async def test_the_file_changes_and_nobody_sends_a_signal(lab):
    lab.write("a b")
    lab.start()
    config = read(lab)
    config["models"]["c"] = lab.model("c")
    write(lab, config)
    await reloaded(lab, 0)
    assert (await lab.chat("c")).status == 200


async def test_watching_can_be_switched_off(lab):
    lab.write("a b", watch=False)
    lab.start()
    config = read(lab)
    config["models"]["c"] = lab.model("c")
    write(lab, config)
    lab.signal(signal.SIGHUP)  # what it would have seen, it sees now, once
    await reloaded(lab, 0)
    assert (await lab.chat("c")).status == 200
    assert times(lab, "config_reloaded") == 1


async def test_a_mistake_keeps_the_old_configuration_and_says_so(lab):
    lab.write("a b")
    lab.start()
    good = lab.file.read_text()
    lab.file.write_text("models: {a: {port: nine}}\n")
    await lab.until(lambda: "config_rejected" in lab.log)
    assert "models.a" in (await lab.status())["reload_error"]
    assert (await lab.chat("b")).status == 200
    lab.file.write_text(good + "# mended\n")
    await reloaded(lab, 0)
    assert (await lab.status())["reload_error"] is None


async def test_a_model_keeps_the_hooks_it_was_woken_with(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    config = read(lab)
    config["models"]["a"]["sleep"] = "exit 9"
    config["models"]["a"]["wake"] = "touch new-wake && sh ./hook.sh wake"
    write(lab, config)
    await reloaded(lab, 0)
    assert (await lab.chat("b")).status == 200, "slept with the old hook"
    assert not (lab.root / "new-wake").exists()
    config["models"]["a"]["sleep"] = "sh ./hook.sh sleep"
    write(lab, config)
    await reloaded(lab, 1)
    assert (await lab.chat("a")).status == 200
    assert (lab.root / "new-wake").exists()


async def test_queued_requests_of_a_removed_model_are_told_and_others_wait_on(lab):
    lab.write("a b c")
    lab.start()
    line = await lab.begin("a", do={"sse": 3, "hold_after": [1, "x"]})
    head = await line.head()
    gone, waits = await lab.begin("b"), await lab.begin("c")
    await lab.until_model("b", queued=1)
    await lab.until_model("c", queued=1)
    config = read(lab)
    del config["models"]["b"]
    write(lab, config)
    assert (await gone.head()).status == 404
    lab.release("x")
    assert (await line.body(head)).whole
    assert (await waits.head()).status == 200
    for one in (line, gone, waits):
        await one.close()


async def test_limits_and_the_policy_apply_at_once(lab):
    lab.write({"a": {"max_in_flight": 1}, "b": {}})
    (lab.root / "mine.py").write_text(
        "from llmux.core.policy import SwitchTo\n"
        "class Mine:\n"
        "    def decide(self, now):\n"
        "        return SwitchTo(now.waiting[0], 'mine')\n"
    )
    lab.start()
    lines = [await lab.begin("a", do={"hold": "x"}) for _ in range(3)]
    await lab.until_model("a", in_flight=1, queued=2)
    config = read(lab)
    config["models"]["a"]["max_in_flight"] = 3
    config["policy"] = {"use": "./mine.py:Mine"}
    write(lab, config)
    await lab.until_model("a", in_flight=3, queued=0)
    assert (await lab.status())["policy"]["use"] == "./mine.py:Mine"
    lab.release("x")
    for line in lines:
        assert (await line.head()).status == 200
        await line.close()
    (lab.root / "mine.py").write_text((lab.root / "mine.py").read_text().replace("'mine'", "'changed'"))

    async def changed() -> bool:
        for model in "ba":
            assert (await lab.chat(model)).status == 200
        return '"reason": "changed"' in lab.log

    await lab.until(changed)


async def test_systemd_is_told(lab, tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.setblocking(False)
        said: list[str] = []

        def heard(*words: str) -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    said.append(sock.recv(4096).decode())
            return all(any(line.startswith(word) for line in said) for word in words)

        lab.env |= {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
        lab.write("a")
        lab.start()
        await lab.until(lambda: heard("READY=1\nSTATUS=", "WATCHDOG=1"))
        said.clear()
        await lab.until(lambda: heard("WATCHDOG=1"))
        lab.signal(signal.SIGHUP)
        await lab.until(lambda: heard("RELOADING=1\nMONOTONIC_USEC=", "READY=1"))
        lab.signal(signal.SIGTERM)
        await lab.until(lambda: heard("STOPPING=1"))

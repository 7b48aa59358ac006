"""Hooks that fail, hang, lie, fork, and print; engines that die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest

from tests.harness.lease.lab import running


async def test_a_failing_wake_backs_off_while_others_are_served(lab):
    lab.write("a b", backoff={"first": "600ms", "max": "2s"})
    lab.script("a", "wake", "exit 1")
    lab.start()
    answers = [await lab.chat("a") for _ in range(4)]
    assert [a.status for a in answers] == [503] * 4
    assert (await lab.chat("b")).status == 200
    assert lab.order()[:2] == ["wake a", "sleep a"], "cleanup before anything else"
    lab.unscript("a", "wake")

    async def served():
        return (await lab.chat("a")).status == 200

    await lab.until(served, every=0.05)
    assert (await lab.status())["models"]["a"]["backoff_until"] is None
    assert gaps(lab, "wake", "a")[0] >= 0.45, "in the backoff nothing is tried"


def gaps(lab, action: str, key: str) -> list[float]:
    """Return the seconds from the end of each of these hooks to the beginning of the next one."""
    ends = [h.t for h in lab.hooks(action, key, "end")]
    starts = [h.t for h in lab.hooks(action, key)]
    return [s - e for s, e in zip(starts[1:], ends, strict=False)]


async def test_the_backoff_grows_and_is_capped(lab):
    lab.write("a", backoff={"first": "200ms", "max": "400ms"})
    lab.script("a", "wake", "exit 1")
    lab.start()

    later = set()

    async def four():
        later.add((await lab.chat("a")).get("Retry-After"))
        return lab.count("wake", "a") >= 5

    await lab.until(four, every=0.02)
    found = gaps(lab, "wake", "a")
    assert found[0] >= 0.155, found
    assert found[2] >= 0.3, found
    assert later == {"1"}, "uncapped, the fifth would be 3.2 s"
    metrics = await lab.metrics()
    assert metrics['llmux_hook_failures_total{hook="wake",model="a"}'] >= 5


async def test_status_names_the_last_error_and_the_backoff(lab):
    lab.write("a", backoff={"first": "5s", "max": "5s"})
    lab.script("a", "wake", "echo smoke >&2; exit 9")
    lab.start()
    answer = await lab.chat("a")
    assert 3 <= int(answer.get("Retry-After")) <= 7
    model = (await lab.status())["models"]["a"]
    assert "smoke" in model["last_error"]
    assert "9" in model["last_error"]
    assert isinstance(model["backoff_until"], int | float)


async def test_a_hook_past_its_timeout_is_killed_with_its_group(lab):
    lab.write({"a": {"timeouts": {"wake": "1s"}}, "b": {}})
    lab.script("a", "wake", 'sleep 600 & echo $! >"$LAB/child"; echo before the hang; wait')
    lab.start()
    answer = await lab.chat("a")
    assert answer.status == 503
    assert "before the hang" in answer.json()["error"]["message"]
    child = int((lab.root / "child").read_text())
    await lab.until(lambda: not running(child))
    assert (await lab.chat("b")).status == 200


async def test_a_hook_that_ignores_term_is_killed(lab):
    lab.write({"a": {"timeouts": {"wake": "1s"}}, "b": {}})
    lab.script("a", "wake", "trap '' TERM; while :; do sleep 0.1; done")
    lab.start()
    task = asyncio.create_task(lab.chat("a"))
    await lab.until(lambda: lab.count("wake", "a"))
    answer = await task
    assert answer.status == 503
    await lab.until(lambda: not [c for c in lab.leftovers() if "wake" in c])
    assert (await lab.chat("b")).status == 200


async def test_a_child_that_keeps_stdout_open_hangs_nothing(lab):
    lab.write("a b")
    lab.script("a", "wake", '(while :; do echo tick; sleep 0.05; done) & echo $! >"$LAB/child"')
    lab.start()
    assert (await lab.chat("a")).status == 200
    child = int((lab.root / "child").read_text())
    await asyncio.sleep(0.3)
    assert running(child), "after a successful exit nothing in the group is signalled, nor dies of SIGPIPE"
    assert (await lab.chat("b")).status == 200
    assert (await lab.chat("a")).status == 200
    assert running(child)

    os.kill(child, signal.SIGKILL)
    for pid, command in lab.processes():
        if "engine.py" not in command and "llmux" not in command:
            with contextlib.suppress(ProcessLookupError):  # its sleep ends by itself
                os.kill(pid, signal.SIGKILL)


async def test_an_engine_that_inherits_stdout_and_prints_much(lab):
    """The wake script leaves an engine behind with its own stdout; it prints megabytes and lives."""
    lab.write("a b")
    body = "head -c 100000 /dev/zero | tr '\\0' x; echo; i=$((i+1))"
    text = f'(i=0; while [ $i -lt 40 ]; do {body}; done; echo done >"$LAB/printed") &'
    lab.script("a", "wake", text)
    lab.start()
    assert (await lab.chat("a")).status == 200
    await lab.until((lab.root / "printed").exists)
    assert (await lab.chat("b")).status == 200
    assert len(lab.log) < 3_000_000, "the log is bounded"


@pytest.mark.parametrize(
    "text", ["yes x | head -c 3000000", "head -c 3000000 /dev/zero", "head -c 3000000 /dev/urandom"]
)
async def test_hooks_that_print_megabytes(lab, text):
    lab.write("a")
    lab.script("a", "wake", text)
    lab.start()
    assert (await lab.chat("a")).status == 200
    assert len(lab.log) < 3_000_000


async def test_output_goes_to_the_log_line_by_line(lab):
    lab.write("a")
    lab.script("a", "wake", "echo loading weights; printf 'no newline at the end'")
    lab.start()
    await lab.chat("a")
    await lab.until(lambda: "loading weights" in lab.log and "no newline at the end" in lab.log)


async def test_a_failing_sleep_with_a_living_engine_goes_on_serving_it(lab):
    lab.write("a b", backoff={"first": "700ms", "max": "2s"})
    lab.script("a", "sleep", "exit 1")
    lab.start()
    await lab.chat("a")
    answer = await lab.chat("b")
    assert answer.status == 503
    assert answer.get("Retry-After")
    assert lab.count("wake", "b") == 0, "nothing wakes beside what still holds the GPU"
    assert (await lab.chat("a")).status == 200
    assert await lab.phase("a") == "AWAKE"
    assert (await lab.chat("b")).status == 503
    lab.unscript("a", "sleep")

    async def served():
        return (await lab.chat("b")).status == 200

    await lab.until(served, every=0.05)
    assert gaps(lab, "sleep", "a")[0] >= 0.53, "the next try waits for the backoff"
    metrics = await lab.metrics()
    assert metrics['llmux_hook_failures_total{hook="sleep",model="a"}'] >= 1


async def test_a_failing_sleep_with_a_dead_engine_is_faulted(lab):
    lab.write("a b", backoff={"first": "500ms", "max": "1s"})
    lab.script("a", "sleep", "exit 1")
    lab.script("a", "alive", "exit 1")
    lab.start()
    await lab.chat("a")
    answer = await lab.chat("b")
    assert answer.status == 503
    assert answer.get("Retry-After")
    assert await lab.phase("a") == "FAULTED"
    for name in "ab":
        answer = await lab.chat(name)
        assert answer.status == 503
        assert answer.get("Retry-After")
    assert (await lab.status())["models"]["a"]["last_error"]
    assert set(lab.order()[1:]) == {"sleep a"}
    lab.unscript("a", "sleep")

    async def served():
        return (await lab.chat("b")).status == 200

    await lab.until(served, every=0.05)
    assert lab.order()[-2:] == ["sleep a", "wake b"]
    assert gaps(lab, "sleep", "a")[0] >= 0.37, "the next try waits for the backoff"
    lab.unscript("a", "alive")


async def test_the_first_request_after_the_backoff_waits_for_the_next_try(lab):
    lab.write("a b", backoff={"first": "300ms", "max": "300ms"})
    lab.script("a", "sleep", "exit 1", times=1)
    lab.script("a", "alive", "exit 1")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 503
    await lab.until_phase("a", "FAULTED")
    await asyncio.sleep(0.45)
    assert (await lab.chat("b")).status == 200


async def test_a_faulted_models_own_request_after_the_backoff(lab):
    lab.write("a b", backoff={"first": "300ms", "max": "300ms"})
    lab.script("a", "sleep", "exit 1", times=1)
    lab.script("a", "alive", "exit 1")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 503
    await asyncio.sleep(0.45)
    assert (await lab.chat("a")).status == 200
    assert lab.order() == ["wake a", "sleep a", "sleep a", "wake a"]


async def test_reset_after_mending_by_hand(lab):
    lab.write("a b", backoff={"first": "30s", "max": "30s"})
    lab.script("a", "sleep", "exit 1")
    lab.script("a", "alive", "exit 1")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 503
    await lab.until_phase("a", "FAULTED")
    lab.crash("a")
    lab.check_holding = False
    assert (await lab.post("/llmux/models/a/reset")).status == 202
    assert await lab.phase("a") == "ASLEEP"
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake b"]


async def test_stop_follows_a_failed_sleep(lab):
    lab.write({"a": {"stop": "sh ./hook.sh stop"}, "b": {}})
    lab.script("a", "sleep", "exit 1")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "stop a", "wake b"]


async def test_stop_follows_a_sleep_that_hangs(lab):
    lab.write({"a": {"stop": "sh ./hook.sh stop", "timeouts": {"sleep": "1s"}}, "b": {}})
    lab.script("a", "sleep", "sleep 60")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "stop a", "wake b"]


async def test_stop_that_fails_too(lab):
    lab.write({"a": {"stop": "sh ./hook.sh stop"}, "b": {}}, backoff={"first": "300ms", "max": "300ms"})
    lab.script("a", "sleep", "exit 1", times=1)
    lab.script("a", "stop", "exit 1", times=1)
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 503
    assert lab.count("wake", "b") == 0

    async def served():
        return (await lab.chat("b")).status == 200

    await lab.until(served, every=0.05)


async def test_verify_is_polled_until_the_memory_is_free(lab):
    lab.write({"a": {"verify": "sh ./hook.sh verify", "timeouts": {"verify": "10s"}}, "b": {}})
    lab.script("a", "verify", "exit 1", times=2)
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 200
    starts = [h.t for h in lab.hooks("verify", "a")]
    assert len(starts) == 3
    assert starts[1] - starts[0] > 0.4
    assert lab.hooks("wake", "b")[0].t >= lab.hooks("verify", "a", "end")[-1].t


async def test_verify_that_never_passes_leads_to_stop(lab):
    lab.write(
        {
            "a": {
                "verify": "sh ./hook.sh verify",
                "stop": "sh ./hook.sh stop",
                "timeouts": {"verify": "2s"},
            },
            "b": {},
        }
    )
    lab.script("a", "sleep", "exit 0")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "stop a", "wake b"]
    assert lab.count("verify", "a") >= 2


async def test_verify_that_never_passes_without_stop(lab):
    """Sleep did nothing; the engine still runs: it is served on, and the other gets a 503."""
    lab.write({"a": {"verify": "sh ./hook.sh verify", "timeouts": {"verify": "300ms"}}, "b": {}})
    lab.script("a", "sleep", "exit 0")
    lab.start()
    await lab.chat("a")
    assert (await lab.chat("b")).status == 503
    assert lab.count("wake", "b") == 0
    assert (await lab.chat("a")).status == 200


async def test_a_wake_that_lies_is_a_failed_wake(lab):
    """It exits 0 and there is no engine: the first connection is refused."""
    lab.write("a b")
    lab.script("a", "wake", "exit 0")
    lab.start()
    answer = await lab.chat("a")
    assert answer.status == 503
    assert answer.get("Retry-After")
    assert lab.count("wake", "a") <= 2
    assert (await lab.chat("b")).status == 200
    assert lab.order()[-2:] == ["sleep a", "wake b"]


async def test_a_crashed_engine_is_woken_by_its_next_request(lab):
    lab.write("a b")
    lab.start()
    first = (await lab.chat("a")).json()["pid"]
    lab.crash("a")
    answer = await lab.chat("a")
    assert answer.status == 200
    assert answer.json()["pid"] != first
    assert lab.count("wake", "a") == 2


async def test_many_requests_find_the_engine_dead(lab):
    lab.write("a")
    lab.start()
    await lab.chat("a")
    lab.crash("a")
    answers = await asyncio.gather(*(lab.chat("a") for _ in range(20)))
    assert [a.status for a in answers] == [200] * 20
    assert lab.count("wake", "a") == 2


async def test_a_crash_in_mid_stream(lab):
    lab.write("a b")
    lab.start()
    answer = await lab.chat("a", do={"sse": 9, "fail": "crash", "fail_after": 4})
    assert answer.status == 200
    assert not answer.whole
    await lab.until(lambda: not running(lab.engine_pid("a")))
    assert (await lab.chat("a")).status == 200
    assert (await lab.chat("b")).status == 200


async def test_a_crash_before_the_headers(lab):
    lab.write("a")
    lab.start()
    answer = await lab.chat("a", do={"fail": "crash"})
    assert answer.status in (502, 503)
    await lab.until(lambda: not running(lab.engine_pid("a")))
    assert (await lab.chat("a")).status == 200


async def test_another_models_request_after_a_crash_cleans_up_first(lab):
    lab.write("a b", alive_every="100ms")
    lab.start()
    await lab.chat("a")
    lab.crash("a")
    await lab.until_phase("a", "LOST", "ASLEEP")
    assert lab.count("alive", "a") >= 4, "three failures in a row"
    assert (await lab.chat("b")).status == 200
    assert lab.order() == ["wake a", "sleep a", "wake b"]


async def test_a_busy_engine_is_not_lost_to_a_failing_probe(lab):
    lab.write("a", alive_every="100ms")
    lab.start()
    lab.script("a", "alive", "exit 1")
    await lab.until(lambda: lab.count("alive", "a") >= 1)
    stream = asyncio.create_task(lab.chat("a", do={"sse": 60, "interval": 0.02}))
    answer = await stream
    assert answer.whole
    assert answer.body.count(b"data: ") == 61
    assert lab.order() == ["wake a"]
    lab.unscript("a", "alive")


async def test_a_cleanup_that_is_not_idempotent_ends_in_asleep(lab):
    """A dead engine's sleep hook fails for ever (kill of a dead pid); with stop it is over at once."""
    lab.write({"a": {"stop": "sh ./hook.sh stop", "env": {"KEY": "a", "SLEEP_OF_DEAD": "1"}}, "b": {}})
    lab.start()
    await lab.chat("a")
    lab.crash("a")
    assert (await lab.chat("a")).status == 200
    lab.crash("a")
    assert (await lab.chat("b")).status == 200


async def test_a_cleanup_that_fails_is_decided_by_verify(lab):
    lab.write(
        {"a": {"verify": "sh ./hook.sh verify", "env": {"KEY": "a", "SLEEP_OF_DEAD": "1"}}, "b": {}},
        alive_every="50ms",
    )
    lab.start()
    await lab.chat("a")
    lab.crash("a")
    await lab.until_phase("a", "LOST", "ASLEEP")
    lab.check_holding = False
    assert (await lab.chat("b")).status == 200


async def test_wakes_of_a_lost_model_need_no_cleanup(lab):
    lab.write("a", alive_every="50ms")
    lab.start()
    await lab.chat("a")
    lab.crash("a")
    await lab.until_phase("a", "LOST", "ASLEEP")
    assert (await lab.chat("a")).status == 200


async def test_hooks_are_measured(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    await lab.chat("b")
    metrics = await lab.metrics()
    for hook, model in (("wake", "a"), ("sleep", "a"), ("wake", "b"), ("alive", "a")):
        assert metrics[f'llmux_hook_duration_seconds_count{{hook="{hook}",model="{model}"}}'] >= 1

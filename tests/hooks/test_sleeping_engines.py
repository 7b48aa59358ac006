"""Hooks of engines that stay as processes while they sleep: with stand-ins that die of what the engines die of."""

import itertools
import json
import shlex
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.engine.real import ROOT, Hook, foreground, runs, status_of, wait_until
from tests.harness.waiting import PATIENCE
from tests.hooks.fakes.base import serving
from tests.hooks.fakes.trtllm import Trtllm
from tests.hooks.fakes.vllm import Vllm

KEY = "control-key"


def fake_command(name: str) -> str:
    return f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -S -m tests.hooks.fakes.{name}"


ALL = {
    "vllm-process": {"VLLM": fake_command("vllm"), "MODEL": "org/m"},
    "vllm-sleep": {"VLLM": fake_command("vllm"), "MODEL": "org/m"},
    "sglang": {"SGLANG": fake_command("sglang"), "MODEL": "org/m"},
    "trtllm": {"TRTLLM_SERVE": fake_command("trtllm"), "MODEL": "org/m", "TRTLLM_RUNTIME_CONTROL_API_KEY": KEY},
}
SLEEPERS = ["vllm-sleep", "sglang", "trtllm"]


class Engine(Hook):
    """A hook whose engine can be looked at and changed."""

    def look(self) -> dict:
        with urllib.request.urlopen(f"{self.url}/fake", timeout=PATIENCE) as answer:
            return json.load(answer)

    def become(self, **attributes) -> None:
        request = urllib.request.Request(f"{self.url}/fake", json.dumps(attributes).encode(), method="POST")
        urllib.request.urlopen(request, timeout=PATIENCE).close()

    def calls(self, *paths: str) -> list[str]:
        """What was asked of it, of these paths."""
        return [call for call in self.look()["calls"] if call.split()[1].partition("?")[0] in paths]


@pytest.fixture
def engine(make_hook):
    """Return a function that makes a hook; its engine is started by its wake."""

    def make(script, **env):
        hook = make_hook(f"{script}.sh", "m", **{**ALL[script], "GRACE": "1", **env})
        hook.__class__ = Engine
        return hook

    return make


@pytest.fixture
def sleeper(request, engine):
    return engine(request.param)


@pytest.mark.parametrize(
    ("script", "shell"),
    [
        *itertools.product(ALL, ["sh"]),
        *itertools.product(["vllm-sleep", "sglang"], ["busybox"]),
        ("vllm-sleep", "bash"),
    ],
    indirect=["shell"],
)
def test_a_whole_life(script, engine, shell, live):
    hook = engine(script)
    hook.shell = shell
    slept = []

    def asleep() -> None:
        assert hook.pid_file.exists() == (script in SLEEPERS)
        slept.extend([hook.pid] if script in SLEEPERS else [])
        assert all(map(runs, slept))

    live(hook, asleep)
    pid = hook.pid
    assert slept == [pid] * (script in SLEEPERS)
    hook.ok("stop")
    assert not runs(pid)
    hook.ok("stop")
    hook.ok("verify")
    hook.ok("sleep")
    hook.fails("alive")


@pytest.mark.parametrize("script", ["vllm-sleep", "sglang"])
def test_to_sleep_under_a_request_is_refused(script, engine):
    hook = engine(script)
    hook.ok("wake")
    hook.become(in_flight=1)
    assert "requests in flight" in hook.fails("sleep")
    hook.ok("alive")
    hook.become(in_flight=0)
    hook.ok("sleep")
    hook.ok("wake")


@pytest.mark.parametrize("script", ALL)
def test_a_start_that_fails_is_said_with_the_log(script, engine):
    said = engine(script).fails("wake", MODEL="broken")
    assert "ended while it was starting" in said
    assert "broken is no folder" in said


@pytest.mark.parametrize("script", ALL)
def test_what_is_not_set_up_is_said(script, engine):
    hook = engine(script)
    program = next(name for name in ("VLLM", "SGLANG", "TRTLLM_SERVE") if name in hook.env)
    assert "MODEL is not set" in hook.fails("wake", code=2, MODEL="")
    assert "no such program: no-such" in hook.fails("wake", code=2, **{program: "no-such"})
    assert "LLMUX_MODEL is not set" in hook.fails("wake", code=2, LLMUX_MODEL="")
    assert "LLMUX_PORT is not set" in hook.fails("alive", code=2, LLMUX_PORT="")
    assert "usage" in hook.fails("dance", code=2)


@pytest.mark.parametrize("script", ["vllm-sleep", "trtllm"])
def test_somebody_elses_server_is_not_taken_for_ours(script, engine):
    hook = engine(script)
    with foreground("stranger", hook.port) as stranger:
        hook.fails("alive")
        assert "something else answers" in hook.fails("wake")
        hook.ok("sleep")
        assert stranger.poll() is None


@pytest.mark.parametrize("sleeper", ["vllm-sleep", "sglang"], indirect=True)
def test_a_canary_that_dies_or_talks_nonsense_is_a_failed_wake(sleeper):
    sleeper.ok("wake")
    sleeper.ok("sleep")
    assert "answers wrongly: 'Berlin' is not in" in sleeper.fails("wake", CANARY_EXPECT="Berlin")
    sleeper.ok("sleep")
    sleeper.ok("wake", CANARY_EXPECT="Paris")
    sleeper.ok("sleep")
    sleeper.become(broken=["/v1/completions"])
    assert "is awake, but does not answer: POST /v1/completions answers 500" in sleeper.fails("wake")
    sleeper.ok("sleep")
    sleeper.ok("wake", CANARY_PATH="")
    sleeper.ok("sleep")


@pytest.mark.parametrize("sleeper", ["vllm-sleep", "sglang"], indirect=True)
def test_the_deepest_of_its_levels_is_the_end_of_the_process(sleeper):
    sleeper.ok("wake")
    pid = sleeper.pid
    sleeper.ok("sleep", LLMUX_SLEEP_LEVEL="1")
    assert runs(pid)
    sleeper.ok("sleep", LLMUX_SLEEP_LEVEL="stop")
    assert not runs(pid)
    sleeper.ok("sleep", LLMUX_SLEEP_LEVEL="stop")
    sleeper.ok("wake", LLMUX_SLEEP_LEVEL="stop")
    sleeper.ok("alive")
    sleeper.ok("sleep", LLMUX_SLEEP_LEVEL="stop")
    sleeper.ok("verify", LLMUX_SLEEP_LEVEL="stop")


# ---- vLLM


@pytest.mark.parametrize("level", ["1", "2"])
def test_vllm_wakes_in_the_order_that_its_level_needs(engine, level):
    hook = engine("vllm-sleep", LEVEL=level, CANARY_EXPECT="Paris")
    hook.ok("wake")
    hook.ok("sleep")
    assert hook.look()["weights"] == {"1": "cpu", "2": "dropped"}[level]
    hook.ok("wake")
    orders = hook.calls("/wake_up", "/collective_rpc", "/reset_prefix_cache")
    assert (
        orders
        == {
            "1": ["POST /wake_up"],
            "2": [
                "POST /wake_up?tags=weights",
                'POST /collective_rpc {"method":"reload_weights"}',
                "POST /wake_up?tags=kv_cache",
                "POST /reset_prefix_cache",
            ],
        }[level]
    )


def test_vllm_wakes_from_the_level_at_which_it_sleeps_whatever_is_configured_now(engine):
    hook = engine("vllm-sleep", CANARY_EXPECT="Paris")
    hook.ok("wake")
    hook.ok("sleep", LEVEL="2")
    assert "level 2" in hook.ok("wake", LEVEL="1")
    hook.ok("sleep", LEVEL="1")
    assert "level 1" in hook.ok("wake", LEVEL="2")
    hook.ok("sleep", LEVEL="2", LLMUX_SLEEP_LEVEL="1")
    assert "cannot go to 2 from there" in hook.fails("sleep", LLMUX_SLEEP_LEVEL="2")
    assert "LEVEL is 1 or 2" in hook.fails("sleep", code=2, LEVEL="3")


def test_vllm_that_sleeps_at_an_unknown_level_reads_its_weights_again(engine):
    hook = engine("vllm-sleep", CANARY_EXPECT="Paris", LEVEL="2")
    hook.ok("wake")
    hook.ok("sleep")
    (hook.pid_dir / f"m-{hook.port}.sleep").unlink()
    hook.ok("wake")


def test_vllm_whose_prefixes_cannot_be_reset_yet_is_asked_again(engine):
    """It answers 200 also then; what it had computed with the weights before would be part of its answers."""
    hook = engine("vllm-sleep", LEVEL="2", CANARY_PATH="", GRACE="5")
    hook.ok("wake")
    hook.ok("sleep")
    hook.become(held=2)
    hook.ok("wake")
    assert hook.look()["prefixes"] == "none"
    hook.ok("sleep")
    hook.become(held=1000)
    assert '"success": false' in hook.fails("wake", GRACE="1")
    hook.become(held=1)  # the next wake has it awake, and not yet as it should be
    hook.ok("wake")
    assert hook.look()["prefixes"] == "none"


def test_vllm_that_says_200_and_dies_of_it_is_noticed(engine):
    hook = engine("vllm-sleep")
    hook.ok("wake")
    hook.become(in_flight=1, metrics=False)  # nobody can see the request
    hook.run("sleep")  # it may have died a little later
    wait_until(lambda: status_of(f"{hook.url}/health") == 0, what="its end")
    hook.ok("stop")
    hook.ok("wake")


def test_vllm_whose_wake_fails_half_way_is_ended_by_its_cleanup(engine):
    hook = engine("vllm-sleep", LEVEL="2")
    hook.ok("wake")
    pid = hook.pid
    hook.ok("sleep")
    hook.become(broken=["/collective_rpc"])
    assert "POST /collective_rpc answers 500" in hook.fails("wake")
    hook.fails("alive")
    hook.fails("verify")  # half awake: the weights' room is taken
    hook.ok("sleep")
    assert not runs(pid)
    hook.ok("verify")
    hook.ok("wake")


def test_vllm_counts_a_client_that_has_left_until_its_next_step(engine):
    hook = engine("vllm-sleep", GRACE="3")
    hook.ok("wake")
    hook.become(left_over=1)
    hook.ok("sleep")


@pytest.mark.parametrize("script", ["vllm-process", "vllm-sleep"])
def test_vllm_with_a_key(engine, script):
    hook = engine(script, API_KEY="s3cret")
    hook.ok("wake")
    assert "s3cret" not in " ".join(hook.look()["calls"])
    hook.ok("sleep")
    hook.ok("wake")
    hook.fails("alive", API_KEY="wrong")


def test_an_engine_that_others_start_in_the_same_moment_is_awake(engine):
    hook = engine("vllm-process")
    fake = Vllm("m")
    with serving(fake, hook.port):
        fake.broken_once = ["/health"]
        assert "this script has not started it" in hook.ok("wake")
        hook.ok("alive")
        assert "end it by hand" in hook.fails("sleep")


def test_vllm_that_others_have_started(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    hook = engine("vllm-sleep", MODEL="")
    assert "nothing answers at" in hook.fails("wake", code=2)
    hook.ok("sleep")
    fake = Vllm("m")
    with serving(fake, hook.port):
        hook.ok("wake")
        hook.ok("sleep")
        assert fake.weights == "cpu"
        hook.fails("alive")
        hook.ok("wake")
        hook.ok("alive")
        fake.broken = ["/wake_up"]
        hook.ok("sleep")
        hook.fails("wake")
        assert "half awake" in hook.fails("sleep")
        assert "STOP" in hook.fails("stop", code=2)
        assert "still answers" in hook.fails("stop", STOP=f"touch '{tmp_path}/stopped'")
        assert (tmp_path / "stopped").exists()
        fake.hanging = ["/health", "/v1/models"]
        assert "does not answer as it should" in hook.fails("sleep", ASK_SECONDS="0.3")
        assert "STOP" in hook.fails("stop", code=2, ASK_SECONDS="0.3")
        hook.ok("stop", ASK_SECONDS="0.3", STOP="true")  # nothing of ours answers any more
    hook.ok("stop")


def test_vllm_without_its_sleep_mode_is_a_mistake_in_the_configuration(engine):
    hook = engine("vllm-sleep", MODEL="")
    with serving(Vllm("m"), hook.port):  # without VLLM_SERVER_DEV_MODE
        for action in ("wake", "alive", "sleep"):
            assert "VLLM_SERVER_DEV_MODE=1" in hook.fails(action, code=2)


# ---- SGLang


def test_sglang_half_way_is_started_anew_or_ended(engine):
    hook = engine("sglang")
    hook.ok("wake")
    pid = hook.pid
    hook.ok("sleep")
    hook.pid_file.write_text(hook.pid_file.read_text().replace("asleep", "resuming"))
    assert "it is not known how far it came" in hook.ok("wake")
    assert not runs(pid)
    pid = hook.pid
    hook.pid_file.write_text(hook.pid_file.read_text().replace("ready", "releasing"))
    hook.fails("alive")
    hook.ok("sleep")
    assert not runs(pid)


def test_sglang_ends_its_schedulers_itself(engine):
    hook = engine("sglang")
    log = hook.pid_file.with_suffix(".log")
    hook.ok("wake")
    hook.ok("sleep", LLMUX_SLEEP_LEVEL="stop")
    assert "crashed" not in log.read_text()
    assert "scheduler_0 has released its memory" in log.read_text()
    hook.ok("wake")
    hook.pid_file.write_text(hook.pid_file.read_text().replace("ready", "resuming"))
    assert "started anew" in hook.ok("wake")
    assert "scheduler_0 has released its memory" in log.with_suffix(".log.1").read_text()


def test_sglang_in_a_script_that_dies_of_term_is_ended_with_it(engine):
    hook = engine("sglang", SGLANG=f"sh -c '{fake_command('sglang')} \"$@\"; true' sh", GRACE="600")
    hook.ok("wake")
    (server,) = (int(word) for word in Path(f"/proc/{hook.pid}/task/{hook.pid}/children").read_text().split())
    hook.ok("sleep", LLMUX_SLEEP_LEVEL="stop")
    assert not runs(server)


def test_sglang_with_keys(engine):
    """With an admin's key, its orders take no other, and its models do not take that one."""
    for keys in ("--api-key k3y", "--admin-api-key 4dmin", "--api-key k3y --admin-api-key 4dmin"):
        env = {"API_KEY": "k3y" if "k3y" in keys else "", "ADMIN_KEY": "4dmin" if "4dmin" in keys else ""}
        hook = engine("sglang", ARGS=keys, **env)
        hook.ok("wake")
        pid = hook.pid
        said = hook.fails("sleep", code=2, ADMIN_KEY="wrong")
        assert "refuses the key" in said, keys
        assert "ADMIN_KEY" in said
        hook.ok("sleep")
        hook.ok("verify")
        assert "refuses the key" in hook.fails("wake", code=2, ADMIN_KEY="wrong")
        hook.ok("wake")
        assert hook.pid == pid, f"{keys}: it was started anew"
        hook.ok("alive")
        hook.ok("stop")


def test_sglang_that_others_have_started_is_not_touched(engine):
    ours, theirs = engine("sglang"), engine("sglang")
    theirs.ok("wake")
    ours.env |= {"LLMUX_PORT": str(theirs.port), "LLMUX_URL": theirs.url, "PID_DIR": str(ours.pid_dir) + "-other"}
    assert "cannot tell whether it sleeps" in ours.fails("wake")
    ours.fails("alive")
    assert "end it by hand" in ours.fails("sleep")
    theirs.ok("alive")


# ---- TensorRT-LLM


def test_trtllm_signs_its_orders(engine):
    hook = engine("trtllm")
    hook.ok("wake")
    for action in ("alive", "sleep", "wake"):
        assert "refuses the signature" in hook.fails(action, TRTLLM_RUNTIME_CONTROL_API_KEY="wrong")
    assert "TRTLLM_RUNTIME_CONTROL_API_KEY is not set" in hook.fails(
        "alive", code=2, TRTLLM_RUNTIME_CONTROL_API_KEY=""
    )


def test_trtllm_whose_memory_failed_is_ended_and_started_anew(engine):
    hook = engine("trtllm")
    hook.ok("wake")
    pid = hook.pid
    hook.ok("sleep")
    hook.become(fails=True)
    assert "POST /resume_memory answers 500" in hook.fails("wake")
    hook.fails("alive")
    hook.fails("verify")
    hook.ok("sleep")
    assert not runs(pid)
    hook.ok("wake")
    hook.become(state="failed")
    assert "started anew" in hook.ok("wake")
    pid = hook.pid
    hook.ok("sleep", LLMUX_SLEEP_LEVEL="stop")
    assert not runs(pid)


def test_trtllm_waits_for_what_is_under_way(engine):
    hook = engine("trtllm", MODEL="", ALIAS="m")
    fake = Trtllm("m", key=KEY)
    with serving(fake, hook.port):
        fake.state = "waking"
        assert "still waking" in hook.fails("wake", WAKE_SECONDS="1")
        fake.state = "running"
        hook.ok("wake")
        hook.ok("sleep")
        assert "STOP" in hook.fails("stop", code=2)
        fake.sleep_mode = False
    with serving(Trtllm("m", key=KEY, sleep_mode=False), hook.port):
        assert "--enable_sleep_mode" in hook.fails("wake", code=2)

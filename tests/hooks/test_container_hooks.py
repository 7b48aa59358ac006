"""Hooks of containers, units and checkpoints, with stand-ins on PATH: they keep states, and refuse bad use."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.real import LLAMA_SERVER, ROOT, runs, wait_until, with_tools
from tests.harness.waiting import PATIENCE
from tests.hooks.fakes import web
from tests.hooks.fakes.base import Fake, serving

FAKES = ROOT / "tests" / "hooks" / "fakes"
CONTAINERS = ["docker", "podman", "podman-criu"]
DIFFERENT = ["docker", "podman-criu"]  # podman.sh is docker.sh with other names: for what is in lib/containers.sh
RUN = "--gpus all -p 127.0.0.1:8002:8000 'an image' --model m"


class Inside(Fake):
    """The server in a container or unit: it answers while that runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__("m")
        self.folder = folder
        self.ready = True

    def routes(self):
        return [web.get("/health", self._health), web.get("/v1/models", self._models)]

    def _runs(self) -> bool:
        for name in ("status", "state"):
            file = self.folder / name
            if file.exists() and file.read_text().strip() in ("running", "active"):
                return True
        return False

    async def _health(self, request):
        if not self._runs():
            request.transport.abort()
        return web.Response(status=200 if self.ready else 503)

    async def _models(self, _request):
        return self.models()


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Return the folder in which the stand-ins on PATH keep their states."""
    folder, tools = tmp_path / "states", tmp_path / "fakes"
    folder.mkdir()
    tools.mkdir()
    for name, file in (
        ("docker", "container-engine.sh"),
        ("podman", "container-engine.sh"),
        ("systemctl", "systemctl.sh"),
        ("cuda-checkpoint", "cuda-checkpoint.sh"),
    ):
        (tools / name).symlink_to(FAKES / file)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_DIR", str(folder))
    return folder


@pytest.fixture
def inside(fakes, make_hook):
    """Return a function that makes a hook and the server that its wake brings up."""
    with_servers = []

    def make(script, **env):
        if script == "systemd":
            (fakes / "m").mkdir(exist_ok=True)
            (fakes / "m" / "state").write_text("inactive\n")
        hook = make_hook(f"{script}.sh", "m", **{"RUN": RUN, "GRACE": "1", "EXPECT": '"id": "m"', **env})
        server = serving(Inside(fakes / "m"), hook.port)
        with_servers.append(server)
        return hook, server.__enter__()

    yield make
    for server in with_servers:
        server.__exit__(None, None, None)


@pytest.fixture(params=[*CONTAINERS, "systemd"])
def script(request):
    return request.param


@pytest.fixture(params=DIFFERENT)
def container(request, inside):
    return inside(request.param)


def calls(fakes, word: str) -> list[str]:
    return [line for line in (fakes / "calls").read_text().splitlines() if f" {word} " in f"{line} "]


@pytest.mark.parametrize(
    ("script", "shell"),
    [
        *itertools.product([*CONTAINERS, "systemd"], ["sh"]),
        *itertools.product(["docker", "podman-criu", "systemd"], ["busybox"]),
    ],
    indirect=["shell"],
)
def test_a_whole_life(script, inside, shell, live):
    hook, _ = inside(script, ASK_SECONDS="30")  # a busy machine takes its time
    hook.shell = shell
    live(hook)
    hook.ok("stop")
    hook.ok("verify")
    hook.ok("stop")
    hook.fails("alive")
    hook.ok("wake")


def test_a_container_is_run_once_and_started_after_that(inside, fakes):
    hook, _ = inside("docker")
    hook.ok("wake")
    assert (fakes / "m" / "arguments").read_text().split("\n")[:4] == [
        "--gpus",
        "all",
        "-p",
        "127.0.0.1:8002:8000",
    ]
    assert "an image\n" in (fakes / "m" / "arguments").read_text()
    hook.ok("sleep")
    hook.ok("wake", RUN="")
    assert len(calls(fakes, "run")) == 1
    assert len(calls(fakes, "start")) == 1


def test_a_container_that_is_not_there_is_a_mistake_unless_it_can_be_run(container):
    hook, _ = container
    assert "set RUN" in hook.fails("wake", code=2, RUN="")
    hook.ok("sleep", RUN="")


def test_a_container_that_was_stopped_with_rm_is_waited_for(inside, fakes):
    hook, _ = inside("docker", RUN=f"--rm {RUN}")
    hook.ok("wake")
    hook.ok("sleep")
    (fakes / "m").mkdir(exist_ok=True)
    (fakes / "m" / "status").write_text("removing\n")
    hook.ok("wake")
    assert len(calls(fakes, "run")) == 2


def test_a_frozen_container_is_woken_and_stopped(container, fakes):
    hook, _ = container
    hook.ok("wake")
    (fakes / "m" / "status").write_text("paused\n")
    hook.fails("alive")
    hook.ok("wake")
    if "criu" not in str(hook.script):
        (fakes / "m" / "status").write_text("paused\n")
        hook.ok("sleep")


def test_a_container_that_ends_while_it_starts_is_said_with_its_log(container, fakes):
    hook, _ = container
    (fakes / "next_start").write_text("exited\n")
    said = hook.fails("wake")
    assert "is exited while it starts" in said
    assert "CUDA out of memory" in said


def test_a_daemon_that_is_down_is_no_container_that_is_down(container, fakes):
    hook, _ = container
    hook.ok("wake")
    for said in (
        "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "failed to connect to the docker API: dial unix /var/run/docker.sock: connect: no such file or directory",
    ):
        (fakes / "daemon_is_down").write_text(said)
        for action in ("alive", "sleep", "verify", "stop"):
            complaint = hook.fails(action)
            assert "cannot say what m does: " in complaint
            assert said in complaint


@pytest.mark.parametrize("script", ["docker", "systemd"], indirect=True)
def test_what_answers_has_to_be_ours(script, inside):
    hook, server = inside(script)
    server.alias = "stranger"
    assert "is not in what it says" in hook.fails("wake")
    hook.fails("alive")
    server.alias = "m"
    hook.ok("wake")


@pytest.mark.parametrize("script", ["docker", "systemd"], indirect=True)
def test_it_waits_until_the_engine_is_ready(script, inside):
    hook, server = inside(script)
    server.ready = False
    with subprocess.Popen(
        ["sh", hook.script, "wake"], env={**with_tools(), **hook.env}, stdout=subprocess.DEVNULL
    ) as wake:
        wait_until(lambda: any("/health" in call for call in server.calls[1:]), what="its questions")
        assert wake.poll() is None
        server.ready = True
        assert wake.wait(PATIENCE) == 0


def test_a_stop_that_is_refused_is_a_failed_sleep(inside, fakes):
    for script in ("docker", "podman", "systemd"):
        hook, _ = inside(script)
        hook.ok("wake")
        (fakes / "stop_fails").touch()
        assert "cannot be stopped" in hook.fails("sleep")
        hook.ok("alive")
        (fakes / "stop_fails").unlink()
        hook.ok("sleep")


def test_what_is_not_set_up_is_said(script, inside):
    hook, _ = inside(script)
    tool = {"systemd": "SYSTEMCTL", "docker": "DOCKER"}.get(script, "PODMAN")
    assert "no such program: no-such" in hook.fails("wake", code=2, **{tool: "no-such --user"})
    assert "is set" in hook.fails("wake", code=2, LLMUX_MODEL="")
    assert "LLMUX_URL is not set" in hook.fails("wake", code=2, LLMUX_URL="")
    assert "set " in hook.fails("wake", code=2, LLMUX_MODEL="org/m")
    assert "set " in hook.fails("wake", code=2, LLMUX_MODEL="--privileged")
    assert "usage" in hook.fails("dance", code=2)


def test_the_command_may_be_several_words(script, inside):
    hook, _ = inside(script)
    tool = {"systemd": "systemctl", "docker": "docker"}.get(script, "podman")
    hook.ok("wake", **{tool.upper(): f"env A=1 {tool}"})
    hook.ok("alive")


# ---- podman with CRIU


def test_criu_checkpoints_and_restores(inside, fakes):
    hook, _ = inside("podman-criu")
    hook.ok("wake")
    for _ in range(2):
        hook.ok("sleep")
        assert (fakes / "m" / "checkpoint").exists()
        hook.ok("wake")
    assert len(calls(fakes, "run")) == 1
    assert len(calls(fakes, "restore")) == 2
    assert not calls(fakes, "start")


def test_criu_that_cannot_restore_starts_from_nothing(inside, fakes):
    hook, _ = inside("podman-criu")
    hook.ok("wake")
    hook.ok("sleep")
    (fakes / "restore_fails").touch()
    assert "started from nothing" in hook.ok("wake")
    hook.ok("alive")


def test_criu_that_cannot_checkpoint_fails_and_the_engine_runs_on(inside, fakes):
    hook, _ = inside("podman-criu")
    hook.ok("wake")
    (fakes / "checkpoint_fails").touch()
    said = hook.fails("sleep")
    assert "cuda_plugin: Unable to checkpoint" in said
    hook.ok("alive")
    hook.ok("stop")
    hook.ok("verify")


# ---- systemd


def test_a_unit_that_failed_before_is_started(inside, fakes):
    hook, _ = inside("systemd")
    (fakes / "m" / "state").write_text("failed\n")
    hook.ok("sleep")
    hook.ok("wake")
    hook.ok("alive")


def test_a_unit_that_ends_again_and_again_is_given_up(inside, fakes):
    hook, _ = inside("systemd")
    (fakes / "next_start").write_text("activating\n")
    (fakes / "loops").touch()
    (fakes / "m" / "restarts").write_text("0\n")
    assert "ends again and again" in hook.fails("wake")
    (fakes / "start_fails").touch()
    hook.ok("stop")
    assert "cannot be started" in hook.fails("wake")


def test_a_unit_that_does_not_exist_is_named(inside):
    hook, _ = inside("systemd")
    assert "no unit nothing.service" in hook.fails("wake", code=2, UNIT="nothing.service")


def test_a_users_own_units(inside, fakes):
    hook, _ = inside("systemd", SYSTEMCTL="systemctl --user")
    hook.ok("wake")
    assert all(line.startswith("systemctl --user ") for line in (fakes / "calls").read_text().splitlines())


# ---- cuda-checkpoint, with real processes


@pytest.fixture
def checkpointed(fakes, make_hook):  # noqa: ARG001 - they are on PATH
    def make(**env):
        command = f'{LLAMA_SERVER} --model "$MODEL" --port "$LLMUX_PORT" --alias "$LLMUX_MODEL"'
        return make_hook("cuda-checkpoint.sh", "m", COMMAND=command, EXPECT='"id":"m"', GRACE="1", **env)

    return make


@pytest.mark.parametrize("shell", ["sh", "busybox"], indirect=True)
def test_cuda_a_whole_life(checkpointed, shell, live, fakes):
    hook = checkpointed()
    hook.shell = shell
    slept = []

    def asleep() -> None:
        slept.append(hook.pid)
        assert (fakes / str(hook.pid)).read_text() == "checkpointed\n"

    live(hook, asleep)
    pid = hook.pid
    assert slept == [pid]
    assert (fakes / str(pid)).read_text() == "running\n"
    hook.ok("stop")
    assert not runs(pid)
    hook.ok("wake")


def test_cuda_process_that_cannot_be_locked_runs_on(checkpointed, fakes, tmp_path):
    (tmp_path / "two.py").write_text(
        "import os, sys\nif os.fork() == 0:\n    import time\n    time.sleep(600)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    engine = ROOT / "examples" / "quickstart" / "engine.py"
    hook = checkpointed(LOCK_SECONDS="1")
    hook.env["COMMAND"] = (
        f"'{sys.executable}' two.py '{engine}' --model \"$MODEL\" --port $LLMUX_PORT --alias $LLMUX_MODEL"
    )
    hook.ok("wake")
    children = Path(f"/proc/{hook.pid}/task/{hook.pid}/children").read_text().split()
    (fakes / "busy").write_text(children[0])
    said = hook.fails("sleep")
    assert "timed out" in said
    assert "runs on" in said
    hook.ok("alive")  # the first that was locked is unlocked again
    (fakes / "busy").unlink()
    hook.ok("sleep")
    assert {(fakes / str(pid)).read_text() for pid in (hook.pid, *children)} == {"checkpointed\n"}
    hook.fails("alive")
    hook.ok("wake")
    hook.ok("alive")


def test_cuda_process_that_cannot_be_checkpointed_is_of_no_more_use(checkpointed, fakes):
    hook = checkpointed()
    hook.ok("wake")
    pid = hook.pid
    (fakes / "uvm").touch()
    assert "not supported" in hook.fails("sleep")
    hook.fails("alive")
    hook.fails("verify")
    assert "of no more use" in hook.fails("wake")
    hook.ok("sleep")
    assert not runs(pid)


def test_cuda_checkpoint_that_hangs_is_given_up(checkpointed, fakes):
    hook = checkpointed(ASK_SECONDS="0.5")
    hook.ok("wake")
    hook.ok("sleep")
    (fakes / "hangs").touch()
    for action in ("wake", "alive", "verify", "sleep"):  # its server answers all the while
        assert "does not say within 0.5 s" in hook.fails(action)
    hook.ok("stop")


def test_cuda_checkpoint_that_is_not_there(checkpointed):
    hook = checkpointed()
    assert "no such program: no-such" in hook.fails("wake", code=2, CUDA_CHECKPOINT="no-such")
    assert "COMMAND is not set" in hook.fails("wake", code=2, COMMAND="")
    hook.env["COMMAND"] = "sleep 600"
    assert "usage" in hook.fails("dance", code=2)

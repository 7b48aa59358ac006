"""`llmux hooks test`: good hooks with real engines, and bad ones, each caught by name."""

import asyncio
import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from examples.quickstart.tiny_gguf import cached
from llmux.cli import app, hook_check, hook_probes
from llmux.cli.hook_check import WARNINGS, Wrong
from llmux.config import Config
from llmux.observability.state_file import StateFile
from llmux.runtime.engine_locks import EngineLocks, controlled
from tests.engine.real import LLAMA_SERVER, ROOT, TINY, end_engines, foreground, runs, wait_until, with_tools
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE
from tests.server.house import Log

# Answers as engines do, says in a file when it is up, and takes its time: with a delay, until alive has looked.
ENGINE = """
import json, os, signal, socketserver, sys, threading, time
name, port, delay, linger, status = sys.argv[1], *map(float, sys.argv[2:])
class Engine(socketserver.StreamRequestHandler):  # http.server takes longer to import than all else here
    def handle(self):
        length, code, body = 0, 200, {"data": [{"id": name}]}
        if self.rfile.readline().startswith(b"POST "):
            code, body = int(status), {"model": name, "choices": []}
        while (line := self.rfile.readline()).strip():
            field, _, value = line.partition(b":")
            length = int(value) if field.lower() == b"content-length" else length
        self.rfile.read(length)
        data = json.dumps(body).encode()
        head = "HTTP/1.1 %d .\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % (code, len(data))
        self.wfile.write(head.encode() + data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
while delay and not os.path.exists("looked-for"):
    time.sleep(0.02)
server = Server(("127.0.0.1", int(port)), Engine)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
open("up", "w").close()
server.serve_forever(0.02)
server.server_close()
time.sleep(linger)
"""

# A hook that does all that it should, but for what $BAD says.
HOOK = """
bad() { [ "$BAD" = "$1" ]; }
up() { [ -e up ] && [ -e pid ] && kill -0 "$(cat pid)" 2>/dev/null; }
asks() { "$PYTHON" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=60)' "$LLMUX_URL/health"; }
start() {
	rm -f up looked-for
	set -- "$PYTHON" -S engine.py "${SERVED:-$LLMUX_MODEL}" "$LLMUX_PORT" "${DELAY:-0}" "${LINGER:-0}"
	set -- "$@" "${STATUS:-200}"
	if bad pipe-left-open; then
		setsid "$@" </dev/null &
	elif bad in-hooks-group; then
		"$@" </dev/null >log 2>&1 &
	else
		setsid "$@" </dev/null >log 2>&1 &
	fi
	echo $! >pid
	echo 9000 >gpu
}
end() {
	kill "$(cat pid)" || bad sleep-ends-another || return
	bad sleep-too-early || while kill -0 "$(cat pid)" 2>/dev/null; do sleep 0.02; done
	rm -f up
	bad sleep-ends-another || rm -f pid
	bad memory-not-freed || echo 100 >gpu
}
case $LLMUX_HOOK in
wake)
	! bad wake-fails || { echo "no such file: model.gguf"; exit 7; }
	! bad wake-lies || exit 0
	if up; then
		! bad wake-not-idempotent || { echo "address already in use"; exit 1; }
		bad wake-restarts || exit 0
		end
	fi
	start
	bad wake-too-early || until up; do sleep 0.02; done
	! bad wake-stays || sleep 100
	;;
sleep)
	! bad sleep-fails || { echo "permission denied"; exit 3; }
	! bad alive-after-sleep || exit 0
	! bad cannot-go-deeper || [ "$LLMUX_SLEEP_LEVEL" != disk ] || exit 1
	if up || bad sleep-not-idempotent || bad sleep-ends-another; then end; fi
	;;
alive)
	if bad alive-takes-a-stranger; then asks; else up || { : >looked-for && exit 1; }; fi
	;;
verify)
	case $BAD in
	verify-fails) exit 1 ;;
	verify-always-passes) exit 0 ;;
	*) ! up ;;
	esac
	;;
esac
"""

LAST_PID = hook_probes._LAST_PID

MORE = {
    Wrong.WAKE_TOO_EARLY: {"DELAY": "1"},
    Wrong.SLEEP_TOO_EARLY: {"LINGER": "3"},  # longer than it takes to look, on a machine that is slow
    Wrong.CANARY_FAILS: {"STATUS": "500"},
    Wrong.WRONG_SERVER: {"SERVED": "stranger"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a configuration to be; engines that are left in it are ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", with_tools()["PATH"])
    monkeypatch.setattr(hook_check, "LINGER", 30.0)
    monkeypatch.setattr(hook_check, "ASK_EVERY", 0.02)
    monkeypatch.setattr(hook_check, "STAYS", 0.2)
    monkeypatch.setattr(hook_probes, "_LAST_PID", Path("/proc/version"))  # as for a user without rights
    monkeypatch.setattr(hook_check, "MEMORY_PATIENCE", 0.2)
    (tmp_path / "engine.py").write_text(ENGINE)
    (tmp_path / "hook.sh").write_text(HOOK)
    yield tmp_path
    end_engines(tmp_path)


@pytest.fixture
def numbers(folder, monkeypatch):  # noqa: ARG001 - which takes them away
    """Numbers can be given away, and by one test at a time: those that run beside it get the next ones."""
    monkeypatch.setattr(hook_probes, "_LAST_PID", LAST_PID)
    with (Path(tempfile.gettempdir()) / "llmux-tests-numbers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def configure(folder):
    def write(bad="", *, port=None, models=None, **settings):
        env = {"BAD": str(bad), "PYTHON": sys.executable, "PID_DIR": str(folder), **MORE.get(bad, {})}
        hooks = dict.fromkeys(("wake", "sleep", "alive", "verify"), "sh hook.sh")
        model = {"port": free_port(), "env": env, "timeouts": {"verify": "3s"}, **hooks, **settings}
        config = {"port": port or free_port(), "models": {"m": model, **(models or {})}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return model

    return write


def with_gpu(folder, monkeypatch):
    """A GPU whose memory the hook keeps in a file."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\ncat gpu 2>/dev/null || echo 100\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def try_hooks(*arguments):
    return CliRunner().invoke(app, ["hooks", "test", *map(str, arguments)])


def found(done) -> set[Wrong]:
    names = [line.split(": ")[1] for line in done.output.splitlines() if line.startswith(("error: ", "warning: "))]
    return {Wrong[name.upper().replace("-", "_")] for name in names}


@pytest.mark.parametrize("script", ["llama-cpp", "vllm-sleep"])
def test_a_good_hook_is_not_found_fault_with(folder, configure, script):
    command = f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -S -m tests.hooks.fakes.vllm"
    env = {
        "llama-cpp": {"LLAMA_SERVER": LLAMA_SERVER, "MODEL": str(cached(TINY))},
        "vllm-sleep": {"VLLM": command, "MODEL": "org/m"},
    }[script]
    hooks = {hook: f"'{ROOT}/hooks/{script}.sh' {hook}" for hook in ("wake", "sleep", "alive", "verify", "stop")}
    configure(**hooks, env={"PID_DIR": str(folder), "GRACE": "1", **env}, timeouts={})
    done = try_hooks("m")
    assert done.exit_code == 0, done.output
    assert "These hooks do what llmux relies on." in done.output
    assert not found(done)
    assert "expected: awake ✓" in done.output
    assert "expected: asleep ✓" in done.output
    steps = [line.split("  ")[0].strip() for line in done.output.splitlines() if " ok " in line]
    assert steps[:8] == ["alive", "wake", "alive", "wake again", "request", "sleep", "verify", "sleep again"]


async def test_it_refuses_while_another_llmux_controls_the_engine(configure, folder):
    """One that has another port and state file; an llmux that does not answer counts, too."""
    port = configure()["port"]
    log = Log()
    locks = EngineLocks(log, "/etc/other.yaml", 100)
    locks.follow(lambda: [f"127.0.0.1:{port}"])
    done = await asyncio.to_thread(try_hooks, "m")
    assert done.exit_code == 2
    assert f"127.0.0.1:{port} is controlled by the llmux with pid {os.getpid()} (/etc/other.yaml)" in " ".join(
        done.output.split()
    )
    assert log.events == [], "a test of hooks is no llmux"
    done = try_hooks("m")  # on this thread: it cannot answer
    assert done.exit_code == 2
    assert f"127.0.0.1:{port} is controlled by another llmux: stop it first" in " ".join(done.output.split())
    assert not (folder / "pid").exists()
    locks.close()
    assert controlled(f"127.0.0.1:{port}") is None


def numbers_can_be_given() -> bool:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with hook_probes.bystander(process.pid) as other:
        return other is not None


needs_numbers = pytest.mark.skipif(not numbers_can_be_given(), reason="Linux asks for root")


class Counter:
    """The machine's counter of process numbers, as far as it is asked and told."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.told: list[str] = []

    def read_text(self) -> str:
        self.seen.append(LAST_PID.read_text())
        return self.seen[-1]

    def write_text(self, text: str) -> None:
        self.told.append(text)
        LAST_PID.write_text(text)


@needs_numbers
@pytest.mark.usefixtures("numbers")
def test_the_next_numbers_are_those_that_would_have_come(monkeypatch):
    counter = Counter()
    monkeypatch.setattr(hook_probes, "_LAST_PID", counter)
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with hook_probes.bystander(process.pid) as other:
        assert other is not None
    assert counter.seen
    assert counter.told[1::2] == counter.seen
    assert set(counter.told[::2]) == {str(process.pid - 1)}


NEEDS = {Wrong.SLEEP_ENDS_ANOTHER: [needs_numbers]}


@pytest.mark.parametrize("wrong", [pytest.param(wrong, marks=NEEDS.get(wrong, [])) for wrong in Wrong])
def test_each_mistake_is_found_by_its_name(folder, configure, monkeypatch, request, wrong):
    if wrong is Wrong.SLEEP_ENDS_ANOTHER:
        request.getfixturevalue("numbers")
    if wrong in (Wrong.MEMORY_NOT_FREED, Wrong.VERIFY_ALWAYS_PASSES):
        with_gpu(folder, monkeypatch)
    if wrong is Wrong.WAKE_LIES:
        monkeypatch.setattr(hook_check, "LINGER", 0.3)
    settings = {"levels": ["ram", "disk"]} if wrong is Wrong.CANNOT_GO_DEEPER else {}
    if wrong is Wrong.ALIVE_AFTER_SLEEP:
        settings = {"verify": None}  # it would find out as well
    configure(wrong, **settings)
    done = try_hooks("m", "--strict")
    assert found(done) == {wrong}, done.output
    assert done.exit_code == 1
    assert " ".join(wrong.value.split()) in " ".join(done.output.split())
    if wrong not in (Wrong.SLEEP_FAILS, Wrong.ALIVE_AFTER_SLEEP):
        assert not (folder / "up").exists()


def test_a_hook_without_a_mistake_has_none(folder, configure, monkeypatch):
    with_gpu(folder, monkeypatch)
    configure(levels=["ram", "disk"], aliases=["other"])
    done = try_hooks("other", "--strict", "-v")
    assert done.exit_code == 0, done.output
    assert "100 MiB in use before, 9000 awake, 100 after sleep" in done.output
    assert "sleep, on to level disk" in done.output


@needs_numbers
@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("script", ["llama-cpp", "process"])
def test_a_shipped_sleep_leaves_alone_what_has_the_engines_number(folder, configure, script):
    command = f'{LLAMA_SERVER} --model "$MODEL" --port "$LLMUX_PORT" --alias "$LLMUX_MODEL"'
    env = {"PID_DIR": str(folder), "MODEL": str(cached(TINY)), "LLAMA_SERVER": LLAMA_SERVER, "COMMAND": command}
    hooks = {hook: f"'{ROOT}/hooks/{script}.sh' {hook}" for hook in ("wake", "sleep", "alive", "verify", "stop")}
    configure(**hooks, env=env, timeouts={})
    done = try_hooks("m")
    assert done.exit_code == 0, done.output
    assert "sleep, number reused" in done.output


def test_ollama_calls_a_model_by_its_tag(configure):
    env = configure()["env"]
    configure(env={**env, "SERVED": "org/m:latest"}, upstream_model="org/m")
    assert try_hooks("m").exit_code == 0
    configure(env={**env, "SERVED": "org/m:8b"}, upstream_model="org/m")
    assert found(try_hooks("m")) == {Wrong.WRONG_SERVER}


def test_a_warning_alone_is_no_failure_unless_strict(configure):
    configure(Wrong.IN_HOOKS_GROUP)
    done = try_hooks("m")
    assert found(done) == {Wrong.IN_HOOKS_GROUP}
    assert done.exit_code == 0


def test_what_is_awake_at_the_start_is_put_to_sleep_first(folder, configure):
    model = configure()
    subprocess.run(
        ["sh", "hook.sh"],
        env={
            **os.environ,
            **model["env"],
            "LLMUX_HOOK": "wake",
            "LLMUX_PORT": str(model["port"]),
            "LLMUX_MODEL": "m",
        },
        check=True,
    )
    pid = int((folder / "pid").read_text())
    done = try_hooks("m")
    assert "sleep, for it was awake" in done.output
    assert done.exit_code == 0
    assert not runs(pid)


def test_an_alive_that_always_says_yes_is_found(configure):
    configure(alive="true")
    done = try_hooks("m")
    assert found(done) == {Wrong.ALIVE_AFTER_SLEEP}
    assert done.exit_code == 1


def test_a_hook_past_its_timeout_is_ended_and_said(folder, configure):
    configure(wake="echo $$ >hung; sleep 600", timeouts={"wake": "1.5s"}, stop="touch stopped", sleep="exit 1")
    done = try_hooks("m")
    assert re.search(r"wake ran past its timeout of \d\.\d s", done.output)  # 1.5, late or not
    assert found(done) == {Wrong.WAKE_FAILS}
    assert not runs(int((folder / "hung").read_text()))
    assert (folder / "stopped").exists()  # as llmux does when sleep fails


def test_an_engine_that_speaks_no_openai_is_not_asked(configure):
    configure(env={**configure()["env"], "STATUS": "404"})
    done = try_hooks("m")
    assert "it takes none of OpenAI's requests (404)" in done.output
    assert done.exit_code == 0, done.output


# It adopts what llmux leaves behind, and never looks after it: as process 1 of many a container does.
NO_INIT = """
import ctypes, subprocess, sys, time
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
done = subprocess.run(sys.argv[1:], check=False)
sys.exit(done.returncode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux knows who adopts orphans")
@pytest.mark.usefixtures("numbers")
def test_a_second_signal_to_an_engine_that_nobody_buries_is_no_good_sleep(configure):
    waits = 'while [ -e "/proc/$pid" ] && ! grep -q "^State:.Z" "/proc/$pid/status"; do sleep 0.02; done'
    configure(sleep=f'pid=$(cat pid); kill "$pid" || exit; {waits}; rm -f up', verify=None)
    command = [sys.executable, "-c", NO_INIT, sys.executable, "-m", "llmux", "hooks", "test", "m", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert "error: sleep-not-idempotent" in done.stdout, done.stdout + done.stderr
    assert "o such process" in done.stdout
    assert done.returncode == 1


def test_where_no_number_can_be_given_away_it_says_so(configure):
    configure()
    done = try_hooks("m", "--strict")
    assert done.exit_code == 0, done.output
    assert "the engine's number cannot be given to another process here" in done.output


def test_an_engine_that_stays_when_it_sleeps_has_its_number_still(folder, configure):
    configure(sleep="rm -f up", alive="[ -e up ]", verify=None, wake="[ -e pid ] || exec sh hook.sh; >up")
    done = try_hooks("m", "--strict")
    assert done.exit_code == 0, done.output
    assert "number reused" not in done.output
    assert runs(int((folder / "pid").read_text()))


@needs_numbers
@pytest.mark.parametrize("signal_to", ['"$pid"', '-- "-$pid"', '-9 "$pid"'])
@pytest.mark.usefixtures("numbers")
def test_a_sleep_that_hides_its_failures_is_found_by_whom_it_hits(configure, signal_to):
    ends = f'pid=$(cat pid); kill {signal_to} 2>/dev/null; while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done'
    configure(sleep=f"{ends}; rm -f up", verify=None)
    assert found(try_hooks("m")) == {Wrong.SLEEP_ENDS_ANOTHER}


@needs_numbers
@pytest.mark.usefixtures("numbers")
def test_a_sleep_that_waits_for_a_stranger_to_end_is_no_good_one(configure):
    ends = 'pid=$(cat pid); [ ! -e up ] || kill "$pid"; while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done'
    configure(sleep=f"{ends}; rm -f up", verify=None, timeouts={"sleep": "3s"})
    done = try_hooks("m")
    assert found(done) == {Wrong.SLEEP_NOT_IDEMPOTENT}
    assert "another process has the number that the engine had, ran past its timeout" in done.output


# ---- when it refuses


def refused(done) -> str:
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return " ".join(done.stderr.split())


def test_a_running_llmux_is_left_alone(folder, configure):
    configure()
    store = StateFile(Config.from_file(folder / "config.yaml").state_path)
    store.open()
    try:
        assert "is in use by the llmux with pid" in refused(try_hooks("m"))
        assert not (folder / "pid").exists()
        assert try_hooks("m", "--force").exit_code == 0
    finally:
        store.close()


def test_a_taken_port_may_be_llmux(configure):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        configure(port=taken.getsockname()[1])
        assert "if it is llmux with these models, stop it first" in refused(try_hooks("m"))


def test_another_model_that_is_awake_is_in_the_way(configure):
    configure(models={"other": {"port": free_port(), "wake": "true", "sleep": "true", "alive": "true"}})
    assert refused(try_hooks("m")).startswith("other: awake, and may hold the GPU")
    assert try_hooks("m", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("m2",), "no model 'm2' (did you mean m?); known: m"),
        (("m", "-c", "nowhere.yaml"), "nowhere.yaml"),
        (("m", "-c", "hook.sh"), "hook.sh"),
    ],
)
def test_bad_input_is_said(configure, arguments, said):
    configure()
    assert said in refused(try_hooks(*arguments))


def test_ctrl_c_ends_the_hook(folder, configure):
    configure(wake="echo $$ >hung; sleep 600")
    command = [sys.executable, "-m", "llmux", "hooks", "test", "m"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: (folder / "hung").exists() and (folder / "hung").read_text(), what="the hook")
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=PATIENCE)[1]
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert "m may be awake" in said
    assert not runs(int((folder / "hung").read_text()))


def test_somebody_elses_server_at_the_start_is_no_engine_of_ours(folder):
    port = free_port()
    with foreground("stranger", port):
        hooks = {hook: f"'{ROOT}/hooks/llama-cpp.sh' {hook}" for hook in ("wake", "sleep", "alive")}
        model = {"port": port, "env": {"PID_DIR": str(folder), "MODEL": str(cached(TINY))}, **hooks}
        (folder / "config.yaml").write_text(yaml.safe_dump({"port": free_port(), "models": {"m": model}}))
        done = try_hooks("m")
        assert found(done) == {Wrong.WAKE_FAILS}
        assert "something else answers" in done.output


def test_every_mistake_is_explained():
    assert set(Wrong) >= WARNINGS
    page = (ROOT / "hooks" / "README.md").read_text()
    assert not [wrong for wrong in Wrong if f"`{wrong}`" not in page]

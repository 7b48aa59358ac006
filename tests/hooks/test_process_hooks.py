"""llama-cpp.sh and process.sh with a real engine: llama.cpp's server, on the CPU."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.quickstart.tiny_gguf import cached
from tests.engine.real import ROOT, SLOW, Hook, foreground, runs, status_of, wait_until, with_tools
from tests.harness.waiting import PATIENCE, processes_with
from tests.hooks.conftest import PROCESS_COMMAND

FORKING = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    while True:
        signal.pause()
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""

OK = FORKING.replace("os.fork() == 0", "False").replace("signal.SIG_IGN", "signal.SIG_DFL")

GROUP_OF_ITS_OWN = """
import subprocess, sys
subprocess.Popen(sys.argv[1:], process_group=0).wait()
"""

# Its worker lives on, as vLLM's do, when the leader of its session has ended.
LOADING = """
import os, signal, sys
if os.fork():
    os.waitpid(-1, 0) if sys.argv[1] == "killed" else sys.exit(int(sys.argv[1]))
with open(sys.argv[2], "w") as file:
    file.write("loading")
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
signal.pause()
"""

LEADERLESS = """
import ctypes, http.server, signal, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def ask(hook: Hook, **fields) -> dict:
    body = {"model": "any", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | fields
    request = urllib.request.Request(f"{hook.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return json.load(response)


@contextlib.contextmanager
def bystanding() -> Iterator[subprocess.Popen]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("hook", "shell", "place"),
    [
        ("llama-cpp.sh", "sh", "as it is"),
        ("llama-cpp.sh", "busybox", "copied"),
        ("process.sh", "sh", "copied"),
        ("process.sh", "busybox", "as it is"),
    ],
    indirect=["hook", "shell"],
)
def test_a_whole_life(hook, shell, place):
    hook.shell = shell
    if place == "as it is":
        hook.script = ROOT / "hooks" / hook.script.name
    hook.fails("alive")
    hook.ok("verify")
    hook.ok("wake")
    pid = hook.pid
    assert "already" in hook.ok("wake")
    assert hook.pid == pid
    hook.ok("alive")
    hook.fails("verify")
    assert ask(hook)["model"] == "tiny"
    hook.ok("sleep")
    assert not runs(pid)
    assert status_of(f"{hook.url}/health") == 0
    hook.ok("sleep")
    hook.fails("alive")
    hook.ok("verify")
    hook.ok("wake")
    pid = hook.pid
    hook.ok("stop")
    assert not runs(pid)
    hook.ok("stop")
    hook.fails("alive")


def test_the_action_may_come_from_llmux(hook):
    done = subprocess.run(
        ["sh", hook.script], env={**with_tools(), **hook.env, "LLMUX_HOOK": "alive"}, check=False
    )
    assert done.returncode == 1
    assert "usage" in hook.fails("dance", code=2)


def test_the_engine_holds_none_of_the_hooks_pipes_and_is_no_member_of_its_group(hook):
    hook.ok("wake")  # subprocess.run reads to the end of the pipes: it would hang here
    assert os.getpgid(hook.pid) == hook.pid
    assert os.getsid(hook.pid) == hook.pid
    descriptors = {str(Path(f"/proc/{hook.pid}/fd/{number}").readlink()) for number in (0, 1, 2)}
    assert descriptors == {"/dev/null", str(hook.pid_dir / f"tiny-{hook.port}.log")}


def test_sleep_in_the_middle_of_an_answer_waits_for_the_process(make_hook):
    hook = make_hook("llama-cpp.sh", MODEL=str(cached(SLOW)), GRACE="1")
    hook.ok("wake")
    pid = hook.pid
    with socket.create_connection(("127.0.0.1", hook.port)) as client:
        body = json.dumps({"prompt": "go", "n_predict": 3000, "stream": True})
        client.sendall(
            f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert client.recv(1)
        hook.ok("sleep")
        assert not runs(pid)
    hook.fails("alive")


def test_an_engine_that_ignores_term_and_has_children_is_killed_with_them(make_hook, tmp_path):
    (tmp_path / "forking.py").write_text(FORKING)
    hook = make_hook(
        "process.sh", COMMAND=f"'{sys.executable}' forking.py $LLMUX_PORT", HEALTH_PATH="/", GRACE="1"
    )
    hook.ok("wake")
    parent = hook.pid
    children = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    assert children
    os.kill(parent, signal.SIGKILL)  # the child is left: it may well be what holds the memory
    wait_until(lambda: not runs(parent))
    hook.fails("alive")
    hook.fails("verify")
    started = time.monotonic()
    hook.ok("sleep")
    assert time.monotonic() - started > 1  # it had to be killed
    assert not any(runs(child) for child in children)


def test_a_process_of_which_only_threads_are_left_has_not_ended(make_hook, tmp_path):
    (tmp_path / "leaderless.py").write_text(LEADERLESS)
    hook = make_hook(
        "process.sh", COMMAND=f"'{sys.executable}' leaderless.py $LLMUX_PORT", HEALTH_PATH="/", GRACE="1"
    )
    hook.ok("wake")
    pid = hook.pid
    wait_until(lambda: ") Z " in Path(f"/proc/{pid}/stat").read_text(), what="that the leader has ended")
    hook.ok("alive")
    hook.fails("verify")
    hook.ok("sleep")
    assert not runs(pid)
    hook.ok("verify")


@pytest.mark.parametrize("end", ["sleep", "stop"])
@pytest.mark.parametrize("shell", ["sh", "bash", "busybox"], indirect=True)
def test_what_has_a_group_of_its_own_is_ended_with_its_session(make_hook, tmp_path, shell, end):
    (tmp_path / "ok.py").write_text(OK)
    (tmp_path / "mpirun.py").write_text(GROUP_OF_ITS_OWN)
    command = f"'{sys.executable}' mpirun.py '{sys.executable}' ok.py $LLMUX_PORT"
    hook = make_hook("process.sh", COMMAND=command, HEALTH_PATH="/", GRACE="1")
    hook.shell = shell
    hook.ok("wake")
    session = hook.pid
    (server,) = (int(word) for word in Path(f"/proc/{session}/task/{session}/children").read_text().split())
    assert os.getpgid(server) != session
    hook.ok(end)
    assert not runs(server)
    assert status_of(hook.url) == 0


def test_a_stopped_engine_is_ended_by_term(make_hook, tmp_path):
    (tmp_path / "ok.py").write_text(OK)
    hook = make_hook("process.sh", COMMAND=f"'{sys.executable}' ok.py $LLMUX_PORT", HEALTH_PATH="/", GRACE="60")
    hook.ok("wake")
    pid = hook.pid
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    hook.ok("sleep")
    assert time.monotonic() - started < 60
    assert not runs(pid)


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_a_stale_pid_file_whose_number_belongs_to_another_process(hook):
    with bystanding() as bystander:
        hook.pid_dir.mkdir()
        hook.pid_file.write_text(f"{bystander.pid} 1-some-earlier-boot ready\n")
        for action in ("sleep", "stop"):
            hook.ok(action)
            hook.pid_file.write_text(f"{bystander.pid} 1-some-earlier-boot ready\n")
        hook.ok("verify")
        hook.ok("wake")
        assert hook.pid != bystander.pid
        hook.ok("sleep")
        assert bystander.poll() is None


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"], indirect=True)
@pytest.mark.parametrize("end", ["killed", "1"])
def test_one_whose_leader_ends_while_it_starts_has_failed_whatever_it_leaves(make_hook, tmp_path, shell, end):
    loading = tmp_path / "loading"
    command = shlex.join([sys.executable, "-c", LOADING, end, str(loading)])
    hook = make_hook("process.sh", COMMAND=command)
    hook.shell = shell
    with ThreadPoolExecutor() as pool:
        waking = pool.submit(hook.fails, "wake")
        wait_until(lambda: loading.exists() or waking.done(), what="the worker")
        if end == "killed":
            os.kill(hook.pid, signal.SIGKILL)
        assert "ended while it was starting" in waking.result()
    assert not processes_with(f"PID_DIR={hook.pid_dir}")
    assert not hook.pid_file.exists()


@contextlib.contextmanager
def killed_wake(hook: Hook) -> Iterator[None]:
    """Wake, and kill the wake at the end, as the next llmux does with one that a killed llmux has left."""
    env = {**with_tools(), **hook.env}
    with subprocess.Popen(
        [hook.shell, hook.script, "wake"], env=env, cwd=hook.folder, start_new_session=True
    ) as wake:
        try:
            yield
        finally:
            os.killpg(wake.pid, signal.SIGKILL)


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"], indirect=True)
@pytest.mark.parametrize("before", [True, False], ids=["before the next wake", "under it"])
def test_one_that_another_wake_has_started_and_whose_leader_ends_has_failed(make_hook, tmp_path, shell, before):
    loading = tmp_path / "loading"
    (tmp_path / "ok.py").write_text(OK)
    hook = make_hook("process.sh", COMMAND=shlex.join([sys.executable, "-c", LOADING, "killed", str(loading)]))
    hook.shell = shell
    with killed_wake(hook):
        wait_until(loading.exists, what="the worker")
        first = hook.pid
    if before:
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not runs(first))
        assert "before a new one is started" in hook.ok(
            "wake", COMMAND=f"'{sys.executable}' ok.py $LLMUX_PORT", HEALTH_PATH="/"
        )
        assert hook.pid != first
    else:
        with ThreadPoolExecutor() as pool:
            waking = pool.submit(hook.fails, "wake", COMMAND="false")
            wait_until(lambda: processes_with("COMMAND=false") or waking.done(), what="the next wake")
            os.kill(first, signal.SIGKILL)
            assert "ended while it was starting" in waking.result()
    assert not any(str(loading) in command for command in processes_with(f"PID_DIR={hook.pid_dir}").values())


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)
def test_one_that_has_become_a_daemon_is_waited_for_by_the_next_wake_too(hook, tmp_path):
    go = tmp_path / "go"
    hook.env["COMMAND"] = f"sh -c '(until [ -e {go} ]; do sleep 0.05; done; exec {PROCESS_COMMAND}) & exit 0'"
    with killed_wake(hook):
        wait_until(lambda: hook.pid_file.exists() and "daemon" in hook.pid_file.read_text())
        first = hook.pid
    with ThreadPoolExecutor() as pool:
        waking = pool.submit(hook.ok, "wake")
        go.touch()
        waking.result()
    assert hook.pid == first


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)
def test_one_that_becomes_a_daemon_is_waited_for(hook):
    hook.env["COMMAND"] = f"sh -c '(sleep 0.5; exec {PROCESS_COMMAND}) & exit 0'"
    hook.ok("wake")
    assert not runs(hook.pid)
    hook.ok("alive")
    hook.ok("sleep")
    hook.ok("verify")


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_a_stale_pid_file_whose_number_belongs_to_a_job_of_a_shell(hook):
    with subprocess.Popen(
        ["sh", "-c", "sleep 600 >&2 & echo $!"],
        process_group=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as job:
        bystander = int(job.communicate()[0])
    try:
        hook.pid_dir.mkdir()
        for action in ("sleep", "stop"):
            hook.pid_file.write_text(f"{job.pid} 1-{boot()} ready\n")
            hook.ok("verify")
            hook.ok(action)
            assert runs(bystander)
    finally:
        os.kill(bystander, signal.SIGKILL)


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


NAMED = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
print(flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_a_name_with_a_line_end_makes_no_process_the_engines(hook):
    with subprocess.Popen(["true"]) as gone:
        pass
    name = f") S   {gone.pid}\n"  # the first line of its stat names the session
    with subprocess.Popen([sys.executable, "-c", NAMED, name], stdout=subprocess.PIPE) as stranger:
        try:
            stranger.stdout.readline()
            hook.pid_dir.mkdir()
            hook.pid_file.write_text(f"{gone.pid} 1-{boot()} ready\n")
            hook.ok("verify")
        finally:
            stranger.kill()


def tool(folder: Path, name: str, script: str) -> str:
    """Put a script in front of the program of that name; return the PATH."""
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{with_tools()['PATH']}"


SETSID = shutil.which("setsid")


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
def test_of_two_wakes_at_once_one_starts_the_engine(make_hook, tmp_path):
    hook = make_hook("process.sh", COMMAND=f"sh -c '\"$@\"; sleep 600' sh {PROCESS_COMMAND}")  # what loads goes on
    env = {**with_tools(), **hook.env, "PATH": tool(tmp_path / "bin", "setsid", f'sleep 1; exec {SETSID} "$@"')}
    wakes = [
        subprocess.Popen(["sh", hook.script, "wake"], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [wake.wait(PATIENCE) for wake in wakes] == [0, 0]
    hook.ok("sleep")
    assert not [pid for pid in processes_with(f"PID_DIR={hook.pid_dir}") if runs(pid)]


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_a_pid_file_that_cannot_be_removed_leads_to_nothing(hook, tmp_path):
    hook.ok("wake")
    pid = hook.pid
    assert "has ended" in hook.ok("sleep", PATH=tool(tmp_path / "bin", "rm", "exit 1"))
    assert hook.pid == pid
    hook.ok("verify")
    hook.ok("wake")
    hook.ok("sleep")


WITHOUT_PROC = """
exec unshare -m sh -c 'mount -t tmpfs none /proc && exec sh "$@"' sh "$@"
"""


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_without_proc_no_engine_is_started(hook, tmp_path):
    tool(tmp_path / "bin", "without-proc", WITHOUT_PROC)
    hook.shell = str(tmp_path / "bin" / "without-proc")
    if subprocess.run([hook.shell, "-c", ":"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no mount namespace here")
    assert "could not be started" in hook.fails("wake")
    assert "needs /proc or ps" in hook.pid_file.with_suffix(".log").read_text()
    assert not [pid for pid in processes_with(f"PID_DIR={hook.pid_dir}") if runs(pid)]


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
@pytest.mark.parametrize("content", ["", "\n", "not a number at all\n", "1\n", "-1 1-1 ready\n"])
def test_a_broken_pid_file_harms_nobody(hook, content):
    hook.pid_dir.mkdir()
    hook.pid_file.write_text(content)
    hook.ok("sleep")
    hook.ok("wake")
    hook.ok("stop")


def test_somebody_elses_server_on_the_port_is_not_taken_for_ours(hook):
    with foreground("stranger", hook.port) as stranger:
        hook.fails("alive")
        assert "something else answers" in hook.fails("wake")
        hook.ok("sleep")  # ours does not run: nothing to do, and nothing to the stranger
        assert stranger.poll() is None


def test_process_sh_tells_a_stranger_by_expect(make_hook):
    hook = make_hook("process.sh", EXPECT='"id":"tiny"')
    with foreground("stranger", hook.port):
        hook.fails("alive")
        hook.fails("wake")
    hook.ok("wake")
    hook.ok("alive")


def test_our_engine_without_its_pid_file_is_found_but_not_claimed_to_sleep(make_hook):
    hook = make_hook("llama-cpp.sh")
    with foreground("tiny", hook.port) as engine:
        hook.ok("alive")
        hook.ok("wake")
        assert "end it by hand" in hook.fails("sleep")
        assert engine.poll() is None


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
@pytest.mark.parametrize(("detach", "starts"), [("sleep 2.5", True), ("exit 3", False)])
def test_a_slow_machine_has_the_time_to_detach_the_engine(hook, tmp_path, detach, starts):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "setsid").write_text(f'#!/bin/sh\n{detach}\nexec {shutil.which("setsid")} "$@"\n')
    (tools / "setsid").chmod(0o755)
    path = f"{tools}:{with_tools()['PATH']}"
    if starts:
        hook.ok("wake", PATH=path)
        hook.ok("sleep")
    else:
        began = time.monotonic()
        assert "could not be started" in hook.fails("wake", PATH=path)
        assert time.monotonic() - began < 25  # nobody waits for what has ended


def test_an_engine_that_ends_while_it_starts_is_reported_with_its_log(make_hook, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_text("no model")
    complaint = make_hook("llama-cpp.sh", MODEL=str(broken)).fails("wake")
    assert "ended while it was starting" in complaint
    assert "broken.gguf" in complaint


def test_what_is_not_set_up_is_said(make_hook):
    assert "MODEL is not set" in make_hook("llama-cpp.sh", MODEL="").fails("wake", code=2)
    assert "cannot be read" in make_hook("llama-cpp.sh", MODEL="/nowhere.gguf").fails("wake", code=2)
    assert "no such program" in make_hook("llama-cpp.sh", LLAMA_SERVER="no-such-server").fails("wake", code=2)
    assert "COMMAND is not set" in make_hook("process.sh", COMMAND="").fails("wake", code=2)
    assert "LLMUX_PORT" in make_hook("process.sh").fails("alive", code=2, LLMUX_PORT="")


@pytest.mark.parametrize("hook", ["llama-cpp.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_an_engine_that_was_ready_and_no_longer_answers_is_replaced(hook):
    hook.ok("wake")
    stuck = hook.pid
    os.kill(stuck, signal.SIGSTOP)
    hook.ok("wake", GRACE="1")
    assert hook.pid != stuck
    assert not runs(stuck)
    hook.ok("alive")


def test_a_wake_that_was_interrupted_goes_on_with_the_engine_that_it_started(make_hook):
    hook = make_hook(
        "llama-cpp.sh",
        LLAMA_SERVER=f"sh -c 'sleep 1; exec \"$@\"' sh {make_hook('process.sh').env['LLAMA_SERVER']}",
    )
    with subprocess.Popen(
        ["sh", hook.script, "wake"],
        env={**with_tools(), **hook.env},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    ) as wake:
        wait_until(hook.pid_file.exists, what="the pid file")
        os.killpg(wake.pid, signal.SIGTERM)
    pid = hook.pid
    assert runs(pid)
    hook.ok("wake")
    assert hook.pid == pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not runs(pid))
    hook.ok("sleep")


@pytest.mark.parametrize("alias", ["org/tiny model:q4", r'模 "q4" \é'])
def test_names_with_slashes_and_spaces_and_options_with_quotes(make_hook, alias):
    hook = make_hook(
        "llama-cpp.sh",
        model="org/tiny",
        ALIAS=alias,
        ARGS='--threads "1" --parallel 1',
        CTX="512",
    )
    hook.ok("wake")
    hook.ok("alive")
    assert ask(hook)["model"] == alias
    hook.fails("alive", ALIAS=alias.replace(" ", ""))  # another model
    assert " --ctx-size 512 --threads 1 --parallel 1" in Path(
        f"/proc/{engine_of(hook)}/cmdline"
    ).read_text().replace("\0", " ")
    hook.ok("sleep")


@pytest.mark.parametrize(
    ("shell", "before"),
    [("sh", False), ("busybox", False), ("sh", True)],
    ids=["sh", "busybox", "started by the script of before"],
    indirect=["shell"],
)
def test_names_that_take_turns_on_a_port_have_files_of_their_own(make_hook, shell, before):
    one, other = make_hook("process.sh", model="模型"), make_hook("process.sh", model="通义")
    one.shell = other.shell = shell
    other.env = {**other.env, "LLMUX_PORT": str(one.port), "LLMUX_URL": one.url}
    one.ok("wake")
    pid = engine_of(one)
    if before:  # which called the files of both alike
        next(one.pid_dir.glob("*.pid")).rename(one.pid_dir / f"______-{one.port}.pid")
    assert "does not run" in other.ok("sleep")
    other.ok("verify")
    one.ok("alive")
    one.ok("sleep")
    assert not runs(pid)


@pytest.mark.parametrize("model", ["x" * 256, "模" * 256])
def test_the_longest_names_make_no_longer_file_names_than_there_can_be(make_hook, model):
    hook = make_hook("process.sh", model=model)
    hook.ok("wake")
    hook.ok("alive")
    hook.ok("sleep")


def engine_of(hook: Hook) -> int:
    (file,) = hook.pid_dir.glob("*.pid")
    return int(file.read_text().split()[0])


@pytest.mark.parametrize("hook", ["llama-cpp.sh"], indirect=True)  # what it is about is in lib/, the same for all
@pytest.mark.parametrize("fetcher", ["python3", "wget"])
def test_works_without_curl(hook, tmp_path, fetcher):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "setsid", "cat", "tr", "sleep", "rm", "mv", "mkdir", "grep", "tail"):
        (tools / tool).symlink_to(shutil.which(tool))
    found = sys.executable if fetcher == "python3" else shutil.which(fetcher)
    if found is None:
        pytest.skip(f"no {fetcher} here")
    (tools / fetcher).symlink_to(found)
    hook.shell = shutil.which("sh")
    hook.env["PATH"] = str(tools)
    hook.fails("alive")
    hook.ok("wake")
    hook.ok("alive")
    hook.ok("sleep")
    with foreground("stranger", hook.port):
        assert "something else answers" in hook.fails("wake")


def test_without_any_of_them_it_says_so(hook, tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "cat", "tr"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    hook.shell = shutil.which("sh")
    assert "needs curl, python3 or wget" in hook.fails("wake", code=2, PATH=str(tmp_path / "bin"))


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)  # what it is about is in lib/, the same for all
def test_the_log_of_the_engine_before_is_kept(hook):
    for _ in range(2):
        hook.ok("wake")
        hook.ok("sleep")
    logs = sorted(path.name for path in hook.pid_dir.iterdir())
    assert logs == [f"tiny-{hook.port}.log", f"tiny-{hook.port}.log.1"]


@pytest.mark.parametrize(("hook", "shell"), [("process.sh", "sh"), ("process.sh", "busybox")], indirect=True)
def test_the_log_of_an_engine_that_is_awake_for_long_is_cut(hook, shell):
    hook.shell = shell
    hook.ok("wake")
    log = hook.pid_file.with_suffix(".log")
    with log.open("a") as file:  # by the same means as the engine
        file.write("x" * (1 << 20))
    before = log.stat().st_size
    hook.ok("alive")
    assert log.stat().st_size >= before
    with log.open("a") as file:
        file.write("y" * (1 << 20) + "the last\n")
    hook.ok("alive", LOG_MIB="1")
    old = log.with_suffix(".log.1").read_bytes()
    assert (len(old), old[-10:]) == (1 << 20, b"ythe last\n")
    hook.ok("alive")
    hook.ok("sleep")  # the engine says so, at the end of what is left
    assert b"\0" not in log.read_bytes()
    assert log.stat().st_size < 1 << 20


@pytest.mark.parametrize("hook", ["process.sh"], indirect=True)
def test_what_the_cut_of_a_log_meets(hook):
    hook.ok("wake")
    log = hook.pid_file.with_suffix(".log")
    old = log.with_suffix(".log.1")
    old.write_text("what was cut\n")
    with log.open("r+") as file:  # which the hook of before has opened, and not to append
        file.seek(2 << 20)
        file.write("it goes on\n")
    hook.ok("alive", LOG_MIB="1")
    assert old.read_text() == "what was cut\n"
    assert log.read_bytes().endswith(b"\0it goes on\n")

    with log.open("a") as file:
        file.write("x" * (2 << 20))
    hook.ok("alive", LOG_MIB="as much as there is")
    assert log.stat().st_size > 4 << 20
    old.unlink()
    old.mkdir()  # nothing can be kept, as on a full disk
    hook.ok("alive", LOG_MIB="1")
    assert log.stat().st_size < 1 << 20

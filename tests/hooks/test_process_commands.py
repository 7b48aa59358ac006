"""process.sh: a command that ends the engine, a folder to run in, and engines without a path for health."""

import shlex
import sys

import pytest

from tests.engine.real import runs, wait_until

# Answers 501 to everything, and prints which signal ended it.
STUBBORN = """
import http.server, os, signal, sys
def end(number, frame):
    print(signal.Signals(number).name, flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, end)
print(os.getcwd(), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.BaseHTTPRequestHandler).serve_forever()
"""


@pytest.fixture
def stubborn(make_hook, tmp_path):
    folder = tmp_path / "its own folder"
    folder.mkdir()
    (folder / "stubborn.py").write_text(STUBBORN)

    def make(**env):
        command = f'{shlex.quote(sys.executable)} ./stubborn.py "$LLMUX_PORT"'
        given = {"COMMAND": command, "FOLDER": str(folder), "HEALTH_PATH": "none", "GRACE": "1"}
        return make_hook("process.sh", **given | env)

    return make


def log_of(hook):
    return hook.pid_file.with_suffix(".log").read_text().split("\n")


def test_a_command_ends_it_and_no_signal_does(stubborn):
    hook = stubborn(STOP_COMMAND='kill -USR1 "$pid"', GRACE="20")
    hook.ok("wake")
    pid = hook.pid
    hook.ok("sleep")
    assert not runs(pid)
    assert log_of(hook)[-2] == "SIGUSR1"
    hook.ok("sleep")


def test_what_the_command_leaves_is_ended_as_without_it(stubborn):
    hook = stubborn(STOP_COMMAND='no-such-program "$UNSET_HERE"')
    hook.ok("wake")
    pid = hook.pid
    hook.ok("sleep")
    assert not runs(pid)
    assert log_of(hook)[-2] == "SIGTERM"


def test_what_outlived_its_process_is_ended_by_the_command(stubborn, tmp_path):
    hook = stubborn(STOP_COMMAND="touch stopped; false")
    hook.ok("wake")
    hook.ok("stop")
    hook.ok("sleep")
    assert (tmp_path / "its own folder" / "stopped").exists()


def test_a_command_for_a_process_that_is_gone_is_not_run(stubborn, tmp_path):
    hook = stubborn(STOP_COMMAND='touch stopped; kill -USR1 "$pid"')
    hook.ok("sleep")
    assert not (tmp_path / "its own folder" / "stopped").exists()


def test_it_runs_in_its_folder_and_is_ready_when_it_answers_anything(stubborn, tmp_path):
    hook = stubborn()
    hook.fails("alive")
    hook.ok("wake")
    wait_until(lambda: log_of(hook)[0] == str(tmp_path / "its own folder"))
    hook.ok("alive")
    hook.ok("stop")


def test_a_folder_that_is_not_there_is_said(stubborn):
    hook = stubborn()
    hook.env["FOLDER"] = "/no/such/folder"
    assert "/no/such/folder" in hook.fails("wake")

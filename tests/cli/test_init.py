"""``llmux init``: with flags, and with a person at a real terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux.cli import app, init
from llmux.config import Config
from llmux.survey import host
from tests.harness.waiting import PATIENCE
from tests.survey.conftest import answering, listed, write_gguf

QWEN = {"general.architecture": "qwen3", "general.type": "model"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine with two models, and nothing else."""
    home = tmp_path / "home"
    write_gguf(home / "models" / "qwen.gguf", QWEN, size=3 * 2**20)
    write_gguf(home / "models" / "nomic-embed.gguf", {"general.architecture": "nomic-bert"})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in [name for name in os.environ if name.startswith(("HF_", "XDG_", "LLAMA_", "OLLAMA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(init, "PORTS", {})
    return home


def run(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def checked():
    done = CliRunner().invoke(app, ["check"])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("home")
class TestWithFlags:
    def test_everything_that_is_found(self, home, tmp_path):
        done = run("--yes")
        assert done.exit_code == 0, done.stderr
        said = checked()
        assert "model nomic-embed at" in said
        assert "model qwen at" in said
        work = tmp_path / "work"
        assert os.access(work / "hooks" / "llama-cpp.sh", os.X_OK)
        text = (work / "config.yaml").read_text()
        assert f"# 3 MiB, {home}/models/qwen.gguf\n" in text
        assert "ARGS: --embedding\n" in text

    def test_a_model_in_this_folder(self, tmp_path):
        here = tmp_path / "work"
        write_gguf(here / "mine.gguf", QWEN)
        write_gguf(here / "mmproj.gguf", {"general.architecture": "clip"})
        write_gguf(here / "deeper" / "other.gguf", QWEN)
        done = run("--yes")
        assert done.exit_code == 0, done.stderr
        assert re.findall("model (.*) at", checked()) == ["mine", "nomic-embed", "qwen"]
        assert f"      MODEL: {here}/mine.gguf\n" in (here / "config.yaml").read_text()

    def test_a_model_is_one_line(self, tmp_path):
        assert run("--yes", "--model", "a=~/models/qwen.gguf").exit_code == 0
        text = (tmp_path / "work" / "config.yaml").read_text()
        assert "    hooks: ./hooks/llama-cpp.sh\n" in text
        assert "wake:" not in text

    def test_what_is_missing_is_said_at_once(self, tmp_path, monkeypatch):
        done = run("-y", "--engine", "process", "--model", "w=no-such-server --port 9")
        assert done.exit_code == 0, done.stderr
        lines = (tmp_path / "work" / "config.yaml").read_text().splitlines()
        number = 1 + lines.index("      COMMAND: no-such-server --port 9")
        said = f"warning: line {number}: models.w.env.COMMAND: there is no program no-such-server on the PATH"
        assert said in done.stdout.splitlines()
        assert said in checked().splitlines()
        assert "llama-server" not in done.stdout
        no_server = "warning: llama-server is not on the PATH: say where it is with LLAMA_SERVER in `env`"
        monkeypatch.setenv("LLAMA_SERVER", "/opt/llama.cpp/llama-server")
        assert no_server not in run("--yes", "--force").stdout
        monkeypatch.delenv("LLAMA_SERVER")
        monkeypatch.setattr(host, "PROGRAMS", ())
        assert no_server in run("--yes", "--force").stdout

    def test_an_engine_that_runs(self):
        with answering(
            {"/v1/models": listed("llamacpp", "mine"), "/props": {"model_path": "/x/mine.gguf"}}
        ) as port:
            done = run("--yes", "--probe", port)
        assert f"llama.cpp on port {port}: mine" in done.stderr
        assert f"model mine at http://127.0.0.1:{port}" in checked()

    def test_an_engine_whose_models_have_names_that_are_none(self, tmp_path):
        names = ["a ", "\ud83d", "a\0b", "1e3", "", "x" * 257]
        with answering({"/v1/models": listed("vllm", *names, root="/m/a\0b")}) as port:
            done = run("--yes", "--probe", port)
        assert done.exit_code == 0, done.stderr
        assert re.findall("model (.*) at", checked()) == ["1e3", "nomic-embed", "qwen"]
        assert "# - vLLM on port" in (tmp_path / "work" / "config.yaml").read_text()

    def test_only_the_models_that_are_named(self, home):
        done = run("--yes", "--model", "a=~/models/qwen.gguf", "-m", f"b b={home}/models/qwen.gguf", "-p", 4321)
        assert done.exit_code == 0, done.stderr
        said = checked()
        assert "listens on 127.0.0.1:4321" in said
        assert re.findall("model (.*) at", said) == ["a", "b b"]

    def test_another_engine(self, tmp_path):
        assert run("-y", "--engine", "process", "--model", "w=whisper-server --port 9").exit_code == 0
        assert "COMMAND: whisper-server --port 9" in (tmp_path / "work" / "config.yaml").read_text()
        checked()

    def test_what_is_there_stays_there_unless_forced(self, tmp_path):
        (tmp_path / "work" / "config.yaml").write_text("mine")
        done = run("--yes")
        assert done.exit_code == 2
        assert "config.yaml is there already" in done.stderr
        assert (tmp_path / "work" / "config.yaml").read_text() == "mine"
        assert run("--yes", "--out", "new/folder").exit_code == 0
        assert run("--yes", "--force").exit_code == 0
        checked()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--model", "qwen"], "is not NAME=PATH"),
            (["--model", "=x"], "is not NAME=PATH"),
            (["--model", "a=/no/such.gguf"], "/no/such.gguf is not a whole GGUF file"),
            (["--model", "a=~nobody-at-all/x.gguf"], "~nobody-at-all/x.gguf: "),
            (["--engine", "process"], "give --model NAME=PATH, too"),
            (["--engine", "lama-cpp", "--model", "a=b"], "did you mean llama-cpp?"),
            (["--engine", "gpu-free", "--model", "a=b"], "that script is for no engine"),
            (["--port", "8001", "--model", "a\tb=~/models/qwen.gguf"], "cannot be printed"),
        ],
    )
    def test_nonsense(self, tmp_path, arguments, said):
        done = run("--yes", *arguments)
        assert done.exit_code == 2
        assert said in done.stderr
        assert not list((tmp_path / "work").iterdir())

    def test_files_that_are_cut_short_are_named_and_left_out(self, home):
        for number in range(12):
            (home / "models" / f"cut-{number:02}.gguf").write_bytes(b"GGUF")
        cut = home / "models" / "a\x1b[31m.gguf"
        cut.write_bytes(b"GGUF\3\0\0\0")
        done = run("--yes")
        assert done.exit_code == 0, done.stderr
        assert re.findall("model (.*) at", checked()) == ["nomic-embed", "qwen"]
        shown = str(cut).replace("\x1b", r"\x1b")
        assert f"left out, as it cannot be read or is not whole: {shown}\n" in done.stderr
        assert done.stderr.count("left out") == 8
        assert "… and 5 more such files" in done.stderr
        named = run("--yes", "--force", "--model", f"a={cut}")
        assert named.exit_code == 2
        assert "is not a whole GGUF file" in named.stderr

    def test_nothing_is_found(self, home, tmp_path):
        for file in (home / "models").iterdir():
            file.unlink()
        (home / ".ollama" / "models" / "manifests").mkdir(parents=True)
        done = run("--yes")
        assert done.exit_code == 2
        assert "no GGUF files in ~/models" in done.stderr
        assert "Ollama's models, whose files have no names" in done.stderr
        assert "--model NAME=PATH" in done.stderr
        assert not list((tmp_path / "work").iterdir())

    def test_files_with_names_that_no_model_may_have(self, home):
        for name in (b"new\nline", b"tab\there", b"latin-\xfc", b"\n"):
            write_gguf(home / "models" / "it's" / os.fsdecode(name + b".gguf"), QWEN)
        done = run("--yes")
        assert done.exit_code == 0, done.stderr
        said = checked()
        assert re.findall("model (.*) at", said) == ["_", "latin-_", "new_line", "tab_here", "nomic-embed", "qwen"]
        for model in Config.from_file(Path("config.yaml")).models.values():
            assert Path(model.env["MODEL"]).is_file()


class Terminal:
    """llmux at a terminal, and somebody who reads and types."""

    def __init__(self, folder, home):
        self.master, slave = pty.openpty()
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "LLMUX"))
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmux", "init"],
            cwd=folder,
            env=environ | {"HOME": str(home), "TERM": "dumb", "COLUMNS": "200"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # so that Ctrl-C reaches it
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (one system call)
        )
        os.close(slave)
        self.said = ""

    def wait_for(self, text, seconds=30):
        """Read until the text appears; return what came before it since the last time."""
        deadline = time.monotonic() + seconds
        while text not in self.said:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in:\n{self.said}"
            try:
                read = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                read = b""
            assert read, f"llmux ended before {text!r}:\n{self.said}"
            self.said += read.decode()
        before, _, self.said = self.said.partition(text)
        return before

    def type(self, text):
        os.write(self.master, f"{text}\n".encode())

    def interrupt(self, text):
        """Press Ctrl-C until the text appears: just before it waits for a key, readline hears no signal."""
        for _ in range(60):
            os.write(self.master, b"\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(text, seconds=0.5)
        raise AssertionError(f"no {text!r} in:\n{self.said}")

    def end(self):
        try:
            while os.read(self.master, 65536):
                pass
        except OSError:
            pass
        return self.process.wait(PATIENCE)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(home, tmp_path):
    terminal = Terminal(tmp_path / "work", home)
    yield terminal
    terminal.close()


class TestAtATerminal:
    def test_somebody_answers(self, terminal, tmp_path, monkeypatch):
        shown = terminal.wait_for("Which of them?")
        number = re.search(r"(\d+)  nomic-embed  \(", shown)[1]
        terminal.wait_for(": ")
        terminal.type("7-99")
        terminal.wait_for("'7-99' is not one of 1 to")
        terminal.wait_for("]: ")
        terminal.type(number)
        terminal.wait_for("Another one?")
        terminal.wait_for(": ")
        terminal.type("y")
        terminal.wait_for("NAME=PATH of a GGUF file: ")
        terminal.type("mine=/no/such.gguf")
        terminal.wait_for("is not a whole GGUF file")
        terminal.wait_for("NAME=PATH of a GGUF file: ")
        terminal.type("mine=~/models/qwen.gguf")
        terminal.wait_for("Another one?")
        terminal.type("")
        terminal.wait_for("llmux's own port")
        terminal.type("99999")
        terminal.wait_for("a port is a number")
        terminal.wait_for("llmux's own port")
        terminal.type("4321")
        terminal.wait_for("Folder for config.yaml")
        (tmp_path / "work" / "config.yaml").write_text("mine")
        terminal.type("")
        terminal.wait_for("config.yaml is there already")
        terminal.wait_for("Folder for config.yaml")
        terminal.type("other")
        terminal.wait_for("now: llmux check other/config.yaml")
        assert terminal.end() == 0
        assert (tmp_path / "work" / "config.yaml").read_text() == "mine"
        monkeypatch.chdir(tmp_path / "work" / "other")
        said = checked()
        assert "listens on 127.0.0.1:4321" in said
        assert re.findall("model (.*) at", said) == ["nomic-embed", "mine"]

    def test_somebody_goes_away(self, terminal, tmp_path):
        terminal.wait_for("Which of them?")
        terminal.wait_for(": ")
        terminal.interrupt("Aborted")
        assert terminal.end() == 1
        assert not list((tmp_path / "work").iterdir())

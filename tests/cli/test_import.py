"""``llmux import``: what is written where, and what is not."""

import os
import stat
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llmux.cli import app
from llmux.cli.hooks import find

WHOLE = "models: {m: {cmd: 'srv --port ${PORT}'}}\n"
PARTLY = WHOLE + "captureBuffer: 8\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Import a text, or what is in the file."""
    monkeypatch.chdir(tmp_path)

    def run(text, *options, file="swap.yaml"):
        if text is not None:
            (tmp_path / file).write_text(text)
        return CliRunner().invoke(app, ["import", "llama-swap", file, *options])

    return run


def test_all_is_carried_over(run, tmp_path):
    done = run(WHOLE)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "1 model," in done.stdout
    script = tmp_path / "hooks" / "process.sh"
    assert script.read_text() == find("process").text
    assert stat.S_IMODE(script.stat().st_mode) == 0o755
    assert CliRunner().invoke(app, ["check"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "hooks", "swap.yaml"]


def test_not_all_is_carried_over(run):
    done = run(PARTLY)
    assert done.exit_code == 1
    assert done.stderr.startswith("swap.yaml:2: captureBuffer: not carried over: ")
    assert "not carried over: 1 setting, named" in done.stdout
    assert CliRunner().invoke(app, ["check"]).exit_code == 0


def test_what_is_there_stays_there(run, tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    done = run(WHOLE)
    assert done.exit_code == 2
    assert "config.yaml is there already" in done.stderr
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert not (tmp_path / "hooks").exists()
    assert "llmux check 'it'\"'\"'s deep/er/config.yaml' &&" in run(WHOLE, "-o", "it's deep/er").stdout
    assert run(WHOLE, "--force").exit_code == 0
    assert "srv" in (tmp_path / "config.yaml").read_text()


def test_a_script_of_ones_own_stays_as_it_is(run, tmp_path):
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "process.sh").write_text("mine")
    done = run(WHOLE)
    assert done.exit_code == 2
    assert "hooks/process.sh: there already, and not as it comes with llmux" in done.stderr
    assert not (tmp_path / "config.yaml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hooks", "swap.yaml"]


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_the_file_itself_is_never_overwritten(run, tmp_path, options):
    done = run(WHOLE, *options, file="config.yaml")
    assert done.exit_code == 2
    assert "is the file that is read" in done.stderr
    assert (tmp_path / "config.yaml").read_text() == WHOLE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "swap.yaml: there is no such file"),
        ("models:\n  m: {cmd: 'x ${nope}'}", "swap.yaml:2: models.m.cmd: uses ${nope}"),
        ("models: {m: {cmd: x}}\n\x00", "swap.yaml:"),
        ("models: {" + "m" * 300 + ": {cmd: 'x ${PORT}'}}", "llmux would not take the result"),
    ],
)
def test_nothing_is_written_for_a_file_that_cannot_be_used(run, tmp_path, text, said):
    done = run(text, "-o", "out")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*"))


def test_longer_names_of_files_than_there_can_be(run):
    done = run(WHOLE, "-o", "x" * 256)
    assert (done.exit_code, done.stderr.endswith("cannot be written: File name too long\n")) == (2, True)
    done = run(None, file=f"{'x' * 256}.yaml")
    assert (done.exit_code, done.stderr.endswith("there is no such file\n")) == (2, True)


def test_a_port_that_an_engine_has(run):
    done = run(WHOLE, "-p", "5800")
    assert done.exit_code == 2
    assert "models.m.port: 127.0.0.1:5800 is llmux's own address" in done.stderr


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(WHOLE, "-o", "file/out")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_keys_are_for_its_owner_only(run, tmp_path):
    run(WHOLE)
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o666 & ~umask()
    assert run(WHOLE + "apiKeys: [sk-secret]\n", "--force").exit_code == 0
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o600


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask | 0o022


def test_a_variable_that_is_set_only_later(run, tmp_path):
    assert run("models: {m: {cmd: 'srv ${PORT} ${env.NOT_HERE_YET}', env: ['A=${env.NOR_THIS}']}}").exit_code == 0
    assert "hold NOT_HERE_YET, NOR_THIS." in (tmp_path / "config.yaml").read_text()
    unset = CliRunner().invoke(app, ["check"])
    assert unset.exit_code == 2
    assert "NOR_THIS is not set" in unset.stderr
    assert CliRunner().invoke(app, ["check"], env={"NOR_THIS": "x"}).exit_code == 0


def test_it_is_the_real_command(tmp_path):
    (tmp_path / "swap.yaml").write_text(WHOLE)
    command = [sys.executable, "-m", "llmux", "import", "llama-swap", "swap.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

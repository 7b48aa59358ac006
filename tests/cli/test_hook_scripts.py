"""The shipped hook scripts: listed, shown, copied, and in the wheel (with the files of the page)."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import yaml
from typer.testing import CliRunner

from llmux.cli import app, hooks
from llmux.cli.hooks import HookScriptError, copy, find, shipped
from tests.engine.real import ROOT

SOURCES = sorted((ROOT / "hooks").glob("*.sh"), key=lambda path: path.stem)

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
LIBRARY = sorted((ROOT / "hooks" / "lib").glob("*.sh"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return go


def test_each_is_listed_with_what_it_is_for(run):
    listed = run("hooks", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in SOURCES]
    assert "llama-server" in next(line for line in listed if line.startswith("llama-cpp "))
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)


def test_one_is_shown_complete(run):
    shown = run("hooks", "show", "process").stdout
    assert shown.startswith((ROOT / "hooks" / "process.sh").read_text().partition("\nlib=")[0])
    assert "\nend_engine() {" in shown
    assert "$lib" not in shown
    assert run("hooks", "show", "prefetch").stdout == (ROOT / "hooks" / "prefetch.sh").read_text()
    assert run("hooks", "show", "process.sh", "--path").stdout.strip() == str(ROOT / "hooks" / "process.sh")


def test_a_copy_is_complete_and_executable_and_the_lines_that_use_it_are_printed(run, tmp_path):
    done = run("hooks", "copy", "llama-cpp")
    target = tmp_path / "hooks" / "llama-cpp.sh"
    assert target.read_text() == run("hooks", "show", "llama-cpp").stdout
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert done.stdout.startswith("models:\n  qwen:\n")
    assert "hooks/llama-cpp.sh" in done.stderr
    assert run("hooks", "copy", "llama-cpp").exit_code == 0  # the same again changes nothing


def test_what_the_lines_use_is_copied_too(run, tmp_path):
    assert "verify: ./hooks/gpu-free.sh" in run("hooks", "copy", "ollama").stdout
    assert (tmp_path / "hooks" / "gpu-free.sh").read_text() == find("gpu-free").text
    (tmp_path / "hooks" / "gpu-free.sh").write_text("my own\n")
    assert run("hooks", "copy", "ollama").exit_code == 0
    assert (tmp_path / "hooks" / "gpu-free.sh").read_text() == "my own\n"


@pytest.mark.parametrize("folder", ["mine", "my own", 'it\'s "mine"', "../mine", "{tmp}/elsewhere", "."])
def test_the_lines_name_the_folder_that_it_was_copied_to(run, tmp_path, monkeypatch, folder):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    lines = run("hooks", "copy", "ollama", folder.format(tmp=tmp_path)).stdout
    model = yaml.safe_load(lines)["models"]["llama3"]
    for hook in ("wake", "verify"):
        script, *action = shlex.split(model[hook])
        assert "/" in script
        assert action == ([] if hook == "verify" else [hook])
        assert os.access(here / script, os.X_OK)


def test_a_file_that_differs_is_not_replaced_unless_forced(run, tmp_path):
    target = tmp_path / "mine" / "process.sh"
    target.parent.mkdir()
    target.write_text("my own work\n")
    done = run("hooks", "copy", "process", "mine")
    assert done.exit_code == 2
    assert "exists and differs" in done.stderr
    assert target.read_text() == "my own work\n"
    assert run("hooks", "copy", "process", "mine", "--force").exit_code == 0
    assert target.read_text() == find("process").text


def test_in_llmuxs_own_folder_they_stay_as_they_are(run, tmp_path, monkeypatch):
    for name in ("hooks", "config"):
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "hooks", tmp_path / "hooks", dirs_exist_ok=True)
    monkeypatch.setattr(hooks, "hook_folder", lambda: tmp_path / "hooks")
    before = (tmp_path / "hooks" / "process.sh").read_bytes()
    for options in ([], ["--force"]):
        assert run("hooks", "copy", "process", *options).exit_code == 0
        assert (tmp_path / "hooks" / "process.sh").read_bytes() == before
    (tmp_path / "swap.yaml").write_text("models: {m: {cmd: 'srv --port ${PORT}'}}\n")
    assert run("import", "llama-swap", "swap.yaml").exit_code == 0
    assert (tmp_path / "hooks" / "process.sh").read_bytes() == before


def test_a_link_to_the_script_is_as_good_as_a_copy(run, tmp_path):
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "process.sh").symlink_to(ROOT / "hooks" / "process.sh")
    before = (ROOT / "hooks" / "process.sh").read_bytes()
    assert run("hooks", "copy", "process", "--force").exit_code == 0
    assert (ROOT / "hooks" / "process.sh").read_bytes() == before


@pytest.mark.parametrize("command", ["show", "copy"])
def test_a_part_that_is_missing_is_named(run, tmp_path, monkeypatch, command):
    shutil.copytree(ROOT / "hooks", tmp_path / "llmux's")
    (tmp_path / "llmux's" / "lib" / "http.sh").unlink()
    monkeypatch.setattr(hooks, "hook_folder", lambda: tmp_path / "llmux's")
    done = run("hooks", command, "process")
    assert done.exit_code == 2
    assert "lib/http.sh cannot be read: No such file or directory" in done.stderr
    assert run("hooks", "list").exit_code == 0


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("hooks", "copy", "process", "file")
    assert done.exit_code == 2
    assert "file/process.sh cannot be written" in done.stderr


@pytest.mark.parametrize("command", ["show", "copy"])
def test_an_unknown_name_is_answered_with_those_that_there_are(run, command):
    done = run("hooks", command, "lama-cpp")
    assert done.exit_code == 2
    assert "did you mean llama-cpp?" in done.stderr
    assert "process" in done.stderr


def test_a_name_cannot_lead_out_of_the_folder(tmp_path):
    with pytest.raises(HookScriptError):
        copy("../.ci/run", tmp_path)


@pytest.mark.parametrize("script", shipped().values(), ids=lambda script: script.name)
def test_the_header_has_an_example_and_a_summary(script):
    assert script.example.startswith("models:\n  ")
    assert f"hooks/{script.name}.sh" in script.example
    assert script.summary.endswith((".", "?"))


def test_they_are_in_the_wheel(tmp_path):
    for name in ("llmux", "hooks", "policies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, env=os.environ, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for script in SOURCES:
            assert archive.read(f"llmux/hooks/{script.name}") == script.read_bytes()
        for part in LIBRARY:
            assert archive.read(f"llmux/hooks/lib/{part.name}") == part.read_bytes()
        for file in (ROOT / "llmux" / "ui").iterdir():  # built once for both: it takes a while
            assert archive.read(f"llmux/ui/{file.name}") == file.read_bytes()
        if sys.platform == "linux":
            assert wheel.name.endswith(
                "-cp311-abi3-" + wheel.stem.rpartition("-")[2] + ".whl"
            )  # any Python takes it
            for built in ("llmux/upstream/native.linux.so", "llmux/accounts/_tally.abi3.so"):
                assert (built in archive.namelist()) is (shutil.which(COMPILER) is not None)

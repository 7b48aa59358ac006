"""Hook scripts that share a library find it however they are called, and say what to do when it is not there."""

import os
import shlex
import shutil
import subprocess

import pytest

from llmux.cli.hooks import copy
from tests.engine.real import ROOT, with_tools
from tests.hooks.test_script_files import SCRIPTS, USERS

HOOKS = ROOT / "hooks"
# What each says once it has got as far as to look at its action: its library is there, and what it needs.
PROGRAMS = ("cuda-checkpoint", "docker", "podman", "systemctl", "curl")
SHELLS = [found for name in ("dash", "bash", "busybox") if (found := shutil.which(name))]


@pytest.fixture
def call(tmp_path):
    """Run a command line, in a folder, as llmux does; return its exit code and what it complained of."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    env = with_tools() | {
        "LLMUX_MODEL": "m",
        "LLMUX_PORT": "1",
        "LLMUX_URL": "http://127.0.0.1:1",
        "TRTLLM_RUNTIME_CONTROL_API_KEY": "k",
        "PID_DIR": str(tmp_path / "pids"),
    }
    env["PATH"] = f"{programs}:{env['PATH']}"

    def go(line, folder=tmp_path, **more):
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=folder,
            env=env | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return go


def is_usage(result) -> bool:
    code, said = result
    return code == 2 and "usage: " in said


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", USERS, ids=lambda path: path.name)
def test_under_each_shell_as_it_is_and_copied(call, script, shell, tmp_path):
    shell = f"{shell} sh" if shell.endswith("busybox") else shell
    for file in (script, copy(script.stem, tmp_path / "mine")):
        assert is_usage(call(f"{shell} {shlex.quote(str(file))} dance"))


@pytest.mark.parametrize("line", ["./hooks/llama-cpp.sh", "sh hooks/llama-cpp.sh", "hooks/../hooks/llama-cpp.sh"])
def test_by_a_relative_path(call, line):
    assert is_usage(call(f"{line} dance", folder=ROOT))
    assert is_usage(call(line, folder=ROOT, LLMUX_HOOK="dance"))


def test_from_its_own_folder(call):
    for line in ("./llama-cpp.sh", "sh llama-cpp.sh", "bash llama-cpp.sh"):
        assert is_usage(call(f"{line} dance", folder=HOOKS)), line


def test_on_the_path(call):
    assert is_usage(call(f"PATH={shlex.quote(str(HOOKS))}:$PATH; llama-cpp.sh dance"))


def test_by_links(call, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "absolute.sh").symlink_to(HOOKS / "llama-cpp.sh")
    (tmp_path / "relative link").symlink_to("one/absolute.sh")
    (tmp_path / "hooks").symlink_to(HOOKS)
    for line in ("one/absolute.sh", "'./relative link'", "./hooks/llama-cpp.sh", "sh 'relative link'"):
        assert is_usage(call(f"{line} dance")), line


def test_from_a_folder_with_a_difficult_name(call, tmp_path):
    folder = tmp_path / 'it\'s a "$HOME" & more'
    shutil.copytree(HOOKS, folder)
    assert is_usage(call("./process.sh dance", folder=folder))
    assert is_usage(call(f"{shlex.quote(str(folder / 'process.sh'))} dance"))


def test_an_engine_is_started_by_a_relative_path_and_by_a_link(call, tmp_path):
    (tmp_path / "hooks").symlink_to(os.path.relpath(HOOKS, tmp_path))
    (tmp_path / "link.sh").symlink_to("hooks/process.sh")
    for line in ("./hooks/process.sh", "sh link.sh"):
        code, said = call(f"{line} wake", COMMAND="false")  # it starts itself once more, to become the engine
        assert code == 1
        assert "ended while it was starting" in said


@pytest.mark.parametrize("script", USERS, ids=lambda path: path.name)
def test_one_that_was_copied_without_its_library_says_what_to_do(call, script, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lib").mkdir()  # somebody else's
    shutil.copy(script, tmp_path / "mine")
    for action in ("wake", "sleep", "alive", "stop", "verify"):
        code, said = call(f"./{script.name} {action}", folder=tmp_path / "mine")
        assert code == 2
        assert f"llmux hooks copy {script.stem}" in said
        assert len(said.splitlines()) == 1
    copy(script.stem, tmp_path / "mine", force=True)
    assert is_usage(call(f"./{script.name} dance", folder=tmp_path / "mine"))


def test_there_are_scripts_that_need_no_library():
    assert {path.stem for path in set(SCRIPTS) - set(USERS)} == {"gpu-free", "prefetch"}

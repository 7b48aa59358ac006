"""`llmux check` looks at the machine, and tells all mistakes of a file at once."""

import asyncio
import json
import os
import tempfile
from pathlib import Path

import pytest

from llmux.config import Config
from llmux.config.checks import look
from tests.cli.invoking import llmux

FILE = """\
models:
  a:
    port: 8001
    wake: |
      (echo one
    sleep: ./hooks/llama-cpp.sh sleep
    alive: ./here.sh alive
    verify: no-such-program --all
    env: {MODEL: ./weights.gguf}
  b:
    port: 8002
    hooks: ./hooks/process.sh
    env: {COMMAND: another-missing-one --port 1}
  c:
    cmd: a-third-missing-one --port ${PORT}
  d:
    port: 8004
    wake: until [ -e up ]; do sleep 1; done
    sleep: A=1 rm -f up
    alive: "[ -e up ]"
    env: {PATH: "${PATH}"}
"""


@pytest.fixture
def check(tmp_path):
    def run(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return asyncio.run(llmux(None, "check", str(file)))

    return run


def test_what_cannot_be_looked_at_is_a_warning_too(check):
    long = "x" * 300
    done = check(
        f"models: {{a: {{hooks: ./{long}.sh, port: 8001, env: {{MODEL: ./{long}.gguf}}}},"
        " b: {hooks: ~no-such-user/b.sh, port: 8002, env: {MODEL: ~no-such-user/b.gguf}}}"
    )
    assert done.exit_code == 0, done.output
    assert f"models.a.hooks: ./{long}.sh cannot be looked at: File name too long" in done.output
    assert f"models.a.env.MODEL: ./{long}.gguf cannot be looked at: File name too long" in done.output
    assert "models.b.hooks: there is no ~no-such-user/b.sh" in done.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_this_user_may_not_read():
    """Look as the user of a service, whose models lie in a folder that it may not enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "private").mkdir(mode=0o700)
        (folder / "closed.gguf").touch(mode=0o600)
        (folder / "h.sh").touch(mode=0o755)
        models = {
            "a": {"hooks": "./private/h.sh", "port": 8001, "env": {"MODEL": "./private/a.gguf"}},
            "b": {"hooks": "./h.sh", "port": 8002, "env": {"MODEL": "./closed.gguf"}},
        }
        (folder / "config.yaml").write_text(json.dumps({"models": models, "state": None}))
        config = Config.from_file(folder / "config.yaml")
        os.setresuid(65534, 65534, 0)
        try:
            said = [problem.message for problem in look(config)]
        finally:
            os.setresuid(0, 0, 0)
    assert said == [
        "./private/h.sh cannot be looked at: Permission denied",
        "./private/a.gguf cannot be looked at: Permission denied",
        "./closed.gguf cannot be read by this user",
    ]


def test_what_this_machine_lacks_is_a_warning_with_its_line(check, tmp_path):
    (tmp_path / "here.sh").write_text("#!/bin/sh\n")
    done = check(FILE)
    assert done.exit_code == 0
    warnings = [line.removeprefix("warning: ") for line in done.output.splitlines() if "warning: line" in line]
    (syntax, *rest) = warnings
    assert syntax.startswith("line 4: models.a.wake: the shell cannot read it: ")
    assert rest == [
        "line 6: models.a.sleep: there is no ./hooks/llama-cpp.sh; `llmux hooks copy llama-cpp` writes it",
        f"line 7: models.a.alive: ./here.sh is not executable: chmod +x {tmp_path / 'here.sh'}",
        "line 8: models.a.verify: there is no program no-such-program on the PATH",
        "line 9: models.a.env.MODEL: there is no ./weights.gguf",
        "line 12: models.b.hooks: there is no ./hooks/process.sh; `llmux hooks copy process` writes it",
        "line 13: models.b.env.COMMAND: there is no program another-missing-one on the PATH",
        "line 15: models.c.cmd: there is no program a-third-missing-one on the PATH",
    ]


@pytest.mark.parametrize(
    ("first", "says"),
    [
        ("#!/bin/sh\r", "its lines end as on Windows: sed -i 's/\\r$//' {file}"),
        ("echo\r", "its lines end as on Windows: sed -i 's/\\r$//' {file}"),
        ("#!/opt/nothing/bash -e", "there is no /opt/nothing/bash, which its first line names"),
        ("#!/usr/bin/env no-such-program", "there is no program no-such-program on the PATH"),
        ("#!/usr/bin/env sh", None),
        ("#!/usr/bin/env -S sh -e", None),
        ("#! /bin/sh -e", None),
        ("#!", None),
        ("echo", None),
        ("", None),
    ],
)
def test_a_script_that_cannot_be_run_is_told_from_one_that_is_not_there(check, tmp_path, first, says):
    (tmp_path / "h.sh").write_text(f"{first}\n", newline="")
    (tmp_path / "h.sh").chmod(0o755)
    done = check("models: {a: {port: 1, wake: ./h.sh wake, sleep: 'true', alive: 'true'}}")
    said = [line for line in done.output.splitlines() if line.startswith("warning")]
    whole = f"warning: line 1: models.a.wake: ./h.sh cannot be run: {says}"
    assert said == ([] if says is None else [whole.format(file=tmp_path / "h.sh")])


@pytest.mark.parametrize(
    ("setting", "warned"),
    [
        ("wake: ./llama-server -m x.gguf --port 1", True),
        ("wake: llama-server -m x.gguf", True),
        ("wake: 'CUDA_VISIBLE_DEVICES=0 ./llama-server -m x.gguf'", True),
        ("wake: './llama-server -m x.gguf >log 2>&1 & sleep 9'", False),
        ('wake: "./llama-server \\\\\\n  -m x.gguf\\n"', True),
        ("wake: ./start.sh llama-server", False),
        ("wake: ./llama-server wake", False),  # the user's own script
        ("wake: ./llama-server $LLMUX_HOOK", False),
        ("wake: './llama-server --version || exit 1; ./start.sh'", False),
        ('wake: "./llama-server --version\\n./start.sh"', False),
        ("stop: ./llama-server --stop", False),
        ("cmd: './llama-server --port ${PORT}'", False),
    ],
)
def test_a_wake_that_is_the_server_itself(check, tmp_path, monkeypatch, setting, warned):
    for name in ("llama-server", "start.sh"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    hooks = "" if setting.startswith("cmd") else "port: 1, sleep: 'true', alive: 'true', "
    wake = "wake: 'true', " if setting.startswith("stop") else ""
    done = check(f"models: {{a: {{{hooks}{wake}{setting}}}}}")
    said = "llama-server stays, and wake has to return once it answers; write `cmd:` in its place"
    assert (said in done.output) is warned
    assert ("warning" in done.output) is warned


def test_what_is_there_is_not_warned_of(check, tmp_path):
    (tmp_path / "x.gguf").touch()
    done = check("models: {a: {cmd: 'sleep ${PORT}', env: {MODEL: x.gguf}}, b: {port: 1, hooks: process}}")
    assert done.exit_code == 0
    assert "warning" not in done.output


@pytest.mark.parametrize(
    "mistake",
    ["max_wait: soon", "max_wait: 1m\nprot: 3", "max_wait: 1m\nmodels: {a: {port: 1}, b: {port: 2, hooks: ./h}}"],
)
def test_a_mistake_does_not_hide_the_policys(check, mistake):
    setting, _, rest = mistake.partition("\n")
    models = "" if "models" in rest else "models: {b: {port: 2, hooks: ./h}}"
    done = check(f"policy: {{use: adaptve, {setting}}}\n{rest}\n{models}")
    assert done.exit_code == 2
    lines = done.output.splitlines()
    assert any("adaptve" in line for line in lines), lines
    assert len(lines) >= 2


def test_a_mistake_does_not_hide_what_the_machine_lacks(check):
    done = check("max_bodyy: 1\nmodels: {a: {port: 8001, hooks: ./mine.sh}}")
    assert done.exit_code == 2
    assert "line 2: models.a.hooks: there is no ./mine.sh" in done.output


def test_the_policy_beside_the_file_is_found_though_there_is_a_mistake(check, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def decide(self, now):\n        return None\n")
    done = check("policy: {use: './mine.py:Mine'}\nmax_bodyy: 1\nmodels: {a: {cmd: 'true ${PORT}'}}")
    assert [line for line in done.output.splitlines() if "warning" not in line] == [
        f"{tmp_path / 'config.yaml'}:2: max_bodyy: unknown setting; did you mean `max_body`?"
    ]


# Two models share a port, an alias is taken, a default is unknown: what only the whole file tells.
BETWEEN = """
default_model: nowhere
models:
  a: &a {port: 8001, hooks: llama-cpp, aliases: [gpt]}
  b: {port: 8001, hooks: llama-cpp, aliases: [gpt]}
  c: {port: 8003, hooks: llama-cpp%s}
"""
WHOLE = {"default_model", "models.b.aliases[0]", "models.a.port", "models.b.port"}


def places(done, tmp_path):
    lines = [line.removeprefix(f"{tmp_path / 'config.yaml'}:") for line in done.output.splitlines()]
    return {line.split(": ")[1] for line in lines if "warning" not in line}


def test_what_is_wrong_between_settings(check, tmp_path):
    assert places(check(BETWEEN % ""), tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        (", idle_slep: 1m", "models.c.idle_slep"),
        (", idle_sleep: soon", "models.c.idle_sleep"),
        (", port: x", "models.c.port"),
        (", env: {'1x': y}", "models.c.env.1x"),
        (", url: 'http://127.0.0.1:1'", "models.c"),
        (", wake: 7", "models.c.wake"),
        (", idle_sleep: '${NOT_SET}'", "models.c.idle_sleep"),
        ("}\npolicy: {max_wait: soon", "policy.max_wait"),
    ],
)
def test_a_mistake_does_not_hide_what_is_wrong_between_settings(check, tmp_path, mistake, place):
    assert places(check(BETWEEN % mistake), tmp_path) == {*WHOLE, place}


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        ("hooks: llama-cp, port: 8004", "hooks"),
        ("hooks: llama-cpp, port: x", "port"),
        ("wake: w, sleep: s, port: 8004", "alive"),
        ("cmd: '', port: 8004", "cmd"),
    ],
)
def test_a_model_that_cannot_be_read_takes_part_all_the_same(check, tmp_path, mistake, place):
    done = check(f"models: {{a: {{{mistake}, aliases: [x]}}, b: {{port: 1, hooks: ./h, aliases: [x]}}}}")
    assert places(done, tmp_path) == {f"models.a.{place}", "models.b.aliases[0]"}


@pytest.mark.parametrize(
    ("text", "found"),
    [  # what would only follow from the first mistake is not told
        ("default_model: b\nmodels: {a: {port: 1, hooks: ./h}, b: {port: x, hooks: ./h}}", {"models.b.port"}),
        ("host: 0.0.0.0\napi_keys: 7\nmodels: {a: {port: 1, hooks: ./h}}", {"api_keys"}),
        ("gpus: {0: much}\nmodels: {a: {port: 1, hooks: ./h, gpus: [0], memory: 1GiB}}", {"gpus.0"}),
        ("models: {a: {port: 0, hooks: ./h}}", {"models.a.port"}),
        ("models: 7", {"models"}),
        (
            "policy: {fair: {}}\napi_keys: [{name: x, key: k, weight: 0}]\nmodels: {a: {port: 1, hooks: ./h}}",
            {"api_keys[0].weight"},
        ),
        ("virtual: {v: {first: [b]}}\nmodels: {a: {port: 1, hooks: ./h}, b: {hooks: 7}}", {"models.b.hooks"}),
    ],
)
def test_what_follows_from_a_mistake_is_not_told(check, tmp_path, text, found):
    assert places(check(text), tmp_path) == found


# ---- what llmux writes


def warnings_of(folder: Path, **settings) -> list[str]:
    config = folder / "config.yaml"
    config.write_text(
        json.dumps({"models": {"a": {"port": 8001, "wake": ":", "sleep": ":", "alive": ":"}}, **settings})
    )
    return [f"{'.'.join(problem.path)}: {problem.message}" for problem in look(Config.from_file(config))]


ALICE = [{"name": "alice", "key": "key-of-alice"}]


def test_what_can_be_written_or_made_is_no_warning(tmp_path):
    (tmp_path / "audit.jsonl").touch(mode=0o600)
    (tmp_path / "there").mkdir(mode=0o700)
    settings = {"audit": "audit.jsonl", "ledger": "ledger.db", "record": "record.jsonl", "api_keys": ALICE}
    for folder in ("there", "will/be/made"):
        assert warnings_of(tmp_path, **settings, captures={"keys": ["alice"], "folder": folder}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.jsonl", "config.yaml", "there"]


@pytest.mark.parametrize("setting", ["audit", "ledger", "record"])
def test_a_file_that_cannot_be(setting, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert warnings_of(tmp_path, **{setting: "none/x"}) == [
        f"{setting}: {tmp_path}/none/x cannot be written: its folder is not there; mkdir -p {tmp_path}/none"
    ]
    assert warnings_of(tmp_path, **{setting: "file/x"}) == [
        f"{setting}: {tmp_path}/file/x cannot be written: {tmp_path}/file is not a folder"
    ]
    assert warnings_of(tmp_path, **{setting: "folder"}) == [
        f"{setting}: {tmp_path}/folder cannot be written: it is a folder; give a file"
    ]


def test_a_folder_of_captures_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/x/y"):
        assert warnings_of(tmp_path, api_keys=ALICE, captures={"keys": ["alice"], "folder": folder}) == [
            f"captures: {tmp_path}/{folder} cannot be written: {tmp_path}/file is not a folder"
        ]


def test_what_others_may_read(tmp_path):
    (tmp_path / "audit.jsonl").touch()
    (tmp_path / "audit.jsonl").chmod(0o644)
    (tmp_path / "captures").mkdir()
    (tmp_path / "captures").chmod(0o755)
    captures = {"keys": ["alice"], "folder": "captures"}
    assert warnings_of(tmp_path, audit="audit.jsonl", api_keys=ALICE, captures=captures) == [
        f"audit: others may read {tmp_path}/audit.jsonl: chmod 600 {tmp_path}/audit.jsonl",
        f"captures: others may read {tmp_path}/captures: chmod 700 {tmp_path}/captures",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_may_not_write():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "audit.jsonl").touch(mode=0o600)
        (folder / "private").mkdir(mode=0o700)
        (folder / "config.yaml").touch(mode=0o644)
        settings = {
            "audit": "audit.jsonl", "ledger": "private/l.db", "record": "record.jsonl", "api_keys": ALICE,
            "captures": {"keys": ["alice"], "folder": "captures"}, "state": "private/made/state.json",
        }  # fmt: skip
        warnings_of(folder, **settings)
        config = Config.from_file(folder / "config.yaml")
        os.setresuid(65534, 65534, 0)
        try:
            said = [problem.message for problem in look(config)]
        finally:
            os.setresuid(0, 0, 0)
    what = "chown it, or give another place"
    assert said == [
        f"{folder}/audit.jsonl cannot be written: this user may not write {folder}/audit.jsonl; {what}",
        f"{folder}/captures cannot be written: this user may not write in {folder}; {what}",
        f"{folder}/private/l.db cannot be written: Permission denied",
        f"{folder}/record.jsonl cannot be written: this user may not write in {folder}; {what}",
        f"{folder}/private/made/state.json cannot be written: Permission denied",
    ]


def test_the_folders_of_a_state_file_are_made(tmp_path):
    (tmp_path / "file").touch()
    assert warnings_of(tmp_path, state="will/be/made/state.json") == []
    assert warnings_of(tmp_path, state="file/made/state.json") == [
        f"state: {tmp_path}/file/made/state.json cannot be written: {tmp_path}/file is not a folder"
    ]

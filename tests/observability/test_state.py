from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmux.errors import StateLockedError
from llmux.observability.state_file import NoState, State, StateFile

STATE = State(
    frozenset({"a", "b"}), {"a": 5.5, "b": 7.0}, {"pairs": [["a", "b", 3.0]]}, levels={"c": "ram", "d": "disk"}
)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def make(tmp_path, warnings):
    made = []

    def state_file(name="llmux/state.json"):
        file = StateFile(tmp_path / name, lambda event, /, **fields: warnings.append((event, fields)))
        made.append(file)
        return file

    yield state_file
    for file in made:
        file.close()


def test_what_was_saved_is_loaded(make, warnings):
    file = make()
    file.open()
    assert file.load() == State()
    assert file.save(STATE)
    file.close()
    again = make()
    again.open()
    assert again.load() == STATE
    assert again.load().recent() == ("b", "a")
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(entry.name for entry in file.path.parent.iterdir()) == ["state.json", "state.json.lock"]
    assert warnings == []


def test_definitions_are_written_as_they_are_now(make):
    """Those that are the same as before are not made again."""
    file, one, two = make(), {"port": 1, "wake": 'say "hi" \u2028'}, {"port": 2}
    file.open()
    for definitions in ({"a": one, "b": two}, {"b": one, "ä": two}, {"b": dict(two)}, {}, {"b": two}):
        assert file.save(State(definitions=definitions))
        assert file.load().definitions == definitions
    nan = {"port": float("nan")}
    assert not file.save(State(definitions={"b": two, "c": nan}))
    assert file.load().definitions == {"b": two}
    assert file.save(State(definitions={"b": one}))
    assert file.load().definitions == {"b": one}


def test_a_second_llmux_is_kept_off(make):
    first, second = make(), make()
    first.open()
    with pytest.raises(StateLockedError, match=rf"state\.json is in use by the llmux with pid {os.getpid()}"):
        second.open()
    first.close()
    second.open()


@pytest.mark.parametrize(
    "how", ["link", "link to a link", "linked folder", "relative link", "hard link", "dangling"]
)
def test_a_second_llmux_is_kept_off_by_whatever_name(make, tmp_path, how):
    first = make()
    other = tmp_path / "other"
    other.mkdir()
    link = other / "state.json"
    first.open()
    if how != "dangling":
        assert first.save(State(frozenset({"old"})))
    if how == "linked folder":
        other.rmdir()
        other.symlink_to(first.path.parent)
    elif how == "link to a link":
        (tmp_path / "between").symlink_to(first.path)
        link.symlink_to(tmp_path / "between")
    elif how == "relative link":
        link.symlink_to("../llmux/state.json")
    elif how == "hard link":
        link.hardlink_to(first.path)
        first.close()  # and started again, with the link in place
        first.open()
    else:
        link.symlink_to(first.path)
    assert first.save(STATE)
    with pytest.raises(StateLockedError, match="is in use by"):
        make("other/state.json").open()
    first.close()
    second = make("other/state.json")
    second.open()
    if how == "hard link":  # by now a file of its own
        assert second.load() == State(frozenset({"old"}))
        return
    assert second.load() == STATE
    assert second.save(State(frozenset({"c"})))
    assert link.is_symlink() or how == "linked folder"
    assert first.path.is_file()
    assert not first.path.is_symlink()
    first = make()
    with pytest.raises(StateLockedError):
        first.open()
    assert first.load().holders == {"c"}


@pytest.mark.parametrize("number", ["1e400", "-1e400", "Infinity", "NaN", "1" + "0" * 400])
def test_a_number_that_cannot_be_written_again_is_left_out(make, warnings, number):
    file = make()
    file.open()
    file.path.write_text(f'{{"version": 1, "holders": ["a"], "last_use": {{"a": {number}, "b": 7.0}}}}')
    state = file.load()
    assert state == State(frozenset({"a"}), {"b": 7.0})
    ((event, fields),) = warnings
    assert event == "state_file_unreadable"
    assert "'a'" in fields["error"]
    assert file.save(state)
    assert file.load() == state


def test_a_killed_llmux_leaves_no_lock(make):
    file = make()
    code = (
        "import os, sys; from llmux.observability.state_file import *; f = StateFile(sys.argv[1]); f.open();"
        "f.save(State(frozenset({'a'}))); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, file.path], check=False).returncode == -9
    file.open()
    assert file.load().holders == {"a"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "holders": [], "last_use": {}}',
        b'{"version": 1}',
        b'{"version": 1, "holders": [1], "last_use": {}}',
        b'{"version": 1, "holders": [], "last_use": []}',
        b'{"version": 1, "holders": [], "last_use": {"a": "x"}}',
        b'{"version": 1, "holders": [], "last_use": {"a": null}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_set_aside(make, warnings, content):
    file = make()
    file.open()
    file.path.write_bytes(content)
    assert file.load() == State()
    ((event, fields),) = warnings
    assert event == "state_file_set_aside"
    assert not file.path.exists()
    assert fields["moved_to"].startswith(f"{file.path}.damaged-")
    assert Path(fields["moved_to"]).read_bytes() == content
    assert file.save(STATE)


def test_an_unreadable_file_is_survived(make, warnings):
    file = make()
    file.open()
    file.path.mkdir()
    assert file.load() == State()
    assert [event for event, _ in warnings] == ["state_file_unreadable"]


def test_a_failing_disk_is_told_once_and_tried_again(make, warnings, monkeypatch):
    file = make()
    file.open()
    replace, broken = os.replace, True

    def failing(*args):
        if broken:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr("os.replace", failing)
    assert not file.save(STATE)
    assert not file.save(State())
    assert [event for event, _ in warnings] == ["state_file_unwritable"]
    assert not file.path.exists()
    assert not file._temporary.exists()
    broken = False
    assert file.save(STATE)
    assert file.load() == STATE
    broken = True
    assert not file.save(State())
    assert len(warnings) == 2


def test_what_is_no_json_never_raises(make, warnings):
    file = make()
    file.open()
    assert not file.save(State(costs=object()))
    assert not file.save(State(costs=float("nan")))
    assert len(warnings) == 1


def test_the_same_again_is_not_written(make):
    file = make()
    file.open()
    file.save(STATE)
    before = file.path.stat().st_ino
    file.save(State(STATE.holders, dict(STATE.last_use), STATE.costs, levels=dict(STATE.levels)))
    assert file.path.stat().st_ino == before
    file.save(State())
    assert json.loads(file.path.read_bytes())["holders"] == []


def test_without_a_file():
    store = NoState()
    store.open()
    assert store.load() == State()
    assert store.save(STATE)
    assert store.load() is STATE
    store.close()


def test_a_folder_that_cannot_be_made_is_told_at_the_start(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make("file/state.json").open()

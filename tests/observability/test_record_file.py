"""The record's file: its lines, its bound, and what a crash, a slow disk and a full one do to it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from llmux.observability import record
from llmux.observability.record import RecordError, RecordFile, read_record
from tests.harness.waiting import PATIENCE

START = {"type": "start", "format": 1}


class Told(list):
    def __call__(self, event, **fields):
        self.append((event, fields))


def write(path, *lines, bound=1 << 20):
    file = RecordFile(path, bound, Told())
    for line in lines:
        file.put(line)
    file.close()


def test_lines_are_appended_and_read_by_run(tmp_path):
    path = tmp_path / "record"
    write(path, START, {"type": "request", "id": 1}, {"type": "switch", "id": 1}, {"type": "stop"})
    write(path, START, {"type": "decision", "id": 1}, {"type": "request", "id": 2})
    first, second = read_record(path)
    assert [line["id"] for line in first.requests + first.switches] == [1, 1]
    assert [line["type"] for line in first.others] == ["stop"]
    assert [line["id"] for line in second.requests + second.decisions] == [2, 1]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_torn_line_is_ended_by_the_next_llmux_and_passed_over(tmp_path):
    path = tmp_path / "record"
    write(path, START, {"type": "request", "id": 1})
    with path.open("ab") as file:
        file.write(b'{"type":"request","i')
    (run,) = read_record(path)
    assert len(run.requests) == 1
    write(path, START, {"type": "request", "id": 3})
    assert [len(run.requests) for run in read_record(path)] == [1, 1]


def test_the_bound(tmp_path):
    path = tmp_path / "record"
    file = RecordFile(path, 1000, Told())
    wait_for(lambda: file.full, lambda: file.put({"type": "request", "text": "x" * 100}))
    file.begin_new()
    file.put(START)
    file.close()
    assert path.read_text() == '{"type":"start","format":1}\n'
    assert (tmp_path / "record.1").stat().st_size >= 1000


def test_a_disk_that_is_too_slow_loses_lines_and_says_so(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    told = Told()
    file = RecordFile(path, 1 << 30, told, waiting=10)
    file.put(START)
    count = 0
    while not file.lost or count < 2000:  # a pipe holds 64 KiB
        file.put({"type": "request", "text": "x" * 100})
        count += 1
    assert [event for event, _ in told][:1] == ["record_lines_lost"]
    os.set_blocking(reader, True)
    file.close_soon()
    data = b""
    while part := os.read(reader, 1 << 16):
        data += part
    os.close(reader)
    lines = [json.loads(line) for line in data.splitlines()]
    requests = sum(line["type"] == "request" for line in lines)
    assert requests + sum(line["lines"] for line in lines if line["type"] == "lost") == count


def test_a_pipe_without_a_reader_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        RecordFile(tmp_path / "pipe", 1 << 20, Told())


def test_a_full_disk_is_told_once():
    told = Told()
    file = RecordFile("/dev/full", 1 << 20, told)
    for number in range(3):
        file.put({"type": "request", "id": number})
        wait_for(lambda number=number: file.lost > number)
    file.close()
    assert told == [("record_unwritable", {"path": "/dev/full", "error": "No space left on device"})]


def begins_anew(file):
    def gone():
        file.begin_new(gone=True)
        file.put(START)

    file.on_gone = gone


def test_a_loss_is_told_after_the_line_with_which_a_file_begins(tmp_path):
    """The disk was full, and the file is moved away: the new one can be read."""
    path = tmp_path / "record"
    file = RecordFile(path, 1 << 20, Told())
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._file)  # no longer what is at the path
    os.close(full)
    for number in range(3):
        file.put({"type": "request", "id": number})
    wait_for(lambda: file.lost == 3)
    begins_anew(file)
    file.on_gone()
    file.put({"type": "request", "id": 3})
    file.close()
    (run,) = read_record(path)
    assert ([line["id"] for line in run.requests], run.lost) == ([3], 3)


def test_a_first_line_that_could_not_be_written_is_written_once_more(tmp_path, monkeypatch):
    """Else nobody could read what follows, or would take it for what an earlier llmux has done."""
    monkeypatch.setattr(record, "LOOK", 0.01)
    path = tmp_path / "record"
    write(path, START, {"type": "request", "id": 1})
    write_some, allowed, room = os.write, [5, 0], threading.Event()  # bytes, until there is room again

    def scarce(file, data):
        if not allowed:
            room.wait(PATIENCE)
        most = allowed.pop(0) if allowed else len(data)
        if not most:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_some(file, data[:most])

    monkeypatch.setattr(os, "write", scarce)
    file = RecordFile(path, 1 << 20, Told())
    begins_anew(file)
    file.put(START)
    wait_for(lambda: file.lost == 1)
    room.set()
    file.put({"type": "request", "id": 2})
    wait_for(lambda: not file.lost)
    file.close()
    first, second = read_record(path)
    assert [line["id"] for line in first.requests] == [1]
    assert [line["id"] for line in second.requests] == [2]
    assert second.lost == 1


def test_what_would_go_with_a_removed_file_is_kept_for_the_next_but_not_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "WAITING", 5)
    folder = tmp_path / "records"
    folder.mkdir()
    file = RecordFile(folder / "record", 1 << 20, Told())
    begins_anew(file)
    shutil.rmtree(folder)
    file.put(START)  # it had not been written yet
    for number in range(8):
        file.put({"type": "request", "id": number})
    wait_for(lambda: file.lost == 3)
    folder.mkdir()
    file.put({"type": "request", "id": 8})
    wait_for((folder / "record").exists)
    wait_for(lambda: not file.lost)
    file.close()
    (run,) = read_record(folder / "record")
    assert [line["id"] for line in run.requests] == [0, 1, 2, 3, 4]
    assert run.lost == 4


def test_kill_9_leaves_what_was_written(tmp_path):
    path = tmp_path / "record"
    code = """
        import sys, time
        from pathlib import Path
        from llmux.observability.record import RecordFile
        file = RecordFile(Path(sys.argv[1]), 1 << 30, print)
        file.put({"type": "start", "format": 1})
        number = 0
        while True:
            number += 1
            file.put({"type": "request", "id": number})
            time.sleep(0.0001)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)])
    try:
        wait_for(lambda: path.exists() and path.stat().st_size > 10_000)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run,) = read_record(path)
    assert [line["id"] for line in run.requests] == list(range(1, len(run.requests) + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no record; set `record: FILE`"),
        ("hello\n", "contains no record"),
        ('{"type": "request"}\n', ":1: is not a record of llmux"),
        ('{"type": "start", "format": 9}\n', ":1: format 9; this llmux reads 1"),
        ('{"type": "start", "format": 1}\nnonsense\n{"type": "request"}\n', ":2: is not a line of a record"),
        ('{"type": "start", "format": 1}\n[1]\n[2]\n', ":2: is not a line of a record"),
        ("[" * 100_000 + "\n", "contains no record"),
        ("\x1f\x8bno gzip", "contains no record"),
    ],
)
def test_what_is_no_record(tmp_path, text, message):
    path = tmp_path / "record"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_record(path)
    assert message in str(caught.value)


def test_a_loss_without_a_number_is_no_loss(tmp_path):
    path = tmp_path / "record"
    path.write_text('{"type": "start", "format": 1}\n{"type": "lost", "lines": "many"}\n')
    (run,) = read_record(path)
    assert run.lost == 0


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecordError, match="No such file"):
        read_record(tmp_path / "nothing")


def wait_for(condition, act=lambda: None):
    end = time.monotonic() + PATIENCE
    while not condition():
        act()
        assert time.monotonic() < end
        time.sleep(0.001)

from __future__ import annotations

import io
import json
import logging
import threading

import pytest

from llmux.observability import log
from llmux.observability.log import ThreadedHandler, configure, escape, get_logger
from tests.harness.waiting import PATIENCE


@pytest.fixture
def logging_restored():
    root, llmux = logging.getLogger(), logging.getLogger("llmux")
    before = root.handlers[:], root.level, llmux.level
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if isinstance(handler, ThreadedHandler):
            handler.close()
    root.handlers[:], root.level = before[0], before[1]
    root.setLevel(before[1])
    llmux.setLevel(before[2])


@pytest.fixture
def written(logging_restored):  # noqa: ARG001  # configure() changes the process's logging
    def configured(level="info", style="json"):
        stream = io.StringIO()
        handler = configure(level, style, stream)

        def lines():
            handler.flush()
            return stream.getvalue().splitlines()

        return lines

    return configured


def test_an_event_is_its_name_and_its_fields(written):
    lines = written()
    get_logger("llmux.test").info("switch_started", to="llama", **{"from": "idle"})
    (line,) = lines()
    event = json.loads(line)
    assert list(event) == ["timestamp", "level", "event", "to", "from"]
    assert event["timestamp"].endswith("Z")
    assert (event["level"], event["event"], event["from"]) == ("info", "switch_started", "idle")


def test_other_loggers_go_the_same_way(written):
    lines = written()
    logging.getLogger("aiohttp.server").warning("odd %s", "request\n")
    logging.getLogger("asyncio").debug("unseen")
    (line,) = lines()
    assert json.loads(line)["event"] == "odd request\n"
    assert json.loads(line)["level"] == "warning"


def test_what_opentelemetry_says_of_every_try_is_told_now_and_then(written, monkeypatch):
    lines, now = written(), 1000.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    exporter, other = logging.getLogger("opentelemetry.exporter.otlp"), logging.getLogger("aiohttp")
    for seconds in (1.0, 2.0, 4.0):
        exporter.warning("Transient error %s, retrying in %.2fs.", "refused", seconds)
        other.warning("says %s", "it again")
    exporter.error("Failed to export spans")
    for number in range(200):
        exporter.error(f"Of its own kind: {number}")
    assert [json.loads(line)["event"] for line in lines()[:5]] == [
        "Transient error refused, retrying in 1.00s.",
        *["says it again"] * 3,
        "Failed to export spans",
    ]
    now += log.SELDOM
    exporter.warning("Transient error %s, retrying in %.2fs.", "refused", 1.0)
    assert json.loads(lines()[-1])["event"] == "Transient error refused, retrying in 1.00s."


@pytest.mark.parametrize(("level", "seen"), [("debug", 2), ("info", 1), ("warning", 0)])
def test_the_level_is_llmuxs(written, level, seen):
    lines = written(level)
    get_logger().debug("a")
    get_logger().info("b")
    logging.getLogger("asyncio").debug("never")
    assert len(lines()) == seen


@pytest.mark.parametrize("style", ["console", "json"])
def test_nothing_forges_a_line(written, style):
    lines = written(style=style)
    evil = "x\n2026 [info] forged\r\x1b[2J\u202e\u2028\x85\x00\udcff"
    get_logger().warning("path_refused", path=evil, several=[evil], deep={evil: evil})
    logging.getLogger("aiohttp").warning(evil)
    out = lines()
    assert len(out) == 2
    assert all(char.isprintable() for line in out for char in line)
    assert "\\x1b[2J" in out[0] or "\\u001b[2J" in out[0]


@pytest.mark.parametrize("style", ["console", "json"])
def test_a_traceback_is_kept(written, style):
    lines = written(style=style)
    try:
        int("broken\x1b[2J\n")
    except ValueError:
        get_logger().exception("internal_error")
        logging.getLogger("aiohttp.server").exception("Error handling request")
    text = "\n".join(lines())
    assert text.count("Traceback (most recent call last)") == 2
    assert "\x1b" not in text
    assert "ValueError" in text


def test_auto_is_json_unless_on_a_terminal(written):
    lines = written(style="auto")
    get_logger().info("ready")
    assert json.loads(lines()[0])["event"] == "ready"


@pytest.mark.usefixtures("logging_restored")
def test_on_a_terminal_auto_is_coloured():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    handler = configure("info", "auto", stream)
    get_logger().info("ready", path="a\nb")
    handler.flush()
    assert "\x1b[" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_as_a_library_nothing_is_configured(caplog):
    before = logging.getLogger().handlers[:]
    with caplog.at_level(logging.INFO, logger="llmux"):
        get_logger().info("model_lost", model="a\nb", n=1)
        get_logger().debug("unseen")
        try:
            int("x")
        except ValueError:
            get_logger().exception("internal_error")
    assert logging.getLogger().handlers == before
    assert [record.getMessage() for record in caplog.records] == [
        "model_lost model=a\\nb n=1",
        "internal_error",
    ]
    assert caplog.records[1].exc_info is not None


def test_escape_leaves_the_printable():
    assert escape("Ünïcode 日本 \\n") == "Ünïcode 日本 \\n"
    assert escape("\t\n") == "\\t\\n"


def test_a_reader_that_stops_reading_stops_nobody():
    gate, entered = threading.Event(), threading.Event()

    class Stuck(io.StringIO):
        def write(self, text):
            entered.set()
            gate.wait(PATIENCE)
            return super().write(text)

    stream = Stuck()
    handler = ThreadedHandler(stream, limit=3)
    record = logging.makeLogRecord({"msg": "line"})
    handler.emit(record)
    assert entered.wait(PATIENCE)
    for _ in range(10):
        handler.emit(record)
    gate.set()
    handler.flush()
    handler.close()
    handler.close()
    lines = stream.getvalue().splitlines()
    assert lines.count("line") == 4
    assert "log_lines_dropped count=7" in lines


def test_a_reader_that_has_gone_is_survived():
    stream = io.StringIO()
    handler = ThreadedHandler(stream)
    stream.close()
    handler.emit(logging.makeLogRecord({"msg": "line"}))
    handler.flush()
    handler.close()

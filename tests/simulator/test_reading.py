import gzip
import io
import json
import sys
from types import SimpleNamespace

import pytest

from llmux.simulator import Job, TraceError
from llmux.simulator.trace import read_trace
from tests.simulator.traces import lines

HEADER = "arrival_s,model,prompt_tokens,output_tokens\n"
JOBS = [Job(0.5, "a", 10, 20), Job(1.25, "b", 0, 1)]


@pytest.fixture
def written(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_csv(written):
    trace = read_trace(written("\n".join(lines(JOBS))))
    assert trace.jobs == JOBS
    assert trace.name == "trace.csv"


def test_gzip_whatever_its_name(written):
    data = gzip.compress("\n".join(lines(JOBS)).encode())
    assert read_trace(written(data, "trace.txt")).jobs == JOBS


def test_columns_in_any_order_and_others_beside(written):
    text = "extra,model,output_tokens,prompt_tokens,arrival_s\r\nx,a,20,10,0.5\r\n"
    assert read_trace(written(text)).jobs == [JOBS[0]]


def test_json_lines(written):
    rows = [
        {"arrival_s": 0.5, "model": "a", "prompt_tokens": 10, "output_tokens": 20, "status": 200},
        {"switch": 3, "from": ["a"], "to": "b", "seconds": 4.0},
        {"event": "switch_ended"},
        {"arrival_s": 1.25, "model": "b", "prompt_tokens": 0, "output_tokens": 1},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    assert read_trace(written(text, "record.jsonl")).jobs == JOBS


def test_burstgpt_as_it_is(written):
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,GPT-4,1087,230,1317,API log\n"
    )
    assert read_trace(written(text)).jobs == [Job(5.0, "ChatGPT", 472, 18), Job(45.0, "GPT-4", 1087, 230)]


def test_times_before_zero_are_shifted(written):
    trace = read_trace(written(HEADER + "-2,a,1,1\n3,b,1,1\n"))
    assert [job.arrival for job in trace.jobs] == [0.0, 5.0]


def test_standard_input(monkeypatch):
    text = "\n".join(lines(JOBS)).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    from pathlib import Path  # noqa: PLC0415

    assert read_trace(Path("-")).jobs == JOBS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"trace.csv:1: the header lacks"),
        ("a,b\n1,2\n", r"trace.csv:1: the header lacks arrival_s, model"),
        (HEADER, r"trace.csv: has no requests"),
        (HEADER + "1,a,2,3\nsoon,a,2,3\n", r"trace.csv:3: arrival_s is not a number: 'soon'"),
        (HEADER + "nan,a,2,3\n", r"trace.csv:2: arrival_s is not a number"),
        (HEADER + "1,a,2\n", r"trace.csv:2: lacks output_tokens"),
        (HEADER + "1,a,2,3,4\n", r"trace.csv:2: has more values"),
        (HEADER + "1,,2,3\n", r"trace.csv:2: model is empty"),
        (HEADER + "1,a,-2,3\n", r"trace.csv:2: prompt_tokens is negative: -2"),
        (HEADER + "1," + "a" * 200_000 + ",2,3\n", r"trace.csv:2: field larger"),
        ('{"arrival_s": 1}\n', r"trace.csv:1: lacks model, prompt_tokens, output_tokens"),
        ('{"event": "x"}\n{nonsense\n', r"trace.csv:2: is not JSON"),
        ('{"event": "x"}\n[1]\n', r"trace.csv:2: is not a JSON object"),
        ('{"model": "a"}\n', r"trace.csv:1: lacks arrival_s"),
        (
            '{"arrival_s": 1, "model": ["a"], "prompt_tokens": 2, "output_tokens": 3}\n',
            r":1: model is not a name: \['a'\]",
        ),
        (
            '{"arrival_s": true, "model": 1, "prompt_tokens": 2, "output_tokens": 3}\n',
            r":1: arrival_s is not a number",
        ),
        (
            '{"arrival_s": 1%s, "model": 1, "prompt_tokens": 2, "output_tokens": 3}\n' % ("0" * 400),
            r"is not a number",
        ),
        ('{"a": ' + "[" * 100_000, r"trace.csv:1: is not JSON"),
        (b"\xff\xfe\x00", r"is not UTF-8 text"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-20], r"damaged or cut off"),
    ],
)
def test_what_cannot_be_used_says_why_and_where(written, text, words):
    with pytest.raises(TraceError, match=words):
        read_trace(written(text))


def test_no_such_file(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "gone.csv")

"""What is read of a JSON object at once: the same as by those who read it piece by piece."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmux.errors import BadRequestError
from llmux.extract import SLICE, ModelField, ModelScanner
from llmux.extract.json_object import MOST, members_of, place_of_model

KEYS = st.sampled_from(["model", "Model", "MODEL", "stream", "stream_options", "messages"]) | st.text(max_size=6)
TEXT = st.text(max_size=6) | st.sampled_from(["model", "a", '"model":"x"', "\ud83d\ude00"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
KNOWN = {"model", "stream", "stream_options"}


def scanned(body: bytes) -> ModelField | None:
    scanner = ModelScanner()
    for start in range(0, len(body), SLICE):
        scanner.feed(body[start : start + SLICE])
    return scanner.finish()


@settings(max_examples=150)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=4), st.booleans(), st.integers(0, 400), st.binary(max_size=3))
@example([("model", "a"), ("n", float("inf"))], True, 400, b"")
@example([("model", "a")], True, 0, b"\xef\xbb\xbf")
@example([("model", "a")], True, 12, b'\x00"')
@example([("model", "a"), ("model", "b"), ("stream", False), ("stream", True)], False, 400, b"")
@example([("messages", {"model": "b"}), ("model", "a")], False, 400, b"")
@example([("messages", '"model":"b"'), ("model", "a\n")], False, 400, b"")
@example([("model", "a"), ("mODEL", "b")], False, 400, b"")
def test_what_it_reads_others_read_too(members, plain, at, junk):
    each = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=plain)}" for key, value in members)
    body = f"{{{', '.join(each)}}}".encode("utf-8", "surrogatepass")
    body = body[:at] + junk + body[at:]
    read = members_of(body)
    if read is None:
        return
    others = json.loads(body)
    assert repr(read) == repr({key: others[key] for key in read})
    assert {key for key in read if key != "model"} == (KNOWN - {"model"}) & set(others)
    if not read["model"]:
        with pytest.raises(BadRequestError):
            scanned(body)
        return
    found = scanned(body)
    assert found is not None
    assert found.name == read["model"]
    assert place_of_model(body) in (None, (found.start, found.end))


@pytest.mark.parametrize("key", ["model", "mod\\u0065l", "\\u006dodel", "mo\\u0064el"])
@pytest.mark.parametrize("other", [b'{"model":"x"}', b'"model"', b'"\\"model\\":\\"x\\""', b"1"])
def test_a_place_is_only_told_if_no_other_could_be_meant(key, other):
    own = b'"%b" : "a"' % key.encode()
    for body in (b'{"x":%b, %b}' % (other, own), b'{%b ,"x":%b}' % (own, other)):
        assert members_of(body) == {"model": "a"}
        found = scanned(body)
        assert found is not None
        place = place_of_model(body)
        assert place in (None, (found.start, found.end))
        if other in {b"1", b'"\\"model\\":\\"x\\""'} and key == "model":
            assert place is not None


def test_a_usual_body_is_read():
    deep = {"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "h\u00e9\n"}]}]}
    for body in (json.dumps(deep), json.dumps(deep, ensure_ascii=False), f" \n{json.dumps(deep)}\r\n"):
        assert members_of(body.encode()) == {"model": "a"}
    for body in (b"[]", b"{}x", b"", b'{"model":"a","MODEL":"b"}', b'\xff{"model":"a"}', b"{'model':'a'}"):
        assert members_of(body) is None


def test_what_would_take_long_is_not_read_at_once():
    """The largest body of text is; one of nothing but brackets, and one byte more, are left to the scanner."""
    before, line, after = b'{"model":"a","x":"', b"a line with brackets, as code has: {...}\\n", b'"}'
    room = MOST - len(before + after)
    text = before + (line * (room // len(line))).ljust(room) + after
    assert members_of(text) == {"model": "a"}
    assert members_of(text + b" ") is None
    assert members_of(b'{"model":"a","x":[' + b"[]," * (MOST // 4) + b"1]}") is None


def test_what_names_no_model_is_not_made_into_objects():
    """As pydantic does to say what is wrong: of a large body it would take long."""
    body = b'{"x":[' + b'"ab",' * ((MOST - 100) // 5) + b"1]}"
    tracemalloc.start()
    try:
        assert members_of(body) is None
        assert tracemalloc.get_traced_memory()[1] < len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", ["x", "model", "Model", "stream", "stream_options"])
def test_where_nothing_but_brackets_would_take_long_it_is_not_read(key):
    body = b'{"model":"a","%b":[%b0]}' % (key.encode(), (b"[" * 150 + b"]" * 150 + b",") * 800)
    assert members_of(body) is None

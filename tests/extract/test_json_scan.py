"""The model in a JSON body, wherever it stands and however the body is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmux.errors import BadRequestError
from llmux.extract import ModelField, ModelScanner, json_literal

BLANKS = st.text(" \t\r\n", max_size=3)
TEXTS = st.text(max_size=8) | st.text('\\"/{}[],:mn \u00e9\U0001f600', max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


def scan(body: bytes, cuts=()) -> ModelField | None:
    scanner = ModelScanner()
    edges = [0, *sorted(cuts), len(body)]
    for start, end in pairwise(edges):
        scanner.feed(body[start:end])
    return scanner.finish()


def scan_bytewise(body: bytes) -> ModelField | None:
    return scan(body, range(1, len(body)))


@st.composite
def literals(draw, texts=TEXTS):
    """Return a JSON string, each of its characters escaped or not."""
    parts = []
    for char in draw(texts):
        escape = draw(st.booleans()) or char in '"\\' or ord(char) < 0x20
        short = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\n": "\\n"}.get(char)
        if not escape:
            parts.append(char)
        elif short and draw(st.booleans()):
            parts.append(short)
        else:
            units = char.encode("utf-16-be")
            parts += [f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)]
    return f'"{"".join(parts)}"'


def containers(inner):
    def spaced(start, items, end):
        return start + ",".join(items) + end

    pairs = st.tuples(BLANKS, literals(TEXTS | st.just("model")), BLANKS, inner).map(
        lambda pair: f"{pair[0]}{pair[1]}{pair[2]}:{pair[3]}"
    )
    return st.builds(spaced, st.just("["), st.lists(inner, max_size=4), st.just("]")) | st.builds(
        spaced, st.just("{"), st.lists(pairs, max_size=4), st.just("}")
    )


VALUES = st.tuples(
    BLANKS, st.recursive(SCALARS.map(json.dumps) | literals(), containers, max_leaves=12), BLANKS
).map("".join)
KEYS = literals(st.just("model") | st.sampled_from(["mode", "models", "Model", ""]) | TEXTS)
MEMBERS = st.tuples(BLANKS, KEYS, BLANKS, VALUES).map(lambda m: f"{m[0]}{m[1]}{m[2]}:{m[3]}")
OBJECTS = st.tuples(BLANKS, st.lists(MEMBERS, max_size=6).map(",".join), BLANKS).map(
    lambda o: f"{o[0]}{{{o[1]}}}{o[2]}"
)


def duplicates_kept(body):
    return json.loads(body, object_pairs_hook=lambda pairs: pairs)


@settings(max_examples=60)
@given(OBJECTS, st.data())
def test_agrees_with_the_json_parser_and_replaces_in_place(text, data):
    body = text.encode()
    wanted = json.loads(body)
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    if "model" not in wanted:
        assert scan(body, cuts) is None
        return
    if any(key != "model" and key.lower() == "model" for key in wanted):
        for where in (cuts, (), range(1, len(body))):
            with pytest.raises(BadRequestError, match="differ in case only"):
                scan(body, where)
        return
    if not wanted["model"] or not isinstance(wanted["model"], str):
        with pytest.raises(BadRequestError, match=r"model is (not a string|empty)"):
            scan(body, cuts)
        return
    field = scan(body, cuts)
    assert field == scan_bytewise(body) == scan(body)
    assert field is not None
    assert field.name == wanted["model"]
    assert json.loads(body[field.start : field.end]) == field.name
    new = data.draw(TEXTS)
    after = body[: field.start] + json_literal(new) + body[field.end :]
    assert json.loads(after) == {**wanted, "model": new}
    before_pairs, after_pairs = duplicates_kept(body), duplicates_kept(after)
    last = max(i for i, (key, _) in enumerate(before_pairs) if key == "model")
    before_pairs[last] = ("model", new)
    assert after_pairs == before_pairs


@settings(max_examples=40)
@given(OBJECTS, st.data())
def test_a_body_cut_short_is_an_error(text, data):
    body = text.encode().rstrip()
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    assume(cut.strip())
    with pytest.raises(BadRequestError):
        scan(cut)
    with pytest.raises(BadRequestError):
        scan_bytewise(cut)


@settings(max_examples=80)
@given(st.binary(max_size=40) | st.text('{}[]":,model \\0', max_size=30).map(str.encode), st.data())
def test_garbage_is_refused_or_read_as_the_json_parser_reads_it(junk, data):
    body = b'{"a":' + junk
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=6))
    try:
        field = scan(body, cuts)
    except BadRequestError:
        field = None
    try:
        wanted = json.loads(body)
    except ValueError:  # ours may look at less; whoever gets it refuses it
        return
    assert (field.name if field else "") == (wanted.get("model") or "")


@pytest.mark.parametrize("body", [b' \xbb {"a": 1', b' \xbb{"model": "m"}', b'\xef\xbb\xbf {"model": "m"}'])
def test_a_byte_order_mark_is_one_at_the_very_beginning_only(body):
    for cuts in ([], [1], [1, 2], [2, 3], [1, 2, 3, 4]):
        found = scan(body, cuts)
        assert (found is None) == (body[:1] == b" ")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model":"m"}', "m"),
        (b'\xef\xbb\xbf \r\n{"model":"m"}\n', "m"),
        (rb'{"mod\u0065l":"m"}', "m"),
        (rb'{"\u006D\u006f\u0064\u0065\u006c":"m"}', "m"),
        (rb'{"model":"\ud83d\ude00\u00e9\"\\\/"}', '\U0001f600\u00e9"\\/'),
        ('{"model":"\u00e9\U0001f600"}'.encode(), "\u00e9\U0001f600"),
        (b'{"model":"a","model":"b"}', "b"),
        (b'{"model":1,"model":"b"}', "b"),
        (b'{"x":{"model":"n"},"y":[{"model":"n"}],"z":"\\"model\\":\\"n\\"","model":"m"}', "m"),
        (b'{"x":"}]\\\\","model":"m","y":[["]"],{"}":"{"}]}', "m"),
        (b'{ "a" : -1.5e+3 , "b" : true , "c" : NaN , "model" : "m" }', "m"),
        (b'{"a":[[[[[[[[{"b":"]]]]"}]]]]]]]],"model":"m"}', "m"),
        (b'{"a":1.' + b"1" * 5000 + b',"model":"m"}', "m"),
        (b'{"a":' + b"[" * 70000 + b"]" * 70000 + b',"model":"m"}', "m"),
        (b'{"a":' + b"[" * 700 + b'"\\\\"' + b"]" * 700 + b',"model":"m","b":' + b"[[[[[[]]]]]]" + b"}", "m"),
    ],
)
def test_the_model_is_found(body, name):
    field = scan(body)
    assert field is not None
    assert field.name == name
    assert json.loads(body[field.start : field.end]) == name
    if len(body) < 10_000:
        assert scan_bytewise(body) == field


@pytest.mark.parametrize("body", [b"{}", b" { } ", b'{"a":{"model":"m"}}', b'{"models":"m"}', b'{"":"m"}'])
def test_an_object_without_a_model(body):
    assert scan(body) is None
    assert scan_bytewise(body) is None


@pytest.mark.parametrize("body", [b"", b" \n", b"[1]", b'"model"', b"--x", b"\xef\xbb\xbf", b"\x00{"])
def test_what_is_no_object_is_left_alone(body):
    scanner = ModelScanner()
    scanner.feed(body)
    scanner.feed(b'{"model":"m"}' if body.strip(b" \n\xef\xbb\xbf") else b"")
    assert not scanner.is_object
    assert scanner.finish() is None


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"model"',
        b'{"model":',
        b'{"model":"m',
        b'{"model":"m\\"',
        b'{"model":"m"',
        b'{"model":"m",',
        b'{"model":"m",}',
        b'{,"model":"m"}',
        b'{"model":"m"}}',
        b'{"model":"m"} {}',
        b'{"model":"m"}x',
        b'{"model" "m"}',
        b'{"model"::"m"}',
        b'{"model":"m" "x":1}',
        b'{model:"m"}',
        b"{'model':'m'}",
        b'{"a":blah,"model":"m"}',
        b'{"a":01,"model":"m"}',
        b'{"a":,"model":"m"}',
        b'{"a":[1,"model":"m"}',
        b'{"a":"x,"model":"m"}',
        b'{"a":\\"model":"m"}',
    ],
)
def test_malformed_bodies_are_refused(body):
    for attempt in (scan, scan_bytewise):
        with pytest.raises(BadRequestError, match="not valid JSON") as caught:
            attempt(body)
        assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"5", "not a string"),
        (b"null", "not a string"),
        (b'["m"]', "not a string"),
        (b'{"model":"m"}', "not a string"),
        (b'""', "empty"),
        (b'"\xff"', "not valid UTF-8"),
        (b'"\\ud800"', "not valid Unicode"),
        (b'"\\x"', "not a valid JSON string"),
        (b'"a\nb"', "not a valid JSON string"),
        (b'"' + b"x" * 1025 + b'"', "longer than 1024"),
        (b'"' + b"x" * 100_000 + b'"', "longer than 1024"),
    ],
)
def test_models_that_are_no_name(value, why):
    with pytest.raises(BadRequestError, match=why) as caught:
        scan(b'{"model":%b}' % value)
    assert caught.value.param == "model"


def test_the_literal_is_utf_8_and_escaped():
    assert json_literal('a"\u00e9') == '"a\\"\u00e9"'.encode()

import json
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmux.config import Config, ConfigErrors, yaml_document
from llmux.config.load import parse_json, parse_yaml


def test_plain_scalars_follow_yaml_1_2():
    data = parse_yaml(
        "{a: on, b: yes, c: 12:30, d: 2024-01-01, e: true, f: ~, g: 0x10, h: 1.5, i: 010, j: .inf, k: 1e3, l: , "
        "m: off, n: 'true', o: 1_000}"
    ).data
    assert data == {
        "a": "on",
        "b": "yes",
        "c": "12:30",
        "d": "2024-01-01",
        "e": True,
        "f": None,
        "g": 16,
        "h": 1.5,
        "i": 10,
        "j": float("inf"),
        "k": 1000.0,
        "l": None,
        "m": "off",
        "n": "true",
        "o": "1_000",
    }


def test_keys_are_text():
    assert parse_yaml("{7: a, true: b, on: c, 1.50: d}").data == {"7": "a", "true": "b", "on": "c", "1.50": "d"}


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
@pytest.mark.parametrize(
    ("more", "at"),
    [
        ({"wake": "echo \ud83d"}, "models.m.wake: holds half of a character"),
        ({"env": {"X": "\udd00"}}, "models.m.env.X: holds half"),
        ({"info": {"description": "\udcff"}}, "models.m.info.description: holds half"),
        ({"variants": {"v": {"set": {"a": ["\ud83d"]}}}}, "models.m.variants.v.set.a[0]: holds half"),
        (
            {"variants": {"v": {"set": {"a": {"\ud83d": 1}}}}},
            "models.m.variants.v.set.a: has a key that holds",
        ),
    ],
)
def test_half_a_character_is_refused_where_it_stands(refused, name, more, at):
    model = {"port": 1, "wake": "w", "sleep": "s", "alive": "a"} | more
    [line] = refused(json.dumps({"models": {"m": model}}), name=name)
    assert line.startswith(f"{name}:1: {at}")


def test_environment_values_keep_their_spelling():
    document = parse_yaml("models: {m: {env: {A: 1.10, B: 0755, C: yes, D: true, E: 0x10, F: '', G: }}}")
    assert document.data["models"]["m"]["env"] == {
        "A": "1.10",
        "B": "0755",
        "C": "yes",
        "D": "true",
        "E": "0x10",
        "F": "",
        "G": None,
    }


def test_lines():
    lines = parse_yaml(
        "# one\nmodels:\n  a:\n    wake: |\n      x\n      y\n    aliases:\n    - b\n    - c\n"
    ).lines
    assert lines == {
        (): 2,
        ("models",): 2,
        ("models", "a"): 3,
        ("models", "a", "wake"): 4,
        ("models", "a", "aliases"): 7,
        ("models", "a", "aliases", 0): 8,
        ("models", "a", "aliases", 1): 9,
    }


def test_anchors_and_merge_keys():
    document = parse_yaml(
        "x-one: &one {a: 1, b: 1}\nx-two: &two {b: 2, c: 2}\nx-three: &three {<<: *one, d: 3}\n"
        "m: {<<: [*one, *two], c: 3}\nn: {c: 3, <<: *three}\no: *one\n"
    )
    assert not document.problems
    assert document.data["m"] == {"a": 1, "b": 1, "c": 3}
    assert document.data["n"] == {"a": 1, "b": 1, "c": 3, "d": 3}
    assert document.data["o"] == {"a": 1, "b": 1}
    assert document.lines["n", "a"] == 1


@pytest.mark.parametrize("parse", [parse_yaml, parse_json])
def test_a_key_that_is_there_twice(parse):
    document = parse('{"a": {"b": 1,\n"c": 2,\n"b": 3},\n"a": 4}')
    assert [(problem.path, problem.line, problem.message) for problem in document.problems] == [
        (("a",), 4, "is there twice, first on line 1; keep one of them"),
        (("a", "b"), 3, "is there twice, first on line 1; keep one of them"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a:\n\tb: 1\n", 2, "indented with a tab"),
        ("a: 1\nb: 2\n\tc: 3\n", 3, "indented with a tab"),
        ("a: 1\nb: c: d\n", 2, "must be in quotes, or on the lines after `|`"),
        ("a: 1\nb: [ -f x ] && y\n", 2, "must be in quotes"),
        ("a: 1\nb: 'x\n\n", 2, "never closed"),
        ("a: {b: 1\n", 1, "never closed"),
        ("a: @x\n", 1, "must be in quotes"),
        ("a: *nobody\n", 1, "an anchor (&name) must stand before"),
        ("a: &x [*x]\n", 1, "contains itself"),
        ("a: &x\n  <<: *x\n", 2, "takes a mapping"),
        ("a: 1\n<<: 3\n", 2, "takes a mapping"),
        ("a: !!python/object:os.system {}\nb: !foo bar\n", 2, "has the tag '!foo'"),
        ("? [a, b]\n: 1\n", 1, "a key that is not text"),
        ("a: 1\n---\nb: 2\n", 2, "several YAML documents"),
        ("a: \x07\n", 1, "a character that YAML does not allow"),
        ('a: "\\UFFFFFFFF"\n', None, "is not YAML"),
        ("a: !!int x\n", 1, "'x' is no int"),
        ("a: !!bool x\n", 1, "'x' is no bool"),
        ("[" * 1500, None, "is not YAML"),
        ("", None, "is empty"),
        ("# only a comment\n", None, "is empty"),
    ],
)
def test_what_is_no_yaml(text, line, words):
    document = parse_yaml(text)
    problem = document.problems[0]
    assert words in problem.message
    assert problem.line == line


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": 1,\n "b": }', 2, "Expecting value (column 7)"),
        ('{"a": 1,\n}', None, "is not JSON"),
        ('{"a": NaN}', None, "NaN is not JSON"),
        ("{'a': 1}", 1, "is not JSON"),
        ("[" * 100_000, None, "is not JSON"),
    ],
)
def test_what_is_no_json(text, line, words):
    problem = parse_json(text).problems[0]
    assert words in problem.message
    assert line in (None, problem.line)


KEYS = st.sampled_from(["a", "b", "<<", "models", "7", ""])
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda one: st.lists(one, max_size=3) | st.lists(st.tuples(KEYS, one), max_size=4))


def as_json(value, *, top=True) -> str:
    """Write JSON in which a list of pairs, and the whole, is an object: a key may be there twice."""
    if isinstance(value, list) and (top or all(isinstance(each, tuple) for each in value)):
        pairs = [each if isinstance(each, tuple) else ("k", each) for each in value]
        return "{" + ",\n ".join(f"{json.dumps(key)}:\t{as_json(each, top=False)}" for key, each in pairs) + "}"
    if isinstance(value, list):
        return f"[{', '.join(as_json(each, top=False) for each in value)}]"
    return json.dumps(value if not isinstance(value, tuple) else list(value))


@settings(max_examples=40)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=5))
@example([("a", "x" * 1100)])
@example([("a", [("b", 1), ("b", 2)])])
@example([("a", [("<<", 1)])])
def test_json_is_read_as_yaml_for_its_lines_and_for_what_is_twice(pairs):
    text = as_json(pairs)
    document, whole = parse_json(text), parse_yaml(text.replace("\t", " "))
    assert document.data == json.loads(text)
    assert document.problems == ([] if whole.data is None else whole.problems)
    assert document.lines == ({} if whole.data is None else whole.lines)


def test_json_that_is_too_much_for_yaml_has_no_lines(monkeypatch):
    monkeypatch.setattr(yaml_document, "MAX_VALUES", 100)
    assert parse_json('{"a": [' + "1," * 50 + "1]}").lines
    document = parse_json('{"a": [' + "1," * 100 + "1]}")
    assert (len(document.data["a"]), document.lines, document.problems) == (101, {}, [])


def test_json_that_yaml_reads_otherwise():
    text = '{"a": "\\/x",\t"b":"\\ud83d\\ude00", "c": 1e3, "<<": {"d": 1}, "e": "\x7f"}'
    assert parse_json(text).data == {"a": "/x", "b": "😀", "c": 1000.0, "<<": {"d": 1}, "e": "\x7f"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "c.yaml: is empty; it needs at least `models:`"),
        (b" \n\n", "c.yaml: is empty"),
        (b"a: 1\nb: \xff\n", "c.yaml:2: is not UTF-8 text"),
        (b"- a\n", "c.yaml:1: must be a mapping"),
        (b"just text\n", "c.yaml:1: must be a mapping"),
        (b"~\n", "c.yaml:1: must be a mapping"),
        (b"models: {}\n", "c.yaml:1: models: needs at least one entry, not an empty mapping"),
        (b"models:\n", "c.yaml:1: models: must be a mapping of names to values, not null"),
        (b"port: 3000\n", "c.yaml:1: models: is missing; name at least one model"),
    ],
)
def test_files_that_say_nothing_useful(tmp_path, content, words):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigErrors, match=r"c\.yaml") as caught:
        Config.from_file(tmp_path / "c.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/{words}")


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "\ufeffmodels: {a: {port: 1, wake: w, sleep: s, alive: a}}\r\n", encoding="utf-8"
    )
    assert Config.from_file(tmp_path / "c.yaml").models["a"].port == 1


def test_no_file_a_folder_and_no_permission(tmp_path):
    with pytest.raises(ConfigErrors, match="there is no such file"):
        Config.from_file(tmp_path / "gone.yaml")
    with pytest.raises(ConfigErrors, match="is a folder"):
        Config.from_file(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigErrors, match="cannot be read: not a directory"):
        Config.from_file(tmp_path / "file" / "c.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path):
    (tmp_path / "c.yaml").write_text("models: {}")
    (tmp_path / "c.yaml").chmod(0)
    with pytest.raises(ConfigErrors, match="permission denied"):
        Config.from_file(tmp_path / "c.yaml")


def bomb(line, depth=12, first="[x, y]"):
    lines = (f"a{n}: &a{n} " + line.format(f"*a{n - 1}") for n in range(1, depth))
    return "\n".join([f"a0: &a0 {first}", *lines, ""])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb("[{0}, {0}, {0}, {0}]"), "counting what aliases stand for"),
        (bomb("{{p: {0}, q: {0}, r: {0}, s: {0}}}"), "counting what aliases stand for"),
        (bomb("{{<<: [{0}, {0}, {0}, {0}]}}", first="{x: 1, y: 2}"), "counting what aliases stand for"),
        (f"a: &a {'x' * 1_000_000}\nb: [{', '.join(['*a'] * 1000)}]\n", "counting what aliases stand for"),
        (bomb("[{0}]", 5000), "levels deep"),
    ],
)
def test_what_aliases_expand_to_is_bounded(text, words):
    document = parse_yaml(text)
    (problem,) = document.problems
    assert words in problem.message
    assert problem.line is not None
    assert document.data is None


def test_many_aliases_of_a_size_that_configurations_have_are_fine():
    models = "".join(f"  m{n}: {{<<: *env, env: *env}}\n" for n in range(3000))
    document = parse_yaml("x-env: &env {A: 1, B: 2}\nmodels:\n" + models)
    assert document.problems == []
    assert len(document.data["models"]) == 3000

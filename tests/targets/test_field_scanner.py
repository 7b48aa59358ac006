"""Rules for the fields of a body: what is changed, and that nothing else is."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.errors import BadRequestError
from llmux.extract import SLICE, Body, BodyBudget, ModelScanner
from llmux.extract import body_of as whole_body
from llmux.extract.body import Store
from llmux.targets.field_scanner import (
    AT_ONCE,
    MOST_TIMES,
    FieldScanner,
    Found,
    Rule,
    changes,
    members_at_once,
    tree,
)


def body_of(data, piece=SLICE):
    """Make a body as it is received: in pieces, scanned for its model."""
    store, scanner = Store(BodyBudget(10**9)), ModelScanner()
    for start in range(0, len(data), piece):
        scanner.feed(data[start : start + piece])
        store.add(data[start : start + piece])
    return Body(store, scanner.finish())


def changed(data, **rules):
    return changed_by(data, {name.replace("__", "."): rule for name, rule in rules.items()})


def changed_by(data, rules):
    with body_of(data) as body:
        edited = body.edit(asyncio.run(changes(body, tree(rules))))
        sent = b"".join(edited)
        assert len(sent) == edited.size
        return sent


def always(value):
    return Rule(always=value, given=True)


STRIP = Rule(strip=True)


@pytest.mark.parametrize(
    ("given", "rules", "sent"),
    [
        (b'{"a" : 1.50 , "b":2}', {"a": always(3)}, b'{"a" : 3 , "b":2}'),
        (b'{"b":2}', {"a": always("x")}, b'{"a":"x","b":2}'),
        (b"{ }", {"a": always(None)}, b'{"a":null }'),
        (b'{"a":1,"a":2}', {"a": always(3)}, b'{"a":3,"a":3}'),
        (b'{"\\u0061":1}', {"a": always(3)}, b'{"\\u0061":3}'),
        (b'{"A":1}', {"a": always(3)}, b'{"a":3,"A":1}'),
        (b'\xef\xbb\xbf{"b":1}', {"a": always(3)}, b'\xef\xbb\xbf{"a":3,"b":1}'),
        (b'{"a":[1,{"b":"]"}]}', {"a": always({"k": ["\u00e9"]})}, '{"a":{"k":["é"]}}'.encode()),
        # default
        (b'{"a":1}', {"a": Rule(default=2)}, b'{"a":1}'),
        (b'{"a":null}', {"a": Rule(default=2)}, b'{"a":2}'),
        (b'{"a":false}', {"a": Rule(default=True)}, b'{"a":false}'),
        (b'{"c":0}', {"a": Rule(default=2), "b": Rule(default=[1])}, b'{"a":2,"b":[1],"c":0}'),
        # strip
        (b'{"a":1,"b":2}', {"a": STRIP}, b'{"b":2}'),
        (b'{"a":1,"b":2}', {"b": STRIP}, b'{"a":1}'),
        (b'{"a":1}', {"a": STRIP}, b"{}"),
        (b'{"a":1,"b":2,"c":3}', {"b": STRIP, "c": STRIP}, b'{"a":1}'),
        (b'{"a":1,"b":2,"c":3}', {"a": STRIP, "c": STRIP}, b'{"b":2}'),
        (b'{"a":1,"b":2,"c":3}', {"a": STRIP, "b": STRIP, "c": STRIP}, b"{}"),
        (b'{"a":1,"b":2,"a":3}', {"a": STRIP}, b'{"b":2}'),
        (b'{"b":2}', {"a": STRIP}, b'{"b":2}'),
        (b'{"a":1}', {"a": STRIP, "b": always(2)}, b'{"b":2}'),
        (b'{"c":0,"a":1}', {"a": STRIP, "b": always(2)}, b'{"b":2,"c":0}'),
        # cap
        (b'{"a":9}', {"a": Rule(cap=5)}, b'{"a":5}'),
        (b'{"a":5}', {"a": Rule(cap=5)}, b'{"a":5}'),
        (b'{"a":4.999}', {"a": Rule(cap=5)}, b'{"a":4.999}'),
        (b'{"a":-1e400}', {"a": Rule(cap=5)}, b'{"a":-1e400}'),
        (b'{"a":1e400}', {"a": Rule(cap=5)}, b'{"a":5}'),
        (b'{"a":NaN}', {"a": Rule(cap=5)}, b'{"a":5}'),
        (b'{"a":null}', {"a": Rule(cap=5)}, b'{"a":null}'),
        (b"{}", {"a": Rule(cap=5)}, b"{}"),
        (b"{}", {"a": Rule(cap=0.5, default=0.25)}, b'{"a":0.25}'),
        (b'{"a":' + b"9" * 5000 + b"}", {"a": Rule(cap=5)}, b'{"a":5}'),
        # objects within
        (b'{"a":{"b":1,"c":2}}', {"a.b": always(9)}, b'{"a":{"b":9,"c":2}}'),
        (b'{"a":{"c":2}}', {"a.b.d": always(9)}, b'{"a":{"b":{"d":9},"c":2}}'),
        (b'{"x":1}', {"a.b": always(9), "a.c": Rule(default=1)}, b'{"a":{"b":9,"c":1},"x":1}'),
        (b'{"a":null}', {"a.b": always(9)}, b'{"a":{"b":9}}'),
        (b'{"a":null}', {"a.b": STRIP}, b'{"a":null}'),
        (b'{"a":"text"}', {"a.b": STRIP}, b'{"a":"text"}'),
        (b"{}", {"a.b": STRIP, "a.c": Rule(cap=1)}, b"{}"),
        (b'{"a":{"b":1}}', {"a.b": STRIP}, b'{"a":{}}'),
        (b'{"a":{"b":7},"a":{"b":8}}', {"a.b": Rule(cap=1)}, b'{"a":{"b":1},"a":{"b":1}}'),
    ],
)
def test_what_the_rules_say_is_changed_and_no_other_byte(given, rules, sent):
    assert changed_by(given, rules) == sent


@pytest.mark.parametrize(
    "members",
    [
        b"", b',"temperature":1', b',"a":"temperature"', b',"a":{"temperature":1}', b',"\\u0074emperature":1',
        b',"a":"\\u00e9\\n"', b',"a":"\\u0041"', b',"n":{"x":{"y":1}},"n":{}', b',"a":"\\"temperature\\""',
        b' , "n" : null',
    ],
)  # fmt: skip
@pytest.mark.parametrize("blanks", [b"", b" \n"])
def test_what_was_read_at_once_is_changed_alike(members, blanks):
    data = b'%b{%b"model":"m"%b}' % (blanks, blanks, members)
    rules = {"temperature": Rule(default=0.5, cap=0.7), "n.x.y": always(2), "top_k": STRIP}
    with whole_body(data, "m", BodyBudget(10**9)) as body:
        assert body.members is not None
        edited = b"".join(body.edit(asyncio.run(changes(body, tree(rules)))))
    assert edited == changed_by(data, rules)
    assert json.loads(edited)["n"] == {"x": {"y": 2}}


@pytest.mark.parametrize(
    ("given", "rules", "field"),
    [
        (b'{"a":"9"}', {"a": Rule(cap=5)}, "a"),
        (b'{"a":true}', {"a": Rule(cap=5)}, "a"),
        (b'{"a":[9]}', {"a": Rule(cap=5)}, "a"),
        (b'{"a":{"b":"9"}}', {"a.b": Rule(cap=5)}, "a.b"),
        (b'{"a":"text"}', {"a.b": always(9)}, "a"),
        (b'{"a":{"b":[]}}', {"a.b.c": always(9)}, "a.b"),
    ],
)
def test_a_value_of_a_type_that_no_rule_can_work_on_is_refused_by_its_name(given, rules, field):
    with pytest.raises(BadRequestError) as refused:
        changed_by(given, rules)
    assert refused.value.param == field
    assert field in refused.value.message


def test_what_is_no_object_is_refused():
    with pytest.raises(BadRequestError, match="not a JSON object"):
        changed(b"[1]", a=STRIP)


@pytest.mark.parametrize("names", [("a.b", "a"), ("a", "a.b"), ("a.b.c", "a.b")])
def test_rules_do_not_overlap(names):
    with pytest.raises(ValueError, match="part"):
        tree(dict.fromkeys(names, STRIP))


BLANK = st.text(" \n\t", max_size=2)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
NAMES = ["a", "b", "c", "d"]
RULES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(NAMES[:3], st.sampled_from([STRIP, always([1]), Rule(default="x")]))
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*NAMES, "e\\", "\u00e9"]), VALUES, BLANK), max_size=6),
    RULES.filter(bool),
    st.booleans(),
)
def test_the_result_is_what_a_parser_would_make_of_it(members, rules, ascii_only):
    text = ",".join(
        f"{b}{json.dumps(k, ensure_ascii=ascii_only)}{b}:{b}{json.dumps(v, ensure_ascii=ascii_only)}{b}"
        for k, v, b in members
    )
    sent = changed_by(f"{{{text}}}".encode("utf-8", "surrogatepass"), rules)
    wanted = {key: value for key, value, _ in members}
    for name, rule in rules.items():
        if rule.strip:
            wanted.pop(name, None)
        elif rule.given:
            wanted[name] = rule.always
        elif all(value is None for key, value, _ in members if key == name):
            wanted[name] = rule.default
    got = json.loads(sent)
    for name, rule in rules.items():
        # Of a key that stands twice every null is filled in.
        if rule.default is not None and len([key for key, _, _ in members if key == name]) > 1:
            got.pop(name), wanted.pop(name)
    assert got == wanted


@pytest.mark.parametrize("piece", range(1, 60))
def test_a_member_is_found_wherever_the_slices_end(piece):
    data = b'{"x":{"a":1},"p":1,"q":"r","y":2,"a" : {"b" :[2, "]"]} , "c":-1e5,"z":null,"s":"\\"}"}'
    scanner = FieldScanner(["a", "c", "s"])
    for start in range(0, len(data), piece):
        scanner.feed(data[start : start + piece])
    scanner.finish()
    assert [(m.name, data[m.start : m.end]) for m in scanner.found] == [
        ("a", b'{"b" :[2, "]"]}'),
        ("c", b"-1e5"),
        ("s", b'"\\"}"'),
    ]
    assert all(data[m.key : m.key + 1] == b'"' and data[m.before : m.before + 1] == b"," for m in scanner.found)
    assert scanner.found[-1].after is None
    assert scanner.others


BLANK = st.sampled_from(["", " ", "\n\t"])
OBJECTS = st.recursive(
    st.sampled_from(
        [
            "1",
            "-0.5e3",
            "null",
            "true",
            "NaN",
            '"x"',
            '"\\"}\\\\"',
            '"\u00e9\u6f22"',
            '"\t"',
            "[]",
            "{}",
            "x",
            "1 2",
        ]
    ),
    lambda inner: st.builds("[{},{}]".format, inner, inner) | st.builds('{{"a" :{}}}'.format, inner),
    max_leaves=4,
)
MEMBERS = st.lists(
    st.tuples(BLANK, st.sampled_from(["a", "b", "c", "\\u0061", "\u00e9", "", "\\q"]), BLANK, OBJECTS, BLANK),
    max_size=5,
)


@settings(max_examples=300)
@given(MEMBERS, BLANK, st.sampled_from(["", "\n ", "x", ","]), st.sampled_from([0, 7]))
def test_at_once_the_same_is_found_as_by_the_scanner(members, before, behind, offset):
    each = (f'{one}"{key}"{two}:{value}{three}' for one, key, two, value, three in members)
    data = f"{before}{{{','.join(each)}}}{behind}".encode()
    found = members_at_once(data, ["a", "c"], offset)
    if found is None:
        return
    scanner = FieldScanner(["a", "c"], offset)
    scanner.feed(data)
    scanner.finish()
    assert found == Found(bool(scanner.is_object), scanner.found, scanner.opens, scanner.others)


def test_what_is_usual_is_found_at_once():
    data = (
        '{"model":"m","messages":[{"role":"user","content":"h\u00e9 \\"x\\""}],"a" : {"b":[1]} , "c":2}'.encode()
    )
    found = members_at_once(data, ["a", "c"])
    assert found is not None
    assert [(one.name, json.loads(data[one.start : one.end])) for one in found.found] == [
        ("a", {"b": [1]}),
        ("c", 2),
    ]
    assert found.others
    for odd in (b"[]", b"{}", b'{"a":1', b'{"a":1}x', b'{"a":}', b'{"a":1 "c":2}', b"{" * 9, b"[" * 10**5, b""):
        assert members_at_once(odd, ["a"]) is None


@pytest.mark.parametrize("nested", [False, True])
async def test_what_would_take_long_is_not_found_at_once(nested):
    """The scanner finds it, and others have their turns meanwhile."""
    many = (f'"k\\u0061{number}":1' for number in range(14_000))
    data = b'{"x":[%b0],"a":2}' % (b"[]," * 80_000) if nested else f'{{{",".join(many)},"a":2}}'.encode()
    assert len(data) <= AT_ONCE
    assert members_at_once(data, ["a"]) is None
    with body_of(data) as body:
        assert json.loads(b"".join(body.edit(await changes(body, tree({"a": always(3)})))))["a"] == 3


@pytest.mark.parametrize("member", ['"a":1', '"b":{"c":1}'])
async def test_a_field_that_comes_again_and_again_is_refused(member):
    """Each time would be a change of its own; while some are made, others have their turns."""
    rules = tree({"a": always(3), "b.c": always(3)})

    def times(number):
        return f'{{"model":"m"{f",{member}" * number}}}'.encode()

    with body_of(times(2 * MOST_TIMES)) as body:
        edited = b"".join(body.edit(await changes(body, rules)))
        assert edited.count(b"3") >= 2 * MOST_TIMES
        assert b"1" not in edited
    with body_of(times(2 * MOST_TIMES + 1)) as body, pytest.raises(BadRequestError, match="more than 100 times"):
        await changes(body, rules)


async def test_a_body_of_20_mb_stays_where_it_is_and_holds_nothing_up():
    messages = json.dumps([{"role": "user", "content": 'hello "x" ' * 20}] * 80_000).encode()
    data = b'{"messages":%b,"n":{"deep":1},"model":"m","max_tokens":9999}' % messages
    rules = tree({"max_tokens": Rule(cap=5), "temperature": always(0), "n.deep": STRIP})
    with body_of(data) as body:
        turns = 0

        async def watch():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        edited = await body.edit(await changes(body, rules)).renamed("other")
        watching.cancel()
        assert edited.spooled
        assert edited.single is None
        assert turns > 10  # others had theirs
        digest = b"".join(edited)
    wanted = data.replace(b"9999", b"5").replace(b'"m"', b'"other"').replace(b'"deep":1', b"")
    assert digest == wanted.replace(b"{", b'{"temperature":0,', 1)
    assert len(digest) > 20_000_000
    assert edited.size == len(digest)

"""The rules of `routes` and of `spill`: what they say of which request."""

from __future__ import annotations

import asyncio
import base64
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux.accounts.pricing import price_of
from llmux.config.remotes import RouteConfig
from llmux.extract import Body, BodyBudget, ModelScanner
from llmux.extract.body import Store
from llmux.targets.route_rules import ASSUMED_OUTPUT, Content, Facts, Offer, content_of, follow, spills, worst_cost


def rules(*given):
    return [RouteConfig.model_validate(each) for each in given]


@pytest.mark.parametrize(
    ("when", "facts", "content", "fits"),
    [
        ({}, Facts("a"), None, True),
        ({"model": "gpt-4*"}, Facts("gpt-4o"), None, True),
        ({"model": "gpt-4*"}, Facts("gpt-5"), None, False),
        ({"model": ["x", "gpt-5"]}, Facts("gpt-5"), None, True),
        ({"key": "k"}, Facts("a", key="k"), None, True),
        ({"key": ["j", "k"]}, Facts("a", key="k"), None, True),
        ({"key": "k"}, Facts("a"), None, False),
        ({"role": "r"}, Facts("a", role="r"), None, True),
        ({"role": "r"}, Facts("a", role="s"), None, False),
        ({"path": "/v1/**"}, Facts("a", "/v1/x/y"), None, True),
        ({"path": "/v1/*"}, Facts("a", "/v1/x/y"), None, False),
        ({"wait_over": "10s"}, Facts("a", wait=11), None, True),
        ({"wait_over": "10s"}, Facts("a", wait=10), None, False),
        ({"wait_over": "10s"}, Facts("a", wait=None), None, False),
        ({"images": True}, Facts("a"), Content(images=True), True),
        ({"images": True}, Facts("a"), Content(), False),
        ({"images": False}, Facts("a"), Content(), True),
        ({"tools": True, "stream": False}, Facts("a"), Content(tools=True), True),
        ({"tools": True, "stream": False}, Facts("a"), Content(tools=True, stream=True), False),
        ({"tokens_over": 100}, Facts("a"), Content(text=351), False),
        ({"tokens_over": 100}, Facts("a"), Content(text=354), True),
        ({"tokens_over": 1499}, Facts("a"), Content(files=1), True),
        ({"model": "b", "images": True}, Facts("a"), None, False),
    ],
)
def test_when_a_rule_fits(when, facts, content, fits):
    found = follow(rules({"when": when}), facts, content)
    assert (found.rule is not None, found.looks) == (fits, False)


def test_the_first_that_fits_is_followed_and_the_body_is_looked_at_only_when_it_matters():
    several = rules(
        {"when": {"model": "a"}, "to": "x"},
        {"when": {"images": True}, "to": "y"},
        {"to": "z"},
    )
    assert follow(several, Facts("a"), None).rule.to == "x"
    assert follow(several, Facts("b"), None) == (None, True)
    assert follow(several, Facts("b"), Content(images=True)).rule.to == "y"
    assert follow(several, Facts("b"), Content()).rule.to == "z"
    assert follow((), Facts("b"), None) == (None, False)


def test_what_refuses():
    found = rules({}, {"to": "x"}, {"to": None}, {"to": None, "regions": ["eu"]}, {"regions": ["eu"]})
    assert [rule.refuses for rule in found] == [False, False, True, False, False]


# ---- a look into the body


def body_of(data, size=None):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    store, scanner = Store(BodyBudget(2**30)), ModelScanner()
    for at in range(0, len(data), size or len(data)):
        scanner.feed(data[at : at + (size or len(data))])
        store.add(data[at : at + (size or len(data))])
    return Body(store, scanner.finish())


IMAGE = base64.b64encode(bytes(range(256)) * 40).decode()
CHAT_IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}
MESSAGES_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}}
LINKED = {"type": "input_image", "image_url": "https://x/y.png"}
DOCUMENT = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": IMAGE}}


def asked(*parts, **more):
    return {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, *parts]}],
        **more,
    }


@pytest.mark.parametrize(
    ("parts", "more", "expected"),
    [
        ((), {}, {}),
        ((CHAT_IMAGE,), {}, {"images": True, "files": 1}),
        ((MESSAGES_IMAGE, LINKED), {}, {"images": True, "files": 2}),
        ((DOCUMENT,), {}, {"files": 1}),
        (({"type": "text", "text": 'say "type": "image"'},), {}, {}),
        ((), {"tools": [{"type": "function"}]}, {"tools": True}),
        ((), {"tools": [], "functions": None}, {}),
        ((), {"stream": True, "max_tokens": 7, "n": 3}, {"stream": True, "limit": 7, "answers": 3}),
        ((), {"max_completion_tokens": 9, "max_output_tokens": "x"}, {"limit": 9}),
        ((), {"stream": "true", "n": None}, {}),
    ],
)
async def test_what_a_look_shows(parts, more, expected):
    found = await content_of(body_of(asked(*parts, **more)))
    whole = json.dumps(asked(*parts, **more))
    text = len(whole) - whole.count(IMAGE) * len(IMAGE)
    told = {name: getattr(found, name) for name in ("images", "tools", "stream", "files", "limit", "answers")}
    usual = {"images": False, "tools": False, "stream": False, "files": 0, "limit": None, "answers": 1}
    assert told == usual | expected
    assert text <= found.text <= text + 200 * (whole.count(IMAGE) + 1)


async def test_of_a_field_that_comes_again_and_again_only_the_last_is_read(monkeypatch):
    read = []
    part = Body.part
    monkeypatch.setattr(Body, "part", lambda body, *at: (read.append(at), part(body, *at))[1])
    found = await content_of(body_of(b'{"model":"m"%b,"stream":true}' % (b',"stream":false' * 2000)))
    assert found.stream
    assert len(read) < 10


async def test_what_is_no_json_has_text_alone():
    assert await content_of(None) == Content()
    assert await content_of(body_of(b"[1, 2")) == Content(text=5)
    form = body_of(b"whatever")
    form.form = True
    assert await content_of(form) == Content(text=8)


async def test_a_large_body_is_looked_at_in_turns():
    text = {"type": "text", "text": "some words " * 300_000}
    body = body_of(asked(text, *[CHAT_IMAGE] * 100, stream=True), size=65536)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(others())
    with body:
        found = await content_of(body)
    beside.cancel()
    assert (found.images, found.files, found.stream) == (True, 100, True)
    assert abs(found.text - 3_300_000) < 50_000
    assert turns > 10


# ---- spill


@pytest.mark.parametrize(
    ("waited", "expected", "worst", "goes"),
    [
        (0, 20, None, False),
        (0, 20.1, None, True),
        (0, None, None, True),
        (15, 5, None, False),
        (15, 5.1, None, True),
        (20.1, 0, None, True),
    ],
)
def test_when_a_request_spills(waited, expected, worst, goes):
    assert spills(Offer("r/m", 20), waited, expected, worst) is goes
    assert spills(Offer("r/m", 20, below=100), waited, expected, 100) is goes
    assert not spills(Offer("r/m", 20, below=100), waited, expected, 101)
    assert not spills(Offer("r/m", 20, below=100), waited, expected, None)


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e3))
def test_what_waits_longer_spills_no_later(over, waited, expected, more):
    offer = Offer("r/m", over)
    if spills(offer, waited, expected, None):
        assert spills(offer, waited + more, expected, None)
        assert spills(offer, waited, expected + more, None)
        assert spills(offer, waited, None, None)


def test_what_it_may_cost_at_worst():
    price = price_of(2.0, None, 10.0)  # of the currency, for a million tokens
    assert worst_cost(price, 2000, 0, 100) == 1000 * 2 + 100 * 10
    assert worst_cost(price, 2001, 1, 100, 2) == (1001 + 3000) * 2 + 2 * 100 * 10
    assert worst_cost(price, 0, 0, None) == ASSUMED_OUTPUT * 10
    assert worst_cost(price_of(0.0000001, None, 0.0), 1, 0, 0) in {0, 1}
    assert worst_cost(price_of(0.3, None, 0.0), 2, 0, 0) == math.ceil(0.3)

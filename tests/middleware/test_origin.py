from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from llmux.middleware.origin import METHODS, Origins, canonical, check_cors_entry

ORIGINS = Origins(
    ["https://chat.example.com", "http://192.168.1.5:8080/", "chrome-extension://abcdef"],
    port=3000,
    hosts=("box.lan",),
)
HOST = "127.0.0.1:3000"


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, HOST),
        (None, None),
        ("http://127.0.0.1:3000", HOST),
        ("http://localhost:3000", HOST),
        ("http://[::1]:3000", HOST),
        ("http://LOCALHOST:3000", HOST),
        ("http://box.lan:3000", "box.lan:3000"),
        ("http://box.lan", "box.lan"),
        ("http://box.lan", "box.lan:80"),
        ("https://box.lan", "Box.lan"),
        ("https://box.lan", "box.lan:443"),
        ("https://chat.example.com", HOST),
        ("https://CHAT.example.com:443", HOST),
        ("http://192.168.1.5:8080", HOST),
        ("chrome-extension://abcdef", HOST),
    ],
)
def test_allowed(origin, host):
    verdict = ORIGINS.check(origin, host)
    assert verdict.allowed
    assert verdict.headers.get("Access-Control-Allow-Origin") == origin
    if origin is not None:
        assert verdict.headers["Vary"] == "Origin"
        assert "X-LLMux-Queue-Seconds" in verdict.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("null", HOST),
        ("", HOST),
        ("https://evil.example", HOST),
        ("http://chat.example.com", HOST),
        ("https://chat.example.com.evil.example", HOST),
        ("https://chat.example.com@evil.example", HOST),
        ("https://chat.example.com:8443", HOST),
        ("http://127.0.0.1:3001", HOST),
        ("https://localhost:3000", HOST),
        ("http://localhost", HOST),
        ("http://box.lan:3000", "box.lan"),
        ("http://evil.example:3000", "evil.example:3000"),
        ("http://127.0.0.1.evil.example:3000", "127.0.0.1.evil.example:3000"),
        ("http://box.lan:3000", None),
        ("http://127.0.0.1:3000, http://evil.example", HOST),
        ("http://127.0.0.1:3000 http://evil.example", HOST),
        ("127.0.0.1:3000", HOST),
        ("http://127.0.0.1:port", HOST),
        ("http://[::1", HOST),
        ("file://", HOST),
        ("http://127.0.0.1:3000/page", HOST),
        ("ftp://box.lan:3000", "box.lan:3000"),
    ],
)
def test_refused(origin, host):
    verdict = ORIGINS.check(origin, host)
    assert not verdict.allowed
    assert "cors" in verdict.reason
    assert "Access-Control-Allow-Origin" not in verdict.headers
    assert ORIGINS.options({"Origin": origin, "Host": host} if host else {"Origin": origin}).status == 403


def test_what_to_add_to_cors_is_named():
    for origin in ("app://obsidian.md", "vscode-webview://0a1b", "null", "http://localhost:5173"):
        assert repr(origin) in ORIGINS.check(origin, HOST).reason
        assert Origins([origin]).check(origin, HOST).allowed
    no_entry = ORIGINS.check("file://", HOST).reason  # some programs send it, and `cors` does not take it
    assert ("'file://'" in no_entry, "only * " in no_entry) == (True, True)
    assert len(ORIGINS.check("x" * 9000, HOST).reason) < 300


def test_null_can_be_listed():
    assert Origins(["null"]).check("null", HOST).headers["Access-Control-Allow-Origin"] == "null"


@pytest.mark.parametrize("origin", ["null", "https://anywhere.example", "nonsense"])
def test_a_star_admits_every_page(origin):
    assert Origins(["*"]).check(origin, HOST).headers["Access-Control-Allow-Origin"] == "*"


def test_nothing_is_listed_by_default():
    assert not Origins().check("http://localhost:3000", "box.lan").allowed


@pytest.mark.parametrize(
    "entry", ["", "example.com", "https://", "https://a/b", "https://a?b", "http://a:b", "**"]
)
def test_entries_that_match_nothing_are_errors(entry):
    with pytest.raises(ValueError, match="origin"):
        check_cors_entry(entry)


def test_preflight():
    answer = ORIGINS.options(
        CIMultiDict(
            {
                "host": HOST,
                "origin": "https://chat.example.com",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, x-stainless-os",
                "access-control-request-private-network": "true",
            }
        )
    )
    assert answer.status == 204
    assert answer.headers == {
        "Access-Control-Allow-Origin": "https://chat.example.com",
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Allow-Headers": "authorization, x-stainless-os",
        "Access-Control-Allow-Private-Network": "true",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
    }


@pytest.mark.parametrize("wanted", ["", "a\r\nSet-Cookie: x", "a;b", "a," * 4000])
def test_what_is_no_list_of_headers_is_not_echoed(wanted):
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    answer = ORIGINS.options(headers | {"Access-Control-Request-Headers": wanted})
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://localhost:3000"}])
def test_options_that_is_no_preflight(headers):
    answer = ORIGINS.options(headers)
    assert answer.status == 204
    assert answer.headers["Allow"] == METHODS


@given(st.text(max_size=50))
def test_a_canonical_origin_is_stable(text):
    form = canonical(text)
    assert canonical(form) == form


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_origin_raises(origin, host):
    ORIGINS.check("http://" + origin, host)

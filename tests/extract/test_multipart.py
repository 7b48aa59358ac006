"""The model in a form, wherever it stands and however the body is cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.errors import BadRequestError
from llmux.extract import MultipartScanner, boundary_of


def scan(body, boundary=b"b", cuts=()):
    scanner = MultipartScanner(boundary)
    edges = [0, *sorted(cuts), len(body)]
    for start, end in pairwise(edges):
        scanner.feed(body[start:end])
    return scanner.finish()


def part(name, content, *, more=b""):
    return b'\r\n--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b' % (name, more, content)


END = b"\r\n--b--\r\n"
BOUNDARIES = st.text("abc-'", min_size=1, max_size=8).map(str.encode)
# Contents made of what delimiters are made of, but never a delimiter itself.
CONTENTS = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"x", b"\xff"]), max_size=12).map(
    b"".join
)
NAMES = st.text(min_size=1, max_size=8).map(str.encode)
SPELLINGS = st.sampled_from(
    [
        b'Content-Disposition: form-data; name="model"',
        b"content-disposition:form-data;name=model",
        b'Content-Type: text/plain\r\nCONTENT-DISPOSITION: Form-Data; x=1 ; NAME = "mo\\"del"',
        b'CONTENT-DISPOSITION: Form-Data; x=1 ; NAME = "model"\r\nX-Y: z',
    ]
)
OTHERS = st.sampled_from(
    [
        b'Content-Disposition: form-data; name="file"; filename="; name=model"',
        b'Content-Disposition: form-data; name="model"; filename="a.wav"',
        b'Content-Disposition: attachment; name="model"',
        b"X-Y: z",
        b"",
    ]
)


@settings(max_examples=120)
@given(
    BOUNDARIES,
    st.lists(st.tuples(SPELLINGS, NAMES) | st.tuples(OTHERS, CONTENTS), max_size=5),
    CONTENTS,
    CONTENTS,
    st.data(),
)
def test_the_last_model_field_is_found_at_any_cut(boundary, parts, preamble, epilogue, data):
    delimiter = b"\r\n--" + boundary
    parts = [(head, content) for head, content in parts if delimiter not in b"\r\n" + content]
    if delimiter in b"\r\n" + preamble + delimiter[:-1]:
        preamble = b""
    body, wanted = preamble, None
    for head, content in parts:
        if delimiter in b"\r\n" + content + delimiter[:-1]:
            continue
        body += (delimiter if body else delimiter[2:]) + data.draw(st.sampled_from([b"", b" \t"])) + b"\r\n"
        body += (head + b"\r\n" if head else b"") + b"\r\n"
        if b"name" in head.lower() and b'mo\\"' not in head and b"file" not in head and b"attach" not in head:
            wanted = (content.decode(), len(body), len(body) + len(content))
        body += content
    body += (delimiter if body else delimiter[2:]) + b"--" + epilogue
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    for where in ((), cuts, range(1, len(body))):
        field = scan(body, boundary, where)
        assert (field and (field.name, field.start, field.end)) == wanted


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "final boundary"),
        (b"nothing", "final boundary"),
        (part(b"model", b"m"), "final boundary"),
        (part(b"model", b"m") + b"\r\n--b", "final boundary"),
        (part(b"model", b"m") + b"\r\n--b-", "final boundary"),
        (part(b"model", b"m") + b"\r\n--bc--", "line's end"),
        (part(b"model", b"m") + b"\r\n--b-x", "line's end"),
        (b"--b" + b" " * 100, "line's end"),
        (b"--b" + b" " * 65 + part(b"model", b"m") + END, "line's end"),
        (part(b"file", b"x", more=b"; y=" + b"z" * 9000) + END, "headers"),
        (b"--b\r\n" + b"z" * 9000, "headers"),
        (part(b"x", b"y") * 1001 + END, "parts"),
        (part(b"model", b"m" * 1025) + END, "longer than 1024"),
        (part(b"model", b"m" * 5000), "longer than 1024"),
        (part(b"model", b"") + END, "empty"),
        (part(b"model", b"\xff") + END, "not valid UTF-8"),
    ],
)
def test_malformed_forms_are_refused(body, why):
    for cuts in ((), range(1, len(body)) if len(body) < 1000 else range(0, len(body), 700)):
        with pytest.raises(BadRequestError, match=why):
            scan(body, cuts=cuts)


def test_a_long_name_and_long_headers_just_fit():
    body = part(b"x", b"y", more=b"; y=" + b"z" * 8000) + part(b"model", b"m" * 1024) + END
    field = scan(body)
    assert field is not None
    assert field.name == "m" * 1024


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data ; charset=utf-8; Boundary = "a b:c"', b"a b:c"),
        ("multipart/form-data; boundary=----WebKitFormBoundaryX; x=y", b"----WebKitFormBoundaryX"),
    ],
)
def test_the_boundary(header, boundary):
    assert boundary_of(header) == boundary


@pytest.mark.parametrize(
    "header",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="a ',
        'multipart/form-data; boundary="a "',
        'multipart/form-data; boundary="a\u00e9"',
        "multipart/form-data; boundary=" + "x" * 71,
        'multipart/form-data; x="; boundary=abc"',
    ],
)
def test_bad_boundaries(header):
    with pytest.raises(BadRequestError):
        boundary_of(header)


@pytest.mark.parametrize("names", [(b"model", b"Model"), (b"MODEL", b"model"), (b"model", b"model", b"moDel")])
def test_fields_that_differ_in_case_only(names):
    body = b"".join(part(name, b"a") for name in names) + END
    for cuts in ((), range(1, len(body))):
        with pytest.raises(BadRequestError, match="differ in case only"):
            scan(body, cuts=cuts)


def test_a_field_in_another_case_alone_is_no_model():
    assert scan(part(b"Model", b"a") + END) is None
    assert scan(part(b"model", b"a") + part(b"Model", b"b", more=b'; filename="x"') + END).name == "a"

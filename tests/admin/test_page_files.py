"""The page's files: what they are served as, to whom, and that they point at nothing outside."""

import re

import pytest

from tests.docs.pages import ROOT

UI = ROOT / "llmux" / "ui"
FILES = sorted(path.name for path in UI.iterdir())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.mark.parametrize("name", FILES)
async def test_each_file_is_served_as_what_it_is(house, name):
    await house.open()
    reply = await house.ask("GET", f"/llmux/ui/{name}")
    assert reply.status == 200
    assert reply.body == (UI / name).read_bytes()
    assert reply.headers["content-type"] == f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    again = await house.ask("GET", f"/llmux/ui/{name}", If_None_Match=reply.headers["etag"])
    assert (again.status, again.body) == (304, b"")


async def test_the_page_is_the_index_and_has_one_address(house):
    await house.open()
    page = await house.ask("GET", "/llmux/ui")
    assert page.body == (UI / "index.html").read_bytes()
    below = await house.ask("GET", "/llmux/ui/")
    assert (below.status, below.headers["location"]) == (308, "../ui")
    assert (await house.ask("HEAD", "/llmux/ui")).headers["content-length"] == str(len(page.body))


@pytest.mark.parametrize(
    "path", ["nothing.js", "../__init__.py", "..%2f__init__.py", "%2e%2e/version.py", "a/b.js", ".hidden", "%00"]
)
async def test_nothing_else_is_served(house, path):
    await house.open()
    assert (await house.ask("GET", f"/llmux/ui/{path}")).status in {400, 404}


async def test_pages_of_other_origins_get_the_files_and_nothing_more(house):
    await house.open()
    for path, status in (
        ("/llmux/ui", 200),
        ("/llmux/ui/main.js", 200),
        ("/llmux/status", 403),
        ("/llmux/uix", 403),
    ):
        reply = await house.ask("GET", path, Origin="http://elsewhere.test")
        assert (path, reply.status) == (path, status)
        assert "access-control-allow-origin" not in reply.headers
    assert (await house.ask("POST", "/llmux/ui", Origin="http://elsewhere.test")).status == 403


def test_the_files_name_no_other_place_and_hold_nothing_inline():
    for name in FILES:
        text = (UI / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", text), name
        if name.endswith(".html"):
            assert not re.search(r"<style|<script(?![^>]*src=)|\son[a-z]+=|\sstyle=", text), name

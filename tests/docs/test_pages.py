"""Links lead somewhere, the diagram is that of the code, the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, markdown_files

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", page.read_text(), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (found := f"{slug}-{number}" if number else slug) in anchors:
            number += 1
        anchors.add(found)
    return anchors | set(re.findall(r'<a (?:id|name)="([^"]+)"', page.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_there(page):
    assert (ROOT / page).is_file()


@pytest.mark.parametrize("page", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for groups in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        link = next(filter(None, groups))
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(("page", "lines"), [("README.md", 220), ("llmux/DESIGN.md", 350)])
def test_what_newcomers_read_is_short(page, lines):
    assert len((ROOT / page).read_text().splitlines()) <= lines

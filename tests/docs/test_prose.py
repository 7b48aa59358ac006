"""Plain English in code, messages and pages: models and requests are things, errors say what is wrong."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, markdown_files

WORST = re.compile(
    r"\b(who|whom|nobody|somebody|anybody|everybody|whoever|is no setting|is no option|is no duration|mended"
    r"|mending|told off|talks nonsense|makes no sense|turned away|made a mistake|is to be)\b",
    re.IGNORECASE,
)
KINDS = {".py", ".sh", ".yaml", ".json", ".html", ".service", ".cfg", ".conf"}
FILES = sorted(
    path
    for folder in ("llmux", "policies", "hooks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in KINDS
)
CODE = re.compile(r"`[^`\n]*`")
MARKUP = re.compile(r"<[^>]*>")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_worst_words(file):
    lines = file.read_text().splitlines()
    found = [f"{n}: {line.strip()}" for n, line in enumerate(lines, 1) if WORST.search(MARKUP.sub("", line))]
    assert not found, f"{file}: write it in plain English"


@pytest.mark.parametrize("page", markdown_files(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_worst_words_of_pages(page):
    lines = page.read_text().splitlines()
    found = [f"{n}: {line.strip()}" for n, line in enumerate(lines, 1) if WORST.search(CODE.sub("", line))]
    assert not found, f"{page}: write it in plain English"

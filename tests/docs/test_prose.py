"""Plain English in code, messages and pages: models and requests are things, errors say what is wrong."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, markdown_files

PLACES = (
    "accounts",
    "admin",
    "app.py",
    "cli",
    "config",
    "control.py",
    "core",
    "errors.py",
    "extract",
    "hookrunner",
    "llama_swap",
    "middleware",
    "observability",
    "plugins.py",
    "process.py",
    "proxy",
    "runtime",
    "server.py",
    "simulator",
    "survey",
    "tracing",
    "upstream",
)
"""What is held to it, in llmux/. To be extended until it is the whole package."""
BESIDE = ("policies", "examples/quickstart")
"""Folders beside the package that are held to it too."""

WORST = re.compile(
    r"\b(who|whom|nobody|somebody|anybody|is no setting|is no option|is no duration|mended|mending|told off"
    r"|talks nonsense|makes no sense|turned away|made a mistake|is to be)\b",
    re.IGNORECASE,
)
FILES = [
    *(f for place in PLACES for f in sorted((ROOT / "llmux" / place).rglob("*.py")) or [ROOT / "llmux" / place]),
    *(f for folder in BESIDE for f in sorted((ROOT / folder).glob("*.py"))),
]
CODE = re.compile(r"`[^`\n]*`")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_worst_words(file):
    lines = file.read_text().splitlines()
    found = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if WORST.search(line)]
    assert not found, f"{file}: write it in plain English"


@pytest.mark.parametrize("page", markdown_files(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_worst_words_of_pages(page):
    lines = page.read_text().splitlines()
    found = [f"{n}: {line.strip()}" for n, line in enumerate(lines, 1) if WORST.search(CODE.sub("", line))]
    assert not found, f"{page}: write it in plain English"

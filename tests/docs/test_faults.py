"""The tables of faults in llmux/DESIGN.md and of attacks in llmux/OPERATING.md name tests that exist."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

PAGES = {"DESIGN.md": "## On a bad day", "OPERATING.md": "## Attacks that were tried"}


def rows() -> list[str]:
    found = []
    for page, title in PAGES.items():
        table = (ROOT / "llmux" / page).read_text().partition(title)[2].partition("\n## ")[0]
        found += [line for line in table.splitlines() if line.startswith("| ") and "`test_" in line]
    return found


def test_there_are_enough():
    assert len(rows()) >= 55


def test_each_names_tests_that_exist():
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    missing = [name for row in rows() for name in re.findall(r"`(test_\w+)`", row) if name not in there]
    assert not missing

"""The table of faults in llmux/DESIGN.md names tests that exist."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

PAGE = ROOT / "llmux" / "DESIGN.md"


def rows() -> list[str]:
    table = PAGE.read_text().partition("## On a bad day")[2].partition("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("| ") and "`test_" in line]


def test_there_are_enough():
    assert len(rows()) >= 40


def test_each_names_tests_that_exist():
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    missing = [name for row in rows() for name in re.findall(r"`(test_\w+)`", row) if name not in there]
    assert not missing

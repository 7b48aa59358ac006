"""The pages that have to document everything, and how to read them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where a user looks; a name that is in none of them is undocumented.
PAGES = (
    "README.md",
    "llmux/DESIGN.md",
    "llmux/OPERATING.md",
    "llmux/REFERENCE.md",
    "llmux/FLEET.md",
    "llmux/TARGETS.md",
    "hooks/README.md",
    "policies/README.md",
    "CHANGELOG.md",
)
SKIPPED = {".venv", ".git", ".demo", "node_modules", "build", "dist"}


def markdown_files() -> list[Path]:
    """Return every page of the repository."""
    return sorted(
        path for path in ROOT.rglob("*.md") if not SKIPPED.intersection(path.relative_to(ROOT).parts[:-1])
    )


@cache
def text_of(*pages: str) -> str:
    """Return the text of these pages, or of all; a page that does not exist is an error."""
    return "\n".join((ROOT / page).read_text() for page in pages or PAGES)


def code_words(text: str) -> set[str]:
    """Return what stands in backticks or in code blocks, whole and word by word."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    words = set(spans)
    for piece in (*blocks, *spans):
        words.update(re.findall(r"[A-Za-z_][A-Za-z0-9_.-]*", piece))
    return words


def undocumented(names, *pages: str) -> list[str]:
    """Return the names that no page mentions as code."""
    known = code_words(text_of(*pages))
    return sorted(name for name in names if name not in known)

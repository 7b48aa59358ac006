"""What a user's policy may raise, and how it is told off."""

from __future__ import annotations

LONGEST = 300  # characters: an answer may be as long as it likes
RAISED = (Exception, SystemExit)  # ``sys.exit()`` in a policy shall not end llmux


def spelled(error: BaseException) -> str:
    """Return the kind of an error and its words, those of one that has none to show left out."""
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - an error of the user's may raise anything, too
        words = ""
    return f"{type(error).__name__}: {words}"[:LONGEST]

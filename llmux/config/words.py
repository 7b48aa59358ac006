"""What a setting's type is called in the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """Put into an ``Annotated`` type: the word for it that a user reads."""

    text: str

"""What a setting's type and default are called in the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """Put into an ``Annotated`` type: the word for it that a user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class Default:
    """Put into an ``Annotated`` type: the default as a user reads it, where the value does not say it."""

    text: str

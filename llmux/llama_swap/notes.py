"""What a person has to know about the result."""

from __future__ import annotations

from dataclasses import dataclass

from llmux.config.problems import Path, dotted


@dataclass(frozen=True, slots=True)
class Note:
    """Something that is ``lost``, or that is there but not quite the same. ``path`` is in llama-swap's file."""

    path: Path
    message: str
    lost: bool = True
    line: int | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        place = [dotted(self.path)] if self.path else []
        return ": ".join([*place, *(["not carried over"] if self.lost else []), self.message])

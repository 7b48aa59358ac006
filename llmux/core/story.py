"""The recent events of the core and what it answered: attached to its errors, pasteable into a playbook test."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from llmux.core.effects import Effect
from llmux.core.events import Event

LENGTH = 200


class Story:
    """The last ``LENGTH`` events with their times and effects."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: deque[tuple[float, Event, Sequence[Effect]]] = deque(maxlen=LENGTH)

    def add(self, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Remember one step."""
        self._entries.append((now, event, effects))

    def tell(self) -> str:
        """Return the story as Python: one ``at(time, event, effects…)`` a line."""
        return "\n".join(
            f"    at({now!r}, {event!r}, {', '.join(repr(effect) for effect in effects)}),"
            for now, event, effects in self._entries
        )

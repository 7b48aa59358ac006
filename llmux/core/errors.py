"""What the core raises: only ever a programming error of the shell or of the core itself."""

from __future__ import annotations


class CoreError(Exception):
    """The core was driven against its rules. ``story`` holds its recent events, as a pasteable playbook."""

    story: str = ""

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n{self.story}" if self.story else text


class InvalidTransitionError(CoreError):
    """A phase was to follow another that it may not follow."""


class InvalidEventError(CoreError):
    """An event speaks of a request or a hook that does not exist, or came twice."""

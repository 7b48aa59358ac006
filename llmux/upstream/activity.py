"""What an engine's connections tell about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class EngineActivity:
    """What is known of an engine from its connections, for one stretch of time that it is awake.

    All requests of that stretch share it; idle connections are kept by it and never outlive it.
    """

    connected: bool = False  # a connection was accepted at least once
    last_byte: float | None = None  # loop time at which a response last delivered something
    counting: bool = False  # somebody wants to know how many events are streamed
    streamed: int = 0  # events of event streams, as far as they were counted

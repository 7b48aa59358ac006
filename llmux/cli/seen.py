"""What ``/llmux/status`` says, as far as the command line shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field


class Commanded(BaseModel):
    """The answer to an operator's command about a model; ``switch`` is the one that carries it out."""

    model: str
    switch: int | None
    phase: str | None


class Leased(BaseModel):
    """The answer to whoever leases the GPU."""

    id: str
    held: bool
    switch: int | None
    reason: str | None
    expires_in: float | None
    requests: str


class SeenModel(BaseModel):
    """One model. Durations are seconds, ``backoff_until`` is a Unix time."""

    phase: str
    queued: int
    in_flight: int
    oldest_wait: float | None
    expected_wait: float | None  # of whoever comes now; None: it would be turned away
    awake_for: float | None
    backoff_until: float | None
    last_error: str | None
    pinned: bool
    pin_expires_in: float | None
    pin_reason: str | None
    level: str | None = None
    streamed: int | None = None  # events, while somebody listens


class SeenSwitch(BaseModel):
    """The switch under way."""

    id: int
    sources: list[str] = Field(alias="from")
    to: str | None
    phase: str
    since: float
    reason: str


class SeenLease(BaseModel):
    """The GPU is lent."""

    id: str
    reason: str | None
    held: bool
    expires_in: float | None
    requests: Literal["wait", "reject"]


class History(BaseModel):
    """``/llmux/history``: what hooks printed, null for whoever is no operator."""

    output: list[dict[str, Any]] | None


class Gpu(BaseModel):
    """One GPU: bytes, a share of 1, °C, W; null where the driver does not say."""

    index: int
    name: str
    memory_used: int | None
    memory_total: int | None
    load: float | None
    temperature: float | None
    power: float | None


class SeenGpus(BaseModel):
    """The GPUs, or why they are not known."""

    gpus: list[Gpu]
    error: str | None


class SeenPolicy(BaseModel):
    """What decides."""

    use: str


class SeenDecision(BaseModel):
    """One decision."""

    reason: str
    switch: int | None


class SeenStatus(BaseModel):
    """The status."""

    version: str
    uptime: float
    ready: bool
    policy: SeenPolicy
    awake: list[str]
    switch: SeenSwitch | None
    manual: bool
    lease: SeenLease | None
    models: Mapping[str, SeenModel]
    decisions: list[SeenDecision]
    reload_error: str | None

"""The settings of the policy and of the guard rails around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llmux.config.durations import Duration
from llmux.config.fields import Default, Section, Word

SECS = "_secs"
WITH_SECS = ("request_timeout", "max_wait", "min_active", "drain_timeout")
"""Settings that may also be written as in llmux 2.x: ``request_timeout_secs``."""


class ShadowConfig(Section):
    """A policy that is asked what it would do, and is not followed."""

    use: str = Field(min_length=1, description="As `policy.use`.")
    options: Mapping[str, Any] = Field(default_factory=dict, description="As `policy.options`.")


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"use": value}
    if not isinstance(value, ShadowConfig | Mapping):
        raise ValueError(f"must be the name of a policy, or {{use: NAME, options: {{…}}}}, not {value!r}")  # noqa: TRY004
    for key in value if isinstance(value, Mapping) else ():
        if key not in ShadowConfig.model_fields:
            raise ValueError(f"has no setting {key!r}; it takes `use` and `options`")
    return value


class PolicyConfig(Section):
    """When to switch: which policy decides, and the limits that hold over any policy."""

    use: str = Field(
        default="adaptive",
        min_length=1,
        description="The policy: a shipped NAME, package.module:Class, or ./file.py:Class.",
    )
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="Options of the policy, checked by the policy when it is loaded."
    )
    shadow: Annotated[
        tuple[Annotated[ShadowConfig, BeforeValidator(_named)], ...], Word("list of policies"), Default("[]")
    ] = Field(
        default=(),
        description="Policies whose answers are only counted: as `use`, or {use: NAME, options: {…}}.",
    )
    manual: bool = Field(
        default=False,
        description="true: only operators switch; requests for a model that is asleep wait for them.",
    )
    request_timeout: Duration | None = Field(
        default=None,
        description="How long a request may wait for its model; then 504. null: as long as its client does.",
    )
    max_wait: Duration = Field(
        default=600.0,
        description="When a model's oldest waiter has waited this long, the next switch goes to that model,"
        " whatever the policy says.",
    )
    min_active: Duration = Field(
        default=0.0, description="How long a model stays awake at least before a switch may displace it."
    )
    anticipate: bool = Field(
        default=False,
        description="true: while all is quiet the policy may wake the model that is likely to be asked next,"
        " though no request waits for it; for agents that alternate between models. `adaptive` can.",
    )
    drain_before_switch: bool = Field(
        default=True,
        description="Let running answers finish before a switch. false: the same as `drain_timeout: 0`.",
    )
    drain_timeout: Duration | None = Field(
        default=None, description="How long a switch waits for running answers. null: they are never cut."
    )

    @model_validator(mode="before")
    @classmethod
    def _seconds(cls, data: Any) -> Any:
        """Accept llmux 2.x's names."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for name in WITH_SECS:
            if name + SECS not in data:
                continue
            if name in data:
                raise PydanticCustomError("both", f"says both `{name}` and `{name}{SECS}`; keep one of them")
            data[name] = data.pop(name + SECS)
        return data

    @model_validator(mode="after")
    def _one_drain(self) -> Self:
        if not self.drain_before_switch and self.drain_timeout:
            raise PydanticCustomError(
                "drain",
                "says both `drain_before_switch: false` and a `drain_timeout`; keep one of them",
            )
        return self

    @property
    def effective_drain_timeout(self) -> float | None:
        """Seconds that a drain may take: None without limit, 0 to cut at once."""
        return self.drain_timeout if self.drain_before_switch else 0.0

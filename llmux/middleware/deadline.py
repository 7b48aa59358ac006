"""Requests that cannot be answered in their time: refused at once, so that no switch is made for them."""

from __future__ import annotations

from aiohttp import web

from llmux.config.setting_types import format_duration, parse_duration
from llmux.errors import BadRequestError, UnavailableError
from llmux.runtime import Switcher, wait_estimate

HEADER = "X-LLMux-Deadline"


def deadline_of(request: web.BaseRequest, default: float | None) -> float | None:
    """Return how many seconds a request has, None for as long as it takes. Raises BadRequestError."""
    given = request.headers.get(HEADER)
    if given is None:
        return default
    try:
        return parse_duration(given)
    except ValueError as error:
        raise BadRequestError(f"{HEADER}: {error}", param=HEADER) from None


def refuse_hopeless(switcher: Switcher, name: str, deadline: float) -> None:
    """Raise UnavailableError if a request for a model that came now would be answered too late.

    That is when the wait that is expected, and the mean of the model's answers, are longer than ``deadline``.
    """
    state = switcher.core.state
    model = state.models.get(name)
    wait = None if model is None else wait_estimate.for_a_newcomer(state, model, switcher.now())
    if model is None or wait is None:  # it is refused for another reason
        return
    if wait + model.service > deadline:
        raise UnavailableError(
            f"An answer of {name!r} cannot be had within {format_duration(deadline)}: a request waits about"
            f" {format_duration(round(wait, 1))}, and is answered in {format_duration(round(model.service, 1))}.",
            code="deadline",
            retry_after=max(1.0, wait + model.service - deadline),
        )

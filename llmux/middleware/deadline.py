"""What a client says about time: until when it needs its answer, and how long its model stays awake after it.

A request that cannot be answered in its time is refused at once, so that no switch is made for it.
"""

from __future__ import annotations

from aiohttp import web

from llmux.config.setting_types import format_duration, parse_duration
from llmux.errors import BadRequestError, UnavailableError
from llmux.runtime import Switcher, wait_estimate

HEADER = "X-LLMux-Deadline"
KEEP_ALIVE = "X-LLMux-Keep-Alive"


def deadline_of(request: web.BaseRequest, default: float | None) -> float | None:
    """Return how many seconds a request has, None for as long as it takes. Raises BadRequestError."""
    given = request.headers.get(HEADER)
    if given is None:
        return default
    try:
        return parse_duration(given)
    except ValueError as error:
        raise BadRequestError(f"{HEADER}: {error}", param=HEADER) from None


def keep_alive_of(request: web.BaseRequest) -> float | None:
    """Return how many idle seconds the model stays awake for after a request; negative: it stays awake.

    None where the client does not say. Raises BadRequestError.
    """
    given = request.headers.get(KEEP_ALIVE)
    if given is None:
        return None
    sign, amount = (-1.0, given[1:]) if given.startswith("-") else (1.0, given)
    try:
        return sign * parse_duration(amount)
    except ValueError as error:
        raise BadRequestError(f"{KEEP_ALIVE}: {error}", param=KEEP_ALIVE) from None


def refuse_hopeless(switcher: Switcher, name: str, deadline: float) -> None:
    """Raise UnavailableError if a request for a model that came now would be answered too late.

    That is when the wait that is expected, and the mean of the model's answers, are longer than ``deadline``.
    """
    state = switcher.core.state
    model = state.models.get(name)
    wait = None if model is None else wait_estimate.for_a_newcomer(state, model, switcher.now())
    if model is None or wait is None:  # it is refused for another reason
        return
    service = model.meter.service
    if wait + service > deadline:
        raise UnavailableError(
            f"An answer of {name!r} cannot be had within {format_duration(deadline)}: a request waits about"
            f" {format_duration(round(wait, 1))}, and is answered in {format_duration(round(service, 1))}.",
            code="deadline",
            retry_after=max(1.0, wait + service - deadline),
        )

"""What a client says about time: until when it needs its answer, and how long its model stays awake after it.

A request that cannot be answered in its time is refused at once by the core, so that no switch is made for it.
"""

from __future__ import annotations

from aiohttp import web

from llmux.config.setting_types import parse_duration
from llmux.errors import BadRequestError

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

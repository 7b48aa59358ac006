"""The top-level ``"stream"`` of a JSON object: whether the client wants its answer in pieces."""

from __future__ import annotations

import asyncio

from llmux.errors import BadRequestError
from llmux.extract.body import Body
from llmux.extract.json_scan import ModelScanner, members_but


class StreamScanner(ModelScanner):
    """Finds out whether ``"stream"`` is ``true``. As with the model, the last duplicate counts."""

    _wanted = b"stream"
    _members = members_but(_wanted)

    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def _value(self, pos: int) -> int:
        self.on = self.on and not self._is_wanted
        return super()._value(pos)

    def _scalar(self, pos: int) -> int:
        end = super()._scalar(pos)
        if self._is_wanted:
            self.on = self._token == b"true"
        return end

    def _model_string(self, pos: int) -> int:
        return self._string(pos)


async def streams(body: Body) -> bool | None:
    """Whether a body asks for a stream; None when it is no JSON object. Other tasks get their turns."""
    if body.compressed:
        return None
    scanner = StreamScanner()
    try:
        for data in body:
            scanner.feed(data)
            if len(data) < body.size:
                await asyncio.sleep(0)
    except BadRequestError:  # the engine's to judge
        return None
    return scanner.on if scanner.is_object else None

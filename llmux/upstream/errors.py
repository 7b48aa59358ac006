"""What can go wrong between llmux and an engine.

EngineError (502)
├── EngineRefusedError     no connection could be made: nothing was sent
├── EngineLostError        the connection ended before the response did
└── EngineProtocolError    the engine's answer is not HTTP/1.1
"""

from __future__ import annotations

from llmux.errors import EngineError


class EngineRefusedError(EngineError):
    """No connection could be made: not a byte of the request was sent."""

    code = "engine_refused"


class EngineLostError(EngineError):
    """The connection ended before the response did."""

    code = "engine_lost"


class EngineProtocolError(EngineError):
    """The engine's answer is not HTTP/1.1."""

    code = "engine_protocol_error"

"""The HTTP/1.1 client side: connections to engines, and the pool of idle ones."""

from llmux.upstream.connection import EngineConnection, ResponseSink
from llmux.upstream.engine import (
    EngineActivity,
    EngineAddress,
    EngineLostError,
    EngineProtocolError,
    EngineRefusedError,
    engine_address,
)
from llmux.upstream.head import Framing, ResponseHead
from llmux.upstream.pool import ConnectionPool

__all__ = [
    "ConnectionPool",
    "EngineActivity",
    "EngineAddress",
    "EngineConnection",
    "EngineLostError",
    "EngineProtocolError",
    "EngineRefusedError",
    "Framing",
    "ResponseHead",
    "ResponseSink",
    "engine_address",
]

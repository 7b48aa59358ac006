"""The streaming path: a request to its engine, and the answer back, byte for byte."""

from llmux.aiohttp_internals import RelayedResponse
from llmux.proxy.envelope import error_response
from llmux.proxy.exchange import Exchange, ExtraFields, RequestBody
from llmux.proxy.forward import Forwarder, RelayFactory
from llmux.proxy.relay import ClientGoneError
from llmux.upstream import EngineActivity

__all__ = [
    "ClientGoneError",
    "EngineActivity",
    "Exchange",
    "ExtraFields",
    "Forwarder",
    "RelayFactory",
    "RelayedResponse",
    "RequestBody",
    "error_response",
]

"""The settings of llama-swap that llmux has nothing for, and what to know about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmux.config.problems import Path
from llmux.llama_swap.notes import Note
from llmux.llama_swap.schema import LlamaSwap, Model

_LIST = "`/v1/models` shows a model's name, aliases and state"
_TIMEOUTS = "llmux does not limit how long an engine takes to answer"
_PROGRESS = "`progress` is for all models, for a key, or for one request (`X-LLMux-Progress`)"

# What a value stands for that changes nothing: nobody needs to hear of it.
_NOTHING: tuple[Any, ...] = (None, False, 0, "", {}, [])
_MODEL = {
    "name": _LIST,
    "description": _LIST,
    "metadata": _LIST,
    "capabilities": _LIST,
    "unlisted": "`/v1/models` lists every model",
    "timeouts": _TIMEOUTS,
    "compat": "a WebSocket wakes its model, and keeps it awake while it is open",
}
_FILTERS = "llmux changes nothing in a request but the model's name; let the engine or the client set parameters"
_GLOBAL = {
    "includeAliasesInList": "`/v1/models` lists the models; `/v1/models/ALIAS` answers all the same",
    "logTimeFormat": "log lines carry the time as ISO 8601",
    "logToStdout": "the log goes to stderr; what an engine prints goes to its own file, named in hooks/process.sh",
    "metricsMaxInMemory": "see `record` for what is kept of requests, and `/metrics`",
    "captureBuffer": "llmux keeps no prompts and no answers",
    "store": "see `record` for a file with a line for each request",
    "ui": "llmux's page is of its own",
    "performance": "see `/metrics`; for the GPU itself use a GPU exporter",
    "profiles": "a name leads to the same model always; change `aliases` and send HUP",
    "peers": "llmux serves the models of this machine; let clients ask the others for theirs",
    "upstream": "what reaches an engine is told by `forward`; `/upstream/MODEL/` is for operators",
}
_DEFAULTS = {"logToStdout": ("proxy",), "captureBuffer": (5,), "metricsMaxInMemory": (1000,)}
_KNOWN_MODEL = frozenset({*Model.model_fields, *_MODEL, "macros", "sendLoadingState"})
_KNOWN = frozenset({*LlamaSwap.model_fields, *_GLOBAL, "macros"})


def leftovers(raw: Mapping[str, Any]) -> Iterator[Note]:
    """Yield what is set at the top level and is not carried over."""
    yield from _named((), raw, _GLOBAL, _KNOWN)


def model_leftovers(name: str, model: Mapping[str, Any], *, loading_state: bool) -> Iterator[Note]:
    """Yield what is set for a model and is not carried over; ``loading_state`` is that of the whole file."""
    at = ("models", name)
    if model.get("sendLoadingState", loading_state) not in (None, loading_state):
        yield Note((*at, "sendLoadingState"), _PROGRESS)
    yield from _named(at, model, _MODEL, _KNOWN_MODEL)
    for key, value in (model.get("filters") or {}).items():
        if value not in _NOTHING:
            yield Note((*at, "filters", key), _FILTERS)
    if name == "comfyui_auto":
        yield Note(at, "the path `/comfyui`; use `/upstream/comfyui_auto/`", lost=True)


def _named(
    at: Path, settings: Mapping[str, Any], reasons: Mapping[str, str], known: frozenset[str]
) -> Iterator[Note]:
    for key, value in settings.items():
        if key in reasons and value not in _NOTHING and value not in _DEFAULTS.get(key, ()):
            yield Note((*at, key), reasons[key])
        elif key not in known and not key.startswith("x-"):
            yield Note((*at, key), "is no setting of llama-swap that is known here")

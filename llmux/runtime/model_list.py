"""What clients see of the models: the entries of ``/v1/models``.

Each is OpenAI's model object, with the fields beside them that chat front ends look for: ``name``,
``description``, ``context_length``, ``capabilities``, ``architecture`` and ``supported_parameters`` as llama-swap
and OpenRouter write them, ``status``, ``aliases`` and ``meta`` as llama.cpp's router does; and ``llmux``, which is
llmux's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from llmux.config import Config
from llmux.config.model_settings import InfoConfig
from llmux.config.targets import leaves
from llmux.core.model import Model
from llmux.core.phases import Phase
from llmux.runtime.history import brief
from llmux.runtime.status_document import place
from llmux.runtime.switcher import Switcher

Entry = dict[str, Any]


class Ability(NamedTuple):
    """How a capability of the configuration is written."""

    key: str  # of ``capabilities``
    takes: tuple[str, ...]  # the kinds of input
    gives: tuple[str, ...]  # the kinds of output
    parameters: tuple[str, ...] = ()  # of a request


_TEXT = ("text",)
ABILITIES: Mapping[str, Ability] = {
    "tools": Ability("function_calling", _TEXT, _TEXT, ("tools", "tool_choice")),
    "vision": Ability("vision", ("text", "image"), _TEXT),
    "reasoning": Ability("reasoning", _TEXT, _TEXT),
    "audio": Ability("audio", ("text", "audio"), _TEXT),
    "transcription": Ability("audio_transcriptions", ("audio",), _TEXT),
    "speech": Ability("audio_speech", _TEXT, ("audio",)),
    "images": Ability("image_generation", _TEXT, ("image",)),
    "image_edit": Ability("image_to_image", ("text", "image"), ("image",)),
    "embeddings": Ability("embeddings", _TEXT, ("embeddings",)),
    "rerank": Ability("reranker", _TEXT, ("rerank",)),
}
_LOADED = {Phase.AWAKE: "loaded", Phase.DRAINING: "loaded", Phase.WAKING: "loading"}  # all others: "unloaded"


def model_list(switcher: Switcher) -> list[Entry]:
    """Return the entries of all names that are listed, sorted by id."""
    return sorted(_entries(switcher), key=lambda entry: str(entry["id"]))


def _pricing(config: Config, name: str) -> Entry:
    """Return what a token of any name costs at most, in dollars, as OpenRouter writes it."""
    # Where no token has a price, as with `gpu_hour` alone, 0 would say that all are free.
    if config.prices is None or config.prices.currency != "usd" or not config.prices.models:
        return {}
    ends = leaves(config, name) if name in config.virtual else (name, config.variants.get(name, name))
    known = [price for each in ends if (price := config.prices.models.get(each)) is not None]
    most = {
        "prompt": max((price.input for price in known), default=0.0),
        "completion": max((price.output for price in known), default=0.0),
    }
    return {
        "pricing": {kind: f"{(Decimal(str(price)) / 1_000_000).normalize():f}" for kind, price in most.items()}
    }


def model_entry(switcher: Switcher, name: str) -> Entry:
    """Return the entry of any name that is configured, listed or not."""
    entry = _of(switcher, name)
    return {**entry, **_pricing(switcher.config, switcher.config.names.get(name, name))}


def _of(switcher: Switcher, name: str) -> Entry:
    config = switcher.config
    if name in config.virtual:
        return _virtual(switcher, name)
    if name in config.variants:
        return _variant(name, _model(switcher, config.variants[name]))
    if name in config.remote_models:
        return _remote(switcher, name)
    model = config.names[name]
    entry = _model(switcher, model)
    return entry if name == model else _alias(name, entry)


def _entries(switcher: Switcher) -> Iterator[Entry]:
    for entry in _unpriced(switcher):
        name = str(entry["id"])
        yield {**entry, **_pricing(switcher.config, switcher.config.names.get(name, name))}


def _unpriced(switcher: Switcher) -> Iterator[Entry]:
    config = switcher.config
    for name, settings in config.models.items():
        if name not in switcher.core.state.models:
            continue
        entry = _model(switcher, name)
        if not settings.info.unlisted:
            yield entry
            yield from (_alias(alias, entry) for alias in settings.aliases if config.list_aliases)
        yield from (_variant(name, entry) for name, variant in settings.variants.items() if not variant.unlisted)
    yield from (_virtual(switcher, name) for name in config.virtual)
    yield from (_remote(switcher, name) for name in config.remote_models)


def _alias(alias: str, entry: Entry) -> Entry:
    return {**_own(entry), "id": alias, "llmux": {**entry["llmux"], "alias_of": entry["id"]}}


def _variant(variant: str, entry: Entry) -> Entry:
    more = {**entry["llmux"], "aliases": [], "variant_of": entry["id"]}
    # All variants under the model's own title could not be told apart.
    own = {field: value for field, value in _own(entry).items() if field != "name"}
    return {**own, "id": variant, "llmux": more}


def _own(entry: Entry) -> Entry:
    """Return the fields that apply to the model's other names, too."""
    return {name: value for name, value in entry.items() if name != "aliases"}


def _virtual(switcher: Switcher, name: str) -> Entry:
    """Return a virtual model, in the state of a model that it may stand for: an awake one, if there is one."""
    virtual = switcher.config.virtual[name]
    found = [switcher.core.state.models.get(model) for model in leaves(switcher.config, name)]
    phases = [model.phase for model in found if model is not None]
    phase = next((phase for phase in phases if phase is Phase.AWAKE), phases[0] if phases else Phase.UNKNOWN)
    more = {"state": phase.value, "aliases": [], "virtual": virtual.kind, "targets": list(virtual.targets)}
    status = {"value": _LOADED.get(phase, "unloaded")}
    return {**_bare(name), **_info(_shared(switcher.config, name)), "status": status, "llmux": more}


def _shared(config: Config, name: str) -> InfoConfig:
    """Return what holds for all models of this host that a virtual model may end at."""
    infos = [config.models[model].info for model in leaves(config, name) if model in config.models]
    contexts = [info.context for info in infos if info.context is not None]
    able = [info.capabilities for info in infos]
    return InfoConfig(
        context=min(contexts) if infos and len(contexts) == len(infos) else None,
        capabilities=tuple(each for each in able[0] if all(each in others for others in able)) if able else (),
    )


def _remote(switcher: Switcher, name: str) -> Entry:
    """Return a model on another host: nothing has to be woken for it."""
    remote, theirs = switcher.config.remote_models[name]
    region = switcher.config.remotes[remote].region
    more: Entry = {"state": "remote", "aliases": [], "remote": remote, "region": region, "upstream_model": theirs}
    return {**_bare(name), "status": {"value": "loaded"}, "llmux": more}


def _model(switcher: Switcher, name: str) -> Entry:
    model, settings = switcher.core.state.models[name], switcher.config.models[name]
    evicted = switcher.decisions.evicted.get(name)
    return {
        **_bare(name),
        **({"aliases": list(settings.aliases)} if settings.aliases else {}),
        **_info(settings.info),
        "status": _status(model),
        "llmux": {
            "state": model.phase.value,
            **place(model),
            "pinned": model.pinned,
            "evicted": None if evicted is None else brief(evicted, time.time() - switcher.now()),
            "queued": len(model.queue),
            "in_flight": len(model.in_flight),
            "aliases": list(settings.aliases),
        },
    }


def _bare(name: str) -> Entry:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llmux"}


def _status(model: Model) -> Entry:
    status: Entry = {"value": _LOADED.get(model.phase, "unloaded")}
    if model.phase is Phase.FAULTED or model.wake_backoff.failures:
        status["failed"] = True
    return status


def _info(info: InfoConfig) -> Entry:
    """Return the known fields; unknown ones are left out."""
    found: Entry = {}
    if info.name:
        found["name"] = info.name
    if info.description:
        found["description"] = info.description
    if info.context is not None:
        found["context_length"] = info.context
        found["meta"] = {"n_ctx": info.context}
    if info.capabilities:
        abilities = [ABILITIES[name] for name in info.capabilities]
        takes = list(dict.fromkeys(kind for each in abilities for kind in each.takes))
        gives = list(dict.fromkeys(kind for each in abilities for kind in each.gives))
        found["capabilities"] = {each.key: True for each in abilities}
        found["architecture"] = {
            "modality": f"{'+'.join(takes)}->{'+'.join(gives)}",
            "input_modalities": takes,
            "output_modalities": gives,
        }
        parameters = [name for each in abilities for name in each.parameters]
        if parameters:
            found["supported_parameters"] = parameters
    return found

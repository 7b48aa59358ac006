"""The amount of work for a request is decided when a configuration is loaded, by key and model.

A *plain* request takes the fast path; a *metered* one, too, and its answer's usage goes to the ledger when it has
ended. A *managed* one takes the slower path: it may have to be refused, sent elsewhere, translated or captured.
(Some cases are found on the fast path, and handed over: a request that has to wait, one that its key's limits or
budget refuse, one for a virtual model that leaves this host, and with `usage: exact` a stream that does not report
its usage.)
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from llmux.config import Config
from llmux.middleware.paths import COUNT, DIALECTS

Names = Mapping[str, str]
"""Names that clients may use, and their models; "" for a virtual model."""


class RequestClass(enum.StrEnum):
    """How much work a request needs."""

    PLAIN = "plain"
    METERED = "metered"
    MANAGED = "managed"


class Classes:
    """The classes of one configuration."""

    def __init__(self, config: Config) -> None:
        self._usual = RequestClass.PLAIN if config.ledger is None else RequestClass.METERED
        self._names = _on_fast_path(config)
        self._elsewhere: dict[str, Names] = {COUNT: {}}
        if config.translated:
            self._elsewhere |= {path: _spoken(config, self._names, dialect) for path, dialect in DIALECTS.items()}
        held = _held(config)
        classes = {  # most keys are held to what their role is
            names: (
                _only(self._names, names),
                {path: _only(these, names) for path, these in self._elsewhere.items()},
            )
            for names in set(held.values())
        }
        self._by_key = {key: classes[names] for key, names in held.items()}

    def names(self, key: str | None, path: str) -> Names:
        """Return the names for which a key's requests are plain or metered, on a path in its normal form."""
        names, elsewhere = self._by_key.get(key or "", (self._names, self._elsewhere))
        return elsewhere.get(path, names)

    def of(self, key: str | None, name: str, path: str = "/v1/chat/completions") -> RequestClass:
        """Return the class of a key's requests for a name."""
        return self._usual if name in self.names(key, path) else RequestClass.MANAGED


def _on_fast_path(config: Config) -> Names:
    apart = config.ruled  # they may have to go elsewhere
    if config.usage == "exact":  # which looks at what the client wrote
        apart |= _asked_otherwise(config)
    names = {**config.names, **config.variants, **dict.fromkeys(config.virtual, "")}
    return {name: model for name, model in names.items() if name not in apart}


def _models_of(config: Config, name: str) -> Iterable[str]:
    """Return the models on this host to which a name may lead."""
    return (model for model in config.leaves(name) if model in config.models)


def _asked_otherwise(config: Config) -> frozenset[str]:
    """Return the names which may change whether a request is for a stream, or for its usage."""
    found = set()
    for name, model in config.variants.items():
        rules = config.models[model].variants[name]
        fields = {field.partition(".")[0] for field in (*rules.set, *rules.default, *rules.strip, *rules.cap)}
        if not fields.isdisjoint({"stream", "stream_options"}):
            found.add(name)
    return frozenset(found.union(config.virtual)) if found else frozenset()


def _spoken(config: Config, names: Names, dialect: str) -> Names:
    return {
        name: model
        for name, model in names.items()
        if all(
            each not in config.translated or dialect in (config.models[each].apis or ())
            for each in _models_of(config, name)
        )
    }


def _held(config: Config) -> Mapping[str, frozenset[str]]:
    """Return the keys with restrictions, and the names that they may use without a further check."""
    captured = () if config.captures is None else config.captures.keys
    nothing: frozenset[str] = frozenset()
    found = {}
    if any(entry.managed for entry in config.api_keys):
        from llmux.accounts.gate import grants_of  # noqa: PLC0415 - most configurations have no use for it

        for key, grant in grants_of(config).items():
            if grant.models is not None:
                found[key] = grant.models
    return found | dict.fromkeys(captured, nothing)


def _only(names: Names, some: frozenset[str]) -> Names:
    return {name: model for name, model in names.items() if name in some}

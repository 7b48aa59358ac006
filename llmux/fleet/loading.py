"""Loading a route: ``use: NAME | package.module:Class | ./file.py:Class``, as policies are loaded."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from llmux.errors import ConfigError
from llmux.fleet.routes import SHIPPED, Route
from llmux.plugins import comes_from_file

USE, OPTIONS = "route.use", "route.options"


def load_route(use: str, options: Mapping[str, Any], folder: Path) -> Route:
    """Make the route that ``use`` names, with ``options``; relative files are relative to ``folder``.

    A file is read anew each time.

    Raises:
        ConfigError: it cannot be found, imported or made, or refuses its options; its ``path`` is ``route.use``
            or ``route.options.…``.

    """
    kind = SHIPPED.get(use) or _own(use, folder)
    model = getattr(kind, "Options", None)
    if isinstance(model, type) and issubclass(model, BaseModel):
        return _made(kind, use, _checked(model, options))
    if options:
        raise ConfigError(f"{use} takes no options", path=OPTIONS)
    return _made(kind, use)


def _checked(model: type[BaseModel], options: Mapping[str, Any]) -> BaseModel:
    unknown = [name for name in options if name not in model.model_fields]
    if unknown:
        known = ", ".join(model.model_fields) or "none"
        raise ConfigError(f"unknown option; known are: {known}", path=f"{OPTIONS}.{unknown[0]}")
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (OPTIONS, *first["loc"]))
        raise ConfigError(first["msg"], path=where) from None


def _made(kind: type, use: str, *options: BaseModel) -> Route:
    try:
        route = kind(*options)
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(f"{use} cannot be made: {type(error).__name__}: {error}", path=USE) from error
    if not callable(getattr(route, "place", None)):
        raise ConfigError(f"{use} has no method `place(model, fleet)`", path=USE)
    return cast("Route", route)


def _own(use: str, folder: Path) -> type:
    place, colon, name = use.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(use, SHIPPED, n=1)
        mean = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"no route is called {use!r}; {mean}shipped are {', '.join(SHIPPED)}; or write package.module:Class,"
            " or ./file.py:Class",
            path=USE,
        )
    try:
        module = _import(place, folder)
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(f"{use} cannot be loaded: {type(error).__name__}: {error}", path=USE) from error
    kind = getattr(module, name, None)
    if not isinstance(kind, type):
        raise ConfigError(f"{place} has no class {name!r}", path=USE)
    return kind


def _import(place: str, folder: Path) -> ModuleType:
    if not comes_from_file(f"{place}:"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        return importlib.import_module(place)
    file = folder / Path(place).expanduser()
    if file.suffix != ".py":
        raise ImportError(f"{file} is not a Python file")
    module = ModuleType(f"llmux_route_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and pydantic look their annotations up there
    # Compiled here and not by an import: its cache would miss a change within the same second.
    exec(compile(file.read_bytes(), file, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 (the user's own)
    return module

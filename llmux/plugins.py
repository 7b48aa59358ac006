"""Loading a policy: ``use: NAME | package.module:Class | ./file.py:Class``.

A policy is a class with a ``decide`` method (see ``llmux.core.policy``). When it has a pydantic model
``Options`` as an attribute, the options of the configuration are validated by it and handed to the
constructor; without one the constructor takes nothing.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from llmux.config.setting_types import is_file
from llmux.core.policy import Policy
from llmux.errors import PolicyLoadError

USE = "policy.use"
OPTIONS = "policy.options"
_neighbours: dict[Path, set[str]] = {}  # by folder: the modules that policies in it have imported from it
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_SHAPES = "write a shipped NAME, package.module:Class, or ./file.py:Class"


def known_policies() -> list[str]:
    """Return the names of the shipped policies, sorted."""
    folder = _shipped_folder()
    names = sorted(file.stem for file in folder.glob("*.py")) if folder else []
    return [name for name in names if not name.startswith("_")]


def load_policy(use: str, options: Mapping[str, Any], folder: Path) -> Policy:
    """Make the policy that ``use`` names, with ``options``; relative files are relative to ``folder``.

    A file, and what it imports from its folder, is read anew each time, so that a reload takes up what its author
    changed.

    Raises:
        PolicyLoadError: it cannot be found, imported or made, or refuses its options; the message names
            ``policy.use`` or ``policy.options.…`` and says what to do.

    """
    made = _make(load_class(use, folder), use, options)
    if hasattr(made, "compose"):
        _compose(made, use, folder)
    return made


def _compose(made: Any, use: str, folder: Path) -> None:
    """Let a policy that chooses among others make these."""

    def load(other: str, options: Mapping[str, Any]) -> Policy:
        found = _make(load_class(other, folder), other, options)
        if hasattr(found, "compose"):
            raise _wrong(other, f"it chooses among policies itself; {use} cannot choose it")
        return found

    try:
        made.compose(load)
    except PolicyLoadError as error:
        raise PolicyLoadError(
            "\n".join(
                f"{OPTIONS}.among: {line.removeprefix(f'{USE}: ').removeprefix(f'{OPTIONS}.')}"
                for line in str(error).splitlines()
            )
        ) from error
    except (Exception, SystemExit) as error:
        raise _wrong(use, f"compose: {_explain(error, None)}") from error


def comes_from_file(use: str) -> bool:
    """Whether ``use`` names a file of the user's, which may have changed since it was loaded."""
    place = use.rpartition(":")[0] or use
    return place.endswith(".py") or "/" in place


def file_of(use: str, folder: Path) -> Path | None:
    """Return the user's file that ``use`` names, None when it names no file."""
    place = use.rpartition(":")[0] or use
    return folder / Path(place).expanduser() if comes_from_file(use) else None


def load_class(use: str, folder: Path) -> type:
    """Return the policy class that ``use`` names.

    Raises:
        PolicyLoadError: as ``load_policy``.

    """
    place, _, class_name = use.rpartition(":") if ":" in use else (use, "", "")
    if ":" in use and not _CLASS.match(class_name):
        raise _wrong(use, f"{class_name!r} is not a name of a class; {_SHAPES}")
    if comes_from_file(use):
        module = _import_file(use, folder / Path(place).expanduser())
    elif class_name:
        if not _DOTTED.match(place):
            raise _wrong(use, f"{place!r} is not a name of a module; {_SHAPES}")
        module = _import_module(use, place, folder)
    else:
        module = _import_shipped(use)
    return _class_of(module, class_name, use)


def _wrong(use: str, message: str) -> PolicyLoadError:
    return PolicyLoadError(f"{USE}: {use}: {message}")


def _shipped_folder() -> Path | None:
    """Find the shipped policies: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    checkout = package.parent
    if (package / "policies").is_dir():
        return package / "policies"
    # Next to an installed package there may be another program's `policies`.
    if (checkout / "pyproject.toml").is_file() and (checkout / "policies").is_dir():
        return checkout / "policies"
    return None


def _import_shipped(use: str) -> ModuleType:
    known = known_policies()
    name = use.replace("-", "_")
    if not _NAME.match(use):
        raise _wrong(use, _SHAPES)
    folder = _shipped_folder()
    if name not in known or folder is None:
        near = difflib.get_close_matches(name, known, n=1)
        mean = f"did you mean {near[0]}? " if near else ""
        raise _wrong(use, f"no such policy; {mean}known: {', '.join(known)}; or {_SHAPES}")
    full_name = f"llmux.policies.{name}"
    return sys.modules.get(full_name) or _execute(use, full_name, folder / f"{name}.py", cached=True)


def _import_file(use: str, file: Path) -> ModuleType:
    if not is_file(file):
        raise _wrong(use, f"there is no file {file}; a path is relative to the configuration's folder")
    _append_to_path(file.parent)
    digest = hashlib.sha256(str(file).encode(errors="surrogateescape")).hexdigest()[:8]
    with _neighbours_read_anew(file.parent):
        return _execute(use, f"llmux_policy_{digest}_{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}", file)


@contextlib.contextmanager
def _neighbours_read_anew(folder: Path) -> Iterator[None]:
    """Have what a policy imports from its own folder read anew as well; if it fails, nothing has changed."""
    importlib.invalidate_caches()  # a file may be new
    known = _neighbours.setdefault(folder, set())
    previous = {name: sys.modules.pop(name) for name in _below(known)}
    before = set(sys.modules)

    def brought() -> set[str]:
        tops = {name.partition(".")[0] for name in sys.modules.keys() - before} - before
        return {top for top in tops if _lies_in(folder, top)}

    # The loader's bytecode would miss a change within the same second.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    except BaseException:
        for name in _below(brought()):
            del sys.modules[name]
        sys.modules.update(previous)
        raise
    finally:
        sys.dont_write_bytecode = writes
    known |= brought()


def _lies_in(folder: Path, top: str) -> bool:
    """Whether an imported module, or a package, be it without an ``__init__.py``, is the folder's own."""
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None)
    if file is None:
        return list(getattr(module, "__path__", ())) == [str(folder / top)]
    return file in (str(folder / f"{top}.py"), str(folder / top / "__init__.py"))


def _below(tops: set[str]) -> list[str]:
    """Return the names of imported modules, and of what is in them."""
    return [name for name in sys.modules if name.partition(".")[0] in tops]


def _import_module(use: str, name: str, folder: Path) -> ModuleType:
    _append_to_path(folder)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _wrong(use, _explain_import(error, name)) from error


def _append_to_path(folder: Path) -> None:
    """Let a policy import what lies next to it; at the end, so that it hides nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _execute(use: str, name: str, file: Path, *, cached: bool = False) -> ModuleType:
    """Run ``file`` as a module of its own. ``cached``: it comes with llmux, and bytecode of it will do."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise _wrong(use, f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pydantic look their annotations up there
    try:
        if cached:
            spec.loader.exec_module(module)
        else:
            source = file.read_bytes()
            # Compiled here and not by the loader: its cache would miss a change within the same second.
            exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 (the user's own)
    except (Exception, SystemExit) as error:
        if previous is None:
            del sys.modules[name]
        else:
            sys.modules[name] = previous
        raise _wrong(use, _explain(error, file)) from error
    return module


def _explain_import(error: BaseException, name: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return (
            f"there is no module {error.name}; install it where llmux runs, or put it into the"
            " configuration's folder"
        )
    return _explain(error, None)


def _explain(error: BaseException, file: Path | None) -> str:
    """Say where it went wrong: the innermost line, in the policy's own file where it is in the trace."""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {what}"
    if isinstance(error, OSError) and file and error.filename and Path(error.filename) == file:
        return f"{file} cannot be read: {error.strerror}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if file and frame.filename == str(file)]
    outside = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    for frame in reversed(own or outside):
        return f"{frame.filename}:{frame.lineno}: {frame.line or ''}: {what}"
    return what


def _class_of(module: ModuleType, class_name: str, use: str) -> type:
    candidates = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "decide")
    ]
    names = [candidate.__name__ for candidate in candidates]
    if not class_name:
        if len(candidates) == 1:
            return _checked(candidates[0], use)
        if candidates:
            raise _wrong(use, f"holds several policies; name one of them: {use}:{' or :'.join(names)}")
        raise _wrong(use, "has no class with a `decide` method; write one")
    found = getattr(module, class_name, None)
    if found is None:
        hint = f"there are: {', '.join(names)}" if names else "it has no class with a `decide` method"
        raise _wrong(use, f"there is no {class_name} in it; {hint}")
    if not isinstance(found, type):
        raise _wrong(use, f"{class_name} is not a class but a {type(found).__name__}; name a class")
    return _checked(found, use)


def _checked(policy: type, use: str) -> type:
    """Refuse what the core could not call."""
    decide = getattr(policy, "decide", None)
    where = f"{policy.__name__}.decide"
    if not callable(decide):
        raise _wrong(use, f"{policy.__name__} has no `decide` method; write `def decide(self, now)`")
    if inspect.iscoroutinefunction(decide):
        raise _wrong(use, f"{where} may not be `async`; it answers at once")
    if inspect.isabstract(policy) or getattr(policy, "_is_protocol", False):
        raise _wrong(use, f"{policy.__name__} is abstract; name a class that can be made")
    return policy


def _make(policy: type, use: str, options: Mapping[str, Any]) -> Policy:
    model = getattr(policy, "Options", None)
    arguments: tuple[BaseModel, ...] = ()
    if isinstance(model, type) and issubclass(model, BaseModel):
        arguments = (_options(model, options),)
    elif options:
        raise PolicyLoadError(f"{OPTIONS}.{next(iter(options))}: {use} takes no options; remove it")
    try:
        inspect.signature(policy).bind(*arguments)
    except TypeError as error:
        takes = "the validated options" if arguments else "nothing"
        raise _wrong(use, f"{policy.__name__}(): {error}; its constructor is given {takes}") from None
    try:
        made = policy(*arguments)
    except (Exception, SystemExit) as error:
        raise _wrong(use, f"{policy.__name__} cannot be made: {_explain(error, None)}") from error
    try:
        inspect.signature(made.decide).bind(None)
    except TypeError as error:
        raise _wrong(use, f"{policy.__name__}.decide(): {error}; it is given the snapshot") from None
    return cast("Policy", made)


def _options(model: type[BaseModel], options: Mapping[str, Any]) -> BaseModel:
    """Validate the options; unknown ones are errors whatever the model says about them."""
    problems: list[str] = []
    known = {info.alias or name for name, info in model.model_fields.items()} | set(model.model_fields)
    if model.model_config.get("extra") != "allow":
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
                problems.append(f"{OPTIONS}.{name}: unknown option; {hint}")
    try:
        made = model.model_validate(dict(options))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            if details["type"] == "extra_forbidden":
                continue
            path = ".".join([OPTIONS, *(str(part) for part in details["loc"])])
            message = details["msg"].removeprefix("Value error, ")
            problems.append(f"{path}: {message[:1].lower()}{message[1:]}")
    if problems:
        raise PolicyLoadError("\n".join(problems))
    return made

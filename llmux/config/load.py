"""From a file to a validated configuration, with every problem on its line.

``${VAR}`` and ``${VAR:-default}`` are filled in string values after parsing. Not in hook scripts, where the shell
expands variables at run time, nor in keys.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import PrivateAttr, ValidationError, model_validator

from llmux.config.document import EMPTY, Document, failed
from llmux.config.problems import ConfigErrors, Lines, Path, Problem, checked_as_whole, explain, raise_all
from llmux.config.setting_types import Section, working_folder
from llmux.core.spec import HookKind

YAML_SUFFIXES = frozenset({".yaml", ".yml"})


def read_document(file: FilePath, *, prepare: Callable[[str], str] = str, last_wins: bool = False) -> Document:
    """Read ``file`` as YAML (``.yaml``, ``.yml``) or JSON (``.json``); ``prepare`` changes its text before that.

    Under any other suffix, where the original read JSON, a text that starts with ``{`` is JSON, the rest YAML.
    ``last_wins``: of a key that is there twice, the last value is taken, as many programs do; else the first.
    """
    found = _read_text(file)
    if isinstance(found, Document):
        return found
    text, suffix = prepare(found), file.suffix.lower()
    if suffix == ".json" or (suffix not in YAML_SUFFIXES and text.lstrip().startswith("{")):
        return parse_json(text)
    return parse_yaml(text, last_wins=last_wins)


def _read_text(file: FilePath) -> str | Document:
    """Return the text, or the document of a file whose text cannot be read."""
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        return failed("there is no such file; name another with -c")
    except IsADirectoryError:
        return failed("is a folder; name the file in it")
    except UnicodeDecodeError as error:
        return failed("is not UTF-8 text; save it as UTF-8", line=raw.count(b"\n", 0, error.start) + 1)
    except OSError as error:
        return failed(f"cannot be read: {(error.strerror or str(error)).lower()}")
    return text if text.strip() else failed(EMPTY)


def parse_json(text: str) -> Document:
    """Parse JSON text. JSON is YAML, except for tabs: the lines are taken from its YAML reading.

    That also finds duplicate keys. Without duplicates it is read as YAML only when its lines are needed, for
    an error.
    """
    plain = True

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal plain
        found = dict(pairs)
        plain = plain and len(found) == len(pairs)
        return found

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON; write a number")

    try:
        data = json.loads(text, parse_constant=constant, object_pairs_hook=mapping)
    except json.JSONDecodeError as error:
        return failed(f"is not JSON: {error.msg} (column {error.colno})", line=error.lineno)
    except (ValueError, RecursionError) as error:
        return failed(f"is not JSON: {error}")

    def read() -> Document:
        # A raw tab inside a JSON string is an error, so every tab is white space.
        document = parse_yaml(text.replace("\t", " "))
        return Document() if document.data is None else document

    if plain:
        return Document(data, lines=lambda: read().lines)
    document = read()
    document.data = data
    return document


def parse_yaml(text: str, *, last_wins: bool = False) -> Document:
    """Read YAML text; a syntax error is a problem of the document, never an exception."""
    from llmux.config.yaml_document import parse  # noqa: PLC0415 - JSON does without

    return parse(text, last_wins=last_wins)


_TOKEN = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{)[^}])*))?\})?")
_HALF = re.compile("[\ud800-\udfff]")
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes, of a file's name for example
_HALVES = "holds half of a character that takes two escapes, as \\ud83d\\ude00; write the character itself"
SECS = "_secs"  # ends the names of llmux 2.x's settings, as ``request_timeout_secs``
_MODEL_SETTING = 3  # models.NAME.setting
_ROUNDS = 5  # of removing errors: a setting, what then lacks it, and so on
_HOOKS = frozenset({*(kind.value for kind in HookKind), "hooks", "cmd"})


def is_script(path: Path) -> bool:
    """Return whether the value at ``path`` is a hook script."""
    return len(path) == _MODEL_SETTING and path[0] == "models" and path[2] in _HOOKS


def interpolate(data: Any, environ: Mapping[str, str]) -> tuple[Any, list[Problem]]:
    """Return ``data`` with its string values filled in, and the problems.

    A value with a problem is returned unchanged. Top-level ``x-`` keys hold anchors, not settings: their contents
    are filled in where they are used. ``data`` is not changed.
    """
    problems: list[Problem] = []

    def walk(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {walk_key(key, path): walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or str(path[0] if path else "").startswith("x-"):
            return value
        try:
            if (_NO_BYTE if is_script(path) or path[2:3] == ("env",) else _HALF).search(value):
                raise ValueError(_HALVES)  # noqa: TRY301
            return value if is_script(path) else fill(value, environ)
        except ValueError as error:
            problems.append(Problem(path, str(error)))
            return value

    def walk_key(key: str, path: Path) -> str:
        if _HALF.search(key):
            problems.append(Problem(path, f"has a key that {_HALVES}"))
        return key

    return walk(data, ()), problems


def literal(text: str) -> str:
    """Escape a text for a configuration so that nothing in it is filled in."""
    return text.replace("${", "$${")


def fill(text: str, environ: Mapping[str, str]) -> str:
    """Fill in one string. As in the shell, ``:-`` also replaces a variable that is set but empty.

    Raises:
        ValueError: a variable is unset and has no default, or ``${`` is not followed by a name and ``}``.

    """

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        if name is None:
            rest = text[match.start() : match.start() + 20]
            raise ValueError(
                f"cannot read {rest!r}; write ${{NAME}} or ${{NAME:-default}}, or $${{ for a literal ${{"
            )
        if default is not None:
            return environ.get(name) or default
        if name not in environ:
            raise ValueError(f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
        return environ[name]

    return _TOKEN.sub(replace, text)


class Whole(Section):
    """A whole configuration, perhaps from a file."""

    _file: FilePath | None = PrivateAttr(default=None)
    _folder: FilePath = PrivateAttr(default_factory=working_folder)

    def came_from(self, file: FilePath) -> None:
        """Take note of the file that it was read from."""
        self._file, self._folder = file.absolute(), file.absolute().parent

    @model_validator(mode="before")
    @classmethod
    def _drop_anchors(cls, data: Any) -> Any:
        """Ignore the top-level keys that only hold YAML anchors."""
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if not str(key).startswith("x-")}

    @property
    def file(self) -> FilePath | None:
        """The file it came from, absolute; None if made in Python."""
        return self._file

    @property
    def folder(self) -> FilePath:
        """The folder for relative paths, in which hooks run, absolute."""
        return self._folder


M = TypeVar("M", bound=Whole)


def load(
    schema: type[M], file: FilePath, environ: Mapping[str, str], changed: Mapping[Path, Any] | None = None
) -> M:
    """Read ``file`` and validate it as ``schema``, with the settings ``changed``, by their paths.

    Raises:
        ConfigErrors: all of its errors.

    """
    document = read_document(file)
    problems = list(document.problems)
    if not isinstance(document.data, Mapping):
        if not problems:
            problems = [Problem((), "must be a mapping: `models:` and other settings at the top level")]
        raise_all(problems, file=str(file), lines=document.lines)
    data, unfilled = interpolate(document.data, environ)
    problems += unfilled
    for path, value in (changed or {}).items():
        _change(data, path, value)
    config = rest = None
    try:
        config = schema.model_validate(data, context={"folder": file.absolute().parent})
    except ValidationError as error:
        # Consequences of a known problem are not repeated.
        known = {problem.path for problem in problems}
        found = [problem for problem in explain(error, schema) if problem.path not in known]
        problems += found
        rest, between = _look_further(schema, data, [problem.path for problem in problems], file)
        problems += [] if checked_as_whole(error) else between
    if config is not None and not problems:
        config.came_from(file)
        return config
    problems = [_as_written(problem, document.lines) for problem in problems]
    try:
        raise_all(problems, file=str(file), lines=document.lines)
    except ConfigErrors as errors:
        errors.rest = rest
        if rest is not None:
            rest.came_from(file)
        raise
    raise AssertionError("what is wrong was not said")


def _change(data: Any, path: Path, value: Any) -> None:
    for part in path[:-1]:
        inner = data.get(part)
        if not isinstance(inner, dict):
            inner = data[part] = {}
        data = inner
    data[path[-1]] = value


def _look_further(
    schema: type[M], data: Mapping[str, Any], wrong: list[Path], file: FilePath
) -> tuple[M | None, list[Problem]]:
    """Validate the rest without the invalid settings; return it, and the problems between the others.

    None if nothing is left. Problems that may only follow from what was removed are left out.
    """
    between: list[Problem] | None = None
    for _ in range(_ROUNDS):
        kept = copy.deepcopy(dict(data))
        for place, path in enumerate(wrong):
            if path in wrong[:place] or not _stand_in(kept, path):
                _remove(kept, path)
        try:
            return schema.model_validate(kept, context={"folder": file.absolute().parent}), between or []
        except ValidationError as error:
            problems = explain(error, schema)
            if between is None and checked_as_whole(error):
                between = [problem for problem in problems if not _may_follow(problem, wrong)]
        wrong = [*wrong, *(problem.path for problem in problems)]
    return None, between or []


def _stand_in(data: Any, path: Path) -> bool:
    """Put a substitute for an invalid hook or port, as the model cannot be validated without one."""
    models = data.get("models")
    if len(path) != _MODEL_SETTING or path[0] != "models" or not isinstance(models, dict):
        return False
    model, setting = models.get(path[1]), path[2]
    if not isinstance(model, dict):
        return False
    if setting in ("wake", "sleep", "alive"):
        model[setting] = "true"
    elif setting in ("hooks", "cmd", "port"):
        model.pop(setting, None)
        instead = (
            ("url", f"http://{list(models).index(path[1])}.invalid") if setting == "port" else ("hooks", "process")
        )
        model.setdefault(*instead)
    else:
        return False
    return True


def _may_follow(problem: Problem, wrong: Iterable[Path]) -> bool:
    """Return whether a problem is about an invalid setting, one that contains it or is in it, or names one."""
    for path in wrong:
        both = min(len(problem.path), len(path))
        if problem.path[:both] == path[:both]:
            return True
        names = [part for part in path if isinstance(part, str) and part != "models"][-1:]
        # Of a list with an error in it nothing is left.
        names += [
            name for name, inside in itertools.pairwise(path) if isinstance(name, str) and inside.__class__ is int
        ]
        if any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", problem.message) for name in names):
            return True
    return False


def _remove(data: Any, path: Path) -> None:
    """Remove what is at ``path`` or, if it is missing, what lacks it."""
    around = [data]
    for part in path[:-1]:
        inner = around[-1].get(part) if isinstance(around[-1], dict) else None
        if inner is None:
            return  # removed before, for another error
        if not isinstance(inner, dict):
            break
        around.append(inner)
    depth = len(around) - 1
    if depth and path[depth] not in around[depth]:
        depth -= 1
    if path:
        around[depth].pop(path[depth], None)


def _as_written(problem: Problem, lines: Lines) -> Problem:
    """Use the original's spelling of a setting if the file does."""
    if not problem.path or problem.path in lines:
        return problem
    written = (*problem.path[:-1], f"{problem.path[-1]}{SECS}")
    return Problem(written, problem.message, problem.line) if written in lines else problem

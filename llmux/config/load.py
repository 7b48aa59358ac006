"""From a file to a validated configuration, with every problem on its line.

YAML is read by the rules of YAML 1.2's core schema, as the original did: ``on``, ``yes``, ``12:30`` and
``2024-01-01`` are text. Keys are always text.

``${VAR}`` and ``${VAR:-default}`` are filled in string values after parsing. Hook scripts are left alone: there
the shell expands variables, at run time. Keys are left alone too.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.reader import ReaderError

from llmux.config.problems import ConfigErrors, Lines, Path, Problem, checked_as_whole, explain, raise_all
from llmux.core.spec import HookKind

YAML_SUFFIXES = frozenset({".yaml", ".yml"})
MAX_VALUES = 100_000
"""Keys and values of a document, counting what its aliases stand for as often as they do."""
LONG_TEXT = 1000
"""Characters for which a text counts as one value more."""
MAX_DEPTH = 100
_EMPTY = "is empty; it needs at least `models:`"


@dataclass(slots=True)
class Document:
    """What a file says. ``problems`` are those found while reading; ``data`` is then incomplete."""

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(file: FilePath, *, prepare: Callable[[str], str] = str) -> Document:
    """Read ``file`` as YAML (``.yaml``, ``.yml``) or JSON (``.json``); ``prepare`` changes its text before that.

    Under any other suffix, for which the original read JSON, what starts with ``{`` is JSON, the rest YAML.
    """
    try:
        text = prepare(_read_text(file))
    except _Unreadable as error:
        return _failed(str(error), line=error.line)
    suffix = file.suffix.lower()
    if suffix == ".json" or (suffix not in YAML_SUFFIXES and text.lstrip().startswith("{")):
        return parse_json(text)
    return parse_yaml(text)


class _Unreadable(Exception):  # noqa: N818 (never leaves this file)
    """A file whose text cannot be had."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def _read_text(file: FilePath) -> str:
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise _Unreadable("there is no such file; name another with -c") from None
    except IsADirectoryError:
        raise _Unreadable("is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _Unreadable("is not UTF-8 text; save it as UTF-8", line) from None
    except OSError as error:
        raise _Unreadable(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if not text.strip():
        raise _Unreadable(_EMPTY)
    return text


def parse_yaml(text: str) -> Document:
    """Read YAML text; a syntax error is a problem of the document, never an exception."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = (error.context_mark if _unclosed(error) else None) or error.problem_mark
        return _failed(_explain(error, text), line=mark.line + 1 if mark else None)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _failed(f"holds a character that YAML does not allow (code {error.character})", line=line)
    except (ValueError, OverflowError, RecursionError) as error:  # an escape beyond Unicode; thousands of brackets
        return _failed(f"is not YAML: {error}")
    if root is None:
        return _failed(_EMPTY)
    try:
        document.data = _Builder(document).build(root, ())
    except _TooMuchError as error:
        return _failed(str(error), line=error.line)
    document.lines.setdefault((), root.start_mark.line + 1)
    return document


def parse_json(text: str) -> Document:
    """Read JSON text. JSON is YAML, but for tabs: the lines are taken from its YAML reading."""

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON; write a number")

    try:
        data = json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        return _failed(f"is not JSON: {error.msg} (column {error.colno})", line=error.lineno)
    except (ValueError, RecursionError) as error:
        return _failed(f"is not JSON: {error}")
    # A raw tab inside a JSON string is an error, so every tab is white space.
    document = parse_yaml(text.replace("\t", " "))
    if document.data is None:
        document = Document()
    document.data = data
    return document


def _failed(message: str, *, line: int | None = None) -> Document:
    return Document(problems=[Problem((), message, line)])


def _unclosed(error: yaml.MarkedYAMLError) -> bool:
    return bool(error.context_mark) and "stream" in (error.problem or "")


_MEANINGS = (
    ("mapping values are not allowed", "a value that contains `: ` must be in quotes, or on the lines after `|`"),
    ("found another document", "holds several YAML documents; remove the `---` between them"),
    ("undefined alias", "an anchor (&name) must stand before its alias (*name)"),
)


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    """Say what a YAML syntax error means to a user without knowledge of the grammar."""
    if _unclosed(error):
        return "a quote or bracket that opens here is never closed"
    what = error.problem or error.context or "it cannot be parsed"
    for sign, meaning in _MEANINGS:
        if sign in what:
            return meaning
    mark = error.problem_mark
    line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "the line is indented with a tab; YAML takes only spaces there"
    where = f" (column {mark.column + 1})" if mark else ""
    return f"is not YAML: {what}{where}; a value that starts with one of [ {{ & * ! | > % @ ` must be in quotes"


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2's core schema does."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base class's own attribute, filled below)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", [*"~nN", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", [*"tTfF"]),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", [*"-+0123456789"]),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)\Z", [*"-+.0123456789"]),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z", [*"-+."]),
    ("merge", r"<<\Z", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_CONVERT: Mapping[str, Callable[[str], Any]] = {
    "bool": lambda text: {"true": True, "false": False}[text],
    "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
}


class _TooMuchError(Exception):
    """A document that holds more than any configuration does."""

    def __init__(self, message: str, node: yaml.Node) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class _Builder:
    """Turns a node tree into data, noting lines, and every key that is there twice.

    An alias stands for all that its anchor holds, aliases included: a few lines can mean billions of values. So
    what is built is counted. Raises _TooMuchError.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: list[yaml.Node] = []  # the nodes around the one being built
        self.built = 0

    def count(self, node: yaml.Node) -> None:
        self.built += 1 + (len(node.value) // LONG_TEXT if isinstance(node, yaml.ScalarNode) else 0)
        if self.built > MAX_VALUES:
            message = f"holds more than {MAX_VALUES} values, counting what aliases stand for; use fewer aliases"
            raise _TooMuchError(message, node)
        if len(self.open) > MAX_DEPTH:
            raise _TooMuchError(f"is nested more than {MAX_DEPTH} levels deep; use fewer aliases", node)

    def build(self, node: yaml.Node, path: Path) -> Any:
        if node in self.open:
            return self.wrong(path, "contains itself; remove the alias", node)
        self.count(node)
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self.sequence(node, path)
            return self.scalar(node, path)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in self.entries(node, path):
            if key.value in entries and entries[key.value][0] in [own for own, _ in node.value]:
                first = entries[key.value][0].start_mark.line + 1
                self.wrong((*path, key.value), f"is there twice, first on line {first}; keep one of them", key)
                continue
            entries[key.value] = (key, value)
        data = {}
        for name, (key, value) in entries.items():
            self.document.lines[(*path, name)] = key.start_mark.line + 1
            data[name] = self.build(value, (*path, name))
        return data

    def entries(self, node: yaml.MappingNode, path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the merged entries, those that win last, then the mapping's own."""
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        own: list[tuple[yaml.Node, yaml.Node]] = []
        for key, value in node.value:
            self.count(key)
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(path, "has a key that is no text", key)
            elif key.tag == "tag:yaml.org,2002:merge":
                # Of several merged mappings the first wins.
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):
                    if not isinstance(source, yaml.MappingNode) or source in self.open:
                        self.wrong(path, "`<<` takes a mapping, or a list of them", key)
                        continue
                    self.count(source)
                    self.open.append(source)
                    merged += self.entries(source, path)
                    self.open.pop()
            else:
                own.append((key, value))
        return merged + own

    def sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        for index, item in enumerate(node.value):
            self.document.lines[(*path, index)] = item.start_mark.line + 1
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def scalar(self, node: yaml.Node, path: Path) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "null":
            return None
        # An environment variable is text: `1.10` must not become 1.1, nor `0755` 755.
        if kind in ("str", "merge") or (path[:1] == ("models",) and path[2:3] == ("env",)):
            return text
        if kind not in _CONVERT:
            return self.wrong(path, f"has the tag {node.tag!r}, which means nothing here; remove it", node)
        try:
            return _CONVERT[kind](text.lower())
        except (ValueError, KeyError):
            return self.wrong(path, f"{text[:40]!r} is no {kind}", node)

    def wrong(self, path: Path, message: str, node: yaml.Node) -> None:
        self.document.problems.append(Problem(path, message, node.start_mark.line + 1))


_TOKEN = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{)[^}])*))?\})?")
SECS = "_secs"  # ends the name of a setting as llmux 2.x had it: ``request_timeout_secs``
_MODEL_SETTING = 3  # models.NAME.setting
_ROUNDS = 5  # of taking out what is wrong: a setting, what lacks it then, and so on
_HOOKS = frozenset({*(kind.value for kind in HookKind), "hooks", "cmd"})


def is_script(path: Path) -> bool:
    """Whether the value at ``path`` is a hook script."""
    return len(path) == _MODEL_SETTING and path[0] == "models" and path[2] in _HOOKS


def interpolate(
    data: Any, environ: Mapping[str, str], *, skip: Callable[[Path], bool] = is_script
) -> tuple[Any, list[Problem]]:
    """Return ``data`` with its string values filled in, and what could not be filled in.

    A value with a problem is returned as it was. Top-level ``x-`` keys hold anchors, not settings: what they
    say is filled in where it is used. ``data`` is not changed.
    """
    problems: list[Problem] = []

    def walk(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or skip(path) or str(path[0] if path else "").startswith("x-"):
            return value
        try:
            return fill(value, environ)
        except ValueError as error:
            problems.append(Problem(path, str(error)))
            return value

    return walk(data, ()), problems


def literal(text: str) -> str:
    """Write a text for a configuration so that nothing in it is filled in."""
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


M = TypeVar("M", bound=BaseModel)


def load(
    schema: type[M], file: FilePath, environ: Mapping[str, str], changed: Mapping[Path, Any] | None = None
) -> M:
    """Read ``file`` and validate it as ``schema``, with the settings ``changed`` by their paths.

    Raises:
        ConfigErrors: everything that is wrong with it.

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
        # Where a problem is known already, what follows from it is not repeated.
        known = {problem.path for problem in problems}
        found = [problem for problem in explain(error, schema) if problem.path not in known]
        problems += found
        rest, between = _look_further(schema, data, [problem.path for problem in problems], file)
        problems += [] if checked_as_whole(error) else between
    problems = [_as_written(problem, document.lines) for problem in problems]
    try:
        raise_all(problems, file=str(file), lines=document.lines)
    except ConfigErrors as errors:
        errors.rest = rest
        raise
    assert config is not None  # raise_all did not
    return config


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
    """Read what is left without the settings that are wrong; return it, and what is wrong between the others.

    None where nothing is left. What may only follow from what was taken out is not told.
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
    """Put something in place of a hook or port that is wrong, as the model cannot be read without one."""
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
    """Whether a problem is about a setting that is wrong itself, what holds or is in one, or names one."""
    for path in wrong:
        both = min(len(problem.path), len(path))
        if problem.path[:both] == path[:both]:
            return True
        name = next((part for part in reversed(path) if isinstance(part, str) and part != "models"), "")
        if name and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", problem.message):
            return True
    return False


def _remove(data: Any, path: Path) -> None:
    """Take out what is at ``path``, or where it is missing, what lacks it."""
    around = [data]
    for part in path[:-1]:
        inner = around[-1].get(part) if isinstance(around[-1], dict) else None
        if inner is None:
            return  # taken out before, for another mistake
        if not isinstance(inner, dict):
            break
        around.append(inner)
    depth = len(around) - 1
    if depth and path[depth] not in around[depth]:
        depth -= 1
    if path:
        around[depth].pop(path[depth], None)


def _as_written(problem: Problem, lines: Lines) -> Problem:
    """Name the original's spelling of a setting where the file uses that."""
    if not problem.path or problem.path in lines:
        return problem
    written = (*problem.path[:-1], f"{problem.path[-1]}{SECS}")
    return Problem(written, problem.message, problem.line) if written in lines else problem

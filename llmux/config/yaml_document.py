"""YAML as a document: its values, the line of each, and its errors.

It is read by the rules of YAML 1.2's core schema, as in the original: ``on``, ``yes``, ``12:30`` and
``2024-01-01`` are text. Keys are always text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from yaml.reader import ReaderError

from llmux.config.document import EMPTY, MAX_DEPTH, MAX_VALUES, Document, failed
from llmux.config.problems import Path, Problem

LONG_TEXT = 1000
"""Characters for which a text counts as one value more."""


def parse(text: str, *, last_wins: bool = False) -> Document:
    """Read YAML text; a syntax error is a problem of the document, never an exception."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = (error.context_mark if _unclosed(error) else None) or error.problem_mark
        return failed(_explain(error, text), line=mark.line + 1 if mark else None)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return failed(f"holds a character that YAML does not allow (code {error.character})", line=line)
    except (ValueError, OverflowError, RecursionError) as error:  # an escape beyond Unicode; thousands of brackets
        return failed(f"is not YAML: {error}")
    if root is None:
        return failed(EMPTY)
    try:
        document.data = _Builder(document, last_wins=last_wins).build(root, ())
    except _TooMuchError as error:
        return failed(str(error), line=error.line)
    document.lines.setdefault((), root.start_mark.line + 1)
    return document


def _unclosed(error: yaml.MarkedYAMLError) -> bool:
    return bool(error.context_mark) and "stream" in (error.problem or "")


_MEANINGS = (
    ("mapping values are not allowed", "a value that contains `: ` must be in quotes, or on the lines after `|`"),
    ("found another document", "holds several YAML documents; remove the `---` between them"),
    ("undefined alias", "an anchor (&name) must stand before its alias (*name)"),
)


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    """Explain a YAML syntax error to a user without knowledge of the grammar."""
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


class Dumper(yaml.SafeDumper):
    """Writes texts in quotes if they would be read as something else, here or where YAML 1.1's rules hold."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # Some that cannot be printed end a line.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


Dumper.add_representer(str, _text)

for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", [*"~nN", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", [*"tTfF"]),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", [*"-+0123456789"]),
    ("float", r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)\Z", [*"-+.0123456789"]),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z", [*"-+."]),
    ("merge", r"<<\Z", ["<"]),
):
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_CONVERT: Mapping[str, Callable[[str], Any]] = {
    "bool": lambda text: {"true": True, "false": False}[text],
    "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
}


class _TooMuchError(Exception):
    """A document with more in it than any configuration has."""

    def __init__(self, message: str, node: yaml.Node) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class _Builder:
    """Converts a node tree to data, and records lines, and every duplicate key.

    An alias stands for everything in its anchor, aliases included: a few lines can mean billions of values. So the
    values built are counted. Raises _TooMuchError.
    """

    def __init__(self, document: Document, *, last_wins: bool) -> None:
        self.document = document
        self.last_wins = last_wins
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
                self.document.repeated.append(self.document.problems[-1])
                if not self.last_wins:
                    continue
            entries[key.value] = (key, value)
        data = {}
        for name, (key, value) in entries.items():
            self.document.lines[(*path, name)] = key.start_mark.line + 1
            data[name] = self.build(value, (*path, name))
        return data

    def entries(self, node: yaml.MappingNode, path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the merged entries, in increasing precedence, then the mapping's own."""
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        own: list[tuple[yaml.Node, yaml.Node]] = []
        for key, value in node.value:
            self.count(key)
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(path, "has a key that is not text", key)
            elif key.tag == "tag:yaml.org,2002:merge":
                # Of several merged mappings the first takes precedence.
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

"""The file, read and filled in, with the line of each of its places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from llmux.config.document import read_document
from llmux.config.explain import explain
from llmux.config.problems import Lines, Path, Problem, raise_all
from llmux.llama_swap.macros import fill_macros
from llmux.llama_swap.marks import fill, mark_environment, variables, written
from llmux.llama_swap.schema import LlamaSwap, Model

# In these a variable is carried over as such. What stands in the others is never used.
_KEPT = frozenset({"cmd", "cmdStop", "env"})
_USED = frozenset(LlamaSwap.model_fields)


@dataclass(frozen=True, slots=True)
class Source:
    """What the file says. ``config`` holds marks in place of what is only known later; ``raw`` is all of it."""

    config: LlamaSwap
    raw: Mapping[str, Any]
    ports: Mapping[str, int]
    lines: Lines
    file: FilePath


def read(file: FilePath, environ: Mapping[str, str]) -> Source:
    """Read llama-swap's configuration; ``environ`` fills in ``${env.NAME}`` where llmux would not do so later.

    Raises:
        ConfigErrors: everything that is wrong with it.

    """
    document = read_document(file, prepare=mark_environment)
    problems = list(document.problems)
    if not isinstance(document.data, Mapping):
        if not problems:
            problems = [Problem((), "must be a mapping: `models:` and other settings at the top level")]
        raise_all(problems, file=str(file), lines=document.lines)
    filled = fill_macros(document.data)
    problems += filled.problems
    data, unset = _settle(filled.data, environ)
    problems += unset
    config = None
    try:
        config = LlamaSwap.model_validate(data)
    except ValidationError as error:
        known = {problem.path for problem in problems}
        problems += [problem for problem in explain(error, LlamaSwap) if problem.path not in known]
    raise_all(
        [Problem(problem.path, written(problem.message), problem.line) for problem in problems],
        file=str(file),
        lines=document.lines,
    )
    assert config is not None  # raise_all did not
    return Source(config, data, filled.ports, document.lines, file)


def _settle(data: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Put in the environment where its values decide what is written."""
    problems: list[Problem] = []

    def walk(value: Any, path: Path) -> Any:
        if _is_kept(path):
            return value
        if isinstance(value, Mapping):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or not variables(value):
            return value
        missing = [name for name in variables(value) if name not in environ]
        problems.extend(_unset(path, missing))
        return fill(value, environ)

    return {key: walk(value, (key,)) for key, value in data.items()}, problems


def _is_kept(path: Path) -> bool:
    if path[0] == "models":
        return len(path) > 2 and (path[2] in _KEPT or path[2] not in Model.model_fields)  # noqa: PLR2004
    return path[0] == "apiKeys" or path[0] not in _USED


def _unset(path: Path, names: list[str]) -> Iterator[Problem]:
    for name in dict.fromkeys(names):
        yield Problem(path, f"uses ${{env.{name}}}, and the variable {name} is not set; set it for the import")

"""From a file to a validated configuration, with every problem on its line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from llmux.config.document import read_document
from llmux.config.explain import explain
from llmux.config.interpolate import interpolate
from llmux.config.policy import SECS
from llmux.config.problems import Lines, Problem, raise_all

M = TypeVar("M", bound=BaseModel)


def load(schema: type[M], file: Path, environ: Mapping[str, str]) -> M:
    """Read ``file`` and validate it as ``schema``.

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
    config = None
    try:
        config = schema.model_validate(data)
    except ValidationError as error:
        # Where a problem is known already, what follows from it is not repeated.
        known = {problem.path for problem in problems}
        problems += [problem for problem in explain(error, schema) if problem.path not in known]
    problems = [_as_written(problem, document.lines) for problem in problems]
    raise_all(problems, file=str(file), lines=document.lines)
    assert config is not None  # raise_all did not
    return config


def _as_written(problem: Problem, lines: Lines) -> Problem:
    """Name the original's spelling of a setting where the file uses that."""
    if not problem.path or problem.path in lines:
        return problem
    written = (*problem.path[:-1], f"{problem.path[-1]}{SECS}")
    return Problem(written, problem.message, problem.line) if written in lines else problem

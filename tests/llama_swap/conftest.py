from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmux.config import Config
from llmux.config.problems import ConfigErrors
from llmux.llama_swap import Translation, translate
from llmux.llama_swap.conversion import page


class Result:
    """What a file was translated to: the notes, and the configuration as llmux reads it from the written page."""

    def __init__(self, translation: Translation, environ: Mapping[str, str], folder: Path) -> None:
        self.translation = translation
        self.notes = translation.notes
        self.text = page(translation)
        self.file = folder / "config.yaml"
        self.file.write_text(self.text)
        unset = dict.fromkeys(translation.variables, "unset")
        self.config = Config.from_file(self.file, environ={**unset, **environ})
        self.environ = environ

    def lost(self) -> dict[str, str]:
        return {str(note).partition(": not carried over: ")[0]: note.message for note in self.notes if note.lost}

    def differs(self) -> list[str]:
        return [str(note).partition(": ")[0] for note in self.notes if not note.lost]

    def words(self, model: str, variable: str = "COMMAND", **environ: str) -> list[str]:
        """What a shell makes of a command: the arguments that are started."""
        settings = self.config.models[model]
        given = {"LLMUX_PORT": str(settings.address.port), "pid": "4711", **self.environ, **environ}
        return split_by_sh(settings.env[variable], given)


def split_by_sh(script: str, environ: Mapping[str, str]) -> list[str]:
    show = 'eval "set -- $SCRIPT"; for word in "$@"; do printf "%s\\0" "$word"; done'
    done = subprocess.run(
        ["sh", "-uc", show],
        env={"PATH": os.environ["PATH"], **environ, "SCRIPT": script},
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


@pytest.fixture
def load(tmp_path) -> Callable[..., Result]:
    (tmp_path / "out").mkdir()

    def load(text: str, environ: Mapping[str, str] | None = None, **options: Any) -> Result:
        file = tmp_path / "llama-swap.yaml"
        file.write_text(text)
        return Result(translate(file, environ or {}, **options), environ or {}, tmp_path / "out")

    return load


@pytest.fixture
def problems(load) -> Callable[..., list[tuple[int | None, str]]]:
    """Return the line and the text of everything that is wrong with a file."""

    def problems(text: str, environ: Mapping[str, str] | None = None) -> list[tuple[int | None, str]]:
        with pytest.raises(ConfigErrors) as refused:
            load(text, environ)
        return [(problem.line, f"{problem.path}: {problem.message}") for problem in refused.value.problems]

    return problems

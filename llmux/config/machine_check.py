"""What a configuration needs of this machine and does not find: scripts, programs, model files.

All of it is a warning: hooks may fetch what is missing, and the file may be for another machine. Nothing is run
but ``sh -n``, which only reads.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from llmux.config.model import ModelConfig
from llmux.config.one_line import hook_folder
from llmux.config.problems import Path as Place
from llmux.config.problems import Problem
from llmux.config.schema import Config

READING = 5.0  # seconds that ``sh -n`` may take
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
# The shell's own words: what follows them is looked at no further.
_SHELL = frozenset(
    re.findall(
        r"\S+",
        """. : [ alias bg break case cd command continue do done elif else esac eval exec exit export false fg fi
        for function getopts hash if in jobs kill local printf echo pwd read readonly return set shift source test
        then time times trap true type ulimit umask unalias unset until wait while { } ! (""",
    )
)
_PROGRAMS = ("COMMAND", "LLAMA_SERVER")  # variables of the shipped scripts that hold a command


def look(config: Config) -> Iterator[Problem]:
    """Yield what is missing, model by model, each with its place in the file."""
    for name, model in config.models.items():
        place: Place = ("models", name)
        path = model.env.get("PATH", os.environ.get("PATH"))
        if model.cmd is not None:
            yield from _script((*place, "cmd"), model.cmd, config.folder, path)
        seen = set()
        for kind, script in model.scripts.items():
            given = kind.value in model.model_fields_set and (model.hooks or model.cmd) is None
            at = (*place, kind.value if given else "hooks" if model.hooks is not None else "cmd")
            for problem in _script(at, script, config.folder, path):
                if problem.message not in seen:  # one script may be all the hooks
                    seen.add(problem.message)
                    yield problem
        yield from _variables(place, model, config.folder, path)


def _script(at: Place, script: str, folder: Path, path: str | None) -> Iterator[Problem]:
    wrong = _syntax(script)
    if wrong is not None:
        yield Problem(at, f"the shell cannot read it: {wrong}")
        return
    word = _program(script)
    if word is None:
        return
    if "/" not in word:
        if shutil.which(word, path=path) is None:
            yield Problem(at, f"there is no program {word} on the PATH")
        return
    file = _path(folder, word)
    fault = _fault(file)
    if fault is not None:
        yield Problem(at, f"{word} {fault}")
    elif not file.exists():
        shipped = file.suffix == ".sh" and (hook_folder() / file.name).exists()
        hint = f"; `llmux hooks copy {file.stem}` writes it" if shipped else ""
        yield Problem(at, f"there is no {word}{hint}")
    elif not file.is_file() or not os.access(file, os.X_OK):
        yield Problem(at, f"{word} is not executable: chmod +x {shlex.quote(str(file))}")


def _path(folder: Path, text: str) -> Path:
    return folder / os.path.expanduser(text)  # noqa: PTH111 (Path's own raises where a user is unknown)


def _fault(file: Path) -> str | None:
    """Return why it cannot be told whether a file is there: a folder that may not be entered, a name too long."""
    try:
        file.exists()
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    return None


def _syntax(script: str) -> str | None:
    """Return what the shell says of a script that it cannot read."""
    try:
        done = subprocess.run(  # noqa: S603 - it is not executed
            ["sh", "-n", "-c", script],  # noqa: S607 - as hooks are run
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=READING,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return None
    text = done.stderr.decode(errors="replace").strip().splitlines()
    return text[-1].rpartition("Syntax error: ")[2] if text else f"`sh -n` exits with {done.returncode}"


def _program(script: str) -> str | None:
    """Return the program that a script of one command runs; None where that cannot be told by reading it."""
    try:
        words = shlex.split(script.strip().splitlines()[0], comments=True)
    except ValueError:
        return None
    for word in words:
        if _ASSIGNMENT.match(word):
            continue
        known = word not in _SHELL and re.fullmatch(r"[\w./+~@-]+", word) is not None
        return word if known else None
    return None


def _variables(place: Place, model: ModelConfig, folder: Path, path: str | None) -> Iterator[Problem]:
    env: Mapping[str, str] = model.env
    weights = env.get("MODEL", "")
    if weights.startswith(("/", "./", "../", "~/")) or (weights.endswith(".gguf") and "$" not in weights):
        at, file = (*place, "env", "MODEL"), _path(folder, weights)
        fault = _fault(file)
        if fault is not None:
            yield Problem(at, f"{weights} {fault}")
        elif not file.exists():
            yield Problem(at, f"there is no {weights}")
        elif not os.access(file, os.R_OK):
            yield Problem(at, f"{weights} cannot be read by this user")
    for name in _PROGRAMS:
        if name in env and model.cmd is None:
            yield from _script((*place, "env", name), env[name], folder, path)

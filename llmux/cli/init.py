"""``llmux init``: a first configuration, made from what is on this machine."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmux.cli.check import warn
from llmux.cli.hooks import HookScript, copy, find, shipped
from llmux.cli.terminal import fail, say, terminal
from llmux.config import Config
from llmux.errors import ConfigError, LLMuxError
from llmux.observability.log import escape
from llmux.survey import host, model_files
from llmux.survey.draft import Draft, Recipe, is_free
from llmux.survey.host import PORTS, Engine, Machine, probe
from llmux.survey.model_files import Candidate, candidates, gibibytes, of_file, unique

CONFIG = "config.yaml"
HOOKS = "hooks"
_PRIVATE, _PUBLIC = 0o600, 0o644
OWN_PORT = 3000
MANY = 8
"""More than this are not taken unless told so."""

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?\Z")


class InitError(LLMuxError):
    """The command line asks for something impossible."""


def run(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="NAME=PATH: only this; PATH is a GGUF file, or what --engine takes."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Hook script for --model (see `llmux hooks list`).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to; without it, this one.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", min=1, max=65535, help="llmux's own port.")] = None,
    probe_port: Annotated[
        list[int] | None, typer.Option("--probe", min=1, max=65535, help="Look for an engine on this port, too.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, take everything that is found.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Look at this machine and write config.yaml, with comments, and the hook scripts that it needs.

    It finds GGUF files, in this folder too, engines that run, containers and GPUs.
    Exit code 0: written. 1: called off. 2: impossible.
    """
    console = terminal(stderr=True, soft_wrap=True)
    try:
        read = {name: Recipe.of(script.example) for name, script in shipped().items()}
        recipes = {name: recipe for name, recipe in read.items() if recipe is not None}
        given = [_given(text, engine, recipes) for text in model or ()]
        if engine is not None and not given:
            raise InitError("--engine says what --model is for; give --model NAME=PATH, too")
        _Init(console, recipes, probe_port or [], ask=not yes).run(given, out, port, force=force)
    except LLMuxError as error:
        fail(error)


class _Init:
    """One run: look, ask, write."""

    def __init__(self, console: Console, recipes: dict[str, Recipe], ports: Sequence[int], *, ask: bool) -> None:
        self.console = console
        self.recipes = recipes
        self.ports = ports
        self.ask = ask

    def run(self, given: list[Candidate], out: Path | None, port: int | None, *, force: bool) -> None:
        self.console.print("looking at this machine …", style="dim")
        found, engines, here = asyncio.run(self.look())
        self.tell(found, engines, here)
        known, left = candidates(found.models, engines, here, self.recipes)
        chosen = unique(given) if given else self.choose(known)
        if port is None:
            port = self.free_port(engines)
        folder = out if out is not None else self.folder(force=force)
        draft = Draft(chosen, self.recipes, here, port=port, left=left, taken=[engine.port for engine in engines])
        target = write(draft.text, folder, draft.scripts, force=force)
        names = ", ".join(one.name for one in chosen[:MANY]) + (", …" if len(chosen) > MANY else "")
        scripts = ", ".join(f"{name}.sh" for name in draft.scripts)
        typer.echo(f"wrote {target} ({names}), and in {target.parent / HOOKS}: {scripts}")
        warn(Config.from_file(target))
        if "llama-cpp" in draft.scripts and not (
            here.programs.get("llama-server") or "LLAMA_SERVER" in os.environ
        ):
            say("warning: llama-server is not on the PATH: say where it is with LLAMA_SERVER in `env`", "yellow")
        quoted = shlex.quote(str(target))
        typer.echo(f"now: llmux check {quoted} && llmux -c {quoted}")

    async def look(self) -> tuple[model_files.Found, list[Engine], Machine]:
        """Look everywhere at once."""
        home = _home()
        return await asyncio.gather(
            asyncio.to_thread(model_files.find, os.environ, home, _here()),
            probe([*PORTS, *self.ports]),
            asyncio.to_thread(host.look, os.environ, home),
        )

    # ---- reporting what was found

    def tell(self, found: model_files.Found, engines: list[Engine], here: Machine) -> None:
        for line in [
            *(f"GPU {gpu.index}: {gpu.name}, {gibibytes(gpu.memory)}" for gpu in here.gpus),
            *([] if here.gpus or "nvidia-smi" in here.said else ["no NVIDIA GPU (nvidia-smi shows none)"]),
            *(f"{name}: {what}" for name, what in here.said.items()),
            *(f"docker: {container.name} ({container.image})" for container in here.containers),
            *(engine.about for engine in engines),
            *([] if engines else ["no engine runs on the usual ports; --probe PORT looks on others"]),
            *(f"{place} holds more than was looked at" for place in found.cut),
            *(f"left out, as it cannot be read or is not whole: {path}" for path in found.broken[:MANY]),
            *([f"… and {len(found.broken) - MANY} more such files"] if len(found.broken) > MANY else []),
        ]:
            self.console.print(f"  {escape(line)}")
        if not found.models and not found.broken:
            self.console.print(
                "  no GGUF files in ~/models, nor in this folder, nor where Hugging Face, llama.cpp and LM Studio"
                " keep theirs"
            )
        if here.ollama_store and not any(engine.kind == "Ollama" for engine in engines):
            self.console.print(
                f"  {here.ollama_store} has Ollama's models, whose files have no names: start Ollama and try again"
            )

    # ---- asking

    def choose(self, known: list[Candidate]) -> list[Candidate]:
        if not self.ask:
            if not known:
                raise InitError("nothing was found to serve; name a model: llmux init --model NAME=PATH")
            return known
        chosen: list[Candidate] = []
        if known:
            for number, one in enumerate(known, 1):
                self.console.print(escape(f"{number:>4}  {one.name}  ({one.about})"))
            default = "all" if len(known) <= MANY else "1"
            question = "Which of them? Numbers, as 1,3-5; all; none"
            chosen = typer.prompt(question, default=default, value_proc=lambda text: _picked(text, known))
        while not chosen or typer.confirm("Another one?", default=False):
            chosen.append(typer.prompt("NAME=PATH of a GGUF file", value_proc=self.answered))
        return unique(chosen)

    def answered(self, text: str) -> Candidate:
        try:
            return _given(text, None, self.recipes)
        except InitError as error:
            raise typer.BadParameter(str(error)) from None

    def free_port(self, engines: Iterable[Engine]) -> int:
        taken = {engine.port for engine in engines}
        free = next(
            number for number in range(OWN_PORT, OWN_PORT + 1000) if number not in taken and is_free(number)
        )
        if not self.ask:
            return free
        return int(typer.prompt("llmux's own port", default=free, value_proc=_port))

    def folder(self, *, force: bool) -> Path:
        if not self.ask:
            return Path()

        def empty(text: str) -> Path:
            folder = Path(text).expanduser()
            if (folder / CONFIG).exists() and not force:
                raise typer.BadParameter(f"{folder / CONFIG} is there already; name another folder")
            return folder

        folder: Path = typer.prompt("Folder for config.yaml and hooks/", default=".", value_proc=empty)
        return folder


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without a home folder, as in containers
        return Path("/nonexistent")


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


def _given(text: str, engine: str | None, recipes: dict[str, Recipe]) -> Candidate:
    """Read NAME=PATH."""
    name, equals, source = text.strip().partition("=")
    name, source = name.strip(), source.strip()
    if not equals or not name or not source:
        raise InitError(f"{text!r} is not NAME=PATH, as qwen=/models/qwen3-8b.gguf")
    if engine is not None and find(engine).name not in recipes:
        raise InitError(f"--engine {engine}: that script is for no engine; take one of {', '.join(recipes)}")
    script = find(engine or "llama-cpp").name
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~NAME of an unknown user
        raise InitError(f"{source}: {error}") from None
    if script == "llama-cpp":
        model = model_files.read(path.absolute())
        if model is None:
            other = "" if engine else "; for anything else than GGUF say which --engine"
            raise InitError(f"{source} is not a whole GGUF file that can be read, or not a model by itself{other}")
        return of_file(model, name)
    return Candidate(name, script, str(path.absolute()) if path.exists() else source, f"{script}: {source}")


def _picked(text: str, known: list[Candidate]) -> list[Candidate]:
    """Read ``1,3-5``, ``all`` or ``none``."""
    word = text.strip().lower()
    if word in ("all", "none"):
        return list(known) if word == "all" else []
    numbers: list[int] = []
    for part in re.split(r"[\s,]+", word.strip(", ")):
        found = _RANGE.match(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= len(known):
            raise typer.BadParameter(
                f"{part!r} is not one of 1 to {len(known)}; write numbers, as 1,3-5; all; none"
            )
        numbers += range(first, last + 1)
    return [known[number - 1] for number in dict.fromkeys(numbers)]


def _port(text: str) -> int:
    if not str(text).isdecimal() or not 1 <= int(text) <= 65535:  # noqa: PLR2004 (ports)
        raise typer.BadParameter("a port is a number from 1 to 65535")
    return int(text)


# ---- writing a generated configuration, and the hook scripts beside it


class UnwrittenError(LLMuxError):
    """Nothing was written."""


def write(
    text: str,
    folder: Path,
    scripts: Iterable[str],
    *,
    force: bool = False,
    unset: Iterable[str] = (),
    spare: Path | None = None,
) -> Path:
    """Write ``folder``/config.yaml and copy the hook scripts beside it, if llmux itself accepts the text.

    Nothing is written half: the configuration appears when everything else is done. ``unset`` are variables that
    need not be set yet; ``spare`` is a file that not even ``force`` overwrites.

    Raises:
        UnwrittenError: a file exists already, cannot be written, or llmux does not accept the text.
        HookScriptError: a different script is there already, or one cannot be written.

    """
    target, scripts = folder / CONFIG, list(scripts)
    try:
        if spare is not None and target.exists() and target.samefile(spare):
            raise UnwrittenError(f"{target} is the file that is read; name another folder")
        if target.exists() and not force:
            raise UnwrittenError(f"{target} is there already; name another folder, or overwrite it with --force")
        own = [path for name in scripts if _differs(path := folder / HOOKS / f"{name}.sh", find(name))]
    except OSError as error:  # its name is longer than there can be, or it may not be looked at
        raise UnwrittenError(f"{target} cannot be written: {error.strerror}") from None
    if own and not force:
        names = " and ".join(map(str, own))
        raise UnwrittenError(f"{names}: there already, and not as it comes with llmux; keep it, or use --force")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{CONFIG}.", suffix=".yaml", dir=folder)
    except OSError as error:
        raise UnwrittenError(f"{target} cannot be written: {error.strerror}") from None
    draft = Path(name)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        config = _taken(draft, unset)
        for script in scripts:
            copy(script, folder / HOOKS, force=force)
        secret = config.api_keys or config.admin_key or any(each.key for each in config.remotes.values())
        draft.chmod(_PRIVATE if secret else _PUBLIC & ~_umask())
        draft.replace(target)
    except OSError as error:
        raise UnwrittenError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    return target


def _differs(path: Path, script: HookScript) -> bool:
    try:
        return not path.samefile(script.path) and path.read_bytes() != script.text.encode()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a folder, or not readable
        return True


def _taken(draft: Path, unset: Iterable[str]) -> Config:
    environ = {**dict.fromkeys(unset, "unset"), **os.environ}
    try:
        return Config.from_file(draft, environ=environ)
    except ConfigError as error:
        problems = getattr(error, "problems", (error,))
        said = "\n".join(f"  {problem.path}: {problem.message}" for problem in problems)
        raise UnwrittenError(f"llmux would not take the result:\n{said}") from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

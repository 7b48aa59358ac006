"""Checks that involve more than one setting, and what a configuration needs but this machine lacks.

What ``look`` finds missing (scripts, programs, model files) is a warning: hooks may fetch it, and the file may be
for another machine. Nothing is run except ``sh -n``, which only reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmux.config.access import Access, check_keys
from llmux.config.accounts import accounts_warnings, check_accounts
from llmux.config.model_settings import expand, hook_folder
from llmux.config.problems import Path as Place
from llmux.config.problems import Problem
from llmux.config.remotes import check_remotes, remotes_warnings
from llmux.config.residency import check_levels, check_residency, levels_warnings, staying_warnings
from llmux.config.setting_types import covers, is_loopback
from llmux.config.targets import check_targets
from llmux.errors import ConfigError
from llmux.normal_path import can_be_in_path

if TYPE_CHECKING:
    from llmux.config.model_settings import ModelConfig
    from llmux.config.schema import Config

SMALLEST_PLAUSIBLE = 2**20  # bytes; `memory: 18` means GiB


def check(config: Config) -> list[Problem]:
    """Return every problem that makes ``config`` as a whole invalid."""
    problems = [*_names(config), *check_targets(config), *_addresses(config), *check_residency(config)]
    problems += check_levels(config)
    if config.backoff.first > config.backoff.max:
        problems.append(Problem(("backoff", "first"), "is longer than `backoff.max`; make it shorter"))
    problems += [*check_keys(config), *check_accounts(config), *check_remotes(config)]
    return [*problems, *open_to_all(config.host, config)]


def _names(config: Config) -> Iterator[Problem]:
    if not config.models and not config.remotes:
        empty = "models" in config.model_fields_set
        why = "needs at least one entry, not an empty mapping" if empty else "is missing; name at least one model"
        yield Problem(("models",), why)
    owners: dict[str, str] = {}
    for name, model in config.models.items():
        for index, alias in enumerate(model.aliases):
            path = ("models", name, "aliases", index)
            if alias in config.models:
                yield Problem(path, f"{alias!r} is the name of a model; choose another")
            elif alias in owners:
                yield Problem(path, f"{alias!r} is already an alias of {owners[alias]}; keep one of them")
            owners.setdefault(alias, name)


def _addresses(config: Config) -> Iterator[Problem]:
    taken: dict[tuple[tuple[str, int], str], list[str]] = defaultdict(list)
    for name, model in config.models.items():
        address = model.address
        taken[address.endpoint, address.base_path].append(name)
        if covers(config.host, address.host) and config.port == address.port:
            yield Problem(
                ("models", name, _address_key(config, name)),
                f"{address.authority} is llmux's own address; change this port or the top-level `port`",
            )
    for names in taken.values():
        if len(names) == 1 or all(config.models[name].upstream_model for name in names):
            continue
        alone = [name for name in names if not config.models[name].shared_address]
        for name in alone:
            other = next(peer for peer in names if peer != name)
            yield Problem(
                ("models", name, _address_key(config, name)),
                f"{config.models[name].address.authority} is also the address of {other};"
                " give each its own port, or `upstream_model` to each if one engine serves both,"
                " or `shared_address: true` to each if they take turns",
            )


def _address_key(config: Config, name: str) -> str:
    return "url" if config.models[name].url is not None else "port"


def open_to_all(host: str, config: Access) -> Iterator[Problem]:
    """Yield why listening on ``host`` is unsafe under this configuration, if it is."""
    if not (is_loopback(host) or config.api_keys or config.insecure):
        yield Problem(
            ("host",),
            f"is {host}, beyond this machine, without `api_keys`: every client that reaches it could use llmux;"
            " give `api_keys` (`llmux key new` makes one), or say `insecure: true` if that is meant",
        )


def operators(config: Access) -> str:
    """Return which clients may operate llmux: wake, put to sleep, pin, lease, and reach engines directly."""
    if config.admin_key is not None:
        return "clients with the `admin_key`"
    if config.api_keys:
        return "the llmux command of the same user on this machine; over HTTP no client, as `admin_key` is not set"
    return "this machine only, no key; set `api_keys` before a proxy on this machine passes requests on"


NO_DRAIN = "the name can stand in no path, with \\, ; or a segment of dots, so no operator can drain it"


def cors_warnings(cors: Sequence[str]) -> Iterator[str]:
    """Yield the origins that no page has."""
    for index, origin in enumerate(cors):
        if origin != "*" and "*" in origin:
            yield f"cors[{index}]: {origin!r} lets nothing in: a * stands alone, for all; write each, or only *"


def find_warnings(config: Config) -> Iterator[str]:
    """Yield what is allowed but probably a mistake."""
    if config.policy.request_timeout == 0:
        yield (
            "policy.request_timeout: is 0: a request whose model is not awake is refused at once;"
            " null means no limit"
        )
    for name, model in config.models.items():
        if not any(can_be_in_path(each) for each in (name, *model.aliases)):
            yield (
                f"models.{name}: its name can stand in no path, with \\, ; or a segment of dots: without an alias"
                " no operator can wake it or put it to sleep, and /upstream does not lead to it"
            )
    if config.fleet is not None and not can_be_in_path(config.fleet.name):
        yield f"fleet.name: {NO_DRAIN}"
    yield from cors_warnings(config.cors)
    yield from _sizes(config)
    yield from levels_warnings(config)
    yield from staying_warnings(config)
    yield from accounts_warnings(config)
    yield from remotes_warnings(config)
    endpoints = [model.address.endpoint for model in config.models.values()]
    for name, model in config.models.items():
        if model.shared_address and endpoints.count(model.address.endpoint) == 1:
            yield f"models.{name}.shared_address: no other model has this address"


def _sizes(config: Config) -> Iterator[str]:
    given: dict[str, Any] = {"capacity": config.capacity, "host_memory": config.host_memory}
    given |= {f"gpus.{gpu}": size for gpu, size in (config.gpus or {}).items()}
    for name, model in config.models.items():
        at = f"models.{name}.memory"
        if isinstance(model.memory, Mapping):
            given |= {f"{at}.{gpu}": size for gpu, size in model.memory.items()}
        else:
            given[at] = model.memory
        given |= {f"models.{name}.levels.{level}": size for level, size in model.levels.items()}
    for at, size in given.items():
        if size is not None and 0 < size < SMALLEST_PLAUSIBLE:
            yield f"{at}: is only {size} bytes; write a unit, as {size}GiB"
    for name, model in config.models.items():
        if model.memory is not None and config.capacity is None and config.gpus is None:
            yield f"models.{name}.memory: has no effect without the top-level `capacity`"


READING = 5.0  # seconds that ``sh -n`` may take
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
# The shell's own words: what follows them is not checked.
_SHELL = frozenset(
    re.findall(
        r"\S+",
        """. : [ alias bg break case cd command continue do done elif else esac eval exec exit export false fg fi
        for function getopts hash if in jobs kill local printf echo pwd read readonly return set shift source test
        then time times trap true type ulimit umask unalias unset until wait while { } ! (""",
    )
)
_SERVERS = frozenset(
    {"llama-server", "vllm", "trtllm-serve", "whisper-server", "sd-server", "koboldcpp", "text-embeddings-router"}
)
_PROGRAMS = ("COMMAND", "LLAMA_SERVER")  # variables of the shipped scripts that hold a command


def look(config: Config) -> Iterator[Problem]:
    """Yield what is missing, model by model, with its place in the file."""
    for name, model in config.models.items():
        place: Place = ("models", name)
        path = model.env.get("PATH", os.environ.get("PATH"))
        if model.cmd is not None:
            yield from _script((*place, "cmd"), model.cmd, config.folder, path)
        seen = set()
        line = "hooks" if model.hooks is not None else "cmd"
        stands_for = expand({line: getattr(model, line), "port": 1})
        for kind, script in model.scripts.items():
            at = (*place, line if stands_for.get(kind.value) == script else kind.value)
            for problem in _hook(at, kind.value, script, config.folder, path):
                if problem.message not in seen:  # one script may serve as all the hooks
                    seen.add(problem.message)
                    yield problem
        yield from _variables(place, model, config.folder, path)
    for setting in _WRITTEN:
        file = None
        with contextlib.suppress(ConfigError):  # without a home folder, which is reported elsewhere
            file = getattr(config, f"{setting}_path")
        if setting == "ledger" and config.ledger is True:  # its folder is created
            file = None
        if file is not None:
            fault = _unwritable(file, folder=setting == "captures", made=setting in _MADE)
            fault = fault or (_readable(file) if setting in _PRIVATE else None)
            if fault is not None:
                yield Problem((setting,), fault)


_WRITTEN = ("audit", "captures", "ledger", "record", "state")
_MADE = frozenset({"captures", "state"})  # their folders are created
_PRIVATE = frozenset({"audit", "captures"})
_OTHERS = 0o077  # everyone but the owner
_LONGEST_FIRST_LINE = 256  # bytes: Linux looks at no more


def _unwritable(file: Path, *, folder: bool, made: bool) -> str | None:
    """Return why a file or folder cannot be written; with ``made`` llmux creates the folders that hold it."""
    try:
        why = _cannot(file, folder=folder, made=made)
    except OSError as error:
        why = f"{error.strerror}"
    return None if why is None else f"{file} cannot be written: {why}"


def _cannot(file: Path, *, folder: bool, made: bool) -> str | None:
    above = file
    while not _is_there(above) and above.parent != above and (made or above is file):
        above = above.parent
    mine = above is file and folder is file.is_dir()
    if not _is_there(above):
        return f"its folder is not there; mkdir -p {shlex.quote(str(above))}"
    if above is file and not mine and not folder:
        return "it is a folder; give a file"
    if not mine and not above.is_dir():
        return f"{above} is not a folder"
    if not os.access(above, os.W_OK | (os.X_OK if above.is_dir() else 0)):
        return f"this user may not write {'in ' if above.is_dir() else ''}{above}; chown it, or give another place"
    return None


def _readable(file: Path) -> str | None:
    """Return what to do if others may read what is there already."""
    if not file.exists() or not file.stat().st_mode & _OTHERS:
        return None
    return f"others may read {file}: chmod {'700' if file.is_dir() else '600'} {shlex.quote(str(file))}"


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
    elif (unfit := _first_line(file, path)) is not None:
        yield Problem(at, f"{word} cannot be run: {unfit}")


def _first_line(file: Path, path: str | None) -> str | None:
    """Return why a script cannot be run: the shell only says that it is not found, though it is there."""
    try:
        with file.open("rb") as script:
            first = script.readline(_LONGEST_FIRST_LINE)
    except OSError:
        return None  # it may be executable all the same
    if first.endswith(b"\r\n") and b"\0" not in first:
        return f"its lines end as on Windows: sed -i 's/\\r$//' {shlex.quote(str(file))}"
    if not first.startswith(b"#!"):
        return None
    words = first[2:].decode(errors="replace").split()
    if words and words[0].startswith("/") and not Path(words[0]).exists():
        return f"there is no {words[0]}, which its first line names"
    if len(words) > 1 and words[0].endswith("/env") and re.fullmatch(r"[\w.+][\w.+-]*", words[1]):
        return None if shutil.which(words[1], path=path) else f"there is no program {words[1]} on the PATH"
    return None


def _hook(at: Place, kind: str, script: str, folder: Path, path: str | None) -> Iterator[Problem]:
    found = [*_script(at, script, folder, path)]
    yield from found
    server = Path(_program(script) or "").name
    if kind == "wake" and not found and server in _SERVERS and _serves(script):
        yield Problem(at, f"{server} stays, and wake has to return once it answers; write `cmd:` in its place")


def _serves(script: str) -> bool:
    """Whether a script that begins with a server's name is that server: a user's own may have it, and return."""
    line = _joined(script)
    return not re.search(r"[;&|\n]", line) and re.search(r"\s(serve|--?[a-z][\w-]*)([\s=]|\Z)", line) is not None


def _joined(script: str) -> str:
    """Return a script without ends of lines that the shell ignores."""
    return script.strip().replace("\\\n", " ")


def _path(folder: Path, text: str) -> Path:
    return folder / os.path.expanduser(text)  # noqa: PTH111 (Path's own raises where a user is unknown)


def _fault(file: Path) -> str | None:
    """Return why a file's existence cannot be determined: a folder without access, a name too long."""
    try:
        _is_there(file)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    return None


def _is_there(file: Path) -> bool:
    """Return whether it exists; OSError if that is unknown, which exists() hides from Python 3.14 on."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise
    return True


@lru_cache(256)  # models have hooks in common
def _syntax(script: str) -> str | None:
    """Return the shell's error message for a script that it cannot parse."""
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
    """Return the program that a script of one command runs; None if reading does not show it."""
    try:
        words = shlex.split(_joined(script).splitlines()[0], comments=True)
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

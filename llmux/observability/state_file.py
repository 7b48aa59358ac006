"""The state file: what a restarted llmux has to know.

JSON: ``{"version": 1, "holders": [...], "last_use": {MODEL: epoch seconds}, "costs": ..., "hooks": [[pid,
start, boot, ending], ...], "definitions": {MODEL: {...}}, "levels": {MODEL: LEVEL}, "asked": ...}``. ``holders``
are the models that may hold the GPU, ``levels`` says how deeply others sleep, ``costs`` what switches have taken
(``dump_costs``); ``asked``, the operators' pins, lease and manual mode, is opaque here.

It is written by rename, so a reader sees the old or the new one, whole. It is not fsynced: the kernel keeps
what a killed llmux wrote, and after a power cut no engine runs and the GPU is empty, so there is nothing to
remember; should the cut leave a torn file, it is set aside and the start is as if there were none. A save
happens on the event loop, before every wake: it takes some 30 µs, an fsync would add what the disk takes.

Nothing here raises into serving: a disk that is full or read-only is warned of once and tried again at the
next save. A lock file beside it, held as long as llmux runs, keeps a second llmux off: beside the file itself, not
beside a symbolic link that leads to it, and the links stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmux.errors import StateLockedError
from llmux.estimates.costs import PAIRS, Average, SwitchCosts

VERSION = 1
_NAMED = 5  # damaged entries that a warning names


@dataclass(frozen=True, slots=True)
class State:
    """What is kept. The times are wall-clock epoch seconds."""

    holders: frozenset[str] = frozenset()
    last_use: Mapping[str, float] = field(default_factory=dict)
    costs: object = None
    definitions: Mapping[str, object] = field(default_factory=dict)  # of the holders
    levels: Mapping[str, str] = field(default_factory=dict)  # at which models sleep
    hooks: tuple[tuple[int, int, str, bool], ...] = ()  # pid, start and boot of the hooks that run; being ended?
    asked: object = None  # what operators have asked for

    def recent(self) -> tuple[str, ...]:
        """Return the models in the order of their last use, most recent first."""
        return tuple(sorted(self.last_use, key=lambda name: (-self.last_use[name], name)))


def dump_costs(costs: SwitchCosts) -> dict[str, Any]:
    """Return what was measured as JSON values, for ``load_costs``."""
    return {
        "pairs": [[source, target, a.seconds, a.samples] for (source, target), a in costs.pairs.items()],
        "wakes": {name: [a.seconds, a.samples] for name, a in costs.wakes.items()},
        "sleeps": {name: [a.seconds, a.samples] for name, a in costs.sleeps.items()},
        "levels": [[*key, a.seconds, a.samples] for key, a in costs.levels.items()],
    }


def load_costs(costs: SwitchCosts, data: Mapping[str, Any]) -> None:
    """Have ``costs`` take over what ``dump_costs`` returned.

    Raises ValueError, TypeError, KeyError or OverflowError if it is something else.
    """
    pairs = {
        (None if source is None else str(source), str(target)): _average(*rest)
        for source, target, *rest in data["pairs"][-PAIRS:]
    }
    wakes, sleeps = (
        {str(name): _average(*rest) for name, rest in data[key].items()} for key in ("wakes", "sleeps")
    )
    levels = {
        (str(half), str(model), str(level)): _average(*rest)
        for half, model, level, *rest in data.get("levels", ())
    }
    costs.pairs, costs.wakes, costs.sleeps, costs.levels = pairs, wakes, sleeps, levels


def _average(seconds: Any, samples: Any) -> Average:
    average = Average(float(seconds), int(samples))
    if not 0.0 <= average.seconds < math.inf:
        raise ValueError(f"not a duration: {seconds!r}")
    return average


class StateStore(Protocol):
    """Where the state is kept."""

    def open(self) -> None:
        """Take possession; StateLockedError when another llmux has it."""

    def load(self) -> State:
        """Return what was saved last, empty when nothing usable was."""

    def save(self, state: State) -> bool:
        """Keep the state; False when that failed. Quick, and never raises. Its definitions are never changed."""

    def close(self) -> None:
        """Give up possession."""


class NoState:
    """Keeps the state in memory only: for use as a library, and in tests."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()

    def open(self) -> None:
        """Do nothing."""

    def load(self) -> State:
        """Return what was saved last."""
        return self.state

    def save(self, state: State) -> bool:
        """Keep the state until the object goes."""
        self.state = state
        return True

    def close(self) -> None:
        """Do nothing."""


class StateFile:
    """The state in a file of its own, locked against a second llmux.

    ``warn(event, **fields)`` is called with what went wrong and was survived.
    """

    def __init__(
        self, path: str | os.PathLike[str], warn: Callable[..., object] = lambda _event, **_fields: None
    ) -> None:
        # The file itself, whatever links lead to it: by another name, or through another folder, a second llmux
        # must meet the same lock; and what is written by rename would replace a link.
        self.path = Path(os.path.realpath(path))
        self.lock_path = self.path.with_name(self.path.name + ".lock")
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._warn = warn
        self._locks: list[int] = []
        self._texts: dict[str, tuple[object, str]] = {}  # of definitions, as JSON
        self._written: bytes | None = None
        self._failing = False

    def open(self) -> None:
        """Create the folder and take the lock.

        StateLockedError when another llmux holds it; OSError when the folder cannot be made or written to,
        which is a mistake in the configuration and told at the start.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Python's descriptors are not inherited: no hook or engine keeps the lock beyond llmux.
        descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        self._locks = [descriptor]
        self._take(descriptor)
        # The file that is found is locked as well: a hard link to it lies beside another lock file. Once it has
        # been written anew, the other name stands for an old copy.
        with contextlib.suppress(OSError):  # there is none yet, or it cannot be read, which load() tells
            found = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            self._locks.append(found)
            self._take(found)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its owner is not named
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                raise
            holder = os.pread(self._locks[0], 32, 0).decode("ascii", "replace").strip()
            self.close()
            owner = f"the llmux with pid {holder}" if holder.isdecimal() else "another llmux"
            raise StateLockedError(
                f"{self.path} is in use by {owner}: stop that one, or give this one a `state:` of its own"
            ) from error

    def load(self) -> State:
        """Read the file. One that is damaged, or not ours, is renamed and warned of."""
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return State()
        except OSError as error:
            self._warn("state_file_unreadable", path=str(self.path), error=str(error))
            return State()
        try:
            state, damaged = _parse(raw)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            self._set_aside(str(error))
            return State()
        if damaged:
            named = ", ".join(repr(name) for name in damaged[:_NAMED])
            self._warn(
                "state_file_unreadable", path=str(self.path), error=f"its times of last use are damaged: {named}"
            )
        self._written = raw
        return state

    def save(self, state: State) -> bool:
        """Replace the file, unless it says the same already."""
        try:
            raw = _render(state, self._texts_of(state.definitions))
            if raw == self._written:
                return True
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            descriptor = os.open(self._temporary, flags, 0o600)
            with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor, for its mode
                _reserve(descriptor, len(raw))
                file.write(raw)
            os.replace(self._temporary, self.path)  # noqa: PTH105  # half the time of Path.replace
        except (OSError, ValueError, TypeError, RecursionError) as error:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            if not self._failing:
                self._failing = True
                self._warn("state_file_unwritable", path=str(self.path), error=str(error))
            self._written = None
            return False
        self._written = raw
        self._failing = False
        return True

    def _texts_of(self, definitions: Mapping[str, object]) -> Iterable[str]:
        # Most of the file, and mostly the same as before: of 2,000 models it took 10 ms to make them again.
        before, texts = self._texts, {}
        for name, definition in definitions.items():
            kept = before.get(name)
            if kept is None or kept[0] is not definition:
                kept = definition, f"{_json(name)}:{_json(definition)}"
            texts[name] = kept
        self._texts = texts
        return [text for _, text in texts.values()]

    def close(self) -> None:
        """Release the lock. Its file stays: deleting it would race with the next llmux."""
        while self._locks:
            os.close(self._locks.pop())

    def _set_aside(self, error: str) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self.path.with_name(f"{self.path.name}.damaged-{stamp}")
        try:
            self.path.rename(aside)
        except OSError as failed:
            error, aside = f"{error}; it could not be renamed: {failed}", self.path
        self._warn("state_file_set_aside", path=str(self.path), moved_to=str(aside), error=error)


def _reserve(descriptor: int, size: int) -> None:
    # ext4 writes a file whose blocks are not allocated yet to the disk when it replaces another: that took 1 ms.
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fallocate(descriptor, 0, size)


def _render(state: State, definitions: Iterable[str]) -> bytes:
    rest = {
        "version": VERSION,
        "holders": sorted(state.holders),
        "last_use": dict(state.last_use),
        "costs": state.costs,
        "levels": dict(state.levels),
        "hooks": state.hooks,
        "asked": state.asked,
    }
    return f'{_json(rest)[:-1]},"definitions":{{{",".join(definitions)}}}}}\n'.encode()


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _parse(raw: bytes) -> tuple[State, list[str]]:
    """Return the state, and the models whose time of last use is no time: they are left out."""
    document = json.loads(raw)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"not a state file of version {VERSION}")
    holders, last_use = document.get("holders"), document.get("last_use")
    if not isinstance(holders, list) or not all(isinstance(name, str) for name in holders):
        raise ValueError("`holders` is not a list of models")
    if not isinstance(last_use, dict):
        raise TypeError("`last_use` is not an object")
    times = {name: float(when) for name, when in last_use.items() if _is_finite(when)}
    hooks = tuple(
        (int(pid), int(started), str(boot), bool(ending and ending[0]))
        for pid, started, boot, *ending in document.get("hooks", ())
    )
    definitions = document.get("definitions", {})
    if not isinstance(definitions, dict):
        raise TypeError("`definitions` is not an object")
    levels = document.get("levels", {})
    if not isinstance(levels, dict):
        raise TypeError("`levels` is not an object")
    levels = {name: str(level) for name, level in levels.items()}
    state = State(
        frozenset(holders), times, document.get("costs"), definitions, levels, hooks, document.get("asked")
    )
    return state, sorted(last_use.keys() - times.keys())


def _is_finite(value: Any) -> bool:
    """Whether a number can be written again: ``1e400`` is read as an infinity, which JSON does not know."""
    try:
        return math.isfinite(float(value))
    except OverflowError:  # of 400 digits
        return False

"""GGUF files, in the places where people and programs keep them.

They are returned as models that llmux could serve, each with the hook script that wakes and sleeps it.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmux.config.setting_types import LONGEST_NAME, is_name
from llmux.survey.host import Container, Engine, Machine, Served

MOST_ENTRIES = 50_000
"""Files and folders that are looked at in each place; a home may hold millions."""

_DEEPEST = 8
_HEAD = 65_536  # bytes; general metadata comes first
_PART = re.compile(r"-(\d{5})-of-(\d{5})\Z")
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
Kinds = dict[Path, dict[str, str] | None]  # the general metadata of the files in a folder

_EMBEDDERS = re.compile(r"bert|embed|t5encoder|bge|gte-|e5-", re.IGNORECASE)
_RERANKERS = re.compile(r"rerank", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gguf:
    """One model. ``size`` is in bytes, of all its parts."""

    path: Path
    size: int
    architecture: str = ""
    projector: Path | None = None

    @property
    def name(self) -> str:
        """Its name: the file's, without the suffix, and without the number of a part."""
        return _PART.sub("", self.path.stem)

    @property
    def options(self) -> list[str]:
        """The options of llama-server besides the file."""
        if _RERANKERS.search(self.name):
            return ["--reranking"]
        if _EMBEDDERS.search(self.architecture) or _EMBEDDERS.search(self.name):
            return ["--embedding"]
        return ["--mmproj", str(self.projector)] if self.projector else []


@dataclass(slots=True)
class Found:
    """What was found, and in which places. ``cut`` are those with too many files to look at all of them.

    ``broken`` are files that cannot be read or are not whole, and the first of parts that are not all there.
    """

    models: list[Gguf] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    places: list[Path] = field(default_factory=list)
    cut: list[Path] = field(default_factory=list)


def places(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the folders where GGUF files may be, programs' own first."""
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    hugging_face = Path(environ.get("HF_HOME") or cache / "huggingface")
    return [
        Path(hub) if hub else hugging_face / "hub",
        Path(environ.get("LLAMA_CACHE") or cache / "llama.cpp"),
        home / "Library" / "Caches" / "llama.cpp",
        home / ".lmstudio" / "models",
        home / ".cache" / "lm-studio" / "models",
        home / "models",
    ]


def find(environ: Mapping[str, str], home: Path, here: Path | None = None) -> Found:
    """Look for models; each file is found once, by whichever path.

    ``here`` is one more folder, which comes first; its subfolders are not searched, as it may be any folder.
    """
    found = Found()
    seen: set[str] = set()
    depths = ({} if here is None else {here: 0}) | dict.fromkeys(places(environ, home), _DEEPEST)
    for place, deepest in depths.items():
        if not os.path.isdir(place):  # noqa: PTH112 (Path's own raises where nothing may be read)
            continue
        found.places.append(place)
        folders: dict[Path, Kinds] = {}
        for path in sorted(_files(place, found, deepest)):
            folders.setdefault(path.parent, {})[path] = _kind(path)
        for near in folders.values():
            projectors = _projectors(near)
            for path in near:
                real = os.path.realpath(path)
                if real not in seen:
                    seen.add(real)
                    model = _model(path, near, projectors)
                    if model is not None:
                        found.models.append(model)
                    elif _is_broken(path, near):
                        found.broken.append(path)
    return found


def read(path: Path) -> Gguf | None:
    """Read one file, and those that belong to it. None if it is no model by itself."""
    near = {other: _kind(other) for other in {path, *path.parent.glob("*.[gG][gG][uU][fF]")}}
    return _model(path, near, _projectors(near))


def _projectors(near: Kinds) -> list[Path]:
    return [path for path, said in near.items() if said is not None and _is_projector(said)]


def _model(path: Path, kinds: Kinds, projectors: list[Path]) -> Gguf | None:
    part, kind = _PART.search(path.stem), kinds[path]
    if kind is None or (part and part[1] != "00001") or not _is_model(kind):
        return None
    if not _is_whole(path, kinds):
        return None
    return Gguf(
        path,
        sum(os.path.getsize(one) for one in _parts(path)),  # noqa: PTH202 (as above)
        kind.get("general.architecture", ""),
        projectors[0] if len(projectors) == 1 else None,
    )


def _parts(path: Path) -> list[Path]:
    """Return the files that a model consists of, by the name of one of them."""
    part = _PART.search(path.stem)
    if part is None:
        return [path]
    names = (f"{path.stem[: part.start()]}-{number:05}-of-{part[2]}" for number in range(1, int(part[2]) + 1))
    return [path.with_name(name + path.suffix) for name in names]


def _is_whole(path: Path, kinds: Kinds) -> bool:
    return all(kinds.get(one) is not None for one in _parts(path))


def _is_broken(path: Path, kinds: Kinds) -> bool:
    """Return whether it is not whole; of a model in parts, this is said of the first that is there."""
    first = next((one for one in _parts(path) if one in kinds), path)
    return path == first and not _is_whole(path, kinds) and os.path.isfile(path)  # noqa: PTH113 (as above)


def _is_projector(said: Mapping[str, str]) -> bool:
    return said.get("general.type") == "mmproj" or said.get("general.architecture") == "clip"


def _is_model(said: Mapping[str, str]) -> bool:
    return said.get("general.type", "model") == "model" and not _is_projector(said)


def _files(place: Path, found: Found, deepest: int) -> Iterator[Path]:
    left = MOST_ENTRIES
    for folder, folders, files in os.walk(place):
        depth = len(Path(folder).relative_to(place).parts)
        folders[:] = [] if depth >= deepest else sorted(name for name in folders if name != "blobs")
        left -= len(files) + len(folders)
        yield from (Path(folder, name) for name in files if name.lower().endswith(".gguf"))
        if left <= 0:
            found.cut.append(place)
            return


def _kind(path: Path) -> dict[str, str] | None:
    """Return the file's general metadata; None if it is not a GGUF file, cannot be read, or ends within them."""
    if not os.path.isfile(path):  # noqa: PTH113 (as above); to open a pipe would wait for a writer
        return None
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if head[:4] != b"GGUF":
        return None
    said: dict[str, str] = {}
    try:
        (count,) = struct.unpack_from("<Q", head, 16)
        at = 24
        for _ in range(count):
            key, at = _text(head, at)
            if not key.startswith("general."):
                break
            (kind,) = struct.unpack_from("<I", head, at)
            if kind == _STRING:
                said[key], at = _text(head, at + 4)
            else:
                at = _skip(head, at + 4, kind)
    except struct.error:
        if len(head) < _HEAD:
            return None
    except (KeyError, UnicodeDecodeError):
        pass  # what was read so far is returned
    return said


def _text(head: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, at)
    end = at + 8 + length
    if end > len(head):
        raise struct.error
    return head[at + 8 : end].decode(), end


def _skip(head: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _text(head, at)[1]
    if kind != _ARRAY:
        return at + _SIZES[kind]
    inner, count = struct.unpack_from("<IQ", head, at)
    at += 12
    if count > len(head):  # it would be an offset that is none
        raise struct.error
    if inner != _STRING:
        return at + _SIZES[inner] * int(count)
    for _ in range(count):
        at = _text(head, at)[1]
    return at


# By preference: the first of these hook scripts that exists.
_SCRIPTS = {
    "llama.cpp": ("llama-cpp",),
    "vLLM": ("vllm-process", "vllm-sleep"),
    "SGLang": ("sglang",),
    "Ollama": ("ollama",),
    "TabbyAPI": ("tabbyapi",),
}
_STAYS = frozenset({"ollama", "llama-cpp-router", "tabbyapi"})
"""Scripts for a server that runs all the time and has many models."""

_KEPT = "the container has to be there after it was stopped (not run with --rm), or be made anew with RUN"
_FOREIGN = (
    "it was not started by the hook, which can therefore not end it: end it once by hand before llmux starts"
)

_NO_NAMES = "no names for llmux; let the engine use others"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model. ``source`` is the value for its hook script: a file, a name, a container.

    ``port`` is None if any free one will do; ``about`` is for people; ``remark`` is what they have to do.
    """

    name: str
    script: str
    source: str
    about: str
    port: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    remark: str = ""


def candidates(
    models: Iterable[Gguf], engines: Iterable[Engine], machine: Machine, scripts: Collection[str]
) -> tuple[list[Candidate], list[str]]:
    """Return what could be served, running engines first, and what was found but cannot be served.

    ``scripts`` are the names of the hook scripts that exist.
    """
    found: list[Candidate] = []
    left: list[str] = []
    for engine in engines:
        mine = {model.name: _running(engine, model, machine, scripts) for model in engine.models}
        known = [one for one in mine.values() if one is not None]
        # What is no server for many models has one, and perhaps several names for it, or adapters.
        taken = known if known and known[0].script in _STAYS else known[:1]
        found += taken
        where = f"{engine.kind} on port {engine.port}"
        if more := known[len(taken) :]:
            names = ", ".join(one.name for one in more)
            left.append(f"{where} has other names, too: {names}; make them `aliases` of {taken[0].name}")
        if unnamed := [name for name, one in mine.items() if one is None and not is_name(name)]:
            left.append(f"{where}: {', '.join(map(repr, unnamed))}: {_NO_NAMES}")
        elif not known:
            left.append(_why_not(engine))
    told = {one.source for one in found}
    if "llama-cpp" in scripts:
        found += [of_file(model) for model in models if str(model.path) not in told]
    return unique(found), left


def of_file(model: Gguf, name: str = "") -> Candidate:
    """Return a GGUF file as a model for llama-server, by its own name or another."""
    env = {"ARGS": shlex.join(model.options)} if model.options else {}
    about = f"{gibibytes(model.size)}, {model.path}"
    return Candidate(name or _printable(model.name), "llama-cpp", str(model.path), about, env=env)


def _printable(name: str) -> str:
    """Return a name which llmux takes: a file's, or an engine's, may hold anything."""
    name = "".join(character if character.isprintable() else "_" for character in name).strip()
    return name[:LONGEST_NAME].strip() or "model"


def unique(found: Iterable[Candidate]) -> list[Candidate]:
    """Give each a name of its own."""
    named: dict[str, Candidate] = {}
    for one in found:
        name, number = one.name, 2
        while name in named:
            end = f"-{number}"
            name, number = one.name[: LONGEST_NAME - len(end)] + end, number + 1
        named[name] = one if name == one.name else replace(one, name=name)
    return list(named.values())


def gibibytes(size: int) -> str:
    """Format a size for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _running(engine: Engine, model: Served, machine: Machine, scripts: Collection[str]) -> Candidate | None:
    container = machine.container_at(engine.port)
    script = _script(engine, container, scripts)
    if script is None or (script == "llama-cpp" and not model.source):
        return None
    if script != "llama-cpp" and not is_name(model.name):  # llama-server answers to any
        return None
    if container is not None and script == "docker":
        return _contained(engine, model, container)
    name, source, remark = model.name, model.source or model.name, _FOREIGN
    if script in _STAYS:
        source, remark = name, ""
    elif engine.sleeps:  # the script does not start an engine without a source
        source, remark = "" if container else source, ""
    elif script == "llama-cpp":
        name = _printable(Path(name).stem if "/" in name else name)
    about = f"{engine.kind} on port {engine.port}, which runs now"
    return Candidate(name, script, source, about, port=engine.port, remark=remark)


def _script(engine: Engine, container: Container | None, scripts: Collection[str]) -> str | None:
    """Return the script for a running engine, None if there is none."""
    wanted = _SCRIPTS.get(engine.kind, ())
    if engine.router:
        wanted = ("llama-cpp-router",)
    elif engine.sleeps:
        wanted = ("vllm-sleep",)
    elif container is not None and not _STAYS.intersection(wanted):
        wanted = ("docker",)
    return next((name for name in wanted if name in scripts), None)


def _contained(engine: Engine, model: Served, container: Container) -> Candidate:
    about = f"{engine.kind} in the container {container.name} ({container.image}), port {engine.port}"
    env = {"EXPECT": f'"{model.name}"'}
    return Candidate(model.name, "docker", container.name, about, port=engine.port, env=env, remark=_KEPT)


def _why_not(engine: Engine) -> str:
    if engine.kind == "llama-swap":
        return f"{engine.about}; `llmux import llama-swap FILE` makes a configuration of its file"
    if engine.kind == "llmux":
        return f"{engine.about}; one llmux is enough for one GPU"
    if engine.locked or not engine.models:
        return engine.about
    return f"{engine.about}; there is no hook script for it: write your own, or use hooks/process.sh"

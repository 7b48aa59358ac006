"""GGUF files, where people and programs keep them."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MOST_ENTRIES = 50_000
"""Files and folders that are looked at in each place; a home may hold millions."""

_DEEPEST = 8
_HEAD = 65_536  # bytes; what is said about a model in general comes first
_PART = re.compile(r"-(\d{5})-of-(\d{5})\Z")
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_EMBEDDERS = re.compile(r"bert|embed|t5encoder|bge|gte-|e5-", re.IGNORECASE)
_RERANKERS = re.compile(r"rerank", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gguf:
    """One model. ``size`` is in bytes, that of all its parts."""

    path: Path
    size: int
    architecture: str = ""
    projector: Path | None = None

    @property
    def name(self) -> str:
        """What to call it: its file, without what says that it is one, or a part of one."""
        return _PART.sub("", self.path.stem)

    @property
    def options(self) -> list[str]:
        """What llama-server has to be told besides the file."""
        if _RERANKERS.search(self.name):
            return ["--reranking"]
        if _EMBEDDERS.search(self.architecture) or _EMBEDDERS.search(self.name):
            return ["--embedding"]
        return ["--mmproj", str(self.projector)] if self.projector else []


@dataclass(slots=True)
class Found:
    """What was found, and in which places. ``cut`` are those that hold too much to look at all of it."""

    models: list[Gguf] = field(default_factory=list)
    places: list[Path] = field(default_factory=list)
    cut: list[Path] = field(default_factory=list)


def places(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Return the folders where GGUF files may be, those that programs use first."""
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


def find(environ: Mapping[str, str], home: Path) -> Found:
    """Look for models; the same file is found once, whatever leads to it."""
    found = Found()
    seen: set[str] = set()
    for place in dict.fromkeys(places(environ, home)):
        if not os.path.isdir(place):  # noqa: PTH112 (Path's own raises where nothing may be read)
            continue
        found.places.append(place)
        kinds = {path: _kind(path) for path in sorted(_files(place, found))}
        for path in kinds:
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                model = _model(path, {other: kind for other, kind in kinds.items() if other.parent == path.parent})
                if model is not None:
                    found.models.append(model)
    return found


def read(path: Path) -> Gguf | None:
    """Read one file, and what is beside it. None when it is no model by itself."""
    return _model(path, {other: _kind(other) for other in {path, *path.parent.glob("*.gguf")}})


def _model(path: Path, kinds: Mapping[Path, dict[str, str] | None]) -> Gguf | None:
    part, kind = _PART.search(path.stem), kinds[path]
    if kind is None or (part and part[1] != "00001") or not _is_model(kind):
        return None
    parts = [path]
    if part:
        start = path.name[: path.name.rindex(part[0])]
        parts = [other for other in kinds if other.name.startswith(start) and _PART.search(other.stem)]
    projectors = [other for other, said in kinds.items() if said is not None and _is_projector(said)]
    return Gguf(
        path,
        sum(os.path.getsize(part) for part in parts if kinds[part] is not None),  # noqa: PTH202 (as above)
        kind.get("general.architecture", ""),
        projectors[0] if len(projectors) == 1 else None,
    )


def _is_projector(said: Mapping[str, str]) -> bool:
    return said.get("general.type") == "mmproj" or said.get("general.architecture") == "clip"


def _is_model(said: Mapping[str, str]) -> bool:
    return said.get("general.type", "model") == "model" and not _is_projector(said)


def _files(place: Path, found: Found) -> Iterator[Path]:
    left = MOST_ENTRIES
    for folder, folders, files in os.walk(place):
        depth = len(Path(folder).relative_to(place).parts)
        folders[:] = [] if depth >= _DEEPEST else sorted(name for name in folders if name != "blobs")
        left -= len(files) + len(folders)
        yield from (Path(folder, name) for name in files if name.lower().endswith(".gguf"))
        if left <= 0:
            found.cut.append(place)
            return


def _kind(path: Path) -> dict[str, str] | None:
    """Return what the file says of itself in general; None when it is no GGUF file, or cannot be read."""
    if not os.path.isfile(path):  # noqa: PTH113 (as above); to open a pipe would wait for whoever writes to it
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
    except (struct.error, KeyError, UnicodeDecodeError):
        pass  # what was said until there is what there is
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
    if inner != _STRING:
        return at + _SIZES[inner] * int(count)
    for _ in range(count):
        at = _text(head, at)[1]
    return at

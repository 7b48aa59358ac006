"""Reading a record: its runs, one for each time that a llmux began to write."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmux.errors import LLMuxError

FORMAT = 1


class RecordError(LLMuxError):
    """A record cannot be read; says where and what to do."""


Lines = list[Mapping[str, Any]]


@dataclass(slots=True)
class RecordedRun:
    """What one llmux wrote from a ``start`` line on, by type, in the order of the file."""

    start: Mapping[str, Any]
    requests: Lines = field(default_factory=list)
    switches: Lines = field(default_factory=list)
    decisions: Lines = field(default_factory=list)
    others: Lines = field(default_factory=list)
    lost: int = 0  # lines that llmux could not write


def looks_like_record(first_line: str) -> bool:
    """Say whether a file that begins like this is a record."""
    try:
        value = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "type" in value and "arrival_s" not in value


def read_record(path: Path) -> list[RecordedRun]:
    """Read the runs of a record, oldest first; ``-`` is standard input. Never returns an empty list.

    Raises:
        RecordError: it cannot be read, is no record, or has a damaged line; the message names it.

    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error):
        raise RecordError(f"{path}: the gzip data is damaged or cut off") from None
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from None
    return parse_record(str(path), data)


def parse_record(name: str, data: bytes) -> list[RecordedRun]:
    """Read the runs of a record from its bytes; as ``read_record``."""
    lines = data.split(b"\n")
    runs: list[RecordedRun] = []
    torn: int | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value = _object(line)
        kind = value.get("type") if value is not None else None
        # What a crash or a full disk tears is followed by the word of the next start or of a loss, or by nothing.
        if torn is not None and kind not in ("start", "lost"):
            raise RecordError(f"{name}:{torn}: is no line of a record: it is no JSON object")
        torn = number if value is None else None
        if value is None:
            continue
        if kind == "start" and value.get("format") != FORMAT:
            raise RecordError(f"{name}:{number}: format {value.get('format')!r}; this llmux reads {FORMAT}")
        if kind != "start" and not runs:
            raise RecordError(f"{name}:{number}: is no record of llmux: it does not begin with a `start` line")
        if kind == "start":
            runs.append(RecordedRun(value))
        else:
            _add(runs[-1], kind, value)
    if not runs:
        raise RecordError(f"{name}: holds no record; set `record: FILE` in the configuration to have one written")
    return runs


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _add(run: RecordedRun, kind: object, value: Mapping[str, Any]) -> None:
    if kind == "request":
        run.requests.append(value)
    elif kind == "switch":
        run.switches.append(value)
    elif kind == "decision":
        run.decisions.append(value)
    elif kind == "lost":
        lines = value.get("lines")
        run.lost += lines if isinstance(lines, int) else 0
    else:
        run.others.append(value)

"""Traffic: which model is requested, when, and how much work that is.

It is read from CSV or JSON lines, gzip too:

- CSV with a header, JSON lines: ``arrival_s``, ``model``, ``prompt_tokens``, ``output_tokens``, perhaps ``key``;
- BurstGPT as it is: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``;

llmux's own record is read by ``recorded``.
Further columns are ignored. Times are shifted so that the first arrival is not before 0.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from llmux.errors import LLMuxError
from llmux.observability.record import looks_like_record


class TraceError(LLMuxError):
    """A trace, a cost matrix or a synthetic load is invalid; the message says where, and what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a trace.

    A job of a closed loop has no arrival of its own (None): it arrives ``think`` seconds after the answer to the
    job which names it as its ``successor`` (an index into the trace).
    """

    arrival: float | None  # seconds from the start of the trace
    model: str
    prompt_tokens: int
    output_tokens: int
    successor: int | None = None
    think: float = 0.0  # seconds between this job's answer and its successor
    service: float | None = None  # seconds from admission to the end, with everything else that is served
    alone: float | None = None  # seconds that it would take if it were served alone
    first: float = 0.0  # seconds of either until the first byte; if set, tokens do not matter
    patience: float | None = None  # seconds after which it leaves the queue
    tokens: tuple[int, int] | None = None  # read and written, if the above has only its times
    key: str = ""  # the name of its key
    keep: float | None = None  # idle seconds that its model stays awake for; see ``RequestFinished``

    @property
    def size(self) -> tuple[int, int]:
        """The tokens that it reads and writes."""
        return self.tokens or (self.prompt_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs, and a name for messages. The order of jobs is free; arrivals are at or after 0."""

    name: str
    jobs: Sequence[Job]

    @property
    def models(self) -> tuple[str, ...]:
        """The models by their first arrival; those that only occur as successors come last."""
        first: dict[str, float] = {}
        never = float("inf")
        for job in self.jobs:
            arrival = never if job.arrival is None else job.arrival
            if arrival < first.setdefault(job.model, arrival):
                first[job.model] = arrival
        return tuple(sorted(first, key=first.__getitem__))

    @property
    def closed_loop(self) -> bool:
        """Whether some jobs wait for the answers to others."""
        return any(job.successor is not None for job in self.jobs)

    def stretched(self, factor: float) -> Trace:
        """Return the same jobs with all times multiplied by ``factor``: 8 makes the load eight times lighter."""
        jobs = [
            replace(job, arrival=None if job.arrival is None else job.arrival * factor, think=job.think * factor)
            for job in self.jobs
        ]
        return replace(self, jobs=jobs)

    def sliced(self, start: float, end: float) -> Trace:
        """Return the arrivals in start ≤ t < end, with times relative to ``start``. Not for closed loops."""
        if self.closed_loop:
            raise TraceError("a closed loop has no slices: its arrivals depend on its answers")
        jobs = [
            replace(job, arrival=job.arrival - start)
            for job in self.jobs
            if job.arrival is not None and start <= job.arrival < end
        ]
        return replace(self, jobs=jobs)

    def busiest(self, count: int) -> Trace:
        """Return the jobs of the ``count`` models with the most jobs. Not for closed loops."""
        if self.closed_loop:
            raise TraceError("models cannot be taken out of a closed loop")
        kept = {model for model, _ in Counter(job.model for job in self.jobs).most_common(count)}
        return replace(self, jobs=[job for job in self.jobs if job.model in kept])


ARRIVAL, MODEL, PROMPT, OUTPUT = "arrival_s", "model", "prompt_tokens", "output_tokens"
KEY = "key"
# BurstGPT's names for the same.
OTHER_NAMES = {"Timestamp": ARRIVAL, "Model": MODEL, "Request tokens": PROMPT, "Response tokens": OUTPUT}
NEEDED = (ARRIVAL, MODEL, PROMPT, OUTPUT)
Row = tuple[int, Mapping[str, Any]]  # line number, values


def read_trace(path: Path) -> Trace:
    """Read a trace; ``-`` is standard input.

    Raises:
        TraceError: it cannot be read, or a line is invalid; the message names the line.

    """
    try:
        text = _text(path)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error):
        raise TraceError(f"{path}: the gzip data is damaged or cut off") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    is_json = text.lstrip()[:1] == "{"
    rows = _json_rows(path, text) if is_json else _csv_rows(path, text)
    jobs = [_job(path, line, values) for line, values in rows]
    if not jobs:
        raise TraceError(f"{path}: has no requests")
    start = min(0.0, *(job.arrival or 0.0 for job in jobs))
    if start < 0.0:
        jobs = [replace(job, arrival=(job.arrival or 0.0) - start) for job in jobs]
    return Trace(path.name, jobs)


def is_record(path: Path) -> bool:
    """Return whether a file is llmux's own record; False for unreadable files, and for ``-``."""
    if str(path) == "-":
        return False
    try:
        return looks_like_record(_text(path).lstrip().partition("\n")[0])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return False


def _text(path: Path) -> str:
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return data.decode("utf-8-sig")


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [OTHER_NAMES.get(name.strip(), name.strip()) for name in reader.fieldnames or ()]
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise TraceError(
            f"{path}:1: the header lacks {', '.join(missing)}; write {','.join(NEEDED)}, or BurstGPT's header"
        )
    reader.fieldnames = header
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise TraceError(f"{path}:{reader.line_num + 1}: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}:{number}: is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise TraceError(f"{path}:{number}: is not a JSON object")
        values = {OTHER_NAMES.get(key, key): value for key, value in values.items()}
        if ARRIVAL in values:
            yield number, values
        elif "event" not in values and "switch" not in values:
            raise TraceError(f"{path}:{number}: lacks {ARRIVAL}")


def _job(path: Path, line: int, values: Mapping[str, Any]) -> Job:
    if None in values or any(values.get(name) is None for name in NEEDED):
        lacking = [name for name in NEEDED if values.get(name) is None]
        what = f"lacks {', '.join(lacking)}" if lacking else "has more values than the header"
        raise TraceError(f"{path}:{line}: {what}")
    model = values[MODEL]
    if isinstance(model, int) and not isinstance(model, bool):
        model = str(model)
    if not isinstance(model, str):
        raise TraceError(f"{path}:{line}: {MODEL} is not a name: {model!r}")
    model = model.strip()
    if not model:
        raise TraceError(f"{path}:{line}: {MODEL} is empty")
    arrival = _number(path, line, ARRIVAL, values)
    tokens = [_number(path, line, name, values) for name in (PROMPT, OUTPUT)]
    for name, count in zip((PROMPT, OUTPUT), tokens, strict=True):
        if count < 0:
            raise TraceError(f"{path}:{line}: {name} is negative: {count:g}")
    key = values.get(KEY)
    return Job(arrival, model, int(tokens[0]), int(tokens[1]), key="" if key is None else str(key).strip())


def _number(path: Path, line: int, name: str, values: Mapping[str, Any]) -> float:
    try:
        number = math.nan if isinstance(values[name], bool) else float(values[name])
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TraceError(f"{path}:{line}: {name} is not a number: {values[name]!r}")
    return number


def read_yaml(path: Path) -> Any:
    """Return the contents of a YAML or JSON file. Raises TraceError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path}: {error}") from None

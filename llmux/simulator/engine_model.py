"""How fast an engine works: continuous batching as processor sharing.

``EngineModel`` is what is known of one, ``Serving`` is one at work: streams that share it, and what waits in it
because its slots are taken.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from llmux.simulator.trace import Job, TraceError

UNITS = ("slots", "decode", "prefill", "slowdown", "speed")
TOKENS = ("decode", "prefill")  # mean nothing to answers that are known by their seconds


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Speed of an engine.

    Each of ``b`` streams in flight advances at ``decode / (1 + slowdown·(b - 1))`` tokens/s. A prompt counts in
    the same currency, as ``prompt_tokens · decode / prefill`` tokens of decoding. What is more than ``slots``
    waits in the engine, in the order in which it came.
    """

    slots: int = 16  # requests served at once
    decode: float = 60.0  # tokens/s of one stream alone
    prefill: float = 6000.0  # prompt tokens/s
    slowdown: float = 0.03  # what each further stream costs the others, as a share
    speed: float = 1.0  # how much faster than that it is in all, and than a record says

    def rate(self, streams: int) -> float:
        """Return the tokens/s of each of so many streams, at least one."""
        return self.decode * self.speed / (1.0 + self.slowdown * (streams - 1))

    def rates(self) -> list[float]:
        """Return the tokens/s of each stream by the number of streams, from 0 to ``slots``."""
        return [0.0] + [self.rate(b) for b in range(1, self.slots + 1)]

    def before_first_token(self, job: Job) -> float:
        """Return the work until the first token is out, in tokens of decoding."""
        if job.alone is not None:
            return min(job.first, job.alone) * self.decode
        return job.prompt_tokens * self.decode / self.prefill + 1.0

    def work(self, job: Job) -> float:
        """Return the whole work of a job, in tokens of decoding; an answer has at least one token."""
        if job.alone is not None:
            return job.alone * self.decode
        return job.prompt_tokens * self.decode / self.prefill + max(1.0, job.output_tokens)

    def least(self, job: Job) -> float:
        """Return the seconds that a job takes if nothing else is served."""
        return self.work(job) / self.rate(1)

    def load(self, jobs: Iterable[Job], seconds: float) -> float:
        """Return the share of the engine's full batches that ``jobs`` would fill over ``seconds``."""
        full = self.slots * self.rate(self.slots)
        return sum(map(self.work, jobs)) / (full * seconds) if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines: one for each model that has its own, ``usual`` for the others."""

    usual: EngineModel = field(default_factory=EngineModel)
    own: Mapping[str, EngineModel] = field(default_factory=dict)

    def of(self, model: str) -> EngineModel:
        """Return the engine of a model."""
        return self.own.get(model, self.usual)

    def load(self, jobs: Iterable[Job], seconds: float) -> float:
        """Return the share of the time in which ``jobs`` would fill the engines' batches, one engine at a time."""
        by_model: dict[str, list[Job]] = {}
        for job in jobs:
            by_model.setdefault(job.model, []).append(job)
        return sum(self.of(model).load(each, seconds) for model, each in by_model.items())


def parse_engines(
    texts: Iterable[str],
    usual: EngineModel,
    models: Iterable[str],
    fitted: Mapping[str, EngineModel] | None = None,
) -> Engines:
    """Read ``--engine``: ``MODEL:slots=4,decode=40``, or a YAML or JSON file of ``{MODEL: {slots: 4}}``.

    What is not said of a model stays as it is in ``fitted``, which a record has shown, else as in ``usual``; later
    words win. ``models`` are those of the traffic.

    Raises:
        TraceError: a word is invalid; the message says which, and what to write.

    """
    own, known = dict(fitted or {}), sorted(models)
    for text in texts:
        path = Path(text)
        if path.suffix.lower() in (".yaml", ".yml", ".json") or path.is_file():
            sections = _file(path)
        else:
            model, colon, words = text.rpartition(":")
            if not colon or not model:
                raise TraceError(f"--engine {text}: write MODEL:KEY=NUMBER,… with {', '.join(UNITS)}, or a file")
            sections = {model: _words(text, words)}
        for model, values in sections.items():
            where = f"{path}: {model}" if path.is_file() else f"--engine {text}"
            if model not in known:
                raise TraceError(f"{where}: the traffic has no model {model!r}, only {', '.join(known)}")
            if fitted is not None and (useless := [key for key in values if key in TOKENS]):
                raise TraceError(
                    f"{where}: a record's answers take what they took, in seconds: for {useless[0]}, write speed=2"
                    " for an engine that is twice as fast"
                )
            own[model] = replace(own.get(model, usual), **_checked(where, values))
    return Engines(usual, own)


def _words(text: str, words: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        key, _, value = word.partition("=")
        values[key.strip()] = value
    if not values:
        raise TraceError(f"--engine {text}: says nothing of the engine; write MODEL:KEY=NUMBER,…")
    return values


def _file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"{path}: {error}") from None
    if not isinstance(data, Mapping) or not all(isinstance(values, Mapping) for values in data.values()):
        raise TraceError(f"{path}: holds no engines; write {{MODEL: {{slots: 4, decode: 40}}}}")
    return {str(model): dict(values) for model, values in data.items()}


def _checked(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {each.name: each.type for each in fields(EngineModel)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            raise TraceError(f"{where}: {key!r} is unknown; use {', '.join(UNITS)}")
        try:
            number = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        whole = kinds[key] == "int"
        least = 0.0 if key == "slowdown" else 1.0 if whole else 1e-9
        if not least <= number < float("inf") or (whole and number != int(number)):
            wanted = "a whole number > 0" if whole else "a number ≥ 0" if key == "slowdown" else "a number > 0"
            raise TraceError(f"{where}: {key} must be {wanted}, not {value!r}")
        checked[key] = int(number) if whole else number
    return checked


EPSILON = 1e-9  # tokens: work smaller than this is done


@dataclass(slots=True)
class Serving:
    """Streams of one engine. All advance alike, so that one number, ``made``, is the progress of each."""

    engine: EngineModel
    time: float = 0.0  # up to which ``made`` is right
    made: float = 0.0  # tokens that a stream in flight since the start would have got
    streams: list[tuple[float, int]] = field(default_factory=list)  # heap of (progress at which it ends, job)
    waiting: deque[tuple[int, Job]] = field(default_factory=deque)
    history: list[tuple[float, float]] = field(default_factory=list)  # (progress, time) when the speed changes
    first_tokens: list[tuple[float, int]] = field(default_factory=list)  # (progress at its first token, job)
    speed: float = 0.0  # tokens/s of each stream
    rates: list[float] = field(init=False)  # of the engine, by the number of streams

    def __post_init__(self) -> None:
        self.rates = self.engine.rates()

    def add(self, index: int, job: Job, time: float) -> None:
        """Take in a job, whose work begins at once if a slot is free."""
        self.made += (time - self.time) * self.speed
        self.time = time
        if len(self.streams) >= self.engine.slots:
            self.waiting.append((index, job))
        else:
            self._begin(index, job)

    def finish(self, time: float) -> int:
        """Take out the stream that is done, and begin with what has waited longest; return its job."""
        made = self.made + (time - self.time) * self.speed
        self.time = time
        work, index = heapq.heappop(self.streams)
        self.made = made = max(made, work)
        if self.waiting:
            self._begin(*self.waiting.popleft())
        else:
            self.history.append((made, time))
            self.speed = self.rates[len(self.streams)]
        return index

    def cut(self, index: int, time: float) -> None:
        """Take out a job before its end, if it is there."""
        self.made += (time - self.time) * self.speed
        self.time = time
        self.waiting = deque(each for each in self.waiting if each[0] != index)
        left = [each for each in self.streams if each[1] != index]
        if len(left) == len(self.streams):
            return
        self.streams[:] = left
        heapq.heapify(self.streams)
        self.first_tokens = [each for each in self.first_tokens if each[1] != index or each[0] <= self.made]
        self.history.append((self.made, time))
        self.speed = self.rates[len(left)]
        if self.waiting:
            self._begin(*self.waiting.popleft())

    def _begin(self, index: int, job: Job) -> None:
        made, engine = self.made, self.engine
        heapq.heappush(self.streams, (made + engine.work(job), index))
        self.first_tokens.append((made + engine.before_first_token(job), index))
        self.history.append((made, self.time))
        self.speed = self.rates[len(self.streams)]

    def place_first_tokens(self, end: float, times: list[float | None]) -> None:
        """Turn the progress at which each first token came into a time: progress is linear in between."""
        made = self.made + (end - self.time) * self.speed
        history, position = [*self.history, (made, end)], 0
        before_made, before = after_made, after = history[0]
        last = len(history) - 1
        for progress, index in sorted(self.first_tokens):
            if progress > made + EPSILON:
                break
            while after_made < progress and position < last:
                before_made, before = after_made, after
                position += 1
                after_made, after = history[position]
            width = after_made - before_made
            share = (progress - before_made) / width if width > 0 and progress < after_made else 1.0
            times[index] = before + share * (after - before)

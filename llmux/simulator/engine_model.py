"""How fast an engine works: continuous batching as processor sharing; and fitting that to a record.

``EngineModel`` describes an engine, ``Serving`` is one in operation: the streams that share it, and the requests
which wait in it for a slot.

``fit`` estimates how many requests an engine serves at once, and how much they slow each other down. A recorded
service time depends on what else was served. For a guess of ``slots`` and ``slowdown`` this can be removed:
requests in the engine begin as slots become free, and then advance at the common speed; the integral of that speed
is the time that the request would have taken alone. The best guess is the one for which these times are best
explained by the request itself, the bytes of its body and of its answer. If answers are streamed, the guesses have
no more slots than streams were seen at once.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llmux.config.setting_types import is_file
from llmux.simulator.trace import Job, TraceError, read_yaml

UNITS = ("slots", "decode", "prefill", "slowdown", "speed")
TOKENS = ("decode", "prefill")  # have no meaning for answers that are known by their seconds


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Speed of an engine.

    Each of ``b`` streams in flight advances at ``decode / (1 + slowdown·(b - 1))`` tokens/s. A prompt counts in
    the same unit, as ``prompt_tokens · decode / prefill`` tokens of decoding. Requests beyond ``slots`` wait in
    the engine, in order of arrival.
    """

    slots: int = 16  # requests served at once
    decode: float = 60.0  # tokens/s of one stream alone
    prefill: float = 6000.0  # prompt tokens/s
    slowdown: float = 0.03  # what each further stream costs the others, as a share
    speed: float = 1.0  # a factor on all of that, and on what a record says

    def rate(self, streams: int) -> float:
        """Return the tokens/s of each of ``streams`` streams, at least one."""
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
        """Return the whole work of a job, in tokens of decoding; every answer has at least one token."""
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

    What is not given for a model is taken from ``fitted``, which comes from a record, else from ``usual``; later
    words win. ``models`` are those of the traffic.

    Raises:
        TraceError: a word is invalid; the message says which, and what to write.

    """
    own, known = dict(fitted or {}), sorted(models)
    for text in texts:
        path = Path(text)
        if path.suffix.lower() in (".yaml", ".yml", ".json") or is_file(path):
            sections = _file(path)
        else:
            model, colon, words = text.rpartition(":")
            if not colon or not model:
                raise TraceError(f"--engine {text}: write MODEL:KEY=NUMBER,… with {', '.join(UNITS)}, or a file")
            sections = {model: _words(text, words)}
        for model, values in sections.items():
            where = f"{path}: {model}" if is_file(path) else f"--engine {text}"
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
    data = read_yaml(path)
    if not isinstance(data, Mapping) or not all(isinstance(values, Mapping) for values in data.values()):
        raise TraceError(f"{path}: has no engines; write {{MODEL: {{slots: 4, decode: 40}}}}")
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


EPSILON = 1e-9  # tokens: less work than this counts as done


@dataclass(slots=True)
class Serving:
    """Streams of one engine. All advance equally, so one number, ``made``, is the progress of each."""

    engine: EngineModel
    time: float = 0.0  # the time to which ``made`` refers
    made: float = 0.0  # tokens that a stream in flight since the start would have received
    streams: list[tuple[float, int]] = field(default_factory=list)  # heap of (progress at which it ends, job)
    waiting: deque[tuple[int, Job]] = field(default_factory=deque)
    history: list[tuple[float, float]] = field(default_factory=list)  # (progress, time) when the speed changes
    first_tokens: list[tuple[float, int]] = field(default_factory=list)  # (progress at its first token, job)
    speed: float = 0.0  # tokens/s of each stream
    rates: list[float] = field(init=False)  # of the engine, by the number of streams

    def __post_init__(self) -> None:
        self.rates = self.engine.rates()

    def add(self, index: int, job: Job, time: float) -> None:
        """Add a job, whose work begins at once if a slot is free."""
        self.made += (time - self.time) * self.speed
        self.time = time
        if len(self.streams) >= self.engine.slots:
            self.waiting.append((index, job))
        else:
            self._begin(index, job)

    def finish(self, time: float) -> int:
        """Remove the stream that is done, and begin the job that waited longest; return the job that is done."""
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
        """Remove a job before its end, if it is there."""
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
        """Convert the progress at which each first token came into a time: progress is linear in between."""
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


SLOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SLOWDOWNS = (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SAMPLES = 1000  # services that are used to choose; all are then calculated
BETTER = 0.9  # a guess is preferred to a simpler one if its error is at most this share of the other's
PIECE = 0.005  # seconds: an answer that passes in less came in one piece
TOGETHER = 0.1  # seconds: requests that begin within this time, as after a wake, have no order
MOST_STREAMED = 0.8  # share of the answers: from here on streams show how many are served at once
RARE = 0.02  # share of the time that is ignored: clocks and networks are inexact
UNSEEN = 1024  # slots of an engine that was never seen full
LEAST = 1e-4  # seconds: no answer takes less


@dataclass(frozen=True, slots=True)
class Service:
    """One recorded service. Times in seconds."""

    admitted: float
    ended: float
    first: float  # when its first byte came
    asked: int  # bytes of its body
    answered: int  # bytes of its answer


@dataclass(frozen=True, slots=True)
class Fit:
    """An engine, and what each service would have taken alone, in the order of the services given."""

    engine: EngineModel
    alone: Sequence[float]
    first: Sequence[float]  # of ``alone``, until the first byte
    most: int  # the most in flight at once
    error: float  # of ``alone`` as predicted from bytes, as a share of its root mean square


def fit(services: Sequence[Service], limit: int | None) -> Fit:
    """Fit an engine to its recorded services; ``limit`` is how many llmux admits at once (None: all)."""
    sample = services[:SAMPLES]
    most = _most(sample)
    unlimited = limit or max(UNSEEN, most)
    best, least = (unlimited, 0.0), float("inf")
    for slots in _candidates(sample, most, unlimited):
        course = _Course(sample, slots)
        for slowdown in SLOWDOWNS if most > 1 else (0.0,):
            error = _error(sample, list(course.alone(slowdown)))
            simpler = slots == best[0]
            if error < least * (1.0 if simpler else BETTER):
                best, least = (slots, slowdown), error
    slots, slowdown = best
    pairs = list(_Course(services, slots).alone(slowdown))
    engine = EngineModel(slots, 1.0, float("inf"), slowdown)
    return Fit(engine, [alone for alone, _ in pairs], [first for _, first in pairs], _most(services), least**0.5)


def _candidates(services: Sequence[Service], most: int, unlimited: int) -> Iterator[int]:
    """Yield possible numbers of slots, most first: a little more than the streams usually seen at once."""
    speaking = 0
    if sum(map(_streamed, services)) >= MOST_STREAMED * len(services):
        speaking = _usually([(each.first, each.ended) for each in services])
    highest = speaking + max(1, speaking // 4) if speaking else most
    if _usually([(each.admitted, each.ended) for each in services]) <= highest:
        yield unlimited
    yield from (count for count in reversed(SLOTS) if speaking <= count < min(most, unlimited, highest + 1))


def _streamed(service: Service) -> bool:
    """Return whether it came in pieces: an answer in one piece, at the end, does not show when it was begun."""
    speaking = service.ended - service.first
    return speaking > PIECE and speaking > RARE * (service.ended - service.admitted)


def _usually(spans: Sequence[tuple[float, float]]) -> int:
    """Return the most that lasted at once, except in rare moments."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    lasted: dict[int, float] = {}
    count, since = 0, changes[0][0]
    for time, change in changes:
        lasted[count] = lasted.get(count, 0.0) + time - since
        count, since = count + change, time
    rare = RARE * sum(seconds for at_once, seconds in lasted.items() if at_once)
    for at_once in sorted(lasted, reverse=True):
        rare -= lasted[at_once]
        if rare < 0.0:
            return at_once
    return 1


class _Course:
    """When each request was served, if an engine has so many slots; the slowdown does not change that."""

    def __init__(self, services: Sequence[Service], slots: int) -> None:
        events = sorted(
            itertools.chain(
                ((each.admitted, 1, index) for index, each in enumerate(services)),
                # What took no time by the clock ends after it has begun, everything else before others begin.
                (
                    (each.ended, 0 if each.ended > each.admitted else 2, index)
                    for index, each in enumerate(services)
                ),
            )
        )
        self.services = services
        self.moments: list[float] = [0.0]
        self.streams: list[int] = [0]  # from the moment of this index to the next
        self.begun = [0] * len(services)  # indices of moments
        self.ended = [0] * len(services)
        # Of requests that came together, the first bytes show which the engine took first, if streamed.
        keys = [(round(each.admitted / TOGETHER), each.first) for each in services]
        waiting: list[tuple[tuple[int, float], int]] = []
        running: set[int] = set()
        for time, kind, index in events:
            here = len(self.moments)
            if kind == 1:
                heapq.heappush(waiting, (keys[index], index))
            elif index in running:
                running.discard(index)
                self.ended[index] = here
            else:  # it was faster than its place in the engine's queue allows
                waiting.remove((keys[index], index))
                heapq.heapify(waiting)
                self.begun[index] = self.ended[index] = here
            while waiting and len(running) < slots:
                _, first = heapq.heappop(waiting)
                running.add(first)
                self.begun[first] = here
            self.moments.append(time)
            self.streams.append(len(running))

    def alone(self, slowdown: float) -> Iterator[tuple[float, float]]:
        """Yield what each would have taken alone, in seconds, and how much of it until its first byte."""
        progress = [0.0]
        for index in range(1, len(self.moments)):
            seconds = self.moments[index] - self.moments[index - 1]
            speed = 1.0 / (1.0 + slowdown * max(0, self.streams[index - 1] - 1))
            progress.append(progress[-1] + seconds * speed)
        for index, each in enumerate(self.services):
            begun, ended = self.begun[index], self.ended[index]
            whole = max(LEAST, progress[ended] - progress[begun])
            span = each.ended - self.moments[begun]
            share = (each.first - self.moments[begun]) / span if span > 0 else 1.0
            yield whole, whole * min(1.0, max(0.0, share))


def _most(services: Sequence[Service]) -> int:
    ends: list[float] = []
    most = 0
    for each in sorted(services, key=lambda one: one.admitted):
        while ends and ends[0] <= each.admitted:
            heapq.heappop(ends)
        heapq.heappush(ends, each.ended)
        most = max(most, len(ends))
    return most


def _error(services: Sequence[Service], pairs: Sequence[tuple[float, float]]) -> float:
    """Return the share of the squares which bytes do not explain: of times alone, and until the first byte."""
    most_asked = max(each.asked for each in services) or 1
    most_answered = max(each.answered for each in services) or 1
    asked = [each.asked / most_asked for each in services]
    answered = [each.answered / most_answered for each in services]
    whole = [alone for alone, _ in pairs]
    rest = _unexplained([[1.0] * len(pairs), asked, answered], whole)
    streamed = [index for index, each in enumerate(services) if _streamed(each)]
    if streamed:
        begun = [pairs[index][1] for index in streamed]
        rest += _unexplained([[1.0] * len(streamed), [asked[index] for index in streamed]], begun)
    return rest / sum(value * value for value in whole)


def _unexplained(columns: Sequence[Sequence[float]], values: Sequence[float]) -> float:
    """Return the squares that the best sum of some of the columns leaves; no weight is below 0."""
    best: float = sum(map(operator.mul, values, values))
    for count in range(1, len(columns) + 1):
        for used in itertools.combinations(columns, count):
            weights = _least_squares(used, values)
            if weights is not None and min(weights) >= 0.0:  # more bytes do not take less time
                left = values
                for weight, column in zip(weights, used, strict=True):
                    left = [value - weight * part for value, part in zip(left, column, strict=True)]
                best = min(best, sum(map(operator.mul, left, left)))
    return best


def _least_squares(columns: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Solve the normal equations of a few unknowns; None if these do not determine them."""
    size = len(columns)
    table = [[sum(map(operator.mul, one, other)) for other in (*columns, values)] for one in columns]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        if abs(table[i][i]) < 1e-9 * len(values):
            return None
        for k in range(size):
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [one - factor * other for one, other in zip(table[k], table[i], strict=True)]
    return [table[i][size] / table[i][i] for i in range(size)]

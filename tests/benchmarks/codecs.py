"""The cost of translating an event of a stream: `python -m tests.benchmarks.codecs`.

The limit for any pair of dialects is 25 µs of CPU an event. Streams are of text, and of calls.
"""

from __future__ import annotations

import argparse
import json
from itertools import permutations
from time import process_time

from llmux.targets.codecs import Dialect, Translation
from llmux.targets.codecs.answer import (
    BlockEnded,
    BlockStarted,
    Delta,
    Ended,
    Finished,
    Kind,
    Started,
    Stop,
    Usage,
)
from llmux.targets.codecs.translation import _ANSWERS

EVENTS = 2000
MOST = 25.0  # µs
ASKED = {
    Dialect.CHAT: {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True},
    Dialect.MESSAGES: {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
    },
    Dialect.RESPONSES: {"model": "m", "input": "hi", "stream": True},
}


def stream_of(engine: Dialect, kind: Kind) -> list[bytes]:
    """Return an engine's stream: an event in each piece, as they come off a connection."""
    encode = _ANSWERS[engine].AnswerEncoder("m", usage_in_stream=True)
    texts = [" token"] * EVENTS if kind is Kind.TEXT else ['{"a":"', *["token "] * EVENTS, '"}']
    events = [Started("7", "m", 5), BlockStarted(kind, "call_1", "f"), *map(Delta, texts), BlockEnded()]
    sent = b"".join(map(encode.feed, [*events, Usage(9, EVENTS), Finished(Stop.END), Ended()]))
    return [piece + b"\n\n" for piece in sent.split(b"\n\n") if piece]


def measure(client: Dialect, engine: Dialect, kind: Kind) -> float:
    """Return the µs of CPU that an event takes: the best of five."""
    pieces = stream_of(engine, kind)
    best = float("inf")
    for _ in range(5):
        translation = Translation(client, engine)
        translation.request(ASKED[client])
        stream = translation.stream()
        began = process_time()
        for piece in pieces:
            stream.feed(piece)
        stream.end()
        best = min(best, process_time() - began)
        assert stream.over
    return best / len(pieces) * 1e6


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    rows = [
        {
            "engine": str(engine),
            "client": str(client),
            "stream": kind.value,
            "us": round(measure(client, engine, kind), 2),
        }
        for engine, client in permutations(Dialect, 2)
        for kind in (Kind.TEXT, Kind.CALL)
    ]
    if parser.parse_args().json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(f"{row['engine']:>9} → {row['client']:<9}  {row['stream']:<5} {row['us']:6.2f} µs an event")
    worst = max(row["us"] for row in rows)
    assert worst <= MOST, f"{worst} µs is more than {MOST}"


if __name__ == "__main__":
    main()

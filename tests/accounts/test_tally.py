"""What is compiled of the accounts does what Python does: the same rows, shares and reports, to the last bit."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from llmux.accounts import shares
from llmux.accounts.accounting import Accounting
from llmux.accounts.ledger_file import bound, sums_by_python, sums_of
from llmux.accounts.shares import Shares, Tally, native
from llmux.accounts.tokens import told
from llmux.core import effects as fx
from llmux.core.phases import Phase
from llmux.upstream.native import SWITCH

compiled = native()
needs_it = pytest.mark.skipif(compiled is None, reason="it is not compiled here")
STATE = (
    "now", "clock", "held", "house", "switch_seconds", "holds", "switching", "plain", "running", "rest", "epoch",
)  # fmt: skip

PIECES = [
    b'"usage":', b'"usage"', b"{", b"}", b" ", b",", b", ", b'"prompt_tokens":', b'"completion_tokens": ',
    b'"completion_tokens":', b'"total_tokens":', b"0", b"17", b"123456789012", b"1234567890123", b"null", b"-1",
    b'"', b'"prompt_tokens_details":null}', b', "prompt_tokens_details": null}', b'"timings"',
    b'"timings":{"a":1}', b'\\"usage\\"', b"data: [DONE]\n\n",
    b'"usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15}',
    b'"usage": {"prompt_tokens": 12, "completion_tokens": 3}',
    b'"usage":{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2',
    b'"usage":{"prompt_tokens":7,"completion_tokens":2',
]  # fmt: skip


@needs_it
def test_a_report_is_found_where_python_finds_it() -> None:
    dice, found = random.Random(1), 0
    for _ in range(60_000):
        text = b"".join(dice.choice(PIECES) for _ in range(dice.randint(0, 9)))
        for _ in range(dice.choice((0, 0, 1))):
            at = dice.randint(0, len(text))
            text = text[:at] + dice.choice((b"", b" ", b"9", b",")) + text[at + dice.randint(0, 1) :]
        cuts = sorted(dice.randint(0, len(text)) for _ in range(dice.choice((0, 0, 1, 3))))
        tail = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert compiled.told(tail) == told(tail), tail
        found += told(tail) is not None
    assert found > 5_000
    assert compiled.told([]) is told([]) is None
    for odd in ((b"",), ["text"], None):
        with pytest.raises(TypeError):
            compiled.told(odd)


def both() -> tuple[Shares, Shares, dict[str, list[int]]]:
    """Return shares by Python and by what is compiled, and what waits."""
    waiting: dict[str, list[int]] = {"a": [], "b": []}
    found = [
        Shares(waiting.__getitem__, lambda request: f"key {request % 3}", tally=tally)
        for tally in (Tally(), compiled.Tally())
    ]
    return found[0], found[1], waiting


def same(one: Any, other: Any) -> None:
    for name in STATE:
        assert getattr(one, name) == getattr(other, name), name


@needs_it
@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_same(seed: int) -> None:
    first, second, waiting = both()
    dice, now, running, number = random.Random(seed), 0.0, [], 0

    def with_each(name: str, *args: Any) -> Any:
        results = [getattr(one, name)(*args) for one in (first, second)]
        assert results[0] == results[1], name
        return results[0]

    for _ in range(2000):
        now += dice.choice((0.0, dice.random(), -0.001))
        what, model = dice.random(), dice.choice("ab")
        if what < 0.35:
            number += 1
            waiting[model].append(number)
        elif what < 0.6 and waiting[model]:
            running.append(waiting[model].pop(0))
            with_each("admitted", now, fx.Admit(running[-1], model, None, 1, False, 0.0))
        elif what < 0.8 and running:
            request = running.pop(dice.randrange(len(running)))
            with_each("ended", now, request, f"key {request % 3}")
        elif what < 0.82 and running:
            request = running.pop()
            waiting[model].append(request)
            with_each("returned", now, request)
        elif what < 0.9:
            phase = dice.choice([one for one in Phase if one is not Phase.UNKNOWN])
            with_each("phase_changed", now, fx.PhaseChanged(model, Phase.ASLEEP, phase, ""))
        elif what < 0.93:
            with_each("switch_started", now, fx.SwitchStarted(1, (), model, ""))
        elif what < 0.97:
            with_each("switch_ended", now, fx.SwitchEnded(1, (), model, "success", 0.0, 0.0, None, None))
        else:
            with_each("take", now)
        same(first.tally, second.tally)
    assert first.held > 0


class Books:
    """What the end of a request needs, by Python and by what is compiled."""

    def __init__(self) -> None:
        self.first, self.second, self.waiting = both()
        self.ledger = SimpleNamespace(awake=True)
        self.rows: list[Any] = []
        self.made: list[Any] = []
        put = SimpleNamespace(put=self.rows.append, awake=True)
        self.python = SimpleNamespace(ledger=put, tally=self.first.tally, shares=self.first, prices=None)
        self.passed_on: list[tuple[Any, ...]] = []
        tally = self.second.tally
        tally.ledger, tally.waiting, tally.room = self.ledger, self.made, 10**9
        tally.otherwise = self.otherwise
        for one in (self.first, self.second):
            one.phase_changed(0.0, fx.PhaseChanged("a", Phase.ASLEEP, Phase.AWAKE, ""))
            one.tally.epoch = 1.8e9

    def otherwise(self, *args: Any) -> float:
        self.passed_on.append(args)
        return 0.125

    def admit(self, now: float, number: int) -> None:
        for one in (self.first, self.second):
            one.admitted(now, fx.Admit(number, "a", None, 1, False, 0.0))

    def end(self, *args: Any) -> float:
        return float(self.second.tally.ended(*args))


def request(number: int, arrived: float = 0.0, waited: float = 0.0, **more: Any) -> Any:
    ticket = SimpleNamespace(id=number, arrived=arrived, waited=waited, key="k")
    fields = {"request_id": f"request {number}", "asked": "alias", "model": "a", "ticket": ticket}
    return SimpleNamespace(**(fields | more))


@needs_it
def test_the_row_of_a_usual_end_is_the_same() -> None:
    books, dice, now = Books(), random.Random(3), 0.0
    books.python.prices = books.second.tally.prices = object()
    running: list[Any] = []
    for number in range(3000):
        now += dice.choice((0.0, dice.random() / 100, 3.0))
        if dice.random() < 0.5:
            waited = dice.choice((0.0, dice.random()))
            more = dice.choice(({}, {"asked": None}, {"model": None}, {"model": "b", "asked": ""}))
            running.append(request(number, now - waited, waited, **more))
            books.admit(now, number)
        elif running:
            one = running.pop(dice.randrange(len(running)))
            args = (
                one, number, now, dice.choice((0.0, one.ticket.waited)), dice.choice((200, 404)),
                dice.choice((None, "engine_lost", "")), dice.choice((None, "alice", "")),
                (number, 10**12 - number),
            )  # fmt: skip
            assert books.end(*args) == Accounting._ended(books.python, *args)  # type: ignore[arg-type]
            assert books.made[-1] == books.rows[-1]
            assert list(map(type, books.made[-1])) == list(map(type, books.rows[-1]))
            same(books.first.tally, books.second.tally)
    assert len(books.made) == len(books.rows) == books.second.tally.made > 1000
    assert not books.passed_on


UNUSUAL: dict[str, tuple[str, Any, Any]] = {
    "no report": ("argument", 7, None),
    "an odd time": ("argument", 2, float("inf")),
    "an odd wait": ("argument", 3, float("nan")),
    "no ticket": ("request", "ticket", None),
    "the thread sleeps": ("thread", "awake", False),
    "no room": ("tally", "room", 0),
    "one left before": ("tally", "left", (1, "", 0.0, 0.0)),
    "no ledger": ("tally", "ledger", None),
    "a switch": ("tally", "plain", False),
}


@needs_it
@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_not_usual_is_pythons(what: str) -> None:
    books = Books()
    books.admit(0.5, 1)
    args = [request(1), 1, 2.0, 0.0, 200, None, None, (1, 2)]
    where, name, value = UNUSUAL[what]
    if where == "argument":
        args[name] = value
    else:
        changed = {"request": args[0], "thread": books.ledger, "tally": books.second.tally}[where]
        setattr(changed, name, value)
    before = {name: getattr(books.second.tally, name) for name in STATE} | {"running": {1: 0.0}}
    assert books.end(*args) == 0.125
    assert books.passed_on == [tuple(args)]
    assert not books.made
    assert {name: getattr(books.second.tally, name) for name in STATE} == before


@needs_it
def test_wrong_arguments_are_errors_and_change_nothing() -> None:
    books = Books()
    tally = books.second.tally
    usual = (request(1), 1, 2.0, 0.0, 200, None, None, (1, 2))
    for call, args in (
        (compiled.Tally, (1,)), (tally.admitted, (1.0,)), (tally.admitted, ("now", 1)), (tally.over, (1.0,)),
        (tally.over, ("now", 1)), (tally.pass_to, ("now",)), (tally.ended, usual[:7]),
        (tally.ended, (*usual[:2], "now", *usual[3:])), (tally.over, (1.0, [])),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            call(*args)
    with pytest.raises(AttributeError):
        tally.admitted(1.0, object())
    with pytest.raises(AttributeError):
        tally.ended(SimpleNamespace(request_id="x", asked="a"), *usual[1:])
    assert not books.made
    assert books.end(*usual) == 0.0  # it had not been admitted
    assert len(books.made) == 1


@needs_it
def test_nothing_is_leaked() -> None:
    books = Books()
    texts = [f"model {len(books.rows)}", f"key {len(books.rows)}", f"id {len(books.rows)}"]
    one, report = request(1, model=texts[0], request_id=texts[2]), (len(texts) + 1000, len(texts) + 2000)
    watched = [one, report, *texts, *report, one.ticket]

    def some(books: Books) -> list[int]:
        for _ in range(100):
            books.admit(1.0, 1)
            books.end(one, 1, 2.0, 0.5, 200, None, texts[1], report)
            compiled.told([b'"usage":{"prompt_tokens":7777,"completion_tokens":8888}'])
            compiled.told([b'"usage":{"prompt', b'_tokens":7777,"completion_tokens":8888}'])
            books.first.ended(2.0, 1, "")
        rows = [(*row, *row[:3]) for row in books.made]
        compiled.sums_of(rows)
        compiled.bound(rows, 1, 50, 23, ((1, 2), (3, 0)))
        books.made.clear()
        return list(map(sys.getrefcount, watched))

    some(books)
    blocks, before = sys.getallocatedblocks(), some(books)
    assert some(books) == before
    assert sys.getallocatedblocks() - blocks < 100
    gone = weakref.ref(books)
    del books
    gc.collect()
    assert gone() is None


def some_rows(dice: random.Random, count: int, keys: int) -> list[tuple[Any, ...]]:
    """Return rows, some of which have values that are the same but not alike."""
    start = dice.choice((0, 3_599_000, 1_795_000_000_000))
    return [
        (
            start + dice.randint(0, 4000), f"id {number}", f"key {dice.randrange(keys)}", "m",
            dice.choice(("m", "n")), "m", dice.randint(0, 10**9), 0, dice.randint(0, 99), 0,
            dice.choice((0, 1, True)), dice.randint(-5, 10**9),
            dice.choice(("", "usd")), dice.choice((None, 1)), 0, number, number, 0, None, None,
            dice.choice((200, 399, 400, 499)), "", dice.choice((0, 0, 1, 2)), number, None,
        )
        for number in range(count)
    ]  # fmt: skip


@needs_it
@pytest.mark.parametrize("seed", range(60))
def test_sums_are_the_same(seed: int) -> None:
    dice = random.Random(seed)
    rows = some_rows(dice, dice.choice((0, 1, 50, 700)), dice.choice((1, 2)))
    found = compiled.sums_of(rows)
    if found is not None:
        assert found == sums_by_python(rows)
    else:
        assert len(sums_by_python(rows)) > 16
    assert sums_of(rows) == sums_of(map(tuple, rows)) == sums_by_python(rows)


@needs_it
def test_rows_that_are_summed_by_python() -> None:
    dice = random.Random(5)
    rows = some_rows(dice, 20, 1)
    many = [(*row[:2], f"key {number}", *row[3:]) for number, row in enumerate(rows)]
    assert compiled.sums_of(many) is None
    assert sums_of(many) == sums_by_python(many)
    for at, value in (
        (6, 2**63), (6, 2**63 - 1), (11, -(2**63)), (16, 2**50), (0, -1), (20, "200"), (22, None), (2, None),
    ):  # fmt: skip
        odd = [*rows, (*rows[0][:at], value, *rows[0][at + 1 :])]
        found = compiled.sums_of(odd)
        assert found is None or found == sums_by_python(odd)
        assert (found is None) is (at != 2)
    assert compiled.sums_of([rows[0][:20]]) is compiled.sums_of([[]]) is compiled.sums_of(None) is None


@needs_it
@pytest.mark.parametrize("seed", range(60))
def test_what_is_bound_is_the_same(seed: int) -> None:
    dice = random.Random(seed)
    rows = some_rows(dice, 40, dice.choice((1, 3)))
    column, same = dice.randrange(23), dice.choice((True, 1, "same", None))
    rows = [(*row[:column], same, *row[column + 1 :]) for row in rows]
    begin = dice.randint(0, 39)
    size = dice.randint(1, 40 - begin)
    columns = dice.sample(range(23), 12)
    groups = dice.choice(((), (tuple(columns[:1]), tuple(columns[1:4]), tuple(columns[4:])), ((column,),)))
    assert compiled.bound(rows, begin, size, 23, groups) == bound(rows, begin, size, 23, groups)


@needs_it
def test_what_cannot_be_bound_is_an_error() -> None:
    rows = some_rows(random.Random(1), 3, 1)
    for args in (
        (rows, 0, 4, 23, ()), (rows, -1, 1, 23, ()), (rows, 0, 0, 23, ()), (rows, 0, 1, 33, ()), ((), 0, 1, 1, ()),
        (rows, 0, 1, 26, ()), ([None], 0, 1, 1, ()), (rows, 0, 1, 3, ((3,),)), (rows, 0, 1, 3, ((-1,),)),
        (rows, 0, 1, 23, (tuple(range(20)), tuple(range(20)))), (rows, 0, 1, 3, []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"bound|no such column"):
            compiled.bound(*args)
    for groups in ((3,), (("a",),)):
        with pytest.raises((TypeError, SystemError)):
            compiled.bound(rows, 0, 1, 23, groups)


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert native() is None
    assert type(shares.new_tally()) is Tally
    monkeypatch.delenv(SWITCH)
    monkeypatch.setitem(sys.modules, "llmux.accounts._tally", None)
    assert native() is None
    assert type(shares.new_tally()) is Tally

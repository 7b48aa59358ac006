"""Fields of a JSON object that is too large to parse: their positions, and their replacements.

Theory of operation. ``members_at_once`` finds the positions of the wanted members with the parser of JSON, if the
object is small. ``FieldScanner`` scans any other once, in slices; the rest is skipped at the speed of the model's
scanner. ``changes`` turns the rules for an object into
splices. A rule for ``a.b`` is one for ``b`` in the object in ``a``, which is then scanned by itself. Everything
else is left as it is: key order, numbers, blanks and escapes.

A key that occurs twice is changed in both places, as engines disagree on which of them counts.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmux.errors import BadRequestError
from llmux.extract import Body, ModelScanner, Pace, Splice, scan_slowly
from llmux.extract.json_scan import members_but

AT_ONCE = 256 * 1024  # bytes of the largest object that is parsed
MOST_TIMES = 100  # that an object may have a field which a rule changes: each time is a change of its own
_QUICK = 32 * 1024  # bytes that are parsed within milliseconds, whatever they are
_NESTED = 16 * 1024  # opening brackets in a larger object, which take longer than anything else
_MEMBERS = 1024  # of an object that is parsed: each takes microseconds
_LONGEST_KEY = 64 * 6  # bytes of a key that are compared: 64 characters, each as an escape
_LONGEST_NUMBER = 4096
_NUMBER = re.compile(rb"[-+.0-9eE]+\Z|NaN\Z|-?Infinity\Z")


class Member(NamedTuple):
    """A member of an object. Positions count bytes from where the scan began."""

    name: str
    key: int  # of its key's opening quote
    start: int  # of its value
    end: int
    before: int | None  # of the comma in front of it
    after: int | None  # of the comma behind it


class Found(NamedTuple):
    """What was found of an object."""

    is_object: bool
    found: list[Member]
    opens: int
    """The position after the object's opening brace."""
    others: bool
    """Whether it has members of other names."""


_decoder = json.JSONDecoder(strict=False)
_BRACE = re.compile(r"[ \t\r\n]*\{")
_KEY = re.compile(r'[ \t\r\n]*"([^"\\]*(?:\\.[^"\\]*)*)"[ \t\r\n]*:[ \t\r\n]*')
_BEHIND = re.compile(r"[ \t\r\n]*([,}])")
_ESCAPED = re.compile(rb"\\u00[2-7]")  # a character of ASCII
_BLANKS = re.compile(r"[ \t\r\n]*\Z")


def members_at_once(data: bytes, names: Iterable[str], offset: int = 0) -> Found | None:
    """Find the members with these names. ``offset`` is the position of the first byte.

    None for what is no object, is empty, or is not valid JSON: the scanner judges that. Also for what would take
    long: the scanner lets others have their turns.
    """
    if len(data) > _QUICK and data.count(b"[") + data.count(b"{") > _NESTED:
        return None
    text = data.decode("latin-1")  # a character for each byte: strings get wrong, but positions stay
    opening = _BRACE.match(text)
    if opening is None:
        return None
    wanted = {name.encode(): name for name in names}
    found: list[Member] = []
    others, before, at = False, None, opening.end()
    try:
        for _ in range(_MEMBERS):
            key = _KEY.match(text, at)
            if key is None:
                break
            _, end = _decoder.raw_decode(text, key.end())
            behind = _BEHIND.match(text, end)
            if behind is None:
                return None
            last = behind[1] == "}"
            comma = None if last else offset + behind.end() - 1
            name = wanted.get(_unescaped(key[1].encode("latin-1")))
            if name is None:
                others = True
            else:
                place = (offset + key.start(1) - 1, offset + key.end(), offset + end)
                found.append(Member(name, *place, before, comma))
            before, at = comma, behind.end()
            if last:
                whole = _BLANKS.match(text, at)
                return Found(True, found, offset + opening.end(), others) if whole else None
    except (ValueError, RecursionError):
        pass
    return None


def _none(data: bytes, names: Iterable[str]) -> Found | None:
    """Return what is found of an object with other members if it clearly has none with these names.

    So it is if they stand nowhere in it, and no escape can stand for one of their letters.
    """
    if any(data.rfind(b'"%b"' % name.encode()) >= 0 for name in names):  # backwards it is faster
        return None
    if data.rfind(b"\\u00") >= 0 and _ESCAPED.search(data):
        return None
    return Found(True, [], data.index(b"{") + 1, True)


def _unescaped(key: bytes) -> bytes:
    if b"\\" not in key:
        return key
    try:
        return str(json.loads(b'"%b"' % key)).encode("utf-8", "replace")
    except ValueError:
        return b""


class FieldScanner(ModelScanner):
    """Notes the positions of the members with these names. ``offset`` is the position of the first byte."""

    def __init__(self, names: Iterable[str], offset: int = 0) -> None:
        super().__init__()
        self._names = {name.encode(): name for name in names}
        self._members = _but(tuple(self._names))
        self._offset = offset
        self.found: list[Member] = []
        self.opens = 0
        """The position after the object's opening brace."""
        self.others = False
        """Whether it has members of other names."""
        self._name: str | None = None
        self._key_at = self._value_at = 0
        self._value_end: int | None = None
        self._comma: int | None = None

    def _start(self, pos: int) -> int:
        end = super()._start(pos)
        self.opens = self._offset + end
        return end

    def _member(self, pos: int) -> int:
        if found := self._members.match(self._text, pos):
            self._first = False
            self.others = True
            self._comma = self._offset + found.end() - 1
            return found.end()
        end = super()._member(pos)
        self._key_at = self._offset + end - 1
        return end

    def _key(self, pos: int) -> int:
        end = self._take_string(pos, _LONGEST_KEY)
        if end < 0:
            return len(self._text)
        self._name = self._names.get(_unescaped(bytes(self._token)))
        self.others = self.others or self._name is None
        self._state = self._colon
        return end

    def _value(self, pos: int) -> int:
        end = super()._value(pos)
        if self._state != self._value:
            self._value_at = self._offset + end - (self._state != self._scalar)
            self._value_end = None
        return end

    def _after(self, pos: int) -> int:
        if self._value_end is None:
            self._value_end = self._offset + pos
        end = super()._after(pos)
        if self._state != self._after:
            comma = self._offset + end - 1 if self._state == self._member else None
            if self._name is not None:
                place = (self._key_at, self._value_at, self._value_end)
                self.found.append(Member(self._name, *place, self._comma, comma))
            self._comma = comma
        return end


@functools.lru_cache(maxsize=256)
def _but(names: tuple[bytes, ...]) -> re.Pattern[bytes]:
    return members_but(b"(?:" + b"|".join(map(re.escape, names)) + b")")


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule for one field. ``strip`` and ``always`` go with nothing else; ``cap`` comes last."""

    always: Any = None  # with `given`: the value, whatever the client says
    given: bool = False
    default: Any = None  # the value if the client gives none, or null; None: none
    strip: bool = False
    cap: int | float | None = None


Rules = Mapping[str, "Rule | Rules"]
"""The rules for an object: for its fields, and for objects within."""


def tree(rules: Mapping[str, Rule]) -> Rules:
    """Return the rules by the parts of their dotted names. ValueError where one name begins another."""
    root: dict[str, Any] = {}
    for name, rule in rules.items():
        *above, last = name.split(".")
        node = root
        for part in above:
            node = node.setdefault(part, {})
            if isinstance(node, Rule):
                raise ValueError(f"{name} is part of another field that has a rule")  # noqa: TRY004
        if last in node:
            raise ValueError(f"{name} has parts that have rules")
        node[last] = rule
    return root


async def changes(body: Body, rules: Rules) -> list[Splice]:
    """Return the changes of a JSON body by the rules. It yields to other tasks.

    BadRequestError if it is not an object, or a field does not have the type that a rule for it takes.
    """
    splices: list[Splice] = []
    if not await _object(body, 0, body.received, rules, "", splices):
        raise BadRequestError("the body is not a JSON object", code="invalid_json")
    return splices


def last_of_each(found: Iterable[Member]) -> dict[str, Member]:
    """Return the members that count, by name."""
    return {member.name: member for member in found}


async def scan(body: Body, start: int, end: int, names: Iterable[str]) -> Found:
    """Scan the object from ``start`` to ``end``. BadRequestError if it is malformed."""
    if end - start <= AT_ONCE:
        data = b"".join(body.part(start, end))
        whole = end - start == body.received and body.members is not None  # then it is an object, with a model
        found = _none(data, names) if whole else None
        found = found or members_at_once(data, names, start)
        if found is not None:
            return found
    scanner = FieldScanner(names, start)
    pace = Pace()
    for data in body.part(start, end):
        await scan_slowly(scanner, data, pace)
    scanner.finish()
    return Found(bool(scanner.is_object), scanner.found, scanner.opens, scanner.others)


async def _object(body: Body, start: int, end: int, rules: Rules, above: str, splices: list[Splice]) -> bool:
    is_object, found, opens, others = await scan(body, start, end, rules)
    if not is_object:
        return False
    if len(found) > MOST_TIMES * len(rules):
        raise BadRequestError(f"the body has the same fields more than {MOST_TIMES} times", code="invalid_json")
    removed: list[Member] = []
    pace = Pace()
    for member in found:
        await pace.turn()
        rule = rules[member.name]
        if not isinstance(rule, Rule):
            await _within(body, member, rule, above + member.name, splices)
        elif rule.strip:
            removed.append(member)
        elif (text := _changed(body, member, rule, above + member.name)) is not None:
            splices.append(Splice(member.start, member.end, text))
    splices += _without(removed)
    there = {member.name for member in found}
    missing = _made({name: rule for name, rule in rules.items() if name not in there})
    if missing:
        rest = b"," if others or len(removed) < len(found) else b""
        splices.append(Splice(opens, opens, _json(missing)[1:-1] + rest))
    return True


async def _within(body: Body, member: Member, rules: Rules, name: str, splices: list[Splice]) -> None:
    """Apply the rules to a value that should be an object."""
    if b"".join(body.part(member.start, member.start + 1)) == b"{":
        await _object(body, member.start, member.end, rules, f"{name}.", splices)
    elif _is_null(body, member):
        if made := _made(rules):
            splices.append(Splice(member.start, member.end, _json(made)))
    elif _sets(rules):
        raise BadRequestError(f"{name} must be an object", param=name)


def _changed(body: Body, member: Member, rule: Rule, name: str) -> bytes | None:
    """Return the replacement of a value; None: it stays."""
    if rule.given:
        return _json(rule.always)
    if _is_null(body, member):
        value = _value(rule)
        return None if value is None else _json(value)
    if rule.cap is None:
        return None
    text = b"".join(body.part(member.start, min(member.end, member.start + _LONGEST_NUMBER)))
    if not _NUMBER.match(text):
        raise BadRequestError(f"{name} must be a number", param=name)
    return None if float(text) <= rule.cap else _json(rule.cap)  # NaN is not


def _value(rule: Rule) -> Any:
    """Return the value of a field that the client does not give; None: it has none."""
    if rule.given:
        return rule.always
    if rule.default is not None and rule.cap is not None:
        return min(rule.default, rule.cap)
    return rule.default


def _made(rules: Rules) -> dict[str, Any]:
    """Return the object that the rules create if there is none."""
    made: dict[str, Any] = {}
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            if inner := _made(rule):
                made[name] = inner
        elif rule.given or rule.default is not None:
            made[name] = _value(rule)
    return made


def _sets(rules: Rules) -> bool:
    return any(rule.given if isinstance(rule, Rule) else _sets(rule) for rule in rules.values())


def _without(removed: Sequence[Member]) -> Iterator[Splice]:
    """Cut members out, each with one comma: the one after it, or for those at the end, the one before them."""
    last_run: list[Member] = []
    for member in removed:
        follows = last_run and last_run[-1].after == member.before
        last_run = [*last_run, member] if follows else [member]
    if not last_run or last_run[-1].after is not None:
        last_run = []
    for member in removed[: len(removed) - len(last_run)]:
        assert member.after is not None
        yield Splice(member.key, member.after + 1, b"")
    if last_run:
        first = last_run[0]
        yield Splice(first.key if first.before is None else first.before, last_run[-1].end, b"")


def _is_null(body: Body, member: Member) -> bool:
    return member.end - member.start == len(b"null") and b"".join(body.part(member.start, member.end)) == b"null"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

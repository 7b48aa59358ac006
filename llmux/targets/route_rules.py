"""Which requests do not go where their name says: the rules of `routes`, and of a model's `spill`.

Pure, except for ``content_of``, which reads a body; the simulator uses ``spills``, too. The first rule of `routes`
whose conditions all hold is followed. The body is only read if the result depends on a rule about it: ``follow``
then asks for a ``Content``.

``spills`` is evaluated when a request arrives, and again while it waits, with the time that it has waited. So no
request waits much longer than ``over``, if it may go and its remote is not too expensive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmux.accounts.pricing import TokenPrice, of_tokens
from llmux.config.access import glob_expression
from llmux.config.remotes import RouteConfig, matches
from llmux.errors import BadRequestError
from llmux.extract import Body, Pace
from llmux.targets.field_scanner import Member, last_of_each, scan

BYTES_PER_TOKEN = 3.5
TOKENS_PER_FILE = 1500

_STEP = 64 * 1024
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_FIELDS = ("tools", "functions", "stream", "n", *_LIMITS)
# A quote within a text is escaped: these are never part of one.
_FILE = re.compile(
    rb'"type"[ \t\r\n]*:[ \t\r\n]*"(?:(image_url|input_image|image)|document|file|input_file|input_audio)"'
)
_LONGEST_FILE = 80  # bytes of that
_ENCODED = re.compile(rb"[A-Za-z0-9+/]{200,}")  # no text has words that long: an image
_CLASSES = bytes(ord("a" if re.match(r"[A-Za-z0-9+/]", chr(byte)) else " ") for byte in range(256))
_LONG = b"a" * 200
_EMPTY = frozenset({b"null", b"[]"})
_NUMBER = re.compile(rb"\d{1,12}\Z")


@dataclass(frozen=True, slots=True)
class Content:
    """What reading a body shows."""

    images: bool = False
    tools: bool = False
    stream: bool = False
    text: int = 0
    """Bytes, without those of files."""
    files: int = 0
    """Images among them."""
    limit: int | None = None
    """The most tokens that an answer may have, if the request says."""
    answers: int = 1

    @property
    def tokens(self) -> int:
        """About how many it has."""
        return round(self.text / BYTES_PER_TOKEN) + TOKENS_PER_FILE * self.files


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a request without reading its body. ``wait`` is in seconds; None: it is unknown."""

    model: str
    path: str = "/"
    key: str | None = None
    role: str | None = None
    wait: float | None = None


class Followed(NamedTuple):
    """The rule that is followed: ``rule`` is None if none fits; ``looks``: the content has to be known first."""

    rule: RouteConfig | None
    looks: bool = False


def follow(rules: Sequence[RouteConfig], facts: Facts, content: Content | None) -> Followed:
    """Return the first rule that fits."""
    for rule in rules:
        if not _fits(rule, facts):
            continue
        if not rule.when.of_content:
            return Followed(rule)
        if content is None:
            return Followed(None, looks=True)
        if _holds(rule, content):
            return Followed(rule)
    return Followed(None)


def _fits(rule: RouteConfig, facts: Facts) -> bool:
    when = rule.when
    return (
        (when.model is None or matches(when.model, facts.model))
        and (when.key is None or facts.key in when.key)
        and (when.role is None or facts.role in when.role)
        and (when.path is None or any(re.fullmatch(glob_expression(glob), facts.path) for glob in when.path))
        and (when.wait_over is None or (facts.wait is not None and facts.wait > when.wait_over))
    )


def _holds(rule: RouteConfig, content: Content) -> bool:
    when = rule.when
    return (
        (when.images is None or when.images is content.images)
        and (when.tools is None or when.tools is content.tools)
        and (when.stream is None or when.stream is content.stream)
        and (when.tokens_over is None or content.tokens > when.tokens_over)
    )


async def content_of(body: Body | None) -> Content:
    """Read a body, in slices; it yields to other tasks. A body that is not JSON has only text."""
    if body is None:
        return Content()
    if body.form or body.compressed:
        return Content(text=body.received)
    try:
        scanner = await scan(body, 0, body.received, _FIELDS)
    except BadRequestError:  # the engine judges that
        return Content(text=body.received)
    values = {name: _value(body, member) for name, member in last_of_each(scanner.found).items()}
    images, files, encoded = await _files(body)
    return Content(
        images=images,
        tools=any(values.get(name, b"null") not in _EMPTY for name in ("tools", "functions")),
        stream=values.get("stream") == b"true",
        text=body.received - encoded,
        files=files,
        limit=max(_numbers(values, _LIMITS), default=None),
        answers=max(_numbers(values, ("n",)), default=1),
    )


def _value(body: Body, member: Member) -> bytes:
    """Return the beginning of a value, enough to know what it is."""
    return b"".join(b"".join(body.part(member.start, min(member.end, member.start + 16))).split())


def _numbers(values: dict[str, bytes], names: Iterable[str]) -> Iterable[int]:
    return (int(values[name]) for name in names if _NUMBER.match(values.get(name, b"")))


async def _files(body: Body) -> tuple[bool, int, int]:
    """Return whether there are images, the number of files, and the bytes of those that are in the body."""
    images, files, encoded = False, 0, 0
    before, pace = b"", Pace()
    for data in body.part(0, body.received):
        for at in range(0, len(data), _STEP):
            piece = data[at : at + _STEP]
            if _LONG in piece.translate(_CLASSES):  # rare, and sought much faster
                encoded += sum(len(run) for run in _ENCODED.findall(piece))
            text = before + piece
            for found in _FILE.finditer(text):
                if text[found.start() - 1 : found.start()] == b"\\":
                    continue  # within a text
                if found.end() > len(before):  # else it was in the last piece
                    files += 1
                    images = images or found[1] is not None
            before = piece[-_LONGEST_FILE:]
            await pace.turn()
    return images, files, encoded


ASSUMED_OUTPUT = 8192
"""Tokens, at worst, of the answer to a request without a limit of its own."""
WORST_BYTES_PER_TOKEN = 2.0
"""Bytes of text for a token, at worst; English has about four."""
WORST_TOKENS_PER_FILE = 3000
"""Tokens of an image or a document, at worst."""


DEAR = TokenPrice(input=15_000_000, cached=15_000_000, output=75_000_000)
"""The assumed price of a remote without a known one, for a million tokens."""


class Offer(NamedTuple):
    """A model's `spill`: seconds, and millionths of the currency (None: any cost)."""

    to: str
    over: float
    below: int | None = None


def spills(offer: Offer, waited: float, expected: float | None, worst: int | None) -> bool:
    """Whether a request goes to the remote.

    ``waited`` is what it has waited, ``expected`` what it will still wait, in seconds; None: it would be refused.
    ``worst`` is its worst-case cost there, in millionths; None: unknown.
    """
    if offer.below is not None and (worst is None or worst > offer.below):
        return False
    return expected is None or waited + expected > offer.over


def worst_cost(price: TokenPrice, text: int, files: int, limit: int | None, answers: int = 1) -> int:
    """Return the worst-case cost of a request, in millionths, rounded up.

    ``text`` is its bytes without ``files``, ``limit`` the most tokens of each of its ``answers``.
    """
    read = -int(-text // WORST_BYTES_PER_TOKEN) + WORST_TOKENS_PER_FILE * files
    wrote = (ASSUMED_OUTPUT if limit is None else limit) * answers
    cost, rest = of_tokens(price, (read, 0, wrote), 0)
    return cost + (rest > 0)

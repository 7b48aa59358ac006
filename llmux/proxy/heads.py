"""The heads that llmux writes: the client's request for the engine, the engine's response for the client.

Both keep the order, the case and the bytes of what they are made from. Hop-by-hop fields go, in both
directions; what replaces a field stands where the field stood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmux.proxy.exchange import Exchange, ExtraFields, path_of
from llmux.upstream import Framing, ResponseHead
from llmux.upstream.head import connection_options

# Fields that concern one connection only (RFC 9110, section 7.6.1, and its forerunners).
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
ACCEPT_ENCODING = frozenset({b"accept-encoding"})
"""Not passed on where llmux has begun the answer itself, or reads it for what it costs: it comes plain."""
# In a request these are replaced or dropped as well.
_SPECIAL_IN_REQUESTS = HOP_BY_HOP | {b"host", b"content-length", b"x-request-id", b"expect"}
# aiohttp's parser leaves HTTP for these protocols only; any other Upgrade is an offer that llmux declines.
_UPGRADES = frozenset({b"websocket", b"tcp"})


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head, ready to be written."""

    data: bytes
    is_head: bool
    upgrade: bool


def request_head(exchange: Exchange, *, may_upgrade: bool) -> RequestHead:
    """Make the head of the engine's request."""
    method = exchange.method
    if isinstance(method, str):
        method = method.encode("ascii")
    # What replaces the client's own fields, where they stand. (The body has been read to its end, so its
    # length is known, however the client framed it.)
    replacements = {
        b"host": exchange.address.host_header,
        b"content-length": b"0" if exchange.body is None else b"%d" % exchange.body.size,
        b"x-request-id": exchange.request_id.encode("latin-1"),
    }
    dropped = exchange.drop_headers
    named, upgrade = _connection(exchange.raw_headers, may_upgrade=may_upgrade)
    if upgrade:
        replacements[b"connection"] = b"Upgrade"

    lines = [method + b" " + _target(exchange) + b" HTTP/1.1"]
    for name, value in exchange.raw_headers:
        lower = name.lower()
        if lower not in _SPECIAL_IN_REQUESTS:
            if lower not in dropped and lower not in named:
                lines.append(name + b": " + value)
            continue
        if lower == b"transfer-encoding":
            lower, name = b"content-length", b"Content-Length"  # noqa: PLW2901
        replacement = replacements.pop(lower, None)
        if replacement is not None:
            lines.append(name + b": " + replacement)
        elif upgrade and lower == b"upgrade":
            lines.append(name + b": " + value)
    if replacements:
        _append_missing(lines, replacements, has_body=exchange.body is not None)
    lines += [name + b": " + value for name, value in exchange.added_headers]
    lines.append(b"\r\n")
    return RequestHead(b"\r\n".join(lines), method == b"HEAD", upgrade)


def _target(exchange: Exchange) -> bytes:
    if exchange.address.base_path:
        return exchange.address.base_path.encode("ascii") + path_of(exchange.target)
    return exchange.target


def _append_missing(lines: list[bytes], missing: dict[bytes, bytes], *, has_body: bool) -> None:
    if (host := missing.get(b"host")) is not None:
        lines.insert(1, b"Host: " + host)
    if has_body and (length := missing.get(b"content-length")) is not None:
        lines.append(b"Content-Length: " + length)
    if (request_id := missing.get(b"x-request-id")) is not None:
        lines.append(b"X-Request-ID: " + request_id)


_NOTHING_NAMED: frozenset[bytes] = frozenset()


def _connection(raw_headers: Sequence[tuple[bytes, bytes]], *, may_upgrade: bool) -> tuple[frozenset[bytes], bool]:
    """Return the fields that Connection names, and whether to pass on the client's wish for an upgrade."""
    options: set[bytes] = set()
    offered = False
    for name, value in raw_headers:
        lower = name.lower()
        if lower == b"connection":
            options |= connection_options(value)
        elif lower == b"upgrade":
            offered = value.strip().lower() in _UPGRADES
    if not options:
        return _NOTHING_NAMED, False
    return frozenset(options), may_upgrade and offered and b"upgrade" in options


_NO_BUFFERING = b"x-accel-buffering"
# What llmux alone may say: no engine has seen the request (see ``llmux.middleware.context``).
REFUSED = b"x-llmux-refused"
_MOST_WRITTEN = 16  # heads that are kept of one of the engine's


def response_head(
    head: ResponseHead,
    length: bytes,
    *,
    extra: Sequence[tuple[str, str]] | ExtraFields,
    chunked: bool,
    connection: bytes | None,
) -> bytes:
    """Make the head of the client's response. ``length``: the value of Content-Length, if there is one.

    ``chunked``: the body that follows is. ``connection``: what to say of its connection, if anything.
    """
    added = extra if isinstance(extra, ExtraFields) else ExtraFields.of(extra)
    # The usual way has the shortest key: the fast path looks for it.
    key: object = (added.names, chunked, connection) if chunked or connection is not None else added.names
    written = head.written.get(key)
    if written is None:
        if len(head.written) >= _MOST_WRITTEN:
            head.written.clear()
        written = head.written[key] = _around_length(head, added.names, chunked=chunked, connection=connection)
    before, has_length, after = written
    end = b"X-Accel-Buffering: no\r\n\r\n" if head.event_stream else b"\r\n"
    separator = b"\r\n" if added.lines else b""
    return b"%b%b%b%b%b%b" % (before, length if has_length else b"", after, added.lines, separator, end)


_ABSOLUTE = re.compile(rb"(?:https?:)?//([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_LOCATION = b"location"


def fields_of_redirect(head: ResponseHead, exchange: Exchange) -> Sequence[tuple[str, str]] | ExtraFields:
    """Return the fields to add to a redirect: its Location too, where it names the engine's own address.

    Engines make it of the ``Host`` that they were sent. A client that followed it would reach nothing, or the
    engine past the queue.
    """
    extra = exchange.extra_headers
    given = [value for lower, _, value in head.fields if lower == _LOCATION]
    if len(given) != 1 or (location := _for_client(given[0], exchange)) == given[0]:
        return extra
    added = extra if isinstance(extra, ExtraFields) else ExtraFields.of(extra)
    lines = [added.lines] if added.lines else []
    return ExtraFields(b"\r\n".join([*lines, b"Location: " + location]), added.names | {_LOCATION})


def _for_client(location: bytes, exchange: Exchange) -> bytes:
    """Return where the client finds what the engine calls ``location``."""
    address, path = exchange.address, location
    if (found := _ABSOLUTE.match(location)) is not None:
        if found[1].lower() != address.host_header.lower():
            return location
        path = found[2]
    elif not location.startswith(b"/"):
        return location  # it goes by the client's own path, which ends as the engine's
    below, base = exchange.below, address.base_path.encode("ascii")
    if below and path.startswith(below) and path[len(below) : len(below) + 1] in {b"", b"/", b"?", b"#"}:
        return path  # the engine was told where its clients see it
    rest = path.removeprefix(base)
    if base and (rest == path or rest[:1] not in {b"", b"/", b"?", b"#"}):
        return location
    # One slash: two would begin the name of a host, for browsers also a backslash and what they skip.
    return below + b"/" + rest.lstrip(b"/\\\t")


def _around_length(
    head: ResponseHead, replaced: frozenset[bytes], *, chunked: bool, connection: bytes | None
) -> tuple[bytes, bool, bytes]:
    """Return what stands before and after the length's value, and whether there is one."""
    tunnel = head.framing is Framing.TUNNEL
    lines = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    before = None
    never = {REFUSED, _NO_BUFFERING} if head.event_stream else {REFUSED}
    for lower, name, value in head.fields:
        if lower in HOP_BY_HOP:
            if not tunnel or lower not in {b"connection", b"upgrade"}:
                continue
        elif lower in replaced or lower in head.named or lower in never:
            continue
        if lower == b"content-length":
            before = b"%b%b: " % (b"".join(lines), name)
            lines = [b"\r\n"]
        else:
            lines.append(b"%b: %b\r\n" % (name, value))
    if chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if connection is not None:
        lines.append(b"Connection: %b\r\n" % connection)
    rest = b"".join(lines)
    return (rest, False, b"") if before is None else (before, True, rest)

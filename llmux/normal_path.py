r"""The form of a URL's path on which all is decided, and which names can stand in a path.

Percent-decoded until stable, ``\`` read as ``/``, ``;…`` dropped from each segment, slashes merged, dot segments
resolved. Control characters, invalid escapes and invalid UTF-8 are malformed (400). Where a dot segment, ``\`` or
``;`` changed the path it is refused (404), so these are found and never resolved: engines disagree on what such a
path means. Slashes alone do not refuse.
"""

from __future__ import annotations

import re
from urllib.parse import quote

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SEVERAL_SLASHES = re.compile("/{2,}")
_MAX_ROUNDS = 16  # of decoding; every round makes an escape shorter, no honest path needs three
_MAX_SEGMENTS = 64  # the deny list looks at every one


class MalformedError(ValueError):
    """It is no path."""


class AmbiguousError(ValueError):
    """It may mean several paths."""


def decode_once(path: str) -> str:
    """Resolve the escapes of a path; those that are invalid stay."""
    try:
        raw = path.encode("utf-8", "surrogateescape")
        return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), raw).decode("utf-8")
    except UnicodeError as error:
        raise MalformedError("the path is not UTF-8") from error


def normalize(path: str) -> str:
    """Return the form of a raw path on which everything is decided."""
    if _BAD_ESCAPE.search(path):
        raise MalformedError("the path has an invalid percent-escape")
    # A % that an escape stood for may be followed by anything: later rounds leave what is no escape.
    for _ in range(_MAX_ROUNDS):
        decoded = decode_once(path)
        if decoded == path:
            break
        path = decoded
    else:
        raise MalformedError("the path is percent-encoded too many times")
    if _CONTROL.search(path):
        raise MalformedError("the path has a control character")
    if "\\" in path or ";" in path:
        raise AmbiguousError("the path has a backslash or a semicolon")
    path = _SEVERAL_SLASHES.sub("/", path)
    if path.count("/") > _MAX_SEGMENTS:
        raise AmbiguousError("the path has too many segments")
    if "/." in path and any(segment in {".", ".."} for segment in path.split("/")):
        raise AmbiguousError("the path has a dot segment")
    return path.rstrip("/") or "/"


def path_of(before: str, name: str, after: str) -> str | None:
    """Return the path of something by its name; None if such a path would be refused, whatever its escapes."""
    path = f"{before}/{quote(name, safe='', errors='replace')}/{after}"
    try:
        normalize(path)
    except (MalformedError, AmbiguousError):
        return None
    return path


def can_be_in_path(name: str) -> bool:
    """Whether an operator can name it: a model, or a host of a gateway."""
    return path_of("/llmux/models", name, "wake") is not None

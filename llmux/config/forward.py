"""Which paths reach the engines."""

from __future__ import annotations

import re

DEFAULT = "default"
DEFAULT_FORWARD: tuple[str, ...] = (
    "/v1/**",
    "/completion",
    "/completions",
    "/chat/completions",
    "/infill",
    "/embedding",
    "/embeddings",
    "/rerank",
    "/reranking",
    "/score",
    "/pooling",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/sdapi/v1/**",
)


def expand(globs: tuple[str, ...]) -> tuple[str, ...]:
    """Replace the element ``default`` by the default list; each glob once, in order.

    Raises:
        ValueError: a glob does not start with ``/``.

    """
    whole: dict[str, None] = {}
    for glob in globs:
        if glob == DEFAULT:
            whole |= dict.fromkeys(DEFAULT_FORWARD)
        elif not glob.startswith("/"):
            raise ValueError(f"{glob!r} is no path; write one as /v1/**, or `default` for the default list")
        else:
            glob_expression(glob)
            whole[glob] = None
    return tuple(whole)


def glob_expression(glob: str) -> str:
    """Return the regular expression of a ``forward`` glob.

    ``*`` stays within one segment, ``**`` (a whole segment) is any depth, none included.

    Raises:
        ValueError: it cannot be one.

    """
    if not glob.startswith("/"):
        raise ValueError(f"{glob!r} does not begin with a slash")
    parts = []
    for segment in glob.split("/")[1:]:
        if segment == "**":
            parts.append("(?:/[^/]+)*")
        elif "**" in segment:
            raise ValueError(f"{glob!r}: ** stands for whole segments")
        else:
            parts.append("/" + "[^/]*".join(re.escape(piece) for piece in segment.split("*")))
    return "".join(parts)

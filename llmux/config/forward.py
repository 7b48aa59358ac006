"""Which paths reach the engines."""

from __future__ import annotations

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
            whole[glob] = None
    return tuple(whole)

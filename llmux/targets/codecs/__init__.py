"""Codecs between the dialects that clients and engines speak: chat, messages and responses.

Theory of operation. A dialect is three things: a request, a whole answer, and a stream of events. For each dialect
there are codecs to and from one neutral form: a ``Request`` of turns and parts (``request``), and the answer as a
list of events (``events``), which is the same whether it came whole or in pieces. A ``Translation`` joins the
codecs of the two dialects of one request. Nothing here does I/O: values and bytes go in, and values and bytes come
out.

Nothing that a dialect lacks is lost silently. It is refused with the name of its field (400,
``cannot_translate``), or with ``lossy`` dropped and listed. Only hints that cannot change an answer, such as cache
marks, are always dropped and listed. A field that no dialect knows is an engine's own, and is kept.
"""

from llmux.targets.codecs.translation import Dialect, Translation

__all__ = ["Dialect", "Translation"]

"""Reads llama-swap's configuration, and writes llmux's from it.

``source`` reads the file, fills it in, and defines its settings; ``engine_command``, ``groups`` and ``conversion``
convert them to llmux's settings, and write these. What cannot be carried over becomes a ``Note``: nothing is
dropped silently.

The meaning of its settings was read from llama-swap's source and its config-schema.json of August 2026.
"""

from llmux.llama_swap.conversion import Translation, translate
from llmux.llama_swap.source import Note

__all__ = ["Note", "Translation", "translate"]

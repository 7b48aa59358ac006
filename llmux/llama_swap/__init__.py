"""Reading llama-swap's configuration, and writing llmux's from it.

``source`` reads the file, fills it in, and says what its settings mean there; ``engine_command``, ``groups`` and
``conversion`` turn it into llmux's settings, and write these down. What cannot be carried over becomes a ``Note``:
nothing is dropped in silence.

What its settings mean was read from llama-swap's source and its config-schema.json of August 2026.
"""

from llmux.llama_swap.conversion import Translation, translate
from llmux.llama_swap.source import Note

__all__ = ["Note", "Translation", "translate"]

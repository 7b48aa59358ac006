"""Converts a configuration of LiteLLM's proxy to one of llmux.

A deployment on this machine becomes a model, whose engine LiteLLM neither starts nor stops; any other becomes a
model of a remote. A name with one deployment, which is on this machine, is that model's own name. Any other name
becomes a virtual model, which uses the ``first`` available one of its deployments, and after them those of its
fallbacks. Settings without an equivalent in llmux are listed in notes, with their lines.

``source`` defines its settings, ``providers`` the endpoints that LiteLLM knows; ``conversion`` converts them,
and ``leftovers`` says what is not carried over.
"""

from llmux.litellm.conversion import page, translate
from llmux.litellm.providers import PROVIDERS

__all__ = ["PROVIDERS", "page", "translate"]

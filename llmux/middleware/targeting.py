"""Requests for a name that is not a model's or an alias: what it stands for, and what that does to the request.

Imported only where the configuration has such names.
"""

from __future__ import annotations

from llmux.config import Config
from llmux.extract import Body
from llmux.middleware.context import RequestContext
from llmux.middleware.model_handler import rename_in_query
from llmux.middleware.paths import Kind
from llmux.targets.variants import variants_of

SERVED_BY = "X-LLMux-Served-By"
VARIANT = "X-LLMux-Variant"


class Targeting:
    """Knows the names of one configuration."""

    def __init__(self, config: Config) -> None:
        self._variants = variants_of(config)

    async def choose(
        self, name: str, context: RequestContext, body: Body | None
    ) -> tuple[str, Body | None] | None:
        """Return the model that serves this request, and the body that it gets; None for an unknown name.

        Raises BadRequestError where the body does not take what the name stands for.
        """
        variant = self._variants.get(name)
        if variant is None or context.route.kind is not Kind.FORWARD:
            return None
        if body is not None:
            body = (await variant.apply(body)).replace_model(variant.model)
        if body is None or body.field is None:
            route = context.route
            context.route = route._replace(target=rename_in_query(route.target, variant.model))
        context.headers += [(SERVED_BY, variant.model), (VARIANT, variant.name)]
        return variant.model, body

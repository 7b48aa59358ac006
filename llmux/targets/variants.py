"""Variants at work: a request's body, changed as the variant says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmux.config import Config
from llmux.config.targets import VariantConfig
from llmux.errors import BadRequestError
from llmux.extract import Body
from llmux.targets.field_scanner import Rule, Rules, changes, tree


@dataclass(frozen=True, slots=True)
class Variant:
    """A model under another name and with other parameters."""

    name: str
    model: str
    rules: Rules

    async def apply(self, body: Body) -> Body:
        """Return the body with the variant's parameters. BadRequestError where they have no place in it."""
        if not self.rules:
            return body
        if body.form or body.compressed:
            kind = "a form" if body.form else "compressed"
            raise BadRequestError(
                f"{self.name!r} is {self.model!r} with other parameters, and these have no place in a body that is"
                f" {kind}: send it as plain JSON, or ask for {self.model!r}",
                code="variant_needs_json",
                param="model",
            )
        return body.edit(await changes(body, self.rules))


def variants_of(config: Config) -> Mapping[str, Variant]:
    """Return the variants by their names."""
    return {
        name: Variant(name, model, _rules(given))
        for model, settings in config.models.items()
        for name, given in settings.variants.items()
    }


def _rules(given: VariantConfig) -> Rules:
    rules = {name: Rule(always=value, given=True) for name, value in given.set.items()}
    rules |= {name: Rule(strip=True) for name in given.strip}
    for name in [*given.default, *(name for name in given.cap if name not in given.default)]:
        rules[name] = Rule(default=given.default.get(name), cap=given.cap.get(name))
    return tree(rules)

"""The model that a request names, and the request's body: read once, kept, sent as often as needed."""

from llmux.extract.body import Body, BodyBudget, BodyLimits, Splice, model_of, read_body, refuse_announced
from llmux.extract.json_scan import ModelScanner
from llmux.extract.model_field import (
    SLICE,
    ModelField,
    MultipartScanner,
    boundary_of,
    json_literal,
    model_in_query,
)

__all__ = [
    "SLICE",
    "Body",
    "BodyBudget",
    "BodyLimits",
    "ModelField",
    "ModelScanner",
    "MultipartScanner",
    "Splice",
    "boundary_of",
    "json_literal",
    "model_in_query",
    "model_of",
    "read_body",
    "refuse_announced",
]

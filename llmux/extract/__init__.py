"""The model that a request names, and the request's body: read once, kept, sent as often as needed."""

from llmux.extract.body import (
    Body,
    BodyBudget,
    BodyLimits,
    Pace,
    Splice,
    body_of,
    model_of,
    read_body,
    refuse_announced,
    scan_slowly,
)
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
    "Pace",
    "Splice",
    "body_of",
    "boundary_of",
    "json_literal",
    "model_in_query",
    "model_of",
    "read_body",
    "refuse_announced",
    "scan_slowly",
]

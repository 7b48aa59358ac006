"""Names that stand for more than one model: variants, virtual models, dialects.

Nothing of this is imported where none of it is configured.
"""

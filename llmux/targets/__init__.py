"""What a name stands for, when it is not a model's own; where requests go instead; and the dialects of engines.

Nothing of this is imported where none of it is configured.
"""

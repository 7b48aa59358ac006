"""What names stand for that are not models; where requests go instead; and the dialects of engines.

Imported only if any of it is configured.
"""

"""The shipped policies, one per file; ``use: NAME`` in the configuration chooses one."""

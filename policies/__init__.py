"""The shipped policies, one a file; ``use: NAME`` in the configuration chooses one."""

"""Moved to ``tests.harness.lease.lab``."""

from tests.harness.lease.lab import *  # noqa: F403

"""Moved to ``tests.harness.lease.raw``."""

from tests.harness.lease.raw import *  # noqa: F403

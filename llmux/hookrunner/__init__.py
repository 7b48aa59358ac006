"""Running hooks: one shell script each, followed until its exit. It decides nothing about switching."""

from llmux.hookrunner.hook_process import Trace, end_leftovers
from llmux.hookrunner.job import HookJob, HookResult, environment
from llmux.hookrunner.runner import HookRunner

__all__ = ["HookJob", "HookResult", "HookRunner", "Trace", "end_leftovers", "environment"]

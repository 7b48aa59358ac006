from pathlib import Path
from types import SimpleNamespace

from llmux.core.policy import SwitchTo
from llmux.plugins import load_policy


def test_the_oldest_waiter_is_served_next():
    decision = load_policy("fifo", {}, Path()).decide(SimpleNamespace(waiting=("b", "c")))
    assert isinstance(decision, SwitchTo)
    assert decision.model == "b"
    assert decision.reason

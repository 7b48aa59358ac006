"""The process in which a running llmux compares policies: ``python -m llmux.simulator.look_back``.

A question comes on standard input, the answer goes to standard output. It runs at the lowest priority and within
limits of its own; see ``llmux.runtime.policy_chooser`` for the question.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmux.core.policy import Policy
from llmux.errors import LLMuxError
from llmux.estimates.costs import SwitchCosts
from llmux.observability.state_file import load_costs
from llmux.plugins import load_policy
from llmux.simulator.choosing import FEWEST, Choice, Memory, choose
from llmux.simulator.configured import HookSeconds, simulate_specs
from llmux.simulator.cost_matrix import measured
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Recorded
from llmux.simulator.run import Outcome

NICE = 19
CPU = 100  # seconds
WRITTEN = 1 << 20  # bytes


def main() -> int:
    """Answer one question."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    for kind, most in ((resource.RLIMIT_CPU, CPU), (resource.RLIMIT_FSIZE, WRITTEN), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    try:
        choice = answer(json.load(sys.stdin.buffer))
    except LLMuxError as error:
        print(error)  # noqa: T201 - this is what its output is for
        return 1
    json.dump(None if choice is None else asdict(choice), sys.stdout)
    return 0


def answer(question: Mapping[str, Any]) -> Choice | None:
    """Return which policy is to decide; None if there is too little data."""
    start = {"models": question["models"], "rules": question["rules"]}
    requests = sorted(question["requests"], key=lambda line: float(line["arrival_s"]))
    recorded = Recorded("the last hour", start, requests, [], [], [], [], 0, 0)
    known = SwitchCosts()
    load_costs(known, question["costs"])
    costs = measured(known)
    if len(requests) < FEWEST or (costs.default is None and not costs.wakes):
        return None
    policy: Any = load_policy(question["use"], question["options"], Path(question["folder"]))
    fits = recorded.fits()
    trace = recorded.fitted_trace(fits)
    engines = Engines(own={name: each.engine for name, each in fits.items()})
    guesses = {name: (guess[0], guess[1]) for name, guess in question["guesses"].items()}
    rules = replace(recorded.rules, anticipate=bool(question["anticipate"]))
    specs = recorded.exact_specs()

    def run(candidate: Policy) -> Outcome:
        return simulate_specs(trace, specs, rules, candidate, HookSeconds(costs, guesses), engines)

    options, makers = policy.options, policy.makers
    memory = Memory.of(question.get("memory"), makers, options.past)
    since = float(question.get("since", 0.0))
    return choose(makers, question["chosen"], run, options.objective, policy.limit, memory=memory, since=since)


if __name__ == "__main__":
    sys.exit(main())

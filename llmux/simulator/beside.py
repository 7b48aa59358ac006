"""The process that looks back for ``use: auto``: a question on standard input, the answer on standard output.

It runs at the lowest priority and within limits of its own; see ``llmux.runtime.auto`` for what it is asked.
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

from llmux.core.costs import SwitchCosts
from llmux.core.policy import Policy
from llmux.errors import LLMuxError
from llmux.plugins import load_policy
from llmux.simulator.choosing import FEWEST, Choice, choose
from llmux.simulator.cost_matrix import measured
from llmux.simulator.engine_model import Engines
from llmux.simulator.recorded import Recorded
from llmux.simulator.residency import HookSeconds, simulate_specs
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
    """Return which policy is to decide; None where there is too little to say."""
    start = {"models": question["models"], "rules": question["rules"]}
    requests = sorted(question["requests"], key=lambda line: float(line["arrival_s"]))
    recorded = Recorded("the last hour", start, requests, [], [], [], [], 0, 0)
    known = SwitchCosts()
    known.load(question["costs"])
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

    return choose(policy.makers, question["chosen"], run, policy.options.objective, policy.limit)


if __name__ == "__main__":
    sys.exit(main())

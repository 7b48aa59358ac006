"""Replay traffic through the production core in virtual time, to compare policies.

Theory of operation
===================

``llmux.core.Core`` does no I/O and reads no clock, so it can be driven by sockets and processes or, as here, by a
heap of virtual times. The rules are the same ones: admission, gates, guard rails and switch-cost averages are the
code that runs in production, and policies are called exactly as there.

- ``trace``         the traffic: jobs (arrival, model, prompt and output tokens), and files of them; generated
                    traffic and users in closed loops are in ``synthetic``;
- ``recorded``      llmux's own record as a trace, and its exact replay;
- ``engine_model``  how fast an engine is: streams share it, each advances by the same number of tokens; and how
                    that is fitted to a record;
- ``cost_matrix``   what a switch costs in each direction;
- ``run``           one run: events in, effects out, a clock that jumps;
- ``configured``    runs under a configuration's rules, with several models awake and sleep levels;
- ``simulation``    whole runs, of one trace under one policy;
- ``choosing``      which policy would have served the last hour best, for ``use: auto``; ``look_back`` is the
                    process in which a running llmux finds it;
- ``statistics``    results: waits, times to the first token, shares of time; whether another run is better by
                    more than chance; which policy to use, in words; and a picture.
"""

from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import EngineModel
from llmux.simulator.run import Outcome
from llmux.simulator.simulation import simulate
from llmux.simulator.statistics import Statistics, statistics_of
from llmux.simulator.trace import Job, Trace, TraceError

__all__ = [
    "CostMatrix",
    "EngineModel",
    "Job",
    "Outcome",
    "Statistics",
    "Trace",
    "TraceError",
    "simulate",
    "statistics_of",
]

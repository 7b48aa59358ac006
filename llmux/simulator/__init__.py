"""Replay traffic through the production core in virtual time, to compare policies.

Theory of operation
===================

``llmux.core.Core`` does no I/O and reads no clock, so what drives it may be sockets and processes or, as here, a
heap of virtual times. There is no second rule book: admission, gates, guard rails and switch-cost averages are
the ones that run in production, and a policy is asked exactly as it is there.

- ``trace``         the traffic: jobs (arrival, model, prompt and output tokens), and files of them; generated ones
                    are in ``synthetic``, users that wait for their answers in ``closed``;
- ``recorded``      llmux's own record as a trace; ``replay`` plays it again exactly;
- ``engine_model``  how fast an engine works: streams share it, each advances by the same number of tokens;
- ``cost_matrix``   what a switch costs in each direction;
- ``run``           one run: events in, effects out, a clock that jumps;
- ``residency``     runs under a configuration's rules, in which several models may be awake, and levels matter;
- ``paired``        whether one run is better than another by more than chance;
- ``statistics``    what came of it: waits, times to the first token, shares of time; and which policy to use, in
                    words; ``plot`` draws it.
"""

from llmux.simulator.cost_matrix import CostMatrix
from llmux.simulator.engine_model import EngineModel
from llmux.simulator.run import Outcome, simulate
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

"""Replay traffic through the production core in virtual time, to compare policies.

Theory of operation
===================

``llmux.core.Core`` does no I/O and reads no clock, so what drives it may be sockets and processes or, as here, a
heap of virtual times. There is no second rule book: admission, gates, guard rails and switch-cost averages are
the ones that run in production, and a policy is asked exactly as it is there.

- ``trace``         the traffic: jobs (arrival, model, prompt and output tokens), and files of them; generated ones
                    and users that wait for their answers are in ``synthetic``;
- ``recorded``      llmux's own record as a trace, and replayed exactly;
- ``engine_model``  how fast an engine works: streams share it, each advances by the same number of tokens; and
                    what a record says of that;
- ``cost_matrix``   what a switch costs in each direction;
- ``run``           one run: events in, effects out, a clock that jumps;
- ``configured``    runs under a configuration's rules, in which several models may be awake, and levels matter;
- ``look_back``     which policy would have served the last hour best, for ``use: auto``;
- ``statistics``    what came of it: waits, times to the first token, shares of time; whether another run is better
                    by more than chance; and which policy to use, in words; and a picture.
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

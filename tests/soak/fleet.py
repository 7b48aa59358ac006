"""Bad days of a fleet, with real processes under load.

    PYTHONPATH=. .venv/bin/python -m tests.soak.fleet 60 [SEED]

See ``tests.harness.lease.bad_days``.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.harness.lease.bad_days import Days


async def main(seconds: float, seed: int) -> int:
    """Run and print."""
    problems = ["it did not come to its end"]
    with tempfile.TemporaryDirectory() as folder:
        days = Days(Path(folder), seed)
        try:
            problems = await days.run(seconds)
        finally:
            await days.finish()
    print(f"{sum(days.ends.values())} requests: {dict(days.ends)}; by host: {dict(days.served)}; seed {seed}")
    print(f"harm: {dict(days.events)}{'' if days.store else '; there was no store'}")
    for what, took in days.took.items():
        print(f"{what}: noticed, or whole again, after {min(took):.2f} to {max(took):.2f} s ({len(took)} times)")
    print("\n".join(problems) or "nothing went wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(asyncio.run(main(float(given[0]) if given else 60.0, int(given[1]) if given[1:] else 1)))

"""How long tests wait for events, and which processes run.

A machine ten times slower than usual must be fast enough.
"""

from pathlib import Path

PATIENCE = 60.0  # seconds


def processes_with(variable: str) -> dict[int, str]:
    """Return the process ids and commands of what runs with this in its environment, as NAME=value."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):  # not "[0-9]*/environ": that fails where one ends meanwhile
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found

"""How long tests wait for what has to happen, and what runs.

A machine ten times slower than usual has to be quick enough.
"""

from pathlib import Path

PATIENCE = 60.0  # seconds


def processes_with(variable: str) -> dict[int, str]:
    """Return the process ids and commands of what runs with this in its environment, as NAME=value."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in file.read_bytes().split(b"\0"):
                found[int(file.parent.name)] = file.with_name("cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found

"""Print, as constraints for pip, the oldest version that pyproject.toml allows of each package that llmux uses.

The tools of the tests are not among them: they are taken as new as they come.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

TOOLS = {"demo", "test"}
FLOOR = re.compile(r">=([\d.]+)[^;]*")


def oldest(file: Path) -> list[str]:
    project = tomllib.loads(file.read_text())["project"]
    extras = project["optional-dependencies"]
    named = {*project["dependencies"], *(one for extra in extras.keys() - TOOLS for one in extras[extra])}
    pinned = {FLOOR.sub(r"==\1", one) for one in named}
    if loose := [one for one in pinned if "==" not in one.partition(";")[0]]:
        raise ValueError(f"without an oldest version: {', '.join(loose)}")
    return sorted(pinned)


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest(Path(sys.argv[1]))) + "\n")

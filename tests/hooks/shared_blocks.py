"""The parts that several hook scripts have in common: each script is complete in itself, so each has a copy.

    python tests/hooks/shared_blocks.py hooks/llama-cpp.sh

copies the parts of this script into all the others that have them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "hooks"
BLOCK = re.compile(r"^# ---- shared: ([^\n]+)\n(.*?)^# ---- end of \1\n", re.MULTILINE | re.DOTALL)


def blocks_of(script: Path) -> dict[str, str]:
    """Return the shared parts of a script, by name."""
    return {found[1]: found[0] for found in BLOCK.finditer(script.read_text())}


def spread(source: Path) -> list[str]:
    """Write the parts of ``source`` into all scripts that have them; return the names of those that changed."""
    ours, changed = blocks_of(source), []
    for script in sorted(FOLDER.glob("*.sh")):
        text = script.read_text()
        fresh = BLOCK.sub(lambda found: ours.get(found[1], found[0]), text)
        if fresh != text:
            script.write_text(fresh)
            changed.append(script.name)
    return changed


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}\n" for name in spread(Path(sys.argv[1]))))

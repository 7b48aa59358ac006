"""One line a model: ``hooks:`` and ``cmd:``, and the hooks and the port that they stand for.

``hooks: llama-cpp`` names a script that comes with llmux, ``hooks: ./my.sh`` one of the user's own; it is called
with the hook's name as its argument. ``cmd:`` is the command of a server, which ``process.sh`` starts and ends;
its port is made from the model's name, so that an engine which outlives llmux is found again.
"""

from __future__ import annotations

import difflib
import shlex
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmux.config.address import parse_address
from llmux.core.spec import HookKind

GIVEN = (HookKind.WAKE, HookKind.SLEEP, HookKind.ALIVE, HookKind.VERIFY, HookKind.STOP)
"""The hooks that a script named in ``hooks:`` has to know, as its first argument."""
PROCESS = "process"  # the script that runs ``cmd``
FIRST_PORT, PORTS = 20_000, 10_000  # below what systems give to outgoing connections
_SINGLE = frozenset({"gpu-free", "prefetch"})  # they are one hook, not five


def hook_folder() -> Path:
    """Return the folder of the scripts that come with llmux: in the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "hooks"
    return installed if installed.is_dir() else package.parent / "hooks"


def script_of(hooks: str) -> str:
    """Return the shell words that ``hooks`` stands for, to which the hook's name is added.

    Raises:
        ValueError: no script of that name comes with llmux.

    """
    if "/" in hooks or len(hooks.split()) != 1:
        return hooks.strip()
    known = sorted(file.stem for file in hook_folder().glob("*.sh") if file.stem not in _SINGLE)
    name = hooks.strip().removesuffix(".sh")
    if name in known:
        return shlex.quote(str(hook_folder() / f"{name}.sh"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"no script {name!r} comes with llmux; {hint}One of your own is written with its path, as ./{name}.sh"
    )


def expand(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model with those that ``hooks`` or ``cmd`` stands for. What is given stays."""
    found = dict(model)
    hooks, cmd = found.get("hooks"), found.get("cmd")
    if isinstance(cmd, str) and cmd.strip() and hooks is None:
        hooks = PROCESS
        env = found.get("env")
        if env is None or isinstance(env, Mapping):
            found["env"] = {"COMMAND": cmd.strip(), **_port(found), **(env or {})}
    if hooks is None:
        return found
    try:
        script = script_of(hooks) if isinstance(hooks, str) and hooks.strip() else "false"
    except ValueError:
        script = "false"  # the setting's own check says what is wrong
    for kind in GIVEN:
        found.setdefault(kind.value, f"{script} {kind}")
    return found


def _port(model: Mapping[str, Any]) -> dict[str, str]:
    port, url = model.get("port"), model.get("url")
    if port is None and isinstance(url, str):
        try:
            port = parse_address(url).port
        except ValueError:
            return {}
    return {} if port is None else {"PORT": str(port)}


def with_ports(models: Mapping[str, Any], seed: object) -> dict[str, Any]:
    """Return the models with a port for each that has a ``cmd`` and no address.

    It is made from ``seed`` and the model's name, and is the same at every start; where two would have the same
    one, the later model has the next.
    """
    taken = {model.get("port") for model in models.values() if isinstance(model, Mapping)}
    taken |= {int(port) for port in taken if isinstance(port, str) and port.isdecimal()}
    found = dict(models)
    for name, model in models.items():
        if not isinstance(model, Mapping) or not isinstance(model.get("cmd"), str):
            continue
        if model.get("port") is not None or model.get("url") is not None:
            continue
        place = zlib.crc32(f"{seed}/{name}".encode())
        port = next(port for n in range(PORTS) if (port := FIRST_PORT + (place + n) % PORTS) not in taken)
        taken.add(port)
        found[name] = {**model, "port": port}
    return found

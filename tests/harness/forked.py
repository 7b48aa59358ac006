"""The process that forks llmuxes: ``python -m tests.harness.forked DESCRIPTOR``. See ``launcher``."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmux
from llmux.config import Config
from llmux.plugins import load_policy

LARGEST = 1 << 20
NOT_WHEN_SERVING = ("__main__", "simulator", "survey", "llama_swap")


def load() -> None:
    """Import what a running llmux needs, and make what each would make anew: the validator is half of a start."""
    for module in pkgutil.walk_packages(llmux.__path__, "llmux."):
        if not any(part in NOT_WHEN_SERVING for part in module.name.split(".")):
            importlib.import_module(module.name)
    for name in ("uvloop", "watchfiles", "anyio._backends._asyncio", "anyio._core._sockets", "redis.asyncio"):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    hooks = {"wake": "true", "sleep": "true", "alive": "true"}
    config = Config.model_validate({"models": {"a": {"port": 1, **hooks}}})
    load_policy(config.policy.use, {}, Path())
    gc.collect()
    gc.freeze()


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the tests have ended; in a child, return what it was forked for."""
    sharing: list[int] = []
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(requests, LARGEST, 1)
        except ConnectionResetError:  # they were interrupted before they had read an answer
            break
        if not data:
            break
        request = json.loads(data)
        if "reap" in request:
            requests.send(str(os.waitpid(request["reap"], 0)[1]).encode())
            continue
        if pid := os.fork():
            requests.send(str(pid).encode())
            for fd in fds:
                os.close(fd)
            if "share" in request:
                sharing.append(pid)
            continue
        if "share" in request:
            sharing.clear()
            os.dup2(fds[0], requests.fileno())
            os.close(fds[0])
            continue
        become(request, fds[0])
        requests.close()
        return request
    for pid in sharing:  # what they took is in what the tests took
        os.waitpid(pid, 0)
    return None


def become(request: dict[str, Any], log: int) -> None:
    """Be the process that was asked for."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["llmux", *request["arguments"]]
    sys.path[0] = str(Path(sys.executable).parent)  # where the script `llmux` is
    if request["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    load()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        if serve(requests) is None:
            return
    from llmux.cli import main as command_line  # noqa: PLC0415, loaded above

    try:
        end(command_line)
    finally:
        os._exit(1)


def end(command_line: Callable[[], None]) -> None:
    """Run it, and end this process as Python does, but for taking apart all that was imported.

    That touches every page that is shared with the process it was forked from: two thirds of a short run's work.
    What a run itself has left is looked for, and complains.
    """
    code = 1
    try:
        command_line()
        code = 0
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)  # noqa: T201
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

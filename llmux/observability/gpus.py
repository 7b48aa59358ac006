"""The memory and load of NVIDIA GPUs, through NVML (the ``gpu`` extra), for the admin API.

NVML may take seconds, or never answer when a driver is stuck. So it is called in its own thread, once at a time,
however many readers there are; meanwhile they get the last result. Nothing is loaded before the first reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import Callable
from typing import Any

FRESH = 1.0  # seconds that an answer is good for
FRESH_ERROR = 15.0  # seconds: a driver does not come back often
PATIENCE = 2.0  # seconds to wait for NVML
LET_GO = 30.0  # seconds without a look after which NVML is closed: open, it keeps a driver from being unloaded

MISSING = "nvidia-ml-py is not installed: pip install 'llmux[gpu]'"
NO_DRIVER = "there is no NVIDIA driver on this machine"

Found = dict[str, Any]
"""``{"gpus": [...], "error": None or why they cannot be read}``."""

UNREAD: Found = {"gpus": [], "error": "not read yet"}
"""What is known before the first answer."""


class Gpus:
    """What the GPUs are doing. All methods are called from the loop."""

    def __init__(self) -> None:
        self._nvml = _Nvml()
        self._reading: asyncio.Future[Found] | None = None
        self._asked = 0.0
        self._good_until = float("-inf")
        self._last = UNREAD
        self._stuck: Found | None = None
        self._closing: asyncio.TimerHandle | None = None

    async def read(self) -> Found:
        """Return what is known, ``FRESH`` seconds old at most; it takes ``PATIENCE`` seconds at most."""
        self._ask()
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=PATIENCE)
        return self._known()

    def glance(self) -> Found:
        """Return what was read last (the same object while nothing is new), and have it read anew when old."""
        self._ask()
        return self._known()

    def _known(self) -> Found:
        if self._reading is None or asyncio.get_running_loop().time() - self._asked < PATIENCE:
            self._stuck = None
            return self._last
        if self._stuck is None:
            self._stuck = {"gpus": self._last["gpus"], "error": "NVML does not answer"}
        return self._stuck

    def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._reading is not None or now < self._good_until:
            return
        self._asked = now
        self._reading = loop.create_future()
        _in_thread(self._read, loop)
        if self._closing is not None:
            self._closing.cancel()
        self._closing = loop.call_later(LET_GO, _in_thread, self._nvml.close)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        found = self._nvml.read()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(self._take, found)

    def _take(self, found: Found) -> None:
        reading, self._reading = self._reading, None
        self._last = found
        fresh = FRESH if found["error"] is None else FRESH_ERROR
        self._good_until = asyncio.get_running_loop().time() + fresh
        if reading is not None and not reading.done():
            reading.set_result(found)


def _in_thread(act: Callable[..., None], *args: object) -> None:
    # A daemon: one that never returns from the driver must not keep llmux from ending.
    threading.Thread(target=act, args=args, name="llmux-gpus", daemon=True).start()


class _Nvml:
    """NVML, opened when it is asked first. Called from threads, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: Any = None

    def read(self) -> Found:
        with self._lock:
            try:
                nvml: Any = importlib.import_module("pynvml")
            except ImportError:
                return {"gpus": [], "error": MISSING}
            try:
                if self._open is None:
                    nvml.nvmlInit()
                    self._open = nvml
                count = nvml.nvmlDeviceGetCount()
                return {"gpus": [_gpu(nvml, number) for number in range(count)], "error": None}
            except nvml.NVMLError as error:
                self._shut()
                missing = {nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED}
                return {"gpus": [], "error": NO_DRIVER if error.value in missing else f"NVML says: {error}"}

    def close(self) -> None:
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        nvml, self._open = self._open, None
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()


def _gpu(nvml: Any, number: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)

    def ask(question: Callable[..., Any], *args: Any) -> Any:
        try:
            return question(handle, *args)
        except nvml.NVMLError as error:
            # Slices of a GPU have no load; GPUs that share the host's memory have none of their own.
            if error.value in {nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_PERMISSION}:
                return None
            raise

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    load = ask(nvml.nvmlDeviceGetUtilizationRates)
    power = ask(nvml.nvmlDeviceGetPowerUsage)
    name = nvml.nvmlDeviceGetName(handle)
    return {
        "index": number,
        "name": name.decode(errors="replace") if isinstance(name, bytes) else name,
        "memory_used": None if memory is None else memory.used,
        "memory_total": None if memory is None else memory.total,
        "load": None if load is None else load.gpu / 100,
        "temperature": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "power": None if power is None else power / 1000,
    }

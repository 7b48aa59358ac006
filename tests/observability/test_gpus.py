"""GPU figures: with a stand-in for NVML that answers and refuses as the real one, and with the real library."""

import asyncio
import importlib
import sys
import threading
import types

import pytest

from llmux.observability import gpus as module
from llmux.observability.gpus import MISSING, NO_DRIVER, Gpus
from tests.harness.waiting import PATIENCE


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__({1: "Uninitialized", 3: "Not Supported", 15: "GPU is lost"}[value])
        self.value = value


class Board(types.ModuleType):
    """NVML with some GPUs; refuses what is asked before ``nvmlInit``."""

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *names, unsupported=()):
        super().__init__("pynvml")
        self.names, self.unsupported = names, unsupported
        self.open = self.inits = 0
        self.lost = False
        self.may_answer = threading.Event()
        self.may_answer.set()

    def nvmlInit(self):  # noqa: N802
        self.open, self.inits = self.open + 1, self.inits + 1

    def nvmlShutdown(self):  # noqa: N802
        self._check()
        self.open -= 1

    def _check(self, what=None):
        if not self.open:
            raise NVMLError(1)
        if what in self.unsupported:
            raise NVMLError(3)

    def nvmlDeviceGetCount(self):  # noqa: N802
        self.may_answer.wait(PATIENCE)
        self._check()
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, number):  # noqa: N802
        self._check()
        if self.lost:
            raise NVMLError(15)
        return number

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        self._check("memory")
        return types.SimpleNamespace(used=(handle + 1) << 30, total=24 << 30)

    def nvmlDeviceGetUtilizationRates(self, _handle):  # noqa: N802
        self._check("load")
        return types.SimpleNamespace(gpu=93, memory=40)

    def nvmlDeviceGetTemperature(self, _handle, _sensor):  # noqa: N802
        return 64

    def nvmlDeviceGetPowerUsage(self, _handle):  # noqa: N802
        self._check("power")
        return 312_400


@pytest.fixture
def board(monkeypatch):
    def put(*names, **more):
        made = Board(*names, **more)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return put


async def test_figures_of_each_gpu(board):
    board("Card", b"Old card")
    found = await Gpus().read()
    assert found["error"] is None
    assert found["gpus"][0] == {
        "index": 0, "name": "Card", "memory_used": 1 << 30, "memory_total": 24 << 30, "load": 0.93,
        "temperature": 64, "power": 312.4,
    }  # fmt: skip
    assert [gpu["name"] for gpu in found["gpus"]] == ["Card", "Old card"]


async def test_what_a_gpu_does_not_tell_is_none(board):
    board("Slice", unsupported=("memory", "load", "power"))
    (gpu,) = (await Gpus().read())["gpus"]
    assert [gpu[name] for name in ("memory_used", "memory_total", "load", "power")] == [None] * 4
    assert gpu["temperature"] == 64


async def test_it_is_asked_once_for_all_who_look_and_again_when_old(board, monkeypatch):
    nvml = board("Card")
    gpus = Gpus()
    one, other = await asyncio.gather(gpus.read(), gpus.read())
    assert one is other is gpus.glance()
    monkeypatch.setattr(module, "FRESH", 0.0)
    gpus._good_until = 0.0
    assert await gpus.read() is not one
    assert nvml.inits == 1


async def test_an_error_is_said_and_the_next_look_begins_anew(board, monkeypatch):
    monkeypatch.setattr(module, "FRESH_ERROR", 0.0)
    nvml = board("Card")
    nvml.lost = True
    gpus = Gpus()
    assert await gpus.read() == {"gpus": [], "error": "NVML says: GPU is lost"}
    assert nvml.open == 0
    nvml.lost = False
    assert len((await gpus.read())["gpus"]) == 1


async def test_a_driver_that_is_stuck_holds_up_nobody(board, monkeypatch):
    nvml = board("Card")
    nvml.may_answer.clear()
    gpus = Gpus()
    monkeypatch.setattr(module, "PATIENCE", 600.0)
    assert gpus.glance() == {"gpus": [], "error": "not read yet"}
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    found = await gpus.read()
    assert found["error"] == "NVML does not answer"
    assert gpus.glance() is gpus.glance()
    reading = gpus._reading
    monkeypatch.setattr(module, "PATIENCE", 600.0)
    nvml.may_answer.set()
    await reading
    assert gpus.glance()["error"] is None


async def test_nobody_looks_and_it_is_let_go(board, monkeypatch):
    monkeypatch.setattr(module, "LET_GO", 0.01)
    nvml = board("Card")
    await Gpus().read()
    async with asyncio.timeout(PATIENCE):
        while nvml.open:  # noqa: ASYNC110 - a thread does it, which tells nobody
            await asyncio.sleep(0.005)


async def test_without_the_library_it_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert await Gpus().read() == {"gpus": [], "error": MISSING}


async def test_the_real_library_answers_or_says_why_not():
    nvml = importlib.import_module("pynvml")
    found = await Gpus().read()
    count, why = 0, None
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        why = NO_DRIVER if error.value in {9, 12} else f"NVML says: {error}"
    assert (len(found["gpus"]), found["error"]) == (count, why)

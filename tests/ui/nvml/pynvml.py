# ruff: noqa: N802 - the names are NVML's
"""A stand-in for NVML with one GPU, for a llmux that is a process of its own."""

from types import SimpleNamespace

NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_TEMPERATURE_GPU = 3, 4, 0


class NVMLError(Exception):
    value = 0


def nvmlInit():
    pass


def nvmlDeviceGetCount():
    return 1


def nvmlDeviceGetHandleByIndex(number):
    return number


def nvmlDeviceGetName(_handle):
    return "NVIDIA Test 80GB"


def nvmlDeviceGetMemoryInfo(_handle):
    return SimpleNamespace(used=int(61.2 * 2**30), total=80 * 2**30)


def nvmlDeviceGetUtilizationRates(_handle):
    return SimpleNamespace(gpu=93)


def nvmlDeviceGetTemperature(_handle, _sensor):
    return 64


def nvmlDeviceGetPowerUsage(_handle):
    return 412_000

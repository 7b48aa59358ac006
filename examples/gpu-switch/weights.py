"""The weights of one engine, which can leave the GPU for host memory and come back.

With torch they are bfloat16 on a GPU, or on the CPU; without it numpy's float16 stands in on the CPU, where the
"GPU" is a second copy in the same memory: enough to see that everything works, not to measure a GPU.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from typing import Any, Protocol

UNITS = {"": 1, "MiB": 1 << 20, "GiB": 1 << 30}


def size(text: str) -> int:
    """Return the bytes that ``8GiB`` means."""
    found = re.fullmatch(r"(\d+)(|MiB|GiB)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GiB or 64MiB")
    return int(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Moved:
    """What one move took: seconds, the seconds of the copy alone, and bytes."""

    seconds: float
    copy: float
    bytes: int

    def as_dict(self) -> dict[str, float]:
        """Return it for JSON."""
        return {"seconds": self.seconds, "copy": self.copy, "bytes": self.bytes}


class Weights(Protocol):
    """A stack of square matrices, one a layer."""

    bytes: int
    device: str

    def to_host(self) -> Moved:
        """Copy the weights to host memory and give the device's back."""

    def to_device(self) -> Moved:
        """Allocate on the device, and copy the weights there."""

    def next_token(self, tokens: list[int]) -> int:
        """Run the tokens through all layers; return the next one."""


class TorchWeights:
    """Weights in torch tensors, with pinned host memory for the way out and back."""

    def __init__(self, size: int, width: int, seed: int, device: str) -> None:
        import torch  # noqa: PLC0415 - only where it is there

        self.torch: Any = torch
        self.device = device
        self.width = width
        self.cuda = device.startswith("cuda")
        layers = max(1, size // (2 * width * width))
        generator = torch.Generator(device=device).manual_seed(seed)
        scale = width**-0.5
        shape = (width, width)
        self.layers = [
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * scale
            for _ in range(layers)
        ]
        self.bytes = layers * 2 * width * width
        # Pinning is slow, so it is done once. It is this memory that a sleeping engine keeps.
        self.host = [torch.empty(shape, dtype=torch.bfloat16, pin_memory=self.cuda) for _ in range(layers)]

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def to_host(self) -> Moved:
        """Copy the weights to host memory and give the device's back."""
        began = time.perf_counter()
        self._wait()
        for host, layer in zip(self.host, self.layers, strict=True):
            host.copy_(layer, non_blocking=True)
        self._wait()
        copied = time.perf_counter()
        self.layers = []
        if self.cuda:
            self.torch.cuda.empty_cache()  # to the driver: another process is to have it
            self._wait()
        return Moved(time.perf_counter() - began, copied - began, self.bytes)

    def to_device(self) -> Moved:
        """Allocate on the device, and copy the weights there."""
        began = time.perf_counter()
        layers = [self.torch.empty_like(host, device=self.device) for host in self.host]
        self._wait()
        allocated = time.perf_counter()
        for host, layer in zip(self.host, layers, strict=True):
            layer.copy_(host, non_blocking=True)
        self._wait()
        self.layers = layers
        ended = time.perf_counter()
        return Moved(ended - began, ended - allocated, self.bytes)

    def next_token(self, tokens: list[int]) -> int:
        """Run the tokens through all layers; return the next one."""
        with self.torch.inference_mode():
            state = self.torch.zeros((1, self.width), dtype=self.torch.bfloat16, device=self.device)
            state[0, [token % self.width for token in tokens[-64:]]] = 1
            for layer in self.layers:
                state = self.torch.tanh(state @ layer)
            return int(state.argmax())


class NumpyWeights:
    """The stand-in without torch."""

    device = "cpu"

    def __init__(self, size: int, width: int, seed: int) -> None:
        import numpy as np  # noqa: PLC0415 - not needed with torch

        self.np: Any = np
        self.width = width
        layers = max(1, size // (2 * width * width))
        random = np.random.default_rng(seed)
        shape = (width, width)
        self.layers = [
            (random.standard_normal(shape, dtype=np.float32) * width**-0.5).astype(np.float16)
            for _ in range(layers)
        ]
        self.bytes = layers * 2 * width * width
        self.host = [np.empty(shape, np.float16) for _ in range(layers)]

    def to_host(self) -> Moved:
        """Copy the weights, and free where they were."""
        began = time.perf_counter()
        for host, layer in zip(self.host, self.layers, strict=True):
            self.np.copyto(host, layer)
        copied = time.perf_counter()
        self.layers = []
        return Moved(time.perf_counter() - began, copied - began, self.bytes)

    def to_device(self) -> Moved:
        """Copy them back into new memory."""
        began = time.perf_counter()
        layers = [self.np.empty_like(host) for host in self.host]
        allocated = time.perf_counter()
        for host, layer in zip(self.host, layers, strict=True):
            self.np.copyto(layer, host)
        self.layers = layers
        ended = time.perf_counter()
        return Moved(ended - began, ended - allocated, self.bytes)

    def next_token(self, tokens: list[int]) -> int:
        """Run the tokens through all layers; return the next one."""
        state = self.np.zeros((1, self.width), self.np.float32)
        state[0, [token % self.width for token in tokens[-64:]]] = 1
        for layer in self.layers:
            state = self.np.tanh(state @ layer.astype(self.np.float32))
        return int(state.argmax())


def make(size: int, seed: int, device: str) -> Weights:
    """Make random weights of about ``size`` bytes on a device: ``cuda``, ``cuda:1``, ``cpu``.

    ImportError when that takes torch and it is not there.
    """
    width = 4096 if size >= 1 << 30 else 512
    try:
        return TorchWeights(size, width, seed, device)
    except ImportError:
        if device != "cpu":
            raise
        return NumpyWeights(size, width, seed)


def bandwidth(size: int, device: str) -> dict[str, float]:
    """Measure bytes a second to the host and to the device: the better of three copies each way."""
    weights = make(size, 0, device)
    out, back = [], []
    for _ in range(3):
        out.append(weights.to_host().copy)
        back.append(weights.to_device().copy)
    return {"to_host": weights.bytes / min(out), "to_device": weights.bytes / min(back)}

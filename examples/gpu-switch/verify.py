"""Exit 0 when the GPU has room for SIZE: python verify.py DEVICE SIZE. On the CPU there is nothing to look at."""

from __future__ import annotations

import sys

from weights import size


def free_bytes(device: str) -> int:
    """Return the free memory of a GPU, as the driver says it."""
    import pynvml  # noqa: PLC0415 - nvidia-ml-py; not on a machine without a GPU

    pynvml.nvmlInit()
    _, _, index = device.partition(":")
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(int(index or 0))).free)


def main() -> None:
    """Look once; llmux asks again until it is so."""
    device, wanted = sys.argv[1], size(sys.argv[2])
    if device == "cpu":
        return
    free = free_bytes(device)
    if free < wanted:
        sys.exit(f"{free / 2**30:.1f} GiB are free of the {wanted / 2**30:.1f} GiB that are needed")


if __name__ == "__main__":
    main()

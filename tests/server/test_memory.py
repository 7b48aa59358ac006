"""Memory that becomes free stays with the process: it is needed again with the next piece of an answer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from llmux.process import KEPT, _settle_memory
if sys.argv[1] == "settled":
    _settle_memory()
size = KEPT // 64
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    pieces = [bytearray(b"x") * size for _ in range(4)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    said = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env=os.environ | environment, stdout=subprocess.PIPE, check=True
    )
    return int(said.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_it_is_not_asked_for_again_and_again():
    assert faults("settled") < 2000
    assert faults("as it is") > 5000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_what_the_environment_says_of_memory_is_left_alone():
    assert faults("settled", MALLOC_TRIM_THRESHOLD_="131072") > 5000

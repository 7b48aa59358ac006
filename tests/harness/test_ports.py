"""Tests that run at the same time, in any process, get different ports."""

import subprocess
import sys

import pytest

from tests.harness import ports

OTHER = """
import sys
from tests.harness import ports
ports.LOWEST, ports.COUNT = int(sys.argv[1]), 40
print(*(ports.free_port() for _ in range(20)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def few(monkeypatch):
    """Few ports, so that all of them are given."""
    monkeypatch.setattr(ports, "LOWEST", ports.LOWEST + ports.COUNT)
    monkeypatch.setattr(ports, "COUNT", 40)


@pytest.mark.usefixtures("few")
def test_two_processes_get_different_ones():
    """Though nothing listens on any of them."""
    command = [sys.executable, "-c", OTHER, str(ports.LOWEST)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = {int(port) for port in other.stdout.readline().split()}
        ours = {ports.free_port() for _ in range(10)}
        other.stdin.close()
        assert other.wait(60) == 0
    assert len(theirs) == 20
    assert len(ours) == 10
    assert not theirs & ours
    assert len(theirs & {ports.free_port() for _ in range(20)}) >= 1  # it has ended: they are free again

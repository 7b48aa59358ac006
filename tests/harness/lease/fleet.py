"""A gateway with a laboratory for each host: all of them real processes."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.harness.lease.lab import Lab
from tests.harness.lease.raw import HOST


class Door(Lab):
    """A gateway, with a laboratory for each host."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.file = root / "gateway.yaml"
        self.hosts: dict[str, Lab] = {}

    def add(self, name: str, models: dict[str, dict] | str = "a b", **more) -> Lab:
        lab = self.hosts[name] = Lab(self.root / name)
        lab.write(models, **more)
        lab.start()
        return lab

    def write_gateway(self, hosts: dict[str, dict] | None = None, **top) -> None:
        told = {name: {"url": f"http://{HOST}:{lab.port}"} for name, lab in self.hosts.items()}
        given = {name: value for name, value in top.items() if value is not None}
        config = {"host": HOST, "port": self.port, "hosts": told | (hosts or {}), **given}
        draft = self.file.with_name(f".{self.file.name}")
        draft.write_text(yaml.safe_dump(config, sort_keys=False))
        draft.replace(self.file)

    def launch(self) -> None:
        self.process = self.spawn("gateway", "-c", str(self.file))

    async def up(self, names: str = "one two", **top) -> None:
        for name in names.split():
            self.add(name)
        self.write_gateway(**top)
        self.start()
        await self.until_hosts(**dict.fromkeys(self.hosts, "ready"))

    async def fleet(self) -> dict:
        return (await self.get("/llmux/fleet")).json()

    async def until_hosts(self, **states: str) -> None:
        async def there():
            hosts = (await self.fleet())["hosts"]
            return all(hosts[name]["state"] == state for name, state in states.items())

        await self.until(there)

    async def until_hosts_are(self, **states: str) -> None:
        """The same, of hosts that the gateway may not know yet."""

        async def there():
            hosts = (await self.fleet())["hosts"]
            return all(hosts.get(name, {}).get("state") == state for name, state in states.items())

        await self.until(there)

    def holder(self, answer) -> tuple[Lab, Lab]:
        """The host that has answered, and the other one."""
        name = answer.get("X-LLMux-Host")
        return self.hosts[name], next(lab for other, lab in self.hosts.items() if other != name)

    def ran(self, word: str) -> list[str]:
        """The hosts whose engines got the request with this id, once for each time."""
        return [name for name, lab in self.hosts.items() for line in lab.journal("request") if line["uid"] == word]

    def finish(self) -> None:
        found = []
        ran: dict[str, list[str]] = {}
        for name, lab in self.hosts.items():
            for line in lab.journal("request"):
                ran.setdefault(line["uid"], []).append(name)
        found += [f"{word} ran on {names}" for word, names in ran.items() if word and len(names) > 1]
        try:
            super().finish()
        finally:
            for lab in self.hosts.values():
                lab.finish()
        assert not found, found

"""What each key used, over all hosts: a gateway adds up what their ledgers say."""

from __future__ import annotations

from pydantic import TypeAdapter

from llmux.cli.api_models import Usage
from llmux.config.accounts import HOUSE
from tests.server.house import until

CHAT = "/v1/chat/completions"
GATEWAY = {"name": "gateway", "key": "sk-gateway", "gateway": True}
PRICES = {"currency": "eur", "models": {"a": {"input": 1, "output": 1}}}


async def fleet(door, **third):
    """Open a gateway with three hosts, each with a ledger, and send requests of two keys."""
    keys = [{"name": name, "key": f"sk-{name}"} for name in ("alice", "bob")]
    for name in ("one", "two", "three"):
        more = {"ledger": "ledger.db"} if name != "three" else third
        await door.host(name, "a", api_keys=[GATEWAY], prices=PRICES, **more)
    told = {
        name: {"url": f"http://127.0.0.1:{house.port}", "key": "sk-gateway"} for name, house in door.hosts.items()
    }
    await door.open_gateway(told, api_keys=keys, route={"use": "round_robin"})
    for name in ("alice", "alice", "alice", "bob", "bob", "bob"):
        headers = {"Authorization": f"Bearer sk-{name}"}
        assert (await door.ask("POST", CHAT, {"model": "a"}, **headers)).status == 200


async def usage(door, query="", **headers):
    fields = {"Authorization": "Bearer sk-bob", **headers}
    return await door.ask("GET", f"/llmux/usage{query}", **fields)


async def test_it_is_added_up(door):
    await fleet(door, ledger="ledger.db")
    document = (await usage(door)).json()
    assert document["by"] == ["key", "model"]
    served = [row for row in document["usage"] if row["key"] != HOUSE]
    assert [(row["key"], row["model"], row["requests"]) for row in served] == [
        ("alice", "a", 3),
        ("bob", "a", 3),
    ]
    assert document["total"][0]["requests"] == 6
    assert document["missing"] == {}
    assert TypeAdapter(Usage).validate_python(document).by == ["key", "model"]
    assert {row["currency"] for row in document["usage"]} == {"eur"}
    mine = (await usage(door, "?by=host&key=bob")).json()["usage"]
    assert {row["host"] for row in mine} == {"one", "two", "three"}
    assert sum(row["requests"] for row in mine) == 3
    total = (await usage(door, "?by=")).json()
    assert [row["requests"] for row in total["usage"]] == [6]
    lines = (await usage(door, "?by=host,key", Accept="text/csv")).body.decode().splitlines()
    assert lines[0].startswith("host,key,requests,")
    assert sum(int(line.split(",")[2]) for line in lines[1:]) == 6
    assert len({line.partition(",")[0] for line in lines[1:]}) == 3


async def test_hosts_that_do_not_tell_are_named(door):
    await fleet(door)
    document = (await usage(door)).json()
    assert document["total"][0]["requests"] == 4
    assert list(document["missing"]) == ["three"]
    assert "ledger" in document["missing"]["three"]
    await door.houses[0].close()
    await until(lambda: door.gateway.hosts["one"].lost)
    document = (await usage(door)).json()
    assert set(document["missing"]) == {"one", "three"}


async def test_a_host_of_another_version_is_named(door, monkeypatch):
    await fleet(door, ledger="ledger.db")
    asks = door.gateway.hosts.ask

    async def ask(host, *what):
        answer = await asks(host, *what)
        if host.name != "two":
            return answer
        return answer._replace(body=answer.body.replace(b'"requests"', b'"queries"'))

    monkeypatch.setattr(door.gateway.hosts, "ask", ask)
    document = (await usage(door)).json()
    assert document["missing"] == {"two": "it does not answer as a llmux of this version does"}
    assert document["total"][0]["requests"] == 4


async def test_questions_with_mistakes(door):
    await fleet(door)
    for query in ("?by=nothing", "?since=yesterday", "?top=3", "?top=x"):
        assert (await usage(door, query)).status == 400

"""What a gateway shows of its hosts, and what operators do to them through it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llmux.cli.fleet import view
from llmux.cli.terminal import terminal
from llmux.config.gateway import HostConfig
from llmux.fleet.fleet_view import read_report
from llmux.fleet.loading import load_route
from llmux.fleet.placement import Rules
from llmux.gateway import hosts
from llmux.gateway.dispatcher import Dispatcher
from llmux.gateway.hosts import Host, Hosts
from llmux.observability.notices import EventLog
from tests.gateway.conftest import ASLEEP, AWAKE
from tests.server.house import held, until

CHAT = "/v1/chat/completions"
REPORT = {"instance": "x", "seq": 1, "ready": True, "leased": False, "lease": 6.0, "free_in": 0.0}


async def fleet(door):
    return (await door.ask("GET", "/llmux/fleet")).json()


async def metrics(door):
    text = (await door.ask("GET", "/metrics")).body.decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#")
    return {name: float(value) for name, _, value in lines}


async def test_the_list_of_models_is_the_union(door):
    await door.host("one", {"a": {"info": {"description": "mine", "context": 100}}, "b": {}})
    await door.host("two", {"a": {}, "c": {"aliases": ["see"]}}, list_aliases=True)
    gateway = await door.open_gateway()
    await until(lambda: all(host.entries for host in gateway.hosts.all()))
    await door.hosts["two"].chat("a")
    await door.known("two", "awake")
    entries = {entry["id"]: entry for entry in (await door.ask("GET", "/v1/models")).json()["data"]}
    assert sorted(entries) == ["a", "b", "c", "see"]
    a = entries["a"]
    assert (a["description"], a["context_length"], a["status"]) == ("mine", 100, {"value": "loaded"})
    assert a["llmux"]["hosts"] == {"one": "asleep", "two": "awake"}
    assert a["llmux"]["state"] == "awake"
    assert entries["see"]["llmux"]["alias_of"] == "c"
    assert (await door.ask("GET", "/v1/models/a")).json()["id"] == "a"
    assert (await door.ask("GET", "/v1/models/nothing")).error["code"] == "model_not_found"
    for also in ("/models", "/models/", "/v1/models/"):
        assert (await door.ask("GET", also)).json() == (await door.ask("GET", "/v1/models")).json()


async def test_a_host_that_has_only_just_reported_is_listed(door, puppet):
    puppet.lists.clear()
    puppet.listed = json.dumps({"data": [{"id": "a", "object": "model"}]}).encode()
    await door.open_gateway({"one": puppet.url})
    both = [await door.begin("GET", f"/v1/models{name}") for name in ("", "/a")]
    await until(lambda: "GET /v1/models" in str(puppet.asked))
    puppet.lists.set()
    whole, one = [(await line.reply()).json() for line in both]
    assert [entry["id"] for entry in whole["data"]] == [one["id"]] == ["a"]


async def test_a_host_that_does_not_answer_holds_up_no_list(door, puppet, monkeypatch):
    monkeypatch.setattr(hosts, "LIST_PATIENCE", 0.01)
    puppet.lists.clear()
    await door.open_gateway({"one": puppet.url})
    assert (await door.ask("GET", "/v1/models")).json()["data"] == []


async def test_what_a_host_has_new_is_listed_though_it_could_not_say_so_at_first(door, puppet):
    puppet.listed = b'{"data": [{"id": "a"}]}'
    gateway = await door.open_gateway({"one": puppet.url})
    await until(lambda: gateway.hosts["one"].entries)
    puppet.listed = b"later"
    puppet.report["models"]["b"], puppet.report["names"] = dict(AWAKE), {"a": "a", "b": "b"}
    asked = len(puppet.asked)
    await until(lambda: len(puppet.asked) > asked)
    puppet.listed = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    await until(lambda: len(gateway.hosts["one"].entries) == 2)
    asked, seq = len(puppet.asked), puppet.report["seq"]
    await until(lambda: puppet.report["seq"] > seq + 3)
    assert len(puppet.asked) == asked


async def test_a_host_that_comes_back_is_listed_as_it_is_now(door, puppet):
    puppet.listed = b'{"data": [{"id": "a", "context_length": 1000}]}'
    gateway = await door.open_gateway({"one": puppet.url})
    await until(lambda: gateway.hosts["one"].entries)
    await puppet.close()
    await until(lambda: door.log.named("host_lost"))
    puppet.listed = b'{"data": [{"id": "a", "context_length": 2000}]}'
    puppet.report["instance"] = "the next"
    await puppet.open()
    await until(lambda: gateway.hosts["one"].entries["a"]["context_length"] == 2000)


async def test_a_name_that_means_something_else_on_another_host_is_warned_of_once_a_change(door, puppet, other):
    for host, model in ((puppet, "a"), (other, "b")):
        host.report["models"]["b"] = dict(ASLEEP)
        host.report["names"] = {"a": "a", "b": "b", "gpt": model, "any": model}
        host.report["virtual"] = ["any"]  # that stands for what would serve it now
    await door.open_gateway({"one": puppet.url, "two": other.url})
    told = {"name": "gpt", "model": "a", "others": {"two": "b"}}
    await until(lambda: door.log.named("names_differ") == [told])
    other.report["names"] |= {"new": "a"}
    await until(lambda: door.gateway.hosts.model_of("new"))
    assert door.log.named("names_differ") == [told]
    puppet.report["names"] |= {"gpt": "b"}
    await until(lambda: door.gateway.hosts.model_of("gpt") == "b")
    assert door.log.named("names_differ") == [told]
    puppet.report["names"] |= {"gpt": "a"}
    await until(lambda: door.log.named("names_differ") == [told, told])


async def test_what_the_gateway_does_not_serve_is_not_listed(door):
    remotes = {"r": {"url": "http://127.0.0.1:1", "models": {"m": "theirs"}}}
    virtual = {"far": {"first": ["r/m"]}, "safe": {"first": ["a", "r/m"]}}
    host = await door.host("one", "a", remotes=remotes, virtual=virtual)
    await door.open_gateway()
    await until(lambda: door.gateway.hosts["one"].entries)
    for place, names in ((host, {"a", "far", "safe", "r/m"}), (door, {"a", "safe"})):
        listed = (await place.ask("GET", "/v1/models")).json()["data"]
        assert {entry["id"] for entry in listed} == names
    for name, status in (("a", 200), ("safe", 200), ("far", 404), ("r/m", 404)):
        assert (await door.ask("POST", CHAT, {"model": name})).status == status


async def test_an_unlisted_model_is_served_and_not_named(door):
    models = {"a": {"aliases": ["gpt"]}, "b": {"info": {"unlisted": True}, "aliases": ["hush"]}}
    await door.open_all("one", models, api_keys=["free", {"name": "alice", "key": "some", "models": ["*"]}])
    for key in ("free", "some"):
        assert (await door.ask("POST", "/v1/x", {"model": "hush"}, X_API_Key=key)).status == 200
        for refused in (
            await door.ask("POST", "/v1/x", {"model": "c"}, X_API_Key=key),
            await door.ask("GET", "/v1/models/c", X_API_Key=key),
        ):
            assert refused.error["message"] == "model 'c' not found; configured are: a, gpt"


@pytest.mark.usefixtures("both_ways")
async def test_a_virtual_model_is_allowed_by_its_own_name_as_on_a_host(door):
    """Its host chooses: what would serve it now is no reason, as something else may."""
    host = await door.host("one", virtual={"any": {"first": ["a", "b"]}})
    names = ("key-of-a", ["a"]), ("key-of-any", ["any"])
    keys = [{"name": key, "key": key, "models": models} for key, models in names]
    await door.open_gateway(api_keys=keys)
    statuses = {}
    for key, _ in names:
        for name in ("a", "any"):
            reply = await door.ask("POST", "/v1/x", {"model": name}, X_API_Key=key)
            statuses[key, name] = reply.status
    assert statuses == {
        ("key-of-a", "a"): 200,
        ("key-of-a", "any"): 403,
        ("key-of-any", "a"): 403,
        ("key-of-any", "any"): 200,
    }
    assert len(host.engine.heads) == 2


async def test_the_fleet_is_told_with_what_is_awake_and_what_waits(door):
    await door.host("one", {"a": {"wake": held("go"), "cost": {"wake": 5}}})
    await door.host("two", {"b": {}})
    gateway = await door.open_gateway({"three": {"url": "http://127.0.0.1:1"}}, wait=False)
    await until(lambda: [gateway.state(host) for host in gateway.hosts.all()] == ["ready", "ready", "unreachable"])
    line = await door.begin("POST", CHAT, {"model": "a"})
    await door.known("one", "waking")
    told = await fleet(door)
    assert told["route"] == "least_wait"
    one, three = told["hosts"]["one"], told["hosts"]["three"]
    assert (one["state"], one["waking"], one["queued"], one["placed"]) == ("ready", ["a"], 1, 1)
    assert one["models"]["a"]["expected_wait"] > 0
    assert (three["state"], three["age"]) == ("unreachable", None)
    assert "refused" in three["trouble"]
    health = (await door.ask("GET", "/health")).json()
    assert (health["status"], len(health["notes"])) == ("ok", 1)
    assert health["notes"][0].startswith("three: unreachable: ")
    assert (await door.ask("GET", "/ready")).json() == {"ready": True, "hosts": 2}
    shown = await metrics(door)
    assert shown['llmux_fleet_host_up{host="one"}'] == shown['llmux_fleet_host_in_flight{host="one"}'] == 1
    assert shown['llmux_fleet_host_up{host="three"}'] == 0
    assert shown['llmux_fleet_placed_total{host="one"}'] == shown['llmux_fleet_ejected_total{host="three"}'] == 1
    door.hosts["one"].release("go")
    assert (await line.reply()).status == 200
    await door.known("one", "awake")
    shown = await metrics(door)
    assert shown['llmux_fleet_wakes_total{host="one"}'] == 1
    assert shown['llmux_requests_total{model="a",status="200"}'] == 1
    assert (await fleet(door))["hosts"]["one"]["wakes_per_minute"] == 1
    rows = (await door.ask("GET", "/llmux/activity")).json()["requests"]
    assert [(row["model"], row["status"]) for row in rows] == [("a", 200)]


async def test_without_a_host_it_is_not_ready(door):
    gateway = await door.open_gateway({"one": {"url": "http://127.0.0.1:1"}}, wait=False)
    await until(lambda: gateway.hosts["one"].lost)
    assert (await door.ask("GET", "/ready")).status == 503
    assert (await door.ask("GET", "/health")).status == 200


async def test_people_are_shown_the_same(door, puppet):
    puppet.report["models"] = {"a": {**ASLEEP, "queued": 3}}
    await door.open_gateway({"one": puppet.url})
    told = await fleet(door)
    console = terminal()
    with console.capture() as shown:
        console.print(view("http://x", told))
    assert "1 of 1 hosts ready, route least_wait" in shown.get()
    assert "ready" in shown.get()


def test_people_are_told_of_a_store_that_cannot_be_used():
    document = {"version": "3", "route": "least_wait", "hosts": {}, "queued": {}}
    shown = []
    for store in (None, {"trouble": None, "limits": None}, {"trouble": "it is away", "limits": {"alone": True}}):
        console = terminal()
        with console.capture() as said:
            console.print(view("http://gw", {**document, "store": store}))
        shown.append(said.get())
    assert "store" not in shown[0] + shown[1]
    assert "the store cannot be used: it is away" in shown[2]
    assert "each gateway counts its share" in shown[2]


async def test_a_drained_host_takes_nothing_new_until_it_is_taken_back(door):
    gateway = await door.open_all("one two")
    door.hosts["one"].up("a")
    reply = await door.ask("POST", "/llmux/fleet/one/drain", {"for": "1h", "reason": "new fans"})
    assert (reply.status, reply.json()["drained"]) == (202, True)
    await until(lambda: gateway.state(gateway.hosts["one"]) == "leased")
    assert door.hosts["one"].switcher.core.state.lease.reason == "drained through the gateway: new fans"
    for _ in range(3):
        assert (await door.chat("a")).headers["x-llmux-host"] == "two"
    again = await door.ask("POST", "/llmux/fleet/one/drain", {})
    assert (again.status, "leased already" in again.error["message"]) == (409, True)
    assert (await door.ask("POST", "/llmux/fleet/one/undrain")).status == 202
    await until(lambda: gateway.state(gateway.hosts["one"]) == "ready")
    assert (await door.ask("POST", "/llmux/fleet/one/undrain")).status == 409


async def test_another_jobs_lease_is_left_alone(door):
    await door.open_all("one")
    await door.hosts["one"].ask("POST", "/llmux/lease", {"reason": "training"})
    reply = await door.ask("POST", "/llmux/fleet/one/undrain")
    assert (reply.status, "training" in reply.error["message"]) == (409, True)
    assert door.hosts["one"].switcher.core.state.lease is not None


async def test_draining_is_for_operators_and_takes_the_hosts_admin_key(door):
    host = await door.host("one", api_keys=["k"], admin_key="root")
    told = {"url": f"http://127.0.0.1:{host.port}", "key": "k"}
    await door.open_gateway({"one": told}, admin_key="mine")
    assert (await door.ask("POST", "/llmux/fleet/one/drain")).status == 401
    reply = await door.ask("POST", "/llmux/fleet/one/drain", X_API_Key="mine")
    assert (reply.status, "set `admin_key` of the host" in reply.error["message"]) == (409, True)
    door.gateway.replace(door.gateway_config({"one": {**told, "admin_key": "root"}}, admin_key="mine"))
    assert (await door.ask("POST", "/llmux/fleet/one/drain", X_API_Key="mine")).status == 202
    unknown = await door.ask("POST", "/llmux/fleet/nine/drain", X_API_Key="mine")
    assert (unknown.status, unknown.error["code"]) == (404, "host_not_found")
    bad = await door.ask("POST", "/llmux/fleet/one/undrain", {"now": True}, X_API_Key="mine")
    assert (bad.status, bad.error["param"]) == (400, "now")


async def test_hosts_come_and_go_with_a_reload(door):
    gateway = await door.open_all("one")
    two = await door.host("two", {"c": {}})
    gateway.replace(door.gateway_config())
    await until(lambda: gateway.state(gateway.hosts["two"]) == "ready")
    assert (await door.chat("c")).headers["x-llmux-host"] == "two"
    gateway.replace(door.gateway_config(hosts={}, fleet={"report_every": "300ms"}, route={"use": "random"}))
    door.hosts.pop("one")
    config = door.gateway_config()
    gateway.replace(config)
    assert [host.name for host in gateway.hosts.all()] == ["two"]
    assert "one" not in gateway.dispatcher.placement.fleet.hosts
    assert (await door.chat("a")).error["code"] == "model_not_found"
    assert json.dumps(await fleet(door))
    await two.chat("c")


async def test_it_has_a_page_of_its_own(door, puppet):
    await door.open_gateway({"one": puppet.url})
    page = await door.ask("GET", "/llmux/ui")
    assert (page.status, b"<title>llmux fleet</title>" in page.body) == (200, True)
    assert (await door.ask("GET", "/llmux/ui/fleet.js")).headers["content-type"].startswith("text/javascript")
    assert (await door.ask("GET", "/", Accept="text/html")).headers["location"] == "llmux/ui"
    assert (await door.ask("GET", "/")).json()["see"] == ["/v1/models", "/llmux/fleet", "/llmux/ui"]
    assert (await door.ask("GET", "/llmux/ui/../x")).status == 404


async def test_what_operators_do_is_in_the_audit(door):
    """In the gateway's, and in the host's own."""
    await door.host("one", audit="audit.jsonl")
    keys = {"admin_key": "key-of-admin", "api_keys": [{"name": "alice", "key": "key-of-alice"}]}
    await door.open_gateway(audit="audit.jsonl", **keys)
    admin, alice = ({"Authorization": f"Bearer key-of-{name}"} for name in ("admin", "alice"))
    drained = await door.ask(
        "POST", "/llmux/fleet/one/drain", {"reason": "new fans"}, X_Request_ID="mine", **admin
    )
    assert drained.status == 202
    assert (await door.ask("POST", "/llmux/fleet/none/drain", **admin)).status == 404
    assert (await door.ask("POST", "/llmux/fleet/one/undrain", **alice)).status == 401

    def lines(folder):
        text = (folder / "audit.jsonl").read_text()
        assert "key-of" not in text
        return [json.loads(line) for line in text.splitlines()]

    await until(lambda: len(lines(door.folder)) == 4)
    started, first, second, refused = lines(door.folder)
    assert (started["event"], started["hosts"]) == ("started", ["one"])
    assert (first["act"], first["host"], first["by"], first["status"]) == ("drain", "one", "admin_key", 202)
    assert (first["options"], first["request_id"]) == ({"reason": "new fans"}, "mine")
    assert (second["host"], second["status"]) == ("none", 404)
    assert (refused["event"], refused["path"]) == ("key_refused", "/llmux/fleet/one/undrain")
    await until(lambda: any(line.get("act") == "lease" for line in lines(door.folder / "one")))
    door.gateway.replace(door.gateway_config(audit="other.jsonl", **keys))
    door.gateway.replace(door.gateway_config(**keys))
    assert door.gateway.audit is None
    await until(lambda: "moved" in (door.folder / "other.jsonl").read_text())
    await until(lambda: lines(door.folder)[-1]["event"] == "moved")


async def test_requests_on_a_host_that_is_removed_end_there(door):
    gateway = await door.open_all("one two")
    line = await door.begin("POST", "/v1/hold", {"model": "a"})
    await until(lambda: any(house.in_flight("a") for house in door.hosts.values()))
    name = next(name for name, house in door.hosts.items() if house.in_flight("a"))
    house = door.hosts.pop(name)
    gateway.replace(door.gateway_config())
    assert [host.name for host in gateway.hosts.all()] == list(door.hosts)
    house.engine.go.set()
    reply = await line.reply()
    assert (reply.status, reply.headers["x-llmux-host"]) == (200, name)
    await until(lambda: not gateway.dispatcher.placement.requests)
    assert not door.log.named("internal_error")
    door.hosts[name] = house
    gateway.replace(door.gateway_config())
    await until(lambda: gateway.state(gateway.hosts[name]) == "ready")
    assert not gateway.view(gateway.hosts[name]).own


async def test_what_a_wake_takes_is_known_from_those_hosts_that_have_measured_it():
    dispatcher = Dispatcher(load_route("least_wait", {}, Path()), Rules(), EventLog())
    hosts = Hosts(dispatcher, EventLog())
    hosts._hosts = {name: Host(name, HostConfig(url=f"http://{name}:1")) for name in ("one", "two", "three")}
    guessed = read_report("three", {**REPORT, "models": {"a": {**ASLEEP, "wake": 9.0}, "b": ASLEEP}})

    def expected() -> tuple[float, float]:
        models = hosts._with_costs(guessed, frozenset()).models
        return models["a"].wake, models["b"].wake

    assert expected() == (9.0, 2.0)
    hosts._learn(hosts["one"], {"a": 20.0})
    hosts._learn(hosts["two"], {"a": 40.0, "b": 6.0})
    assert expected() == (30.0, 6.0)
    hosts._learn(hosts["two"], {"a": 50.0})
    assert expected() == (35.0, 2.0)
    hosts._following = dict.fromkeys(hosts._hosts, asyncio.create_task(asyncio.sleep(0)))
    hosts.configure({name: hosts[name].config for name in ("two", "three")})
    assert expected() == (50.0, 2.0)
    hosts.configure({})
    assert expected() == (9.0, 2.0)

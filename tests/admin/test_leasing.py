"""Leasing the GPU over HTTP: what the job that leases it says, and what it is told."""

import pytest

from llmux.core import effects as fx
from tests.server.house import until

BODIES = [
    (b'{"for": "soon"}', 400),
    (b'{"reason": 7}', 400),
    (b'{"reason": "two\\nlines"}', 400),
    (b'{"reason": "' + b"x" * 201 + b'"}', 400),
    (b'{"requests": "go away"}', 400),
    (b'{"requests": true}', 400),
    (b'{"id": 7}', 400),
    (b'{"id": ""}', 400),
    (b'{"to": "me"}', 400),
    (b'{"id": "nobody\'s"}', 409),
    (b"", 202),
    (b'{"for": "1h", "reason": " training ", "requests": "wait", "id": null}', 202),
    (b'{"for": null, "reason": null, "requests": null}', 202),
]


@pytest.mark.parametrize(("body", "status"), BODIES)
async def test_bodies(house, body, status):
    await house.open()
    reply = await house.ask("POST", "/llmux/lease", body)
    assert reply.status == status, reply
    assert (house.switcher.core.state.lease is not None) is (status == 202)
    assert not house.log.named("internal_error")


async def test_the_lease_of_another_is_left_alone(house):
    await house.open()
    assert (await house.ask("DELETE", "/llmux/lease")).status == 409
    first = await house.ask("POST", "/llmux/lease", {"for": "1h", "reason": "training"})
    name = first.json()["id"]
    second = await house.ask("POST", "/llmux/lease", {"for": "2h"})
    assert second.status == 409
    assert "training" in second.error["message"]
    assert (await house.ask("POST", "/llmux/lease", {"id": "other"})).status == 409
    assert (await house.ask("DELETE", "/llmux/lease?id=other")).status == 409
    assert (await house.ask("DELETE", "/llmux/lease?id=")).status == 400
    renewed = await house.ask("POST", "/llmux/lease", {"id": name, "for": "2h"})
    assert (renewed.status, renewed.json()["id"], renewed.json()["reason"]) == (202, name, "training")
    assert 7000 < renewed.json()["expires_in"] < 7201
    assert (await house.ask("DELETE", f"/llmux/lease?id={name}")).status == 202
    assert (await house.ask("POST", "/llmux/lease", {"id": name})).status == 409
    assert house.switcher.core.state.lease is None


async def test_the_configuration_says_whether_requests_wait(house):
    await house.open(lease_requests="wait")
    held = []
    house.switcher.subscribe(lambda effect: held.append(effect) if isinstance(effect, fx.LeaseHeld) else None)
    assert (await house.chat("a")).status == 200
    reply = await house.ask("POST", "/llmux/lease")
    assert (reply.json()["requests"], reply.json()["held"]) == ("wait", False)
    await until(lambda: held)
    line = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: house.queued("b"))
    (event,) = house.log.named("lease_held")
    assert event["after_secs"] > 0
    assert (await house.ask("DELETE", "/llmux/lease")).status == 202
    assert (await line.reply()).status == 200


async def test_metrics_tell_what_operators_have_asked_for(house):
    await house.open()
    names = ('llmux_model_pinned{model="a"}', "llmux_leased", "llmux_manual")

    async def found():
        lines = (await house.ask("GET", "/metrics")).body.decode().splitlines()
        return [float(line.rpartition(" ")[2]) for name in names for line in lines if line.startswith(f"{name} ")]

    assert await found() == [0, 0, 0]
    for path in ("/llmux/models/a/pin", "/llmux/lease", "/llmux/manual"):
        assert (await house.ask("POST", path)).status == 202
    assert await found() == [1, 1, 1]


async def test_manual_mode(house):
    await house.open()
    assert (await house.ask("POST", "/llmux/manual", {"for": "1h"})).status == 400
    for _ in range(2):
        assert (await house.ask("POST", "/llmux/manual")).json() == {"manual": True, "switch": None}
    assert (await house.ask("GET", "/llmux/status")).json()["manual"] is True
    assert (await house.ask("DELETE", "/llmux/manual")).json()["manual"] is False
    assert [event["manual"] for event in house.log.named("manual_set")] == [True, False]

"""Leases, pins and the manual mode, with real processes: they hold, they end, and they outlive llmux."""

from __future__ import annotations


async def held(lab) -> dict:
    """Wait until nothing holds the GPU; return the lease."""

    async def there():
        lease = (await lab.status())["lease"]
        return lease if lease["held"] else None

    return await lab.until(there)


async def lease_over(lab) -> None:
    async def over():
        return (await lab.status())["lease"] is None

    await lab.until(over)


async def test_requests_wait_for_a_lease_that_expires(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    answer = await lab.post("/llmux/lease", body={"for": "1h", "reason": "training", "requests": "wait"})
    assert answer.status == 202
    name = answer.json()["id"]
    lease = await held(lab)
    assert (lease["id"], lease["reason"], lease["requests"]) == (name, "training", "wait")
    assert 3500 < lease["expires_in"] <= 3601
    lines = {model: await lab.begin(model) for model in "ab"}
    for model in lines:
        await lab.until_model(model, queued=1)
    assert (await lab.get("/health")).status == 200
    assert lab.order() == ["wake a", "sleep a"]
    answer = await lab.post("/llmux/lease", body={"for": "200ms", "id": name})
    assert answer.status == 202
    await lease_over(lab)
    for line in lines.values():
        head = await line.head()
        assert head.status == 200
        assert float(head.get("X-LLMux-Queue-Seconds")) > 0
        await line.close()
    assert sorted(lab.order()[2:4]) in (["sleep a", "wake a"], ["sleep b", "wake b"])


async def test_kill_9_under_a_lease(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    name = (await lab.post("/llmux/lease", body={"for": "1h", "reason": "nightly"})).json()["id"]
    await held(lab)
    lab.kill()
    lab.start()
    lease = await held(lab)
    assert (lease["id"], lease["reason"], lease["requests"]) == (name, "nightly", "reject")
    assert 3500 < lease["expires_in"] <= 3601
    answer = await lab.chat("b")
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "leased"
    assert "nightly" in answer.json()["error"]["message"]
    assert 3500 < int(answer.get("Retry-After")) <= 3601
    assert lab.order() == ["wake a", "sleep a"]
    assert (await lab.post("/llmux/lease", body={"for": "200ms", "id": name})).status == 202
    await lease_over(lab)
    assert (await lab.chat("b")).status == 200


async def test_kill_9_with_a_pin(lab):
    lab.write("a b")
    lab.start()
    assert (await lab.post("/llmux/models/a/pin", body={"for": "1h", "reason": "a demo"})).status == 202
    await lab.until_phase("a", "AWAKE")
    lab.kill()
    lab.start()
    model = (await lab.status())["models"]["a"]
    assert (model["phase"], model["pinned"], model["pin_reason"]) == ("awake", True, "a demo")
    assert 3500 < model["pin_expires_in"] <= 3601
    answer = await lab.chat("b")
    assert (answer.status, answer.json()["error"]["code"]) == (503, "pinned")
    assert "a demo" in answer.json()["error"]["message"]
    assert (await lab.post("/llmux/models/a/unpin")).status == 202
    assert (await lab.chat("b")).status == 200


async def test_in_manual_mode_the_operator_switches(lab):
    lab.write("a b")
    lab.start()
    await lab.chat("a")
    assert (await lab.post("/llmux/manual")).status == 202
    line = await lab.begin("b")
    await lab.until_model("b", queued=1)
    assert (await lab.chat("a")).status == 200
    lab.kill()
    await line.close()
    lab.start()
    assert (await lab.status())["manual"] is True
    line = await lab.begin("b")
    await lab.until_model("b", queued=1)
    assert (await lab.chat("a")).status == 200
    assert lab.order() == ["wake a"]
    decision = (await lab.status())["decisions"][-1]
    assert (decision["kind"], decision["by"]) == ("stay", "manual")
    health = await lab.get("/health")
    assert health.status == 200
    assert "manual" in health.body.decode()
    assert (await lab.post("/llmux/models/b/wake")).status == 202
    assert (await line.head()).status == 200
    await line.close()
    line = await lab.begin("a")
    await lab.until_model("a", queued=1)
    assert (await lab.ask("DELETE", "/llmux/manual")).status == 202
    assert (await line.head()).status == 200
    await line.close()
    assert lab.order() == ["wake a", "sleep a", "wake b", "sleep b", "wake a"]


async def test_an_engine_that_dies_in_manual_mode_comes_back(lab):
    lab.write("a b", policy={"use": "fifo", "manual": True})
    lab.start()
    assert (await lab.post("/llmux/models/a/wake")).status == 202
    await lab.until_phase("a", "AWAKE")
    assert (await lab.chat("a")).status == 200
    lab.crash("a")
    assert (await lab.chat("a")).status == 200
    assert lab.order() == ["wake a", "wake a"]

"""llmux inside another program, as OPERATING.md shows it."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

import llmux
from llmux.errors import PolicyLoadError
from tests.harness.ports import free_port
from tests.server.house import HOST, held, until


async def test_the_application_in_a_test_server(house):
    app, switcher = llmux.build_app(house.config())
    async with TestClient(TestServer(app)) as client:
        await until(lambda: switcher.core.state.ready)
        async with client.post("/v1/chat/completions", json={"model": "a"}) as reply:
            assert (reply.status, await reply.text()) == (200, "ok")
            assert reply.headers["X-Request-ID"]
        async with client.get("/llmux/status") as reply:
            assert (await reply.json())["awake"] == ["a"]
    assert switcher.stopped.is_set()


async def mine(_request):
    return web.Response(text="mine")


def beside(house, **options):
    """An application of its own with llmux beside its routes."""
    front, switcher = llmux.middleware_for(house.config(**options))
    app = web.Application(middlewares=[front.middleware()])
    app.router.add_get("/mine", mine)
    app.router.add_get("/health", mine)

    async def life(_app):
        switcher.start()
        yield

    async def stop(_app):
        await switcher.stop()

    app.cleanup_ctx.append(life)
    app.on_shutdown.append(stop)
    house.switcher = switcher
    return app


@pytest.mark.parametrize("cancellation", [True, False])
async def test_the_middleware_beside_routes_of_ones_own(house, cancellation):
    await house.serve(beside(house), plain=True, handler_cancellation=cancellation, auto_decompress=False)
    assert (await house.ask("GET", "/mine")).body == b"mine"
    assert (await house.ask("GET", "/health")).body == b"mine"
    assert (await house.ask("GET", "/llmux/status")).status == 404
    reply = await house.chat("a")
    assert (reply.status, reply.body) == (200, b"ok")
    assert reply.marked
    assert (await house.chat("nobody")).status == 404
    assert b"llmux_model_in_flight" in house.switcher.metrics.render()[0]


@pytest.mark.parametrize("phase", ["queued", "in flight"])
async def test_without_cancellation_a_client_that_leaves_is_noticed_too(house, monkeypatch, phase):
    monkeypatch.setattr("llmux.middleware.model_handler.GONE_POLL", 0.01)
    models = {"a": {}, "b": {"wake": f"{held('b')}; touch b.up"}}
    await house.serve(beside(house, models=models), plain=True, handler_cancellation=False)
    if phase == "queued":
        line = await house.begin("POST", "/v1/x", {"model": "b"})
        await until(lambda: house.queued("b"))
    else:
        line = await house.begin("POST", "/v1/hold", {"model": "a"})
        await until(lambda: house.engine.bodies)
    line.abort()
    await until(lambda: not house.switcher.inside.tickets)
    await until(lambda: not house.engine.open)
    house.release("b")


async def test_what_is_queued_is_told_at_the_end(house):
    models = {"a": {"wake": f"{held('a')}; touch a.up"}}
    await house.serve(beside(house, models=models), plain=True, handler_cancellation=True)
    line = await house.begin("POST", "/v1/x", {"model": "a"})
    await until(lambda: house.queued("a"))
    closing = asyncio.create_task(house.close())
    reply = await line.reply()
    assert (reply.status, reply.error["code"]) == (503, "stopping")
    await closing


async def test_a_policy_from_a_file(house):
    policy = """
        from llmux import Stay, SwitchTo

        class Last:
            def decide(self, now):
                waiting = [name for name, model in now.models.items() if model.queued and not model.awake]
                return SwitchTo(max(waiting)) if waiting else Stay()
    """
    (house.folder / "mine.py").write_text(textwrap.dedent(policy))
    models = {"a": {"wake": f"{held('a')}; touch a.up"}, "b": {}, "c": {}}
    switcher = await house.open(models=models, policy={"use": "./mine.py:Last"})
    order = []
    switcher.subscribe(lambda e: order.append(e.model) if type(e).__name__ == "ModelActivated" else None)
    asking = [asyncio.create_task(house.chat("a"))]
    await until(lambda: house.queued("a"))
    for model in "bc":
        asking.append(asyncio.create_task(house.chat(model)))
        await until(lambda model=model: house.queued(model))
    house.release("a")
    assert [(await one).status for one in asking] == [200] * 3
    assert order == ["a", "c", "b"]
    assert not house.log.named("policy_overruled")
    # A reload takes up what its author changed, and refuses what cannot be loaded.
    before = switcher.core.state.policy
    (house.folder / "mine.py").write_text(textwrap.dedent(policy).replace("max(", "min("))
    switcher.replace(house.config(models=models, policy={"use": "./mine.py:Last"}))
    assert switcher.core.state.policy is not before
    (house.folder / "mine.py").write_text("nonsense(")
    with pytest.raises(PolicyLoadError):
        switcher.replace(house.config(models=models, policy={"use": "./mine.py:Last"}))
    assert (await house.chat("b")).status == 200


async def test_what_waits_for_a_model_that_is_removed_gets_404(house):
    switcher = await house.open(models={"a": {}, "b": {"wake": f"{held('b')}; touch b.up"}})
    waiting = asyncio.create_task(house.chat("b"))
    await until(lambda: house.queued("b"))
    config = house.config("a", forward=["/mine/**"], max_buffered=1)
    switcher.replace(config)
    house.front.configure(config)
    reply = await waiting
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert reply.marked
    house.release("b")
    reply = await house.ask("POST", "/mine/x", {"model": "b"})
    assert (reply.status, reply.error["code"]) == (503, "bodies_full")
    reply = await house.ask("GET", "/mine/x?model=b")
    assert reply.status == 404
    assert "a" in reply.error["message"]
    text = house.switcher.metrics.render()[0].decode()
    assert 'llmux_requests_total{model="unknown",status="404"}' in text


async def test_run_app_as_the_documentation_says(house):
    port = free_port()
    house.config()
    program = f"""
        import llmux
        from aiohttp import web
        config = llmux.Config.from_file({str(house.folder / "config.json")!r})
        app, switcher = llmux.build_app(config)
        web.run_app(app, host="{HOST}", port={port}, handler_cancellation=True, auto_decompress=False, print=None)
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", textwrap.dedent(program), stderr=subprocess.PIPE
    )
    try:
        async with ClientSession() as session:
            while True:
                try:
                    async with session.post(f"http://{HOST}:{port}/v1/x", json={"model": "a"}) as reply:
                        assert (reply.status, await reply.text()) == (200, "ok")
                        break
                except OSError:
                    assert process.returncode is None
                    await asyncio.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        errors = (await process.communicate())[1]
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors

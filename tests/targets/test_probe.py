"""`llmux check --probe`: what engines speak is found out, without a token being made or a model woken untold."""

import asyncio
import json

import pytest
from aiohttp import web

from llmux.cli import check as probing
from llmux.cli.check import PATHS, spoken
from tests.cli.invoking import llmux
from tests.server.house import HOST, SLEEP, WAKE, free_port


@pytest.fixture
async def engine():
    """An engine that speaks what ``serve`` says, and complains as engines do when something is missing."""
    runners = []

    async def serve(apis, complaint=422, elsewhere=404, delay=0.0):
        seen = []
        paths = {PATHS[api][0] for api in apis}

        async def answer(request):
            seen.append((request.path, await request.json()))
            await asyncio.sleep(delay)
            return web.json_response({}, status=complaint if request.path in paths else elsewhere)

        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        return f"http://{HOST}:{runner.addresses[0][1]}", seen

    yield serve
    for runner in runners:
        await runner.cleanup()


@pytest.mark.parametrize(
    "apis", [("chat", "completions", "embeddings"), ("messages", "count_tokens"), (), tuple(PATHS)]
)
@pytest.mark.parametrize(("complaint", "elsewhere"), [(400, 404), (422, 405), (500, 501)])
async def test_what_an_engine_speaks(engine, apis, complaint, elsewhere):
    url, seen = await engine(apis, complaint, elsewhere)
    assert (await spoken(url)).apis == apis
    assert all(not {"messages", "prompt", "input"} & body.keys() for _, body in seen)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 302, 503])
async def test_one_that_answers_everything_alike_says_nothing(engine, status):
    url, seen = await engine((), status, status)
    found = await spoken(url)
    assert found.apis == ()
    assert str(status) in found.why
    assert len(seen) == 1


async def test_one_that_hangs_or_is_gone(engine, monkeypatch):
    monkeypatch.setattr(probing, "PATIENCE", 0.05)
    url, _ = await engine(("chat",), delay=30.0)
    assert "Timeout" in (await spoken(url)).why
    assert (await spoken(f"http://{HOST}:{free_port()}")).why


def write(folder, **models):
    hooks = {"wake": WAKE, "sleep": SLEEP, "alive": 'test -e "$LLMUX_MODEL.up"'}
    file = folder / "config.json"
    file.write_text(
        json.dumps({"port": free_port(), "models": {name: {**hooks, **m} for name, m in models.items()}})
    )
    return file


async def test_what_to_write(engine, tmp_path):
    chat, _ = await engine(("chat", "completions"))
    every, _ = await engine(tuple(PATHS))
    models = {
        "plain": {"url": chat},
        "right": {"url": chat + "/", "upstream_model": "x", "apis": ["completions", "chat"]},
        "less": {"url": every, "upstream_model": "y", "apis": ["chat"]},
        "all": {"url": every, "upstream_model": "z"},
        "asleep": {"port": free_port()},
    }
    models["plain"]["upstream_model"] = "w"
    for name in ("plain", "right", "less", "all"):
        (tmp_path / f"{name}.up").touch()
    done = await llmux(None, "check", "--probe", write(tmp_path, **models))
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "plain speaks chat, completions; not messages, responses, embeddings, count_tokens" in said
    assert "models.plain: write `apis: [chat, completions]`, so that llmux translates the others" in said
    assert "model right speaks chat, completions; not messages, responses, embeddings, count_tokens as its" in said
    assert "models.less: write `apis: [chat, completions, messages, responses, embeddings, count_tokens]`" in said
    assert "speaks more than its `apis` state (completions, messages," in said
    assert (
        "model all speaks chat, completions, messages, responses, embeddings, count_tokens nothing to write"
        in said
    )
    assert "model asleep: asleep, and not asked; --wake wakes it" in said
    assert not (tmp_path / "asleep.up").exists()


async def test_apis_that_are_not_so(engine, tmp_path):
    chat, _ = await engine(("chat",))
    (tmp_path / "a.up").touch()
    done = await llmux(None, "check", "--probe", write(tmp_path, a={"url": chat, "apis": ["chat", "messages"]}))
    assert done.exit_code == 6
    assert (
        "models.a: write `apis: [chat]`: its `apis` state messages, which the engine does not speak" in done.output
    )


async def test_without_probe_no_engine_is_asked(engine, tmp_path):
    chat, seen = await engine(("chat",))
    (tmp_path / "a.up").touch()
    assert (await llmux(None, "check", write(tmp_path, a={"url": chat}))).exit_code == 0
    assert seen == []


async def test_those_asleep_are_woken_by_the_llmux_that_runs(engine, tmp_path, house):
    one, _ = await engine(("chat",))
    other, _ = await engine(("messages",))
    urls = {"a": one, "b": other}
    await house.open(
        models={name: {"port": None, "url": url, "shared_address": False} for name, url in urls.items()}
    )
    file = tmp_path / "config.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps({**text, "port": house.port}))
    done = await llmux(None, "check", "--probe", "--wake", file)
    assert done.exit_code == 0, done.output
    assert "models.a: write `apis: [chat]`" in done.output
    assert "models.b: write `apis: [messages]`" in done.output
    assert [each["to"] for each in house.log.named("switch_started")] == ["a", "b"]


async def test_no_llmux_runs_that_could_wake_one(tmp_path):
    done = await llmux(None, "check", "--probe", "--wake", write(tmp_path, a={"port": free_port()}))
    assert done.exit_code == 0
    assert "model a: could not be woken" in done.output
    assert not (tmp_path / "a.up").exists()
    refused = await llmux(None, "check", "--wake", write(tmp_path, a={"port": free_port()}))
    assert refused.exit_code == 2

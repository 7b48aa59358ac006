"""The commands that operate a running llmux: what they do, what they say, how they end."""

import asyncio
import json
import re

import pytest

from llmux.cli.terminal import MEANINGS, Exit
from llmux.core.effects import LeaseSet
from tests.cli.invoking import answered, llmux, said
from tests.harness.ports import free_port
from tests.server.house import ALIVE, HOST, SLEEP, WAKE, until

NAMES = ["a", "org/model 1", "[bold]x", "100%", "a//b%2F模"]


async def quiet(house):
    await until(lambda: house.switcher.core.state.switch is None)


async def test_a_model_is_switched_to_and_put_to_sleep(house):
    await house.open()
    assert re.fullmatch(r"a is awake after [\d.e-]+ s", await said(house, "switch", "a"))
    assert await said(house, "switch", "a") == "a is awake already"
    found = await answered(house, "switch", "b")
    assert (found["model"], found["phase"], found["switch"]) == ("b", "awake", 2)
    assert found["seconds"] > 0
    assert re.fullmatch(r"b sleeps after [\d.e-]+ s", await said(house, "sleep", "b"))
    assert await said(house, "sleep", "b") == "b sleeps already"
    assert await answered(house, "sleep", "b") == {"model": "b", "switch": None, "phase": "asleep", "seconds": 0.0}
    assert await said(house, "wake", "a") == "switch 4 wakes a"
    await quiet(house)
    assert await said(house, "wake", "a") == "a is awake already"
    assert (await answered(house, "wake", "a"))["phase"] == "awake"


async def test_all_that_are_awake_are_put_to_sleep(house):
    models = {name: {"memory": "1GiB", "port": free_port(), "shared_address": False} for name in ("a", "b", "c")}
    await house.open(models, capacity="2GiB")
    assert await said(house, "sleep", "--all") == "no model is awake"
    for name in ("a", "b"):
        await said(house, "switch", name)
    told = await said(house, "sleep", "--all")
    assert re.fullmatch(r"a sleeps after [\d.e-]+ s b sleeps after [\d.e-]+ s", told)
    await said(house, "switch", "c")
    [found] = await answered(house, "sleep", "--all")
    assert (found["model"], found["phase"]) == ("c", "asleep")
    assert await answered(house, "sleep", "--all") == []
    for wrong in ((), ("a", "--all")):
        assert "say which model, or --all" in await said(house, "sleep", *wrong, exit_code=2)


@pytest.mark.parametrize("name", ["a;b", "..", "%2e%2e", "a%3Bb", "a%00b"])
async def test_a_name_that_can_stand_in_no_path_is_told(house, name):
    await house.open(models={name: {"aliases": ["gpt"]}})
    told = await said(house, "wake", name, exit_code=Exit.NO_SUCH_MODEL)
    assert "which can stand in no path; use an alias" in told
    for command in ("drain", "undrain"):
        told = await said(house, "fleet", command, name, exit_code=Exit.NO_SUCH_MODEL)
        assert told == f"host {name!r} not found by that name, which can stand in no path"
    told = await said(house, "cancel", name, exit_code=Exit.NO_SUCH_MODEL)
    assert told == f"request {name!r} not found by that ID, which can stand in no path"
    assert (await said(house, "switch", "gpt")).startswith(f"{name} is awake")


@pytest.mark.parametrize("name", NAMES)
async def test_models_of_any_name(house, name):
    hooks = {"wake": "touch up", "sleep": "rm -f up", "alive": "test -e up"}
    await house.open(models={name: hooks, "other": {"aliases": ["gpt"]}})
    assert (await said(house, "switch", name)).startswith(f"{name} is awake")
    assert name in await said(house, "status")
    assert (await said(house, "switch", "gpt")).startswith("other is awake")


async def test_names_are_not_cut_off(house):
    names = ["llama-3.1-8b-instruct", "llama-3.1-70b-instruct"]
    await house.open(models={name: {} for name in names})
    shown = await said(house, "status", COLUMNS="80")
    assert all(name in shown for name in names)
    assert "…" not in await said(house, "status", COLUMNS="40")


@pytest.mark.parametrize("name", ["", ".", "a/../b", "/", "\udcff", "é", "a?b#c", "x" * 5000])
async def test_names_of_nobody(house, name):
    await house.open()
    for command in ("switch", "pin", "logs", "activity"):
        assert "not found" in await said(house, command, "--", name, exit_code=Exit.NO_SUCH_MODEL)


async def test_what_fails_is_said_with_its_reason(house):
    await house.open(models={"a": {"wake": "echo no memory; exit 3"}, "b": {"sleep": "exit 4", "alive": ALIVE}})
    assert "exited with 3" in await said(house, "switch", "a", exit_code=Exit.FAILED)
    await quiet(house)
    await said(house, "switch", "b")
    assert "exited with 4" in await said(house, "sleep", "b", exit_code=Exit.FAILED)


async def test_what_takes_too_long_goes_on_by_itself(house):
    await house.open(models={"a": {"wake": f"until [ -e go ]; do sleep 0.01; done; {WAKE}"}, "b": {}})
    line = await said(house, "switch", "a", "--timeout", "50ms", exit_code=Exit.TIMED_OUT)
    assert line == "not within 0.05 s; it goes on by itself"
    assert "switch 1: nothing → a, waking for" in await said(house, "status")
    assert "switch 1" in await said(house, "switch", "b", exit_code=Exit.REFUSED)
    (house.folder / "go").touch()
    await quiet(house)
    assert await said(house, "switch", "a") == "a is awake already"


async def test_a_switch_that_ends_with_llmux(house):
    await house.open(models={"a": {"wake": "until [ -e go ]; do sleep 0.01; done"}}, shutdown_grace=0)
    switching = asyncio.create_task(llmux(house, "switch", "a"))
    await until(lambda: house.switcher.core.state.switch is not None)
    await house.close()
    done = await switching
    assert done.exit_code in (Exit.FAILED, Exit.UNREACHABLE)
    assert "Traceback" not in done.output


async def test_pins(house):
    await house.open()
    assert await said(house, "pin", "a", "--for", "2h", "-r", "a demo") == "a is pinned for 2h; switch 1 wakes it"
    await quiet(house)
    assert "pinned for 120 min more: a demo" in await said(house, "status")
    assert "model 'a' is pinned: a demo" in await said(house, "switch", "b", exit_code=Exit.REFUSED)
    assert "not a duration" in await said(house, "pin", "a", "--for", "soon", exit_code=Exit.USAGE)
    assert (await answered(house, "pin", "a"))["phase"] == "awake"
    assert await said(house, "unpin", "a") == "unpinned a"
    assert (await answered(house, "unpin", "a"))["model"] == "a"


async def test_a_model_that_was_mended(house):
    await house.open(models={"a": {"wake": "exit 1"}}, backoff={"first": "1h", "max": "1h"})
    assert (await house.chat("a")).status == 503
    assert "not tried again for" in (line := await said(house, "status"))
    assert "exited with 1" in line
    await quiet(house)
    assert await said(house, "reset", "a") == "a: its failures are forgotten"
    assert "not tried again" not in await said(house, "status")
    assert (await answered(house, "reset", "a"))["model"] == "a"


async def test_the_request_that_a_drain_waits_for_is_named_and_cancelled(house):
    await house.open()
    await said(house, "switch", "a")
    line = await house.begin("POST", "/v1/hold", {"model": "a"}, X_Request_ID="it/hangs")
    await until(lambda: house.in_flight("a") == 1)
    assert "it/hangs" not in await said(house, "status")
    waits = await house.begin("POST", "/v1/x", {"model": "b"})
    await until(lambda: house.switcher.core.state.switch is not None)
    assert "waits for it/hangs, without an answer for" in await said(house, "status")
    assert await said(house, "cancel", "it/hangs") == "cancelled it/hangs: a"
    assert (await line.reply()).status == 410
    assert (await waits.reply()).status == 200
    assert "No request is called" in await said(house, "cancel", "it/hangs", exit_code=Exit.NO_SUCH_MODEL)


async def test_leases(house):
    await house.open()
    await said(house, "switch", "a")
    line = await said(house, "lease", "--for", "1h", "--reason", "training", "--requests", "wait")
    name = re.fullmatch(r"nothing holds the GPU; it is leased for 1h: llmux release (\w+)", line)[1]
    line = await said(house, "status")
    assert f"leased to another job for 60 min more (lease {name}): training; requests wait" in line
    assert "training" in await said(house, "lease", exit_code=Exit.REFUSED)
    assert "training" in await said(house, "release", "another", exit_code=Exit.REFUSED)
    assert "is empty" in await said(house, "release", "", exit_code=Exit.USAGE)
    assert "is empty" in await said(house, "lease", "--renew", "", exit_code=Exit.USAGE)
    found = await answered(house, "lease", "--renew", name, "--for", "2h")
    assert (found["id"], found["held"], found["reason"], found["requests"]) == (name, True, "training", "wait")
    assert await said(house, "release", name) == "the GPU is llmux's again"
    assert await said(house, "release", exit_code=Exit.REFUSED) == "the GPU is not leased"
    assert "not leased" in await said(house, "lease", "--renew", name, exit_code=Exit.REFUSED)
    found = await answered(house, "lease")
    assert found["expires_in"] is None
    assert (await answered(house, "release"))["leased"] is False


async def test_a_lease_that_is_not_held_in_time_is_given_back(house):
    await house.open()
    async with house.switcher.hold("a"):
        line = await said(house, "lease", "--timeout", "100ms", exit_code=Exit.TIMED_OUT)
        assert line == "something still holds the GPU after 0.1 s; the lease is given back"
        assert house.switcher.core.state.lease is None
        line = await said(house, "lease", "--no-wait")
        assert "the GPU is being cleared; it is leased until it is given back" in line
        name = house.switcher.core.state.lease.id
        line = await said(house, "lease", "--renew", name, "--timeout", "50ms", exit_code=Exit.TIMED_OUT)
        assert line.endswith("the lease stays")
        renewed = []
        house.switcher.subscribe(lambda effect: renewed.append(effect) if isinstance(effect, LeaseSet) else None)
        waiting = asyncio.create_task(said(house, "lease", "--renew", name, exit_code=Exit.FAILED))
        await until(lambda: renewed)
        assert (await house.ask("DELETE", "/llmux/lease")).status == 202
        assert "the lease ended before" in await waiting
    await said(house, "lease", "--for", "1h", "--", "true", exit_code=Exit.USAGE)


async def test_manual_mode(house):
    await house.open()
    assert await said(house, "manual", "on") == "only operators switch"
    line = await house.begin("POST", "/v1/x", {"model": "a"})
    await until(lambda: house.queued("a"))
    shown = await said(house, "status")
    assert "manual mode: only operators switch" in shown
    assert re.search(r"│ a │ asleep │ 1 │ [\d.]+ s │ ≈ \d+ s │", shown), shown
    assert "no model is woken yet: manual mode, only an operator switches; 1 waiting for a" in shown
    assert (await answered(house, "manual", "off"))["manual"] is False
    assert (await line.reply()).status == 200
    assert await said(house, "manual", "off") == "the policy switches"


async def test_the_status_as_json(house):
    await house.open()
    assert (await answered(house, "status"))["models"].keys() == {"a", "b"}


async def test_the_status_says_which_remotes_are_left_alone(house):
    remotes = {name: {"url": "http://127.0.0.1:9", "models": {"m": "m"}} for name in ("far", "off")}
    await house.open(remotes=remotes, remotes_for_all=True)
    for _ in range(3):
        await house.ask("POST", "/v1/x", {"model": "off/m"})
    shown = await said(house, "status", COLUMNS="200")
    assert "remote far: 0 in flight" in shown
    assert "remote off: left alone, again in " in shown
    assert "No connection to the engine at http://127.0.0.1:9" in shown


async def test_what_hooks_print(house):
    hooks = {"wake": f"echo 'up [now]'; {WAKE}", "sleep": f"echo down; {SLEEP}"}
    await house.open(models={"a": {**hooks, "aliases": ["gpt"]}, "b": {"wake": f"echo b; {WAKE}"}})
    await said(house, "switch", "a")
    await said(house, "switch", "b")
    done = await llmux(house, "logs")
    shown = [line.split(" ", 1)[1] for line in done.output.splitlines()]
    assert shown == ["a wake | up [now]", "a sleep | down", "b wake | b"]
    assert (await llmux(house, "logs", "gpt", "-n", "1")).output.endswith(" sleep | down\n")
    assert (await llmux(house, "logs", "-n", "0")).output == ""
    lines = (await llmux(house, "logs", "a", "--json")).output.splitlines()
    assert [json.loads(line)["line"] for line in lines] == ["up [now]", "down"]
    assert "known: a, b" in await said(house, "logs", "zz", exit_code=Exit.NO_SUCH_MODEL)


async def test_hooks_live(house):
    hooks = {"wake": f"echo up; until [ -e go ]; do sleep 0.01; done; {WAKE}", "sleep": "echo no; exit 7"}
    await house.open(models={"a": hooks, "b": {}})
    waiting = await house.begin("POST", "/v1/x", {"model": "a"})
    await until(lambda: house.switcher.history.document(output=True, base_url="")["output"])
    following = asyncio.create_task(llmux(house, "logs", "a", "-f"))
    await until(lambda: house.switcher.history._listeners)
    (house.folder / "go").touch()
    assert (await waiting.reply()).status == 200
    assert (await house.ask("POST", "/llmux/models/a/sleep")).status == 202
    await quiet(house)
    await house.close()
    done = await following
    assert done.exit_code == Exit.UNREACHABLE
    shown = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    assert shown[0] == "wake | up"
    assert shown[1].startswith("wake has succeeded after ")
    assert shown[2:4] == ["sleep begins", "sleep | no"]
    assert shown[4].startswith("sleep has failed with exit code 7 after ")


async def test_top(house):
    await house.open()
    house.up("a")
    for every in ("0.2", "1", "5", "25"):  # seconds in which this machine gets something done
        looking = asyncio.create_task(llmux(house, "top", "--once", "--every", every))
        while not looking.done():
            assert (await house.chat("a")).status == 200
            line = await house.begin("POST", "/v1/stream", {"model": "a"})
            await line.reader.readuntil(b"data: 1")
            line.abort()
        done = await looking
        assert done.exit_code == 0, done.output
        (row,) = [line for line in done.output.splitlines() if "│ a " in line]
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[1] == "awake"
        answers, events = (float(cells[place].replace(",", "") or 0) for place in (7, 8))
        if answers > 0 and events > 0:  # of each second
            return
    raise AssertionError(done.output)


# ---- who may, and where


async def test_keys(house, tmp_path):
    await house.open(api_keys=["user"], admin_key="root")
    assert "--key-file" in await said(house, "status", exit_code=Exit.NOT_ALLOWED)
    assert "policy" in await said(house, "status", LLMUX_API_KEY="user")
    await said(house, "switch", "a", exit_code=Exit.NOT_ALLOWED, LLMUX_API_KEY="user")
    await said(house, "logs", exit_code=Exit.NOT_ALLOWED, LLMUX_API_KEY="user")
    await said(house, "switch", "a", LLMUX_ADMIN_KEY="root", LLMUX_API_KEY="user")
    file = tmp_path / "key"
    file.write_text("root\n")
    await said(house, "logs", "--key-file", file)
    await said(house, "sleep", "a", LLMUX_ADMIN_KEY_FILE=str(file), LLMUX_ADMIN_KEY="wrong")
    for text in (b"", b"two words", b"\xff\xfe", b"a\nb"):
        file.write_bytes(text)
        assert str(file) in await said(house, "status", "--key-file", file, exit_code=Exit.USAGE)
    assert "missing" in await said(house, "status", "--key-file", "missing", exit_code=Exit.USAGE)


@pytest.mark.parametrize("url", ["", "x", "ftp://h", "http://", "http://[::1", "http://h:99999", "http:///x"])
async def test_addresses_that_are_none(url):
    done = await llmux(None, "status", "--url", url)
    assert done.exit_code == Exit.USAGE
    assert "--url http://HOST:PORT" in done.output


COMMANDS = [
    ("status",), ("status", "--watch"), ("status", "--json", "--watch"), ("top",), ("logs",), ("logs", "-f"),
    ("switch", "a"), ("wake", "a"), ("sleep", "a"), ("pin", "a"), ("unpin", "a"), ("reset", "a"), ("lease",),
    ("lease", "--", "true"), ("release",), ("manual", "on"),
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
async def test_nobody_answers(words):
    url = f"http://{HOST}:{free_port()}"
    done = await llmux(None, *words, LLMUX_URL=url)
    assert done.exit_code == Exit.UNREACHABLE, done.output
    hint = "Connection refused; does llmux run there? Give its address with --url or LLMUX_URL"
    assert " ".join(done.output.split()) == f"{url}: {hint}"


OTHERS = [
    b"",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 500 Oh\r\nContent-Length: 13\r\n\r\n" + b'{"error": {}}',
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 12\r\n\r\ndata: {{{{\n\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("answer", OTHERS)
@pytest.mark.parametrize("words", [("status",), ("switch", "a"), ("lease",), ("top", "--once"), ("logs", "-f")])
async def test_something_else_answers(answer, words):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    url = f"http://{HOST}:{server.sockets[0].getsockname()[1]}"
    done = await llmux(None, *words, "--url", url)
    server.close()
    assert done.exit_code == Exit.UNREACHABLE, (done.output, done.exception)
    assert url in done.output
    assert ("llmux fleet status" in " ".join(done.output.split())) == (b" 404 " in answer)  # as a gateway answers


def test_every_exit_code_has_a_meaning():
    assert set(MEANINGS) == set(Exit)


def configuration(house, **more):
    file = house.folder / "of-it.yaml"
    model = {"port": 9, "wake": ":", "sleep": ":", "alive": ":"}
    file.write_text(json.dumps({"port": house.port, "models": {"a": model}} | more))
    return file


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "localhost"])
async def test_a_command_finds_the_llmux_of_a_configuration(house, host):
    """Also where LLMUX_URL says another: what stands on the command line is meant."""
    await house.open("a")
    file = configuration(house, host=host, insecure=True)
    for words in (
        ("-c", file, "status"),
        ("-c", file, "requests"),
        ("-c", file, "explain"),
        ("-p", house.port, "status"),
    ):
        for url in ("http://127.0.0.1:9", ""):
            done = await llmux(None, *words, LLMUX_URL=url)
            assert done.exit_code == 0, done.output
    other = configuration(house, port=10)
    assert (await llmux(None, "-c", other, "-p", house.port, "status")).exit_code == 0
    assert (await llmux(house, "-c", other, "status", "--url", f"http://127.0.0.1:{house.port}")).exit_code == 0
    done = await llmux(house, "-c", other, "status")
    assert done.exit_code == Exit.UNREACHABLE
    assert ":10: " in done.output


async def test_a_configuration_that_names_no_address_is_an_error(house):
    for text, why in (
        ("{", "of-it.yaml:1"),
        ('{"port": 0, "models": {}}', "models"),
        ('{"port": "x", "models": {"a": {"port": 9, "wake": ":", "sleep": ":", "alive": ":"}}}', "port"),
    ):
        file = configuration(house)
        file.write_text(text)
        done = await llmux(None, "-c", file, "status")
        assert done.exit_code == Exit.USAGE
        assert "of-it.yaml" in done.output
        assert why in done.output
    done = await llmux(None, "-c", configuration(house, port=0), "usage")
    assert done.exit_code == Exit.USAGE
    assert "of-it.yaml" in done.output
    assert "any free port" in done.output
    assert "--url" in done.output
    done = await llmux(None, "-c", house.folder / "missing.yaml", "usage")
    assert done.exit_code == Exit.USAGE
    assert "there is no such file" in done.output


async def test_a_gateways_configuration_is_one_too(house):
    await house.open("a")
    file = house.folder / "gateway.yaml"
    file.write_text(json.dumps({"port": house.port, "hosts": {"one": {"url": "http://127.0.0.1:9"}}}))
    done = await llmux(None, "-c", file, "fleet", "status")
    assert f"127.0.0.1:{house.port}" in done.output  # which is no gateway, but was asked
    assert done.exit_code == Exit.UNREACHABLE

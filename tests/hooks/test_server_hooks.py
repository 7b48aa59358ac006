"""Hooks of servers that run all the time, and load and unload: with stand-ins for their HTTP APIs."""

import contextlib
import itertools
import os
import shutil
import sys
import threading

import pytest

from tests.hooks.fakes.base import serving
from tests.hooks.fakes.ollama import Ollama
from tests.hooks.fakes.router import Router
from tests.hooks.fakes.tabbyapi import KEY, Tabby
from tests.hooks.fakes.triton import Triton

ALL = {
    "llama-cpp-router": (lambda: Router("m", "other"), {}),
    "ollama": (lambda: Ollama("m:latest", "other:latest"), {}),
    "tabbyapi": (lambda: Tabby("m", "other"), {"ADMIN_KEY": KEY}),
    "triton": (lambda: Triton("m", "other"), {}),
}
QUICK = {"GRACE": "1"}


@pytest.fixture
def server(make_hook):
    """Return a function that makes a hook, and its server unless ``up=False``."""
    with contextlib.ExitStack() as stack:

        def make(script, fake=None, *, up=True, model="m", **env):
            made, given = ALL[script]
            hook = make_hook(f"{script}.sh", model, **{**given, **QUICK, **env})
            fake = fake or made()
            if up:
                stack.enter_context(serving(fake, hook.port))
            return hook, fake

        yield make


@pytest.fixture(params=ALL)
def script(request):
    return request.param


@pytest.mark.parametrize(
    ("script", "shell"),
    [*itertools.product(ALL, ["sh", "busybox"])],
    indirect=["shell"],
)
def test_a_whole_life(script, server, shell, live):
    hook, _ = server(script)
    hook.shell = shell
    live(hook)


def test_with_python_in_place_of_curl(server, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "awk", "cut", "sed", "sleep", "tr"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").symlink_to(sys.executable)
    hook, _ = server("tabbyapi")
    hook.env["PATH"] = str(tools)
    hook.fails("alive")
    hook.ok("wake")
    hook.ok("alive")
    hook.ok("sleep")
    hook.ok("verify")
    (tools / "python3").unlink()
    assert "needs curl or python3" in hook.fails("alive", code=2)


def test_no_server_is_asleep_and_cannot_be_woken(script, server):
    hook, _ = server(script, up=False)
    hook.fails("alive")
    hook.ok("verify")
    hook.ok("sleep")
    assert "nothing listens at" in hook.fails("wake")


def test_a_server_that_hangs_is_not_taken_for_asleep(script, server):
    hook, fake = server(script)
    hook.ok("wake")
    fake.hanging += ["/models", "/api/ps", "/v1/model", "/v2/repository/index", "/v2/models/m/ready"]
    for action in ("alive", "verify", "sleep"):
        assert "did not answer within" in hook.fails(action, ASK_SECONDS="0.3")


def test_another_model_is_left_alone(script, server):
    hook, _ = server(script)
    other = dict(hook.env, NAME="other")
    hook.fails("alive", **other)
    hook.ok("wake", **other)
    hook.fails("alive")
    hook.ok("sleep")
    hook.ok("alive", **other)


def test_what_is_still_busy_is_not_said_to_sleep(script, server):
    hook, fake = server(script)
    hook.ok("wake")
    if isinstance(fake, Tabby):
        pytest.skip("TabbyAPI cuts its requests")
    fake.in_flight = 1
    assert "still" in hook.fails("sleep")
    fake.in_flight = 0
    hook.ok("sleep")
    hook.ok("verify")


def test_a_load_that_fails_is_said(script, server):
    hook, fake = server(script)
    if isinstance(fake, Ollama):
        fake.broken.append("/api/generate")
    else:
        fake.bad.append("m")
    said = hook.fails("wake")
    assert {
        "llama-cpp-router": "was not loaded, it is failed",
        "ollama": "POST /api/generate answers 500",
        "tabbyapi": "Insufficient VRAM",
        "triton": "version 1 is at UNAVAILABLE",
    }[script] in said
    hook.fails("alive")
    hook.ok("sleep")
    fake.broken, fake.bad = [], []
    hook.ok("wake")


def test_an_unknown_model_is_a_mistake_in_the_configuration(script, server):
    hook, _ = server(script, NAME="nobody")
    said = hook.fails("wake", code=1 if script == "tabbyapi" else 2)
    assert "nobody" in said or "Could not find the model path" in said
    hook.ok("sleep")
    hook.fails("alive")


def test_stop_runs_what_the_user_gave(script, server, tmp_path):
    hook, fake = server(script)
    hook.ok("wake")
    assert "STOP is not set" in hook.fails("stop", code=2)
    assert "'exit 3' failed" in hook.fails("stop", STOP="exit 3")
    assert "still" in hook.fails("stop", STOP="true")
    if isinstance(fake, Ollama):
        fake.loaded.clear()
    elif isinstance(fake, Tabby):
        fake.loaded = None
    elif isinstance(fake, Triton):
        fake.state["m"] = "UNAVAILABLE"
    else:
        fake.status["m"] = "unloaded"
    hook.ok("stop", STOP=f"echo $LLMUX_MODEL >'{tmp_path}/stopped'")
    assert (tmp_path / "stopped").read_text() == "m\n"


def test_what_is_not_set_up_is_said(script, server):
    hook, _ = server(script, up=False)
    assert "usage" in hook.fails("dance", code=2)
    assert "LLMUX_MODEL is not set" in hook.fails("alive", code=2, LLMUX_MODEL="")
    assert "LLMUX_URL is not set" in hook.fails("alive", code=2, LLMUX_URL="")


# ---- what is special about each


def test_router_refuses_without_the_key(server):
    hook, fake = server("llama-cpp-router", Router("m", key="s3cret"))
    assert "Invalid API Key" in hook.fails("wake")
    hook.ok("wake", API_KEY="s3cret")
    assert fake.status["m"] == "loaded"


def test_router_waits_for_a_load_that_somebody_else_has_begun(server):
    hook, fake = server("llama-cpp-router")
    fake.status["m"] = "loading"
    fake.broken.append("/models/load")
    with contextlib.ExitStack() as stack:
        timer = threading.Timer(0.3, fake.status.__setitem__, ("m", "loaded"))
        stack.callback(timer.join)
        timer.start()
        hook.ok("wake")


def test_router_names_its_models(server):
    hook, _ = server("llama-cpp-router", Router("tiny", "org/big model:q4"), model="m")
    assert '"tiny" "org/big model:q4"' in hook.fails("wake", code=2)
    hook.ok("wake", NAME="org/big model:q4")
    hook.ok("alive", NAME="org/big model:q4")
    hook.fails("alive", NAME="org/big")


def test_ollama_keeps_what_it_loads_and_adds_the_tag(server):
    hook, fake = server("ollama", Ollama("m:latest", "m:8b"))
    hook.ok("wake")
    assert fake.keeps == {"m:latest": -1}
    hook.fails("alive", NAME="m:8b")
    hook.ok("wake", NAME="m:8b")
    hook.ok("sleep", NAME="m:8b")
    hook.ok("alive")


def test_ollama_loads_embedders_too(server):
    hook, fake = server("ollama", Ollama(embedders=("m:latest",)))
    hook.ok("wake")
    assert any(call.startswith("POST /api/embed") for call in fake.calls)
    hook.ok("sleep")
    hook.ok("verify")


def test_ollama_says_when_a_model_has_no_room_on_the_gpu(server):
    hook, fake = server("ollama")
    fake.part = 0.5
    assert "only 2048 of 4096 MiB are on the GPU" in hook.ok("wake")


def test_tabby_wants_the_admin_key(server):
    hook, fake = server("tabbyapi")
    for key in ("", "wrong"):
        assert "ADMIN_KEY" in hook.fails("wake", code=2, ADMIN_KEY=key)
        assert "ADMIN_KEY" in hook.fails("alive", code=2, ADMIN_KEY=key)
    hook.ok("wake", OPTIONS='"max_seq_len": 4096, "cache_mode": "Q8"')
    assert fake.options == {"max_seq_len": 4096, "cache_mode": "Q8"}


def test_no_key_is_seen_in_the_list_of_processes(server, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    (tools / "curl").write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/arguments"\nexec {curl} "$@"\n')
    (tools / "curl").chmod(0o755)
    hook, _ = server("tabbyapi")
    hook.ok("wake", PATH=f"{tools}:{os.environ['PATH']}")
    arguments = (tmp_path / "arguments").read_text()
    assert "/v1/model/load" in arguments
    assert KEY not in arguments


def test_triton_unloads_an_ensemble_with_its_parts(server):
    hook, fake = server("triton")
    fake.parts["m"] = ["other"]
    hook.ok("wake")
    hook.ok("sleep")
    assert fake.state == {"m": "UNAVAILABLE", "other": "UNAVAILABLE"}
    hook.ok("wake")
    hook.ok("sleep", DEPENDENTS="no")
    assert fake.state["other"] == "READY"


def test_triton_that_does_not_take_orders_says_why(server):
    hook, _ = server("triton", Triton("m", explicit=False))
    assert "explicit model load / unload is not allowed" in hook.fails("wake")


def test_triton_has_names_of_its_own(server):
    hook, _ = server("triton", model="org/m")
    assert "set NAME" in hook.fails("wake", code=2)
    hook.ok("wake", NAME="m")

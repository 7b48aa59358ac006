"""What a page of another site can have a real Chromium do to the llmux on the user's machine: nothing."""

from __future__ import annotations

import json

import pytest

from tests.engine.real import wait_until
from tests.ui.conftest import FOREIGN, REBOUND, WAIT

WAKE = "touch up.{0}; touch woken.{0}"
MODELS = {"llama": {"wake": WAKE.format(0)}, "qwen": {"wake": WAKE.format(1)}}

IMAGE = """url => new Promise(done => {
  const it = new Image()
  it.onload = it.onerror = () => done()
  it.src = url
})"""
FRAME = """url => new Promise(done => {
  const it = document.createElement("iframe")
  it.onload = () => done(it.contentDocument === null)
  it.src = url
  document.body.append(it)
})"""
FORM = """([url, method, name, value]) => new Promise(done => {
  const frame = document.createElement("iframe")
  frame.name = "target" + Math.random()
  document.body.append(frame)
  const form = document.createElement("form")
  Object.assign(form, {action: url, method, enctype: "text/plain", target: frame.name})
  const field = document.createElement("input")
  Object.assign(field, {name, value})
  form.append(field)
  document.body.append(form)
  frame.onload = () => done()
  form.submit()
})"""
FETCH = """([url, options]) => fetch(url, {signal: AbortSignal.timeout(10000), ...options})
  .then(it => it.type + " " + it.status, error => "error " + error.name)"""
SOCKET = """url => new Promise(done => {
  const it = new WebSocket(url)
  it.onopen = () => done("open")
  it.onerror = () => done("error")
})"""


@pytest.fixture(scope="module")
def stage(make_stage):
    return make_stage(MODELS)


@pytest.fixture(scope="module")
def page(browser):
    """An empty page; each test opens what it is about, in place of what the one before has opened."""
    with browser.new_context() as context:
        context.set_default_timeout(WAIT)
        yield context.new_page()


def foreign(page, stage):
    """Open the attacker's page."""
    page.goto(f"http://{FOREIGN}:{stage.engine.port}/")
    return page


def refusals(stage):
    """The log's lines about what was refused."""
    lines = (stage.folder / "llmux.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [event for event in events if event["event"] in ("origin_refused", "host_refused")]


def refused(stage, count):
    """Wait until so many refusals are in the log, which a thread writes."""
    wait_until(lambda: len(refusals(stage)) >= count, 60, what=f"{count} refusals")


def asleep(stage):
    """Nothing has been switched, and nothing is asked for."""
    status = stage.status()
    assert not list(stage.folder.glob("woken.*"))
    assert (status["awake"], status["switch"], status["lease"]) == ([], None, None)
    assert not any(model["queued"] or model["in_flight"] or model["pinned"] for model in status["models"].values())


# Names of the user's machine, by which a page may try: one that the browser trusts, one to which it sends no
# Sec-Fetch-Site, because it does not, though llmux answers to it, and one that llmux does not know.
NAMES = ["127.0.0.1", "localhost4", REBOUND]
OTHERS = ["localhost", "0.0.0.0", REBOUND]
GETS = [
    "/upstream/qwen/x",
    "/v1/x?model=qwen",
    "/v1/models",
    "/llmux/status",
    "/llmux/events",
    "/health",
    "/metrics",
]


@pytest.mark.parametrize("name", NAMES)
def test_images_frames_and_navigations_switch_nothing(stage, page, name):
    before = len(refusals(stage))
    here = f"http://{name}:{stage.port}"
    foreign(page, stage)
    for path in GETS:
        page.evaluate(IMAGE, here + path)
    for path in GETS[:2]:
        page.evaluate(FRAME, here + path)
    for path in GETS[:2]:
        foreign(page, stage)
        with page.expect_navigation(url=here + path, wait_until="commit"):
            page.evaluate("url => { location.href = url }", here + path)
        assert "_not_allowed" in page.content()
    refused(stage, before + len(GETS) + 4)
    asleep(stage)


@pytest.mark.parametrize("name", OTHERS)
def test_forms_and_fetches_switch_nothing(stage, page, name):
    before = len(refusals(stage))
    here = f"http://{name}:{stage.port}"
    foreign(page, stage)
    body = '{"model": "qwen", "x": "'
    page.evaluate(FORM, [f"{here}/v1/chat/completions", "post", body, '"}'])
    page.evaluate(FORM, [f"{here}/llmux/models/qwen/wake", "post", "", ""])
    page.evaluate(FORM, [f"{here}/v1/x", "get", "model", "qwen"])
    sent = [
        ("/v1/chat/completions", {"method": "POST", "mode": "no-cors", "body": '{"model": "qwen"}'}),
        ("/v1/x?model=qwen", {"mode": "no-cors"}),
        ("/upstream/qwen/x", {"mode": "no-cors"}),
        ("/llmux/models/qwen/wake", {"method": "POST", "mode": "no-cors"}),
        ("/llmux/lease", {"method": "DELETE"}),
        ("/llmux/status", {}),
    ]
    for path, options in sent:
        # An opaque answer is one that the page cannot read.
        assert page.evaluate(FETCH, [here + path, options]) in {"opaque 0", "error TypeError"}, path
    assert page.evaluate(SOCKET, f"ws://{name}:{stage.port}/v1/realtime?model=qwen") == "error"
    refused(stage, before + 3 + len(sent) - 2)  # preflights apart
    asleep(stage)


def test_a_name_that_points_here_reads_nothing(stage, page):
    # DNS rebinding: for the browser all of it is the page's own server.
    rebound = f"http://{REBOUND}:{stage.port}"
    for path in ("/llmux/ui", "/llmux/status", "/v1/models", "/metrics", "/"):
        answer = page.goto(rebound + path)
        assert answer.status == 403
        assert "`hosts`" in answer.text()
    for path, options in (
        ("/llmux/status", {}),
        ("/v1/chat/completions", {"method": "POST", "body": '{"model": "qwen"}'}),
        ("/llmux/models/qwen/wake", {"method": "POST"}),
    ):
        assert page.evaluate(FETCH, [rebound + path, options]) == "basic 403"
    asleep(stage)


def test_a_link_on_another_site_opens_the_page_and_the_page_works(stage, page):
    foreign(page, stage)
    with page.expect_navigation():
        page.evaluate("url => { location.href = url }", f"{stage.url}/llmux/ui")
    page.locator("#models tbody tr").filter(has_text="llama").wait_for()
    foreign(page, stage)
    assert page.evaluate(FRAME, f"{stage.url}/llmux/ui")
    assert "llama" not in page.frames[-1].content()
    asleep(stage)


def test_the_attacks_do_switch_where_everything_is_allowed(make_stage, page):
    """Else the tests above would prove nothing."""
    stage = make_stage(MODELS, cors=["*"], hosts=["*"])
    foreign(page, stage)
    page.evaluate(IMAGE, f"{stage.url}/upstream/qwen/x")
    wait_until((stage.folder / "woken.1").exists, 30, what="the wake of an image")
    page.evaluate(IMAGE, f"http://localhost4:{stage.port}/v1/x?model=llama")
    wait_until((stage.folder / "woken.0").exists, 30, what="the wake of an image by another name")
    assert not refusals(stage)

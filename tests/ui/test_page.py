"""The page, in a real browser, before a real llmux with real hooks."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from tests.engine.real import wait_until
from tests.ui.conftest import REBOUND
from tests.ui.stage import held

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
NASTY = '"><img src=x onerror="window.hacked=1"><b>'  # a model's name
SHOUT = "<script>window.hacked=2</script><img src=x onerror=window.hacked=3>"  # what its hook prints


@pytest.fixture(scope="module")
def stage(make_stage):
    """One llmux for those who only look: ``llama`` was awake, then the one with the nasty name; ``flux`` fails."""
    stage = make_stage(
        {
            "llama": {"aliases": ["gpt"]},
            NASTY: {"wake": f"printf '%s\\n' '{SHOUT}'; touch up.1"},
            "flux": {"wake": "echo 'CUDA error: out of memory'; exit 1"},
        },
        backoff={"first": "1h", "max": "1h"},
        fake_gpu=True,
    )
    for model in ("llama", NASTY, "flux"):
        stage.ask(model).join(20)
    stage.ask(NASTY, hold=True)
    stage.in_flight(NASTY)
    return stage


def row(page, model):
    return page.locator("#models tbody tr").filter(
        has=page.locator("bdi", has_text=re.compile(f"^{re.escape(model)}$"))
    )


def phase(page, model):
    return row(page, model).locator(".phase")


def lane(page, model, phase):
    return page.locator(f'.lane[data-model="{model}"] rect[data-phase={phase}]')


def under_the_pointer(page):
    """The time that the readout begins with, in seconds of the day."""
    hours, minutes, seconds = page.locator("#readout").inner_text()[:8].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)


def live(page):
    expect(page.locator("body")).to_have_attribute("data-link", "live")


def test_a_switch_is_seen_as_it_happens_and_by_those_who_come_later(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {"wake": f"echo loading; {held('go')}; echo ready; touch up.1"}})
    page = visit(stage)
    live(page)
    expect(page.locator("#who")).to_have_text("nobody")
    stage.ask("llama", hold=True)
    expect(page.locator("#who")).to_have_text("llama")
    expect(page.locator("#why")).to_contain_text("wakes llama: ")
    expect(row(page, "llama").locator("[data-label='in flight']")).to_have_text("1")
    # An event every 20 ms, or what this machine makes of it.
    expect(row(page, "llama").locator("[data-label='tokens/s']")).to_have_text(re.compile(r"^[1-9]\d?(\.\d)?$"))
    stage.ask("qwen")
    expect(phase(page, "llama")).to_have_text("draining")
    expect(page.locator("#steps [aria-current=step]")).to_have_text("drain")
    expect(page.locator("#why")).to_contain_text("1 waiting for qwen")
    expect(row(page, "qwen").locator("[data-label=queued]")).to_have_text("1")
    expect(row(page, "qwen").locator("[data-label=oldest]")).to_have_text(re.compile(r"^\d+\.\d s$"))
    stage.engine.go.set()
    expect(page.locator("#who")).to_have_text("llama→qwen")
    expect(page.locator("#steps [aria-current=step]")).to_have_text("wake")
    expect(page.locator("#hooks .hook_output")).to_have_text(re.compile("qwen.*wake.*loading$"))
    assert page.title() == "llama → qwen · llmux"
    stage.release("go")
    expect(page.locator("#who")).to_have_text("qwen")
    expect(page.locator("#told")).to_have_text("qwen holds the GPU")
    expect(page.locator("#steps")).to_be_hidden()
    expect(page.locator("#costs td.number")).to_have_text([re.compile(r"s.1$")] * 2)
    expect(page.locator("#decisions li").first).to_contain_text("goes from llama to qwen")
    late = visit(stage)
    for one in (page, late):
        for seen in ("waking", "awake", "draining"):
            expect(lane(one, "llama", seen)).not_to_have_count(0)
        expect(one.locator("#hooks .hook_output .text")).to_have_text(["loading", "ready"])
        one.locator("#table summary").click()
        for words in ("draining", "switch 2 from llama to qwen: success"):
            expect(one.locator("#table tbody")).to_contain_text(words)
        expect(one.locator("#sums")).to_contain_text("switches in 1 h2")


def test_buttons_operate_and_say_what_came_of_it(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {"wake": f"{held('go')}; touch up.1"}})
    page = visit(stage)
    page.get_by_role("button", name="Wake llama").click()
    expect(phase(page, "llama")).to_have_text("awake")
    expect(page.locator("#answer")).to_have_text("llama wakes (switch 1).")
    page.get_by_role("button", name="Pin llama", exact=True).press("Enter")
    expect(phase(page, "llama")).to_have_text("awake · pinned")
    page.get_by_role("button", name="Wake qwen").press("Space")
    expect(page.locator("#answer")).to_contain_text("qwen: ")
    assert stage.status()["awake"] == ["llama"]
    page.get_by_role("button", name="Unpin llama").click()
    expect(phase(page, "llama")).to_have_text("awake")
    wake = page.get_by_role("button", name="Wake llama")
    expect(wake).to_have_attribute("aria-disabled", "true")
    wake.click(force=True)
    expect(page.locator("#answer")).to_have_text("llama is no longer pinned.")
    page.get_by_role("button", name="Wake qwen").click()
    expect(phase(page, "qwen")).to_have_text("waking")
    stage.release("go")
    expect(phase(page, "qwen")).to_have_text("awake")
    page.get_by_role("button", name="Sleep qwen").click()
    expect(page.locator("#who")).to_have_text("nobody")
    stage.command("lease", {"for": "1h", "reason": "training"})
    expect(page.locator("#who")).to_have_text("lent to another job")
    expect(page.locator("#who-facts")).to_contain_text("left (training); requests are turned away")
    expect(page.locator("#plot .lent")).to_have_count(1)
    stage.command("manual", {})
    expect(page.locator("#why")).to_contain_text("operators alone switch")


def test_the_page_asks_for_keys_and_keeps_them_in_its_tab(make_stage, visit):
    stage = make_stage({"llama": {"wake": "echo secret; touch up.0"}}, api_keys=["user"], admin_key="root")
    page = visit(stage)
    dialog, field = page.get_by_role("dialog"), page.get_by_role("textbox", name="Key")
    expect(dialog).to_be_visible()
    field.fill("wrong")
    field.press("Enter")
    expect(page.locator("#banner")).to_contain_text("wants a key")
    page.get_by_role("button", name="Key…").click()
    expect(dialog).to_contain_text("API key")
    field.fill("user")
    field.press("Enter")
    live(page)
    expect(page.locator("#who")).to_have_text("nobody")
    expect(page.locator("#hooks")).to_contain_text("shown to operators")
    page.get_by_role("button", name="Wake llama").click()
    expect(dialog).to_contain_text("admin key")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#answer")).to_contain_text("admin key")
    page.get_by_role("button", name="Wake llama").click()
    field.fill("root")
    page.get_by_role("button", name="Use it").click()
    expect(phase(page, "llama")).to_have_text("awake")
    expect(page.locator("#hooks")).to_contain_text("secret")
    assert page.evaluate("Object.values(sessionStorage)") == ["root"]
    assert "root" not in page.content()
    page.reload()
    live(page)
    other = visit(stage)  # another tab has to ask again
    expect(other.get_by_role("dialog")).to_be_visible()


def test_a_page_with_another_name_or_from_elsewhere_cannot_operate(stage, visit, browser):
    page = visit(stage, url=f"http://{REBOUND}:{stage.port}")
    live(page)
    page.get_by_role("button", name="Wake llama").click()
    expect(page.locator("#answer")).to_contain_text("may not use llmux")
    expect(page.locator("#hooks")).to_contain_text("shown to operators")
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(f"http://127.0.0.1:{stage.engine.port}/")
        send = "url => fetch(url, {method: 'POST', mode: 'no-cors'}).then(it => it.type)"
        assert other.evaluate(send, f"{stage.url}/llmux/models/llama/wake") == "opaque"
        frame = """url => new Promise(done => {
          const it = document.createElement("iframe")
          it.onload = () => done(it.contentDocument === null)
          it.src = url
          document.body.append(it)
        })"""
        assert other.evaluate(frame, f"{stage.url}/llmux/ui")
        assert "llmux" not in other.frames[-1].content()
    assert stage.status()["models"]["llama"]["phase"] == "asleep"
    assert stage.status()["switch"] is None


def test_llmux_goes_and_comes_back(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {}})
    page = visit(stage)
    expect(page.locator("#gpus")).to_contain_text(re.compile("No figures of the GPU: |GPU 0"))  # of this machine
    page.get_by_role("button", name="Wake llama").click()
    expect(page.locator("#who")).to_have_text("llama")
    expect(lane(page, "llama", "waking")).to_have_count(1)
    stage.stop(signal.SIGKILL)
    expect(page.locator("#banner")).to_contain_text("Connection lost")
    expect(page.locator("#link-text")).to_have_text("connection lost")
    expect(page.locator("#told")).to_have_text("The connection to llmux is lost.")
    expect(page.locator("#who")).to_have_text("llama")  # the last that was known
    stage.start()
    live(page)
    expect(page.locator("#banner")).to_be_hidden()
    page.get_by_role("button", name="Wake qwen").click()
    expect(page.locator("#who")).to_have_text("qwen")
    # What was before is still there, and that nothing is known of the time between.
    expect(lane(page, "llama", "waking")).not_to_have_count(0)
    expect(page.locator("#plot rect[fill='url(#unseen)']")).to_have_count(2)


def test_text_stays_text(stage, visit):
    page = visit(stage)
    expect(page.locator("#who")).to_have_text(NASTY)
    expect(page.locator("#hooks")).to_contain_text(SHOUT)
    expect(page.locator("#decisions")).to_contain_text(f"goes from llama to {NASTY}")
    expect(page.locator("#hooks-of option")).to_have_count(4)
    page.locator("#hooks-of").select_option("flux")
    expect(page.locator("#hooks")).not_to_contain_text(SHOUT)
    expect(page.locator("#hooks .hook_output .text")).to_have_text("CUDA error: out of memory")
    expect(row(page, "flux").locator(".error")).to_contain_text("CUDA error")
    expect(page.locator(".lane[data-model=flux] .failure")).not_to_have_count(0)


def test_axe_finds_nothing_serious_and_nothing_is_too_wide(stage, visit):
    page = visit(stage, reduced_motion="reduce", bypass_csp=True)
    expect(page.locator("#who")).to_have_text(NASTY)
    page.locator("#table summary").click()
    expect(page.locator("#table tbody tr")).not_to_have_count(0)
    page.evaluate(AXE)
    for width, scheme in ((1280, "light"), (820, "dark"), (360, "dark"), (360, "light")):
        page.set_viewport_size({"width": width, "height": 740})
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        assert not [
            (scheme, width, one["id"], [node["html"] for node in one["nodes"]])
            for one in found
            if one["impact"] in {"serious", "critical"}
        ]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    moves = "it => parseFloat(getComputedStyle(it).transitionDuration) > 0"
    assert page.evaluate(f"[...document.querySelectorAll('*')].filter({moves}).length") == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(f"[...document.querySelectorAll('*')].filter({moves}).length") > 0


def test_what_happens_while_the_history_is_on_its_way_is_not_lost(stage, visit):
    page = visit(stage)
    told = page.evaluate("""async () => {
      const { World } = await import("/llmux/ui/world.js")
      const world = new World(), model = (phase, streamed) => ({ a: { phase, streamed } })
      const status = { time: 100, models: model("asleep", 0), decisions: [], switch_costs: [] }
      world.link = "lost"
      const move = (id, time, from, to) => ({ id, time, model: "a", from, to })
      world.apply("status", status)
      world.apply("phase", move(2, 101, "asleep", "waking"))
      world.apply("phase", move(3, 102, "waking", "awake"))
      world.apply("hook_output", { time: 101, model: "a", hook: "wake", line: "in both" })
      world.apply("hook_output", { time: 102, model: "a", hook: "wake", line: "late" })
      world.load({
        now: 101.5, begins: 90, notes: [], output: [{ time: 101, model: "a", hook: "wake", line: "in both" }],
        moves: [move(1, 91, "unknown", "asleep"), move(2, 101, "asleep", "waking")],
      }, [])
      world.apply("status", { ...status, time: 103 })
      return [
        world.stretches(0, 103).get("a").map(it => [it.phase, it.from, it.to]), world.output.map(it => it.line),
      ]
    }""")
    stretches = [["unknown", 90, 91], ["asleep", 91, 101], ["waking", 101, 102], ["awake", 102, 103]]
    assert told == [stretches, ["in both", "late"]]


def test_with_the_keyboard_alone(stage, visit):
    page = visit(stage)
    expect(page.locator("#who")).to_have_text(NASTY)
    seen = []
    describe = """() => {
      const it = document.activeElement, style = getComputedStyle(it)
      const shown = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0
      return [it.id || it.getAttribute("aria-label") || it.textContent, shown]
    }"""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        name, visible = page.evaluate(describe)
        assert visible, f"{name} does not show that it has the focus"
        seen.append(name)
    wanted = [
        "To what holds the GPU",
        "key",
        "Wake llama",
        "Sleep llama",
        "Pin llama",
        "Wake flux",
        "Earlier",
        "plot",
        "As a table",
        "decisions",
        "hooks-of",
        "hooks",
    ]
    assert [name for name in seen if name in wanted] == wanted  # in this order, and out at the end
    plot = page.locator("#plot")
    plot.focus()
    minute = page.get_by_role("button", name="The last 1 min")
    expect(minute).to_have_attribute("aria-pressed", "true")  # as much as there is to see
    page.keyboard.press("+")
    expect(minute).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("-")
    expect(minute).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("button", name="Later")).not_to_have_attribute("aria-disabled", "true")
    expect(page.locator("#readout")).not_to_contain_text("now")
    page.keyboard.press("0")
    expect(page.get_by_role("button", name="The last 1 h")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Tab")
    expect(page.locator("#table summary")).to_be_focused()


def test_the_timeline_is_zoomed_by_wheel_and_drag_and_tells_what_is_under_the_pointer(stage, visit):
    page = visit(stage)
    expect(page.locator("#gpus")).not_to_be_empty()
    plot = page.locator("#plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    right, second_lane = box["x"] + box["width"], box["y"] + 8 + 26 + 13
    page.mouse.move(right - 1, second_lane)
    expect(page.locator("#readout")).to_contain_text(f"{NASTY}: awake for")
    page.mouse.move(right - 300, second_lane)
    before = under_the_pointer(page)
    page.mouse.wheel(0, -400)
    expect(page.get_by_role("button", name="The last 1 min")).to_have_attribute("aria-pressed", "false")
    assert abs(under_the_pointer(page) - before) <= 2  # what is under the pointer stays there
    page.mouse.down()
    page.mouse.move(right - 20, second_lane, steps=4)
    page.mouse.up()
    assert abs(under_the_pointer(page) - before) <= 2  # it was dragged along
    for _ in range(8):
        page.get_by_role("button", name="Zoom out").click(force=True)
    expect(page.get_by_role("button", name="The last 1 h")).to_have_attribute("aria-pressed", "true")
    # Zoomed out, the wheel scrolls the page again.
    before = page.evaluate("scrollY")
    page.mouse.move(right - 300, second_lane)
    page.mouse.wheel(0, 300)
    wait_until(lambda: page.evaluate("scrollY") != before, what="scrolling")


def test_figures_of_the_gpu(stage, visit):
    page = visit(stage)
    card = page.locator(".gpu")
    expect(card).to_contain_text("GPU 0 · NVIDIA Test 80GB")
    expect(card).to_contain_text("61.2 of 80.0 GiB")
    expect(page.get_by_role("meter", name="load")).to_have_attribute("aria-valuenow", "93")

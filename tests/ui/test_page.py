"""The page, in a real browser, before a real llmux with real hooks."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from tests.engine.real import wait_until
from tests.harness.waiting import PATIENCE
from tests.ui.stage import held

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
# Style sheets are looked at by experimental rules only, and sound and films are not on the page.
VIOLATIONS = "axe.run({resultTypes: ['violations'], preload: false}).then(found => found.violations)"
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
        stage.ask(model).join(PATIENCE)
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
    expect(page.locator("#who")).to_have_text("no model")
    stage.ask("llama", hold=True)
    expect(page.locator("#who")).to_have_text("llama")
    expect(page.locator("#why")).to_contain_text("wakes llama: ")
    expect(row(page, "llama").locator("[data-label='in flight']")).to_have_text("1")
    # An event every 20 ms, or what this machine makes of it.
    expect(row(page, "llama").locator("[data-label='tokens/s']")).to_have_text(re.compile(r"^[1-9]\d?(\.\d)?$"))
    stage.ask("qwen")
    expect(phase(page, "llama")).to_have_text("draining")
    expect(page.locator("#steps [aria-current=step]")).to_have_text("drain")
    expect(page.locator("#why")).to_contain_text("llama → qwen: 1 waiting")
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
    expect(page.locator("#decisions li").first).to_contain_text("llama → qwen")
    late = visit(stage)
    for one in (page, late):
        for seen in ("waking", "awake", "draining"):
            expect(lane(one, "llama", seen)).not_to_have_count(0)
        expect(one.locator("#hooks .hook_output .text")).to_have_text(["loading", "ready"])
        one.locator("#table summary").click()
        for words in ("draining", "switch 2 from llama to qwen: success"):
            expect(one.locator("#table tbody")).to_contain_text(words)
        expect(one.locator("#sums")).to_contain_text(re.compile(r"switches in [^2]*2? s2"))


def test_buttons_operate_and_say_what_came_of_it(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {"wake": f"{held('go')}; touch up.1"}})
    page = visit(stage)
    page.get_by_role("button", name="Wake llama").click()
    expect(phase(page, "llama")).to_have_text("awake")
    expect(page.locator("#answer")).to_have_text("llama wakes (switch 1).")
    page.get_by_role("button", name="Pin llama", exact=True).press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("llama stays awake until")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Pin llama", exact=True).click()
    dialog.get_by_label("For", exact=True).select_option("until it is ended")
    dialog.get_by_role("button", name="Pin it").click()
    expect(phase(page, "llama")).to_have_text("awake · pinned")
    expect(page.locator("#why")).to_contain_text(
        "llama stays awake until an operator unpins it; requests for qwen are refused"
    )
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
    expect(page.locator("#who")).to_have_text("no model")


def test_the_gpu_is_lent_and_manual_mode_set_once_that_is_confirmed(make_stage, visit):
    stage = make_stage({"llama": {}})
    page = visit(stage)
    dialog = page.get_by_role("dialog")
    expect(phase(page, "llama")).to_have_text("asleep")  # before it knows a state, the button does nothing
    page.get_by_role("button", name="Lend the GPU…").click()
    dialog.get_by_label("Reason").fill("training")
    dialog.get_by_label("Requests meanwhile").select_option("wait")
    expect(dialog).to_contain_text("Requests wait.")
    dialog.get_by_label("Requests meanwhile").select_option("are refused")
    dialog.get_by_role("button", name="Lend it").click()
    expect(page.locator("#answer")).to_have_text(re.compile(r"^The GPU is lent to another job until \d\d:\d\d\.$"))
    expect(page.locator("#who")).to_have_text("lent to another jobtraining")
    expect(page.locator("#who-facts")).to_contain_text("left; requests are refused")
    expect(row(page, "llama").locator(".refused")).to_have_text(re.compile(r"^refused until .*: the GPU is lent$"))
    expect(page.locator("#plot .lent")).to_have_count(1)
    page.get_by_role("button", name="Manual mode…").click()
    expect(dialog).to_contain_text("only operators wake models")
    expect(dialog.locator("#deed-choices")).to_be_hidden()
    dialog.get_by_role("button", name="Cancel").click()
    assert not stage.status()["manual"]
    page.get_by_role("button", name="Manual mode…").click()
    dialog.get_by_role("button", name="Begin it").click()
    expect(page.locator("#why")).to_contain_text("operators alone switch")
    page.get_by_role("button", name="End manual mode…").click()
    expect(dialog).to_contain_text("The policy switches again.")
    dialog.get_by_role("button", name="End it").click()
    expect(page.locator("#why")).not_to_contain_text("operators alone switch")
    page.get_by_role("button", name="Take the GPU back…").click()
    expect(dialog).to_contain_text("The job “training” has had it for")
    dialog.get_by_role("button", name="Take it back").click()
    expect(page.locator("#who")).to_have_text("no model")
    assert stage.status()["lease"] is None


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
    expect(page.locator("#who")).to_have_text("no model")
    expect(page.locator("#hooks")).to_contain_text("shown to operators")
    page.get_by_role("button", name="Wake llama").click()
    expect(dialog).to_contain_text("admin key")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#answer")).to_contain_text("takes the admin key")
    page.get_by_role("button", name="Wake llama").click()
    field.fill("no such key")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#answer")).to_contain_text("llama: nothing was done; that is not the admin key")
    live(page)  # the key that was there before stays
    assert page.evaluate("Object.values(sessionStorage)") == ["user"]
    expect(page.locator("#onlooker")).to_contain_text("You look on.")
    page.get_by_role("button", name="Lend the GPU…").click()
    page.get_by_role("button", name="Lend it").click()
    field.fill("root")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#who")).to_contain_text("lent to another job")
    expect(page.locator("#onlooker")).to_be_hidden()
    page.get_by_role("button", name="Take the GPU back…").click()
    page.get_by_role("button", name="Take it back").click()
    expect(page.locator("#who")).to_have_text("no model")
    page.get_by_role("button", name="Wake llama").click()
    expect(phase(page, "llama")).to_have_text("awake")
    expect(page.locator("#hooks")).to_contain_text("secret")
    assert page.evaluate("Object.values(sessionStorage)") == ["root"]
    assert "root" not in page.content()
    page.reload()
    live(page)
    other = visit(stage)  # another tab has to ask again
    expect(other.get_by_role("dialog")).to_be_visible()


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
    expect(page.locator("#decisions")).to_contain_text(f"llama → {NASTY}")
    expect(page.locator("#hooks-of option")).to_have_count(4)
    page.get_by_role("tab", name="Logs").click()
    page.locator("#hooks-of").select_option("flux")
    expect(page.locator("#hooks")).not_to_contain_text(SHOUT)
    expect(page.locator("#hooks .hook_output .text")).to_have_text("CUDA error: out of memory")
    expect(row(page, "flux").locator(".error")).to_contain_text("CUDA error")
    expect(page.locator(".lane[data-model=flux] .failure")).not_to_have_count(0)


def test_axe_finds_nothing_serious_and_nothing_is_too_wide(stage, visit):
    page = visit(stage)
    page.emulate_media(reduced_motion="reduce")
    expect(page.locator("#who")).to_have_text(NASTY)
    page.locator("#table summary").click()
    expect(page.locator("#table tbody tr")).not_to_have_count(0)
    page.get_by_role("tab", name="Requests").click()
    page.locator("#ended button").first.click()
    expect(page.locator("#ended .story")).to_be_visible()
    page.evaluate(AXE)
    sizes = ((1280, "light"), (820, "dark"), (360, "dark"), (360, "light"))
    for tab, (width, scheme) in itertools.product(("Overview", "Requests", "Usage", "Logs", "Try"), sizes):
        page.get_by_role("tab", name=tab).click()
        page.set_viewport_size({"width": width, "height": 740})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if (width, scheme) in sizes[1::2]:  # half of a second's work; both schemes are seen, and both layouts
            continue
        found = page.evaluate(VIOLATIONS)
        assert not [
            (tab, scheme, width, one["id"], [node["html"] for node in one["nodes"]])
            for one in found
            if one["impact"] in {"serious", "critical"}
        ]
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
        "tab-overview",
        "lend",
        "manual",
        "Wake llama",
        "Sleep llama",
        "Pin llama",
        "Wake flux",
        "Earlier",
        "plot",
        "As a table",
        "decisions",
    ]
    assert [name for name in seen if name in wanted] == wanted  # in this order, and out at the end
    expect(page.locator("[aria-label^='The last '][aria-pressed=true]")).to_have_count(1)  # what there is to see
    minute = page.get_by_role("button", name="The last 1 min")
    minute.focus()
    page.keyboard.press("Enter")
    expect(minute).to_have_attribute("aria-pressed", "true")
    page.locator("#plot").focus()
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
    expect(page.locator(".gpu")).to_contain_text("GiB")  # the last that moves what is below
    expect(page.locator("#decisions li")).not_to_have_count(0)
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


def test_costs_are_a_square_of_few_models_and_a_list_of_many(stage, visit):
    few, many = visit(stage).evaluate("""async () => {
      const { World } = await import("/llmux/ui/world.js")
      const { showCosts } = await import("/llmux/ui/decisions.js")
      const texts = found => [...document.querySelectorAll(`#costs ${found}`)].map(it => it.textContent)
      const shown = count => {
        const world = new World(), names = Array.from({ length: count }, (_, place) => `m${place}`)
        const models = Object.fromEntries(names.map(name => [name, { phase: "asleep" }]))
        const costs = names.map((to, place) => (
          { from: names[place - 1] ?? null, to, seconds: 1 + place, samples: 1 + place % 2 }))
        world.apply("status", { time: 100, models, decisions: [], switch_costs: costs })
        showCosts(world)
        return ["thead th", "tbody th", "td b"].map(texts)
      }
      return [shown(3), shown(9)]
    }""")
    assert few == [["m0", "m1", "m2"], ["no model", "m0", "m1"], ["1.0 s", "2.0 s", "3.0 s"]]
    heads, rows, costs = many
    assert heads == []
    # The most frequent first, then the dearest.
    assert rows == [f"m{place - 1} → m{place}" for place in (7, 5, 3, 1, 8, 6, 4, 2)] + ["no model → m0"]
    assert costs == [f"{1 + place}.0 s" for place in (7, 5, 3, 1, 8, 6, 4, 2, 0)]


def test_a_faulted_model_says_what_to_do(visit, stage):
    facts = visit(stage).evaluate("""async () => {
      const { World } = await import("/llmux/ui/world.js")
      const { showHolder } = await import("/llmux/ui/holder.js")
      const world = new World()
      const models = { a: { phase: "faulted", in_flight: 0, queued: 0 } }
      world.apply("status", { time: 100, ready: true, awake: [], models, decisions: [], switch_costs: [] })
      showHolder(world)
      return document.querySelector("#who-facts").textContent
    }""")
    assert "a is faulted: it may still hold the GPU" in facts
    assert "then press Reset" in facts


def test_a_newcomer_is_told_what_to_do_and_what_is_empty_is_not_there(make_stage, visit):
    stage = make_stage({"llama": {"aliases": ["gpt"]}, "qwen": {}})
    page = visit(stage, url=stage.url)
    expect(page.locator("#start-command")).to_contain_text(f"curl {stage.url}/v1/chat/completions ")
    expect(page.locator("#start-command")).to_contain_text('"model":"llama"')
    expect(page.locator("#calm")).to_have_text(re.compile(r"^No model has been awake since \d\d:\d\d\.$"))
    expect(page.locator("#models thead .of-memory")).to_be_hidden()
    for gone in ("#plot", "#legend", "#of-decisions", "#of-costs", "#models .of-error >> nth=0", "#memory"):
        expect(page.locator(gone)).to_be_hidden()
    expect(row(page, "llama").locator("th")).to_have_text("llama(gpt)")
    page.get_by_role("link", name="try a model on this page").click()
    expect(page.get_by_role("tab", name="Try")).to_have_attribute("aria-selected", "true")
    page.locator("#try-model").select_option("qwen")
    page.locator("#try-prompt").fill("one two three")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#try-answer")).to_have_text("one two three")
    expect(page.locator("#try-figures")).to_have_text(
        re.compile(r"^waited\d.* m?sfirst token.*stokens7 → 3tokens/s\d")
    )
    page.go_back()
    expect(page.locator("#who")).to_have_text("qwen")
    for there in ("#plot", "#legend", "#of-decisions", "#of-costs"):
        expect(page.locator(there)).to_be_visible()
    expect(page.locator("#start")).to_be_hidden()
    page.get_by_role("tab", name="Requests").click()
    cells = page.locator("#ended tbody tr").first.locator("td")
    expect(cells.nth(1)).to_have_text("qwen")
    expect(cells.nth(3)).to_have_text("200")
    expect(cells.nth(7)).to_have_text("7 → 3")
    expect(cells.nth(2)).to_be_hidden()  # without keys there is no column for them
    expect(cells.nth(9)).to_be_hidden()
    cells.nth(0).get_by_role("button").click()
    story = page.locator("#ended .story")
    expect(story.locator(".text").first).to_have_text("arrived, for qwen")
    expect(story.locator(".text").last).to_have_text(re.compile("^200, the end of the answer, .* after it came$"))
    expect(story.locator("dd").first).to_have_text(re.compile("^try-"))


def test_the_address_alone_leads_to_the_page(stage, visit):
    page = visit(stage)
    page.goto(stage.url)
    live(page)
    assert page.url == f"{stage.url}/llmux/ui"


def test_who_waits_is_told_and_a_prompt_that_waits_knows_its_place(make_stage, visit):
    stage = make_stage(
        {"llama": {}, "qwen": {"wake": f"{held('go')}; touch up.1"}, "flux": {"wake": "echo CUDA error; exit 1"}}
    )
    page = visit(stage)
    stage.ask("qwen")
    page.get_by_role("tab", name="Requests").click()
    expect(page.locator("#waiting tbody tr")).to_have_count(1)
    expect(page.locator("#waiting tbody tr td").nth(2)).to_have_text("1")
    page.get_by_role("tab", name="Requests").press("ArrowLeft")
    expect(page.get_by_role("tab", name="Overview")).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Try")).to_be_focused()
    page.locator("#try-model").select_option("qwen")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#try-state")).to_contain_text("position 2 of 2, about")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#try-state")).to_contain_text("Stopped after")
    wait_until(lambda: stage.status()["models"]["qwen"]["queued"] == 1, what="llmux to notice")
    stage.release("go")
    wait_until(lambda: stage.status()["awake"] == ["qwen"], what="qwen")
    page.locator("#try-model").select_option("flux")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#try-state")).to_have_text(re.compile(r"^Failed after .*: 503: .*Again in .*\.$"))
    page.get_by_role("tab", name="Requests").click()
    expect(page.locator("#ended [data-kind=failed] .status")).to_have_text(["503 wake failed", "499 client left"])
    page.locator("#requests-of").select_option("qwen")
    expect(page.locator("#ended tbody tr")).to_have_count(2)
    page.locator("#requests-of").select_option("flux")
    expect(page.locator("#ended tbody tr")).to_have_count(1)
    page.locator("#ended button").click()
    expect(page.locator("#ended .moments")).to_contain_text(
        re.compile(r"flux at \d\d:\d\d:\d\d: wake exited with 1: CUDA error")
    )


def test_what_models_take_is_drawn_and_what_a_pin_excludes_is_told_until_when(make_stage, visit):
    sizes = {"llama": {"memory": "18GiB"}, "qwen": {"memory": "4GiB"}, "flux": {"memory": "12GiB"}}
    stage = make_stage(
        {name: {"shared_address": False, "upstream_model": name, **it} for name, it in sizes.items()},
        capacity="24GiB",
    )
    page = visit(stage)
    stage.command("models/llama/pin", {"for": "1h"})
    bar = page.get_by_role("meter", name="memory of the models on the GPU")
    expect(bar).to_have_attribute("aria-valuetext", "18.0 of 24.0 GiB")
    expect(row(page, "qwen").locator("[data-label=memory]")).to_have_text("4.0 GiB")
    refused = row(page, "flux").locator(".refused")
    expect(refused).to_have_text(re.compile(r"^refused until \d\d:\d\d:\d\d: llama pinned$"))
    expect(row(page, "qwen").locator(".refused")).to_be_empty()
    expect(phase(page, "llama")).to_contain_text("awake")  # a switch that is under way lets no other begin
    page.get_by_role("button", name="Wake qwen").click()
    expect(bar).to_have_attribute("aria-valuetext", "22.0 of 24.0 GiB")


def test_decisions_stand_in_their_order_and_a_failed_wake_looks_failed(stage, visit):
    page = visit(stage)
    decisions = page.locator("#decisions li")
    expect(page.locator("#decisions")).to_contain_text("wakes llama")
    page.wait_for_function("document.querySelectorAll('#decisions li').length >= 3")
    ids = decisions.evaluate_all("all => all.map(it => Number(it.dataset.id))")
    assert ids == sorted(ids, reverse=True)
    seen = page.evaluate("""async () => {
      const { World } = await import("/llmux/ui/world.js")
      const { showDecisions } = await import("/llmux/ui/decisions.js")
      const world = new World()
      const one = id => ({ id, time: id, last: id, times: 1, kind: "stay", by: "policy", reason: `${id}` })
      const status = { time: 100, models: {}, decisions: [one(901), one(902)], switch_costs: [] }
      world.apply("status", status)
      showDecisions(world)
      const history = { now: 100, begins: 90, notes: [], output: [], moves: [] }
      world.load(history, [899, 900, 901, 902].map(one))
      showDecisions(world)
      return [...document.querySelectorAll("#decisions li")].map(it => it.dataset.id)
    }""")
    assert seen[:4] == ["902", "901", "900", "899"]
    failed = page.locator(".lane[data-model=flux] rect[data-failed]")
    expect(failed).not_to_have_count(0)
    expect(failed.first).to_have_attribute("data-phase", "waking")
    expect(page.locator(".lane[data-model=llama] rect[data-failed]")).to_have_count(0)


def test_a_model_that_a_reload_adds_was_not_there_before(make_stage, visit):
    stage = make_stage({"llama": {}})
    page = visit(stage)
    page.get_by_role("button", name="Wake llama").click()
    expect(phase(page, "llama")).to_have_text("awake")
    began = time.monotonic()
    file = stage.folder / "config.json"
    config = json.loads(file.read_text())
    config["models"]["added"] = {
        **config["models"]["llama"],
        "wake": "touch up.9",
        "sleep": "rm -f up.9",
        "alive": "test -e up.9",
    }
    wait_until(lambda: time.monotonic() - began > 3, what="a stretch that is wide enough to see")
    file.write_text(json.dumps(config))
    stage.process.send_signal(signal.SIGHUP)
    late = visit(stage)
    for one in (page, late):
        expect(phase(one, "added")).to_have_text("asleep")
        one.get_by_role("button", name="Zoom in").click()
        expect(one.locator(".lane[data-model=added]")).to_have_count(1)
        unknown = one.locator(".lane[data-model=added] rect[data-phase=unknown]")
        assert all(width < 20 for width in unknown.evaluate_all("all => all.map(it => it.width.baseVal.value)"))

"""The last requests and what keys used, on the page: told truly, live, and never as markup."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing

import pytest
from playwright.sync_api import expect

from llmux.accounts.ledger_file import Row, Store
from llmux.config.accounts import HOUSE
from tests.engine.real import wait_until
from tests.harness.waiting import PATIENCE
from tests.ui.stage import Stage, held
from tests.ui.test_page import AXE, VIOLATIONS, live

NASTY = "<script>window.hacked=4</script>"
KEYS = [{"name": name, "key": f"key-of-{name}"} for name in ("alice", "bob")] + [
    {"name": NASTY, "key": "key-of-n"}
]
PRICES = {"currency": "eur", "gpu_hour": 360000}
DAY = 86_400_000  # milliseconds
LONG = "x" * 120
NONE = "\N{EN DASH}"


def rows_of(page):
    return page.locator("#ended tbody tr:not(.below)")


def opened(page, text):
    """Open the details of the first request with this text; return them."""
    rows_of(page).filter(has_text=text).first.locator("button").click()
    return page.locator("#ended .story")


def test_a_request_tells_what_it_waited_for(make_stage, visit):
    stage = make_stage(
        {
            "llama": {"sleep": f"{held('asleep')}; rm -f up.0"},
            "qwen": {"aliases": ["gpt"], "wake": f"{held('awake')}; touch up.1", "max_in_flight": 1},
        },
        ledger="ledger.db",
        prices=PRICES,
        api_keys=KEYS,
        admin_key="root",
    )
    page = visit(stage)
    page.get_by_role("textbox", name="Key").fill("root")
    page.get_by_role("button", name="Use it").click()
    live(page)
    page.get_by_role("tab", name="Requests").click()
    stage.ask("llama", "key-of-alice", hold=True)
    stage.in_flight("llama")
    stage.ask("qwen", "key-of-bob", "first")
    wait_until(lambda: stage.status()["models"]["qwen"]["queued"] == 1, what="the first")
    stage.ask("gpt", "key-of-n", "second")
    # What waits is told with its key.
    waits = page.locator("#waiting tbody tr")
    expect(waits).to_have_count(2)
    expect(waits.filter(has_text="second").locator(".key")).to_have_text(NASTY)
    wait_until(lambda: stage.status()["models"]["llama"]["phase"] == "draining", what="the drain")
    time.sleep(0.05)  # longer than what is not worth a word
    stage.engine.go.set()
    wait_until(lambda: stage.status()["models"]["llama"]["phase"] == "sleeping", what="the sleep")
    time.sleep(0.05)
    stage.release("asleep")
    wait_until(lambda: stage.status()["models"]["qwen"]["phase"] == "waking", what="the wake")
    time.sleep(0.05)
    stage.release("awake")
    expect(rows_of(page)).to_have_count(3)  # without a look at the page again
    row = rows_of(page).filter(has_text="as gpt")
    expect(row.locator(".key")).to_have_text(NASTY)
    expect(row.locator(".cost")).to_have_text(re.compile(r"^€\d"))  # a moment later than the rest
    story = opened(page, "as gpt")
    words = story.locator(".moments")
    expect(words).to_contain_text("arrived, for qwen under the name gpt; 1 request for qwen waited before it")
    expect(words).to_contain_text("decided before it came: llama → qwen: 1 waiting")
    took = r"\d[\d.]* m?s"
    steps = f"drain {took}, sleep {took}, wake {took}"
    expect(words).to_contain_text(re.compile(rf"waited {took} for the switch llama → qwen \({steps}\)"))
    expect(words).to_contain_text(
        re.compile(rf"its turn after {took} \({steps}(, for a place {took})?\): sent to qwen")
    )
    expect(words.locator("li").last).to_contain_text("200, the end of the answer")
    for name, value in (("request id", "second"), ("key", NASTY), ("its share of the GPU", "s"), ("cost", "€")):
        expect(story.locator(f"dt:text-is('{name}') + dd")).to_contain_text(value)
    expect(story.locator(".parts i.draining, .parts i.sleeping, .parts i.waking")).to_have_count(3)
    # The keyboard opens and closes it, and others.
    button = row.locator("button")
    expect(button).to_have_attribute("aria-expanded", "true")
    button.press("Enter")
    expect(story).to_have_count(0)
    button.press("Space")
    expect(story).to_have_count(1)
    page.locator("#requests-by").select_option("alice")
    expect(rows_of(page)).to_have_count(1)
    page.locator("#requests-of").select_option("qwen")
    expect(page.locator("#no-requests")).to_have_text("None of these has ended lately.")
    page.locator("#requests-by").select_option("all keys")
    expect(rows_of(page)).to_have_count(2)


def test_a_request_for_a_virtual_model_tells_why_it_was_this_one(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {}}, virtual={NASTY: {"awake": ["llama", "qwen"]}})
    stage.ask("qwen").join(PATIENCE)
    stage.ask(NASTY).join(PATIENCE)
    page = visit(stage)
    page.get_by_role("tab", name="Requests").click()
    expect(rows_of(page).first).to_contain_text(f"qwenas {NASTY}")
    story = opened(page, NASTY)
    expect(story.locator(".moments")).to_contain_text(f"chosen for {NASTY}: qwen (awake)")


def test_a_request_that_waits_can_be_cancelled(make_stage, visit):
    stage = make_stage({"llama": {"wake": f"{held('go')}; touch up.0"}})
    page = visit(stage)
    client = stage.ask("llama", request_id="long/one")
    stage.ask("llama", request_id="other")
    page.get_by_role("tab", name="Requests").click()
    page.get_by_role("button", name="Cancel request long/one").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The request long/one for llama is answered with 410 at once.")
    dialog.get_by_role("button", name="Leave it").click()
    expect(page.locator("#waiting tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Cancel request long/one").click()
    dialog.get_by_role("button", name="Cancel it").click()
    expect(page.locator("#answer")).to_have_text("Request long/one is cancelled.")
    expect(page.locator("#waiting tbody tr")).to_have_count(1)
    expect(rows_of(page).locator(".status")).to_have_text("410 cancelled")
    client.join(PATIENCE)
    stage.release("go")


def test_what_a_drain_waits_for_is_told_and_can_be_cancelled(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {}})
    page = visit(stage)
    stage.ask("llama", request_id="endless", hold=True)
    stage.in_flight("llama")
    page.get_by_role("tab", name="Requests").click()
    expect(page.locator("#of-serving")).to_be_hidden()
    stage.ask("qwen", request_id="next")
    row = page.locator("#serving tbody tr")
    expect(row).to_have_count(1)
    expect(row.locator("[data-label=answer]")).to_have_text("has begun")
    expect(page.locator("#who-facts")).to_contain_text(re.compile(r"waits for endless, in flight for \d\S* m?s"))
    page.get_by_role("button", name="Cancel request endless").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The request endless for llama ends in the middle of its answer.")
    dialog.get_by_role("button", name="Cancel it").click()
    expect(rows_of(page)).to_have_count(2)
    expect(page.locator("#of-serving")).to_be_hidden()
    expect(rows_of(page).filter(has_text="qwen").locator(".status")).to_have_text("200")


def test_the_older_ones_are_there_too_and_another_llmux_begins_anew(make_stage, visit):
    stage = make_stage({"llama": {}, "qwen": {}})
    for _ in range(250):
        stage.ask("llama").join(PATIENCE)
    page = visit(stage)
    page.get_by_role("tab", name="Requests").click()
    expect(rows_of(page)).to_have_count(200)
    # A burst of more than are shown, also of such as ended a moment ago: no more is asked for than is shown.
    asked = []
    page.on("request", lambda it: asked.append(it.url))
    for _ in range(20):
        stage.ask("qwen").join(PATIENCE)
    expect(rows_of(page).filter(has_text="qwen")).to_have_count(20)
    expect(rows_of(page)).to_have_count(200)
    assert asked
    assert all("limit=200&" in url for url in asked)
    page.get_by_role("button", name="Older ones").click()
    expect(rows_of(page)).to_have_count(270)
    expect(page.get_by_role("button", name="Older ones")).to_be_hidden()
    stage.ask("qwen").join(PATIENCE)
    expect(rows_of(page).first).to_contain_text("qwen")
    stage.stop()
    expect(page.locator("#link-text")).to_have_text("connection lost")
    stage.start()
    live(page)
    stage.ask("qwen").join(PATIENCE)  # its number is lower than any that the page has seen
    expect(rows_of(page)).to_have_count(1)


def test_what_is_no_longer_in_memory_is_in_the_ledger(make_stage, visit):
    # Each switch takes longer than what is not worth a word.
    slow = {"wake": "sleep 0.05; touch up.0"}
    stage = make_stage({"llama": slow, "qwen": {}}, ledger="ledger.db")
    for model in ("llama", "llama", "qwen", "llama"):
        stage.ask(model, messages=[{"role": "user", "content": "one two"}]).join(PATIENCE)
    page = visit(stage)
    page.get_by_role("tab", name="Requests").click()
    expect(rows_of(page)).to_have_count(4)
    expect(page.locator("#older")).to_be_hidden()  # the ledger has the same, and no more
    stage.stop()
    expect(page.locator("#link-text")).to_have_text("connection lost")
    stage.start()
    live(page)
    expect(page.locator("#no-requests")).to_have_text("No request has ended yet.")
    older = page.get_by_role("button", name="Older ones, out of the ledger")
    older.click()
    expect(rows_of(page)).to_have_count(4)
    expect(older).to_be_hidden()
    stage.ask("qwen").join(PATIENCE)
    expect(rows_of(page)).to_have_count(5)
    assert [it.split()[0] for it in rows_of(page).locator(".subject").all_inner_texts()] == [
        "qwen", "llama", "qwen", "llama", "llama",
    ]  # fmt: skip
    story = opened(page, "llama")
    expect(story.locator(".moments")).to_contain_text("for the switch qwen → llama")  # this page has seen it
    page.reload()
    expect(rows_of(page)).to_have_count(1)
    older.click()
    expect(rows_of(page)).to_have_count(5)
    opened(page, "llama")
    expect(story.locator(".moments")).to_contain_text("sent to llama")
    expect(story).to_contain_text("What the models did then is no longer known")
    expect(story.locator("dt:text-is('read') + dd")).to_have_text("7 tokens")
    page.locator("#requests-of").select_option("qwen")
    expect(rows_of(page)).to_have_count(1)
    older.click()
    expect(rows_of(page)).to_have_count(2)


WORLD = """async () => {
  const { World } = await import("/llmux/ui/world.js")
  const { story } = await import("/llmux/ui/request.js")
  const world = new World()
  const models = { a: { phase: "awake", streamed: 0 }, b: { phase: "asleep", streamed: 0 } }
  world.apply("status", { time: 1000, models, decisions: [], switch_costs: [] })
  const move = (id, time, model, from, to) => ({ id, time, model, from, to })
  world.load({
    now: 1000, begins: 900, output: [],
    notes: [
      { event: "lease_set", time: 910, leased: true }, { event: "lease_set", time: 920, leased: false },
      { event: "switch_started", switch: 1, time: 920, from: "idle", to: "a" },
      { event: "switch_ended", switch: 1, time: 922 },
      { event: "pin_set", model: "b", pinned: true, time: 940, reason: "a demo" },
      { event: "pin_set", model: "c", pinned: true, time: 941 },
      { event: "pin_set", model: "c", pinned: false, time: 942 },
      { event: "model_faulted", model: "c", error: "its sleep failed", time: 943 },
    ],
    moves: [
      move(1, 900, "a", "unknown", "asleep"), move(2, 900, "b", "unknown", "asleep"),
      move(3, 920, "a", "asleep", "waking"), move(4, 922, "a", "waking", "awake"),
    ],
  }, [])
  const told = change => {
    const one = {
      id: 5, time: 915, asked: "a", model: "a", status: 200, waited: 10, first_byte: 11, duration: 15, error: null,
      input_tokens: null, output_tokens: null, ...change,
    }
    const { parts, lines, known } = story(one, world)
    return [parts.map(part => [part.kind, part.from, part.to]), lines.map(line => line.text), known]
  }
  return [
    told({}), told({ time: 800 }),
    told({ model: null, status: 404, error: "model_not_found", waited: 0, first_byte: 1, duration: 1 }),
    told({ status: 503, error: "wake_failed", waited: 8, first_byte: 8, duration: 8 }),
    told({ status: 499, first_byte: null, duration: 10 }),
    told({ time: 930, waited: 0, first_byte: .5, duration: 2, error: "engine_broke_off" }),
    ...["leased", "pinned", "faulted", "stopping"].map(
      error => told({ time: 950, waited: 0, first_byte: 0, duration: 0, status: 503, error })),
  ]
}"""


def test_what_it_waited_for_moment_by_moment(make_stage, visit):
    page = visit(make_stage({"a": {}}))
    whole, before, unknown, failed, left, broken, *refused = page.evaluate(WORLD)
    assert whole[0] == [
        ["lent", 915, 920],
        ["waking", 920, 922],
        ["place", 922, 925],
        ["reading", 925, 926],
        ["answering", 926, 930],
    ]
    assert whole[1] == [
        "arrived, for a",
        "waited 5.0 s while the GPU was lent to another job",
        "waited 2.0 s for a to wake",
        "waited 3.0 s for a place at its engine",
        "its turn after 10 s (wake 2.0 s, for a place 3.0 s, lent 5.0 s): sent to a",
        "first byte of the answer, 1.0 s after that",
        "200, the end of the answer, 15 s after it came",
    ]
    assert (whole[2], before[2]) == (True, False)
    assert unknown[:2] == [
        [],
        [
            "arrived; it named no model that is configured",
            "404 model not found, 1.0 s after it came",
        ],
    ]
    assert failed[1][-1] == "503 wake failed, 8.0 s after it came"
    assert not any("sent to" in line for line in failed[1])
    assert left[1][-1] == "its client left, 10 s after it came"
    assert not any("sent to" in line for line in left[1])
    assert broken[1] == [
        "arrived, for a",
        "no wait: sent to a",
        "first byte of the answer, 0.5 s after that",
        "200 engine broke off, 2.0 s after it came",
    ]
    clock = r"at \d\d:\d\d:\d\d"
    causes = [lines[1] for _, lines, _ in refused]
    assert re.fullmatch(f"the GPU was lent to another job {clock}", causes[0])
    assert re.fullmatch(rf"b was pinned {clock} \(a demo\)", causes[1])
    assert re.fullmatch(f"c {clock}: its sleep failed", causes[2])
    assert causes[3] == "503 stopping, 0 ms after it came"


def filled(path, keys, models, days):
    """Write a ledger of the last days: of key number i for model number j it has i + j + 1 requests a day."""
    store, now = Store(path), round(time.time() * 1000)
    for day in range(days):
        then = now - day * DAY
        rows = [
            Row(
                then, "x", key, model, model, model, 1000, 0, 200, 0, 0, 10_000 * (i + 1), "eur", None, 500, 900,
                2_000_000, 1_000_000 * (i + 1), None, None, 200, "",
            )
            for i, key in enumerate(keys)
            for j, model in enumerate(models)
            for _ in range(i + j + 1)
        ]  # fmt: skip
        idle = (0, 0, 10**7, 0, None, None, 0, "", 2)
        rows.append(Row(then, "", HOUSE, "", "", "", 0, 0, 0, 0, 0, 5000, "eur", None, *idle))
        store.write(rows)
    store.close()


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    """One llmux with a ledger of ten days, and names that are nasty or long."""
    folder = tmp_path_factory.mktemp("accounts")
    filled(folder / "ledger.db", ["alice", NASTY, ""], ["llama", NASTY, LONG], 10)
    stage = Stage(folder, {"llama": {}, NASTY: {}, LONG: {}}, ledger="ledger.db", prices=PRICES)
    stage.start()
    yield stage
    stage.close()


def test_charts_of_use_and_cost_by_day(accounts, visit):
    page = visit(accounts)
    page.get_by_role("tab", name="Usage").click()
    legend, columns = page.locator("#usage-legend li"), page.locator("#usage-chart .column")
    # Of the three keys with one, two, three cents a request: 1·1+2·2+3·3 for the first model, and so on.
    expect(page.locator("#usage-title")).to_have_text("Cost by day, UTC")
    expect(legend).to_have_text([
        re.compile(rf"^{LONG} €2.60 "), re.compile(rf"^{re.escape(NASTY)} €2.00 "), re.compile("^llama €1.40 "),
        "no model €0.05 1 %",
    ])  # fmt: skip
    expect(page.locator("#usage-sum")).to_have_text("€6.05")
    expect(columns).to_have_count(31)
    chart = page.locator("#usage-chart")
    chart.focus()
    page.keyboard.press("End")
    readout = page.locator("#usage-readout")
    expect(readout).to_contain_text(re.compile(rf"^\d{{4}}-\d\d-\d\d: €0.61 · {LONG} €0.26, {re.escape(NASTY)} "))
    page.keyboard.press("Home")
    expect(readout).to_have_text(re.compile(r"^\d{4}-\d\d-\d\d: €0.00$"))
    page.locator("#usage-by").select_option("key")
    expect(legend).to_have_text([
        re.compile(f"^{re.escape(NASTY)} €1.80 "), re.compile("^alice €0.60 "), re.compile("^no key €3.60 "),
        re.compile("^house: idle, or operators €0.05 "),
    ])  # fmt: skip
    page.locator("#usage-figure").select_option("requests")
    expect(page.locator("#usage-title")).to_have_text("Requests by day, UTC")
    expect(legend.first).to_have_text(re.compile(f"^{re.escape(NASTY)} 90 "))
    page.locator("#usage-since").select_option("24 hours")
    expect(page.locator("#usage-title")).to_have_text("Requests by hour, UTC")
    expect(legend.first).to_have_text(re.compile(f"^{re.escape(NASTY)} (9|18) "))


def test_the_axis_says_small_amounts_exactly(accounts, visit):
    page = visit(accounts)
    said = """[0, .005, .01, .015].map(one => format.amount(one, "eur", .005)).join(" ")"""
    assert page.evaluate(f'import("/llmux/ui/format.js").then(format => {said})') == "€0.00 €0.005 €0.01 €0.015"


def test_which_keys_cause_switches_and_what_each_used(accounts, visit):
    page = visit(accounts)
    page.get_by_role("tab", name="Usage").click()
    causers = page.locator("#causers tbody tr")
    expect(causers).to_have_count(3)  # and not the house
    expect(causers.first.locator("td")).to_have_text(["no key", "6 min 00 s", "60 %", "60 %", LONG])
    expect(causers.last.locator("td")).to_have_text(["alice", "60 s", "10 %", "33 %", LONG])
    uses = page.locator("#uses tbody tr")
    expect(uses).to_have_count(10)
    expect(uses.first.locator("td")).to_have_text(
        ["no key", LONG, "50", NONE, "50K", "10K", "0.5 s", "4 min 10 s", "€1.50"]
    )
    expect(uses.filter(has_text="house").locator("td")).to_contain_text(["house", "no model", "0", NONE])


def test_it_fits_and_axe_finds_nothing_serious(accounts, visit):
    page = visit(accounts)
    page.get_by_role("tab", name="Usage").click()
    expect(page.locator("#uses tbody tr")).to_have_count(10)
    page.evaluate(AXE)
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "dark"), (360, "light")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#usage-chart svg").bounding_box()["width"] <= width
        if (width, scheme) not in {(1280, "light"), (390, "dark")}:  # both layouts and both schemes are seen
            continue
        found = page.evaluate(VIOLATIONS)
        serious = [one for one in found if one["impact"] in {"serious", "critical"}]
        assert not [(width, one["id"], [node["html"] for node in one["nodes"]]) for one in serious]


def test_without_a_ledger_it_says_how_to_have_one(make_stage, visit):
    stage = make_stage({"llama": {}})
    page = visit(stage)
    page.get_by_role("tab", name="Usage").click()
    expect(page.locator("#no-ledger")).to_contain_text("ledger: true")
    for gone in ("#of-usage", "#of-causers", "#of-uses", "#usage-error"):
        expect(page.locator(gone)).to_be_hidden()
    stage.ask("llama").join(PATIENCE)
    page.get_by_role("tab", name="Requests").click()
    expect(rows_of(page)).to_have_count(1)


def test_a_ledger_that_cannot_be_read_is_said(make_stage, visit):
    stage = make_stage({"llama": {}}, ledger="ledger.db")
    page = visit(stage)
    stage.ask("llama").join(PATIENCE)
    page.get_by_role("tab", name="Usage").click()
    expect(page.locator("#uses tbody tr")).to_have_count(1)
    expect(page.locator("#uses .cost").first).to_be_hidden()  # there are no prices
    expect(page.locator("#usage-title")).to_have_text("Tokens by day, UTC")
    with closing(sqlite3.connect(stage.folder / "ledger.db")) as ledger:
        ledger.execute("DROP TABLE days")
    page.locator("#usage-by").select_option("key")
    expect(page.locator("#usage-error")).to_contain_text("no such table: days")
    expect(page.locator("#uses tbody tr")).to_have_count(1)  # what was known stays


def test_a_page_that_is_only_open_asks_for_nothing_and_a_hidden_one_draws_nothing(make_stage, visit):
    stage = make_stage({"llama": {}})
    page = visit(stage)
    live(page)
    stage.ask("llama").join(PATIENCE)
    expect(page.locator("#who")).to_have_text("llama")
    expect(page.locator("#gpus")).not_to_be_empty()
    asked = []
    page.on("request", lambda it: asked.append(it.url))
    page.evaluate("""() => {
      window.beats = 0
      new MutationObserver(() => { window.beats++ }).observe(document.getElementById("facts"), { childList: true })
    }""")
    wait_until(lambda: page.evaluate("window.beats") >= 3, what="three changes of the uptime")
    assert not asked
    page.evaluate("""() => {
      Object.defineProperty(document, "hidden", { value: true, configurable: true })
      window.changes = 0
      const all = { childList: true, characterData: true, attributes: true, subtree: true }
      new MutationObserver(() => { window.changes++ }).observe(document.querySelector("main"), all)
    }""")
    stage.command("models/llama/sleep", {})
    wait_until(lambda: page.title() == "no model · llmux", what="the title")
    expect(page.locator("#who")).to_have_text("llama")
    assert page.evaluate("window.changes") == 0
    page.evaluate("""() => {
      Object.defineProperty(document, "hidden", { value: false, configurable: true })
      document.dispatchEvent(new Event("visibilitychange"))
    }""")
    expect(page.locator("#who")).to_have_text("no model")

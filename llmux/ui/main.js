// The page, put together: events in, everything shown anew at most sixty times a second, and nothing while it is hidden.

import { address, askForKey, read } from "./api.js"
import { showCosts, showDecisions } from "./decisions.js"
import { at, say } from "./dom.js"
import { clock, duration } from "./format.js"
import { showGpus, showHolder, showSums, showTitle, summary } from "./holder.js"
import { showHooks } from "./hooks.js"
import { showModels } from "./models.js"
import { forget, refresh, showRequests } from "./requests.js"
import { settle } from "./palette.js"
import { Stream } from "./stream.js"
import * as tabs from "./tabs.js"
import { Timeline } from "./timeline.js"
import { begin as beginTry, showTry } from "./try.js"
import { showUsage } from "./usage.js"
import { World } from "./world.js"

const world = new World()
const timeline = new Timeline(world)
const stream = new Stream("events?every=1s", told, changed)
let due = false
let fresh = false // the history of this connection has been asked for

function soon() {
  if (due) return
  due = true
  // Not at the next frame: there is none in a tab that is hidden, and its title tells, too.
  setTimeout(() => {
    due = false
    if (!world.status) return
    settle(Object.keys(world.status.models))
    showTitle(world)
    if (document.hidden) return // the title is all that is seen
    for (const show of [showHolder, showSums, showGpus, showModels, showDecisions, showCosts, showHooks, showRequests, showUsage, showTry, showStart]) show(world)
    timeline.show()
    header()
    announce()
  }, 16)
}

function told(name, data) {
  world.apply(name, data)
  if (name === "status" && !fresh) {
    fresh = true
    load()
  }
  soon()
}

async function load() {
  try {
    const [history, decisions] = await Promise.all([read("history"), read("decisions")])
    world.load(history, decisions.decisions)
    soon()
  } catch {
    // When the connection is lost, too, the next one asks again.
    setTimeout(() => fresh && load(), 2000)
  }
}

// What a newcomer does next, until there has been anything to see.
function showStart({ status, moves, decisions, begins }) {
  const [model] = Object.keys(status.models)
  const quiet = moves.every(move => move.from === "unknown" && move.to === "asleep") && !decisions.length
    && Object.values(status.models).every(one => one.phase === "asleep" && !one.queued)
  at("start").hidden = begins === null || !quiet || status.switch !== null || model === undefined
  const body = JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] }).replaceAll("'", "'\\''")
  say(at("start-command"), `curl ${address("../v1/chat/completions")} \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`)
}

// ---- the connection

let locked = false

function changed(state, why) {
  if (state === "live") {
    if (world.link === "live") return
    locked = false
    tell(world.link === "lost" ? "Connected again." : "")
  } else {
    if (world.link === "live") {
      world.lostAt = world.seen
      document.title = "connection lost · llmux"
      tell("The connection to llmux is lost.")
    }
    fresh = false
    world.connecting()
    forget()
  }
  world.link = state
  document.body.dataset.link = state
  say(at("link-text"), { live: "live", lost: "connection lost", locked: "a key is needed" }[state])
  banner(why)
  if (state === "locked" && !locked) {
    locked = true
    unlock()
  }
}

async function unlock() {
  if (await askForKey("This llmux shows its state only with one of its keys.", true)) stream.again()
}

function banner(why) {
  const box = at("banner")
  box.hidden = world.link === "live" || world.link === "connecting"
  if (world.link === "locked") say(box, "llmux wants a key before it tells anything: use the button “Key…”.")
  else if (world.link === "lost") {
    say(box, world.seen ? `Connection lost; what you see is as of ${clock(world.seen)}. Trying again.` : "llmux cannot be reached. Trying again.")
    box.title = why ?? ""
  }
}

// ---- words

function header() {
  const { status } = world
  const shadows = status.shadows?.length ? `, shadows ${status.shadows.map(one => one.policy).join(", ")}` : ""
  const auto = status.policy.auto
  say(at("facts"), `${status.version} · policy ${status.policy.use}${auto ? ` (${auto.chosen} decides)` : ""}${shadows} · up ${duration(status.uptime)}${status.reload_error ? " · the configuration has an error" : ""}`)
  at("facts").title = status.reload_error ?? auto?.error ?? auto?.last?.reason ?? ""
}

const QUIET = 2000 // ms at least between two announcements
let holding = null
let announced = -Infinity

// For a screen reader: only what changes the picture, and not too often.
function announce() {
  const { status } = world
  if (status.switch || performance.now() - announced < QUIET) return
  const now = summary(status)
  if (holding !== null && now !== holding) {
    announced = performance.now()
    tell(now)
  }
  holding = now
}

function tell(text) {
  say(at("told"), text)
}

at("key").addEventListener("click", async () => {
  if (await askForKey("The admin key operates llmux; one of the API keys lets you look on.")) stream.again()
})
addEventListener("llmux-key", () => stream.again())
document.addEventListener("visibilitychange", soon)
beginTry()
tabs.begin(name => {
  soon()
  if (name === "requests" && world.link === "live") refresh(true)
})
stream.run()

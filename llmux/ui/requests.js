// The requests: those that wait, from the status; those that have ended, asked for while they are looked at.

import { read } from "./api.js"
import { at, make, mark, only, say } from "./dom.js"
import { choose, clock, duration, rate } from "./format.js"
import { shape } from "./palette.js"
import { tab } from "./tabs.js"

const EVERY = 2000 // ms
let asked = -Infinity
let asking = false
let known = []
let drawn = ""

const named = model => make("span", { class: "model" }, shape(model), make("bdi", {}, model))

export function showRequests(world) {
  choose(at("requests-of"), Object.keys(world.status.models), () => refresh(true))
  if (tab !== "requests") return
  waiting(world)
  if (world.link === "live") refresh()
}

export async function refresh(now = false) {
  if (asking || (!now && performance.now() - asked < EVERY)) return
  asking = true
  asked = performance.now()
  const model = at("requests-of").value
  try {
    known = (await read(`activity?limit=200${model ? `&model=${encodeURIComponent(model)}` : ""}`)).requests
    ended()
  } catch {
    // The stream says that the connection is lost; the next turn asks again.
  } finally {
    asking = false
    if (at("requests-of").value !== model) refresh(true)
  }
}

function waiting(world) {
  const rows = Object.entries(world.status.models).flatMap(([model, it]) => it.waiting.map(one => ({ model, ...one })))
  rows.sort((one, other) => other.waited - one.waited)
  at("of-waiting").hidden = !rows.length
  only(at("waiting").tBodies[0], ...rows.map(one => row([
    [named(one.model), "model", "subject"], [String(one.position), "position", "number"], [duration(one.waited), "waited", "number"],
    [duration(one.expected), "expected still", "number"], [one.request_id ?? "", "request id", "id"],
  ])))
}

function ended() {
  const key = known.map(one => one.id).join()
  at("no-requests").hidden = known.length > 0
  at("ended").hidden = known.length === 0
  if (key === drawn) return
  drawn = key
  only(at("ended").tBodies[0], ...known.map(one => {
    const element = row([
      [clock(one.time), "time", "time"], [one.model === null ? make("span", { class: "sub" }, "none") : named(one.model), "model", "subject"],
      [status(one), "status", "status"], [duration(one.waited), "waited", "number"], [duration(one.first_byte), "first byte", "number"],
      [duration(one.duration), "in all", "number"], [tokens(one), "tokens", "number"], [rate(one.tokens_per_second), "tokens/s", "number"],
      [one.request_id, "request id", "id"],
    ])
    mark(element, "data-kind", one.status >= 400 || one.error ? "failed" : null)
    return element
  }))
}

function row(cells) {
  return make("tr", { role: "row" }, ...cells.map(([content, label, kind]) =>
    make("td", { role: "cell", "data-label": label, class: kind, ...(content === "–" ? { "data-none": "" } : {}) }, content)))
}

function status(one) {
  if (one.status === 499) return "499 client left"
  return one.error ? `${one.status} ${one.error.replaceAll("_", " ")}` : String(one.status)
}

function tokens(one) {
  if (one.input_tokens === null && one.output_tokens === null) return "–"
  return `${one.input_tokens ?? "?"} → ${one.output_tokens ?? "?"}`
}

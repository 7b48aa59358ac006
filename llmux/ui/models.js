// The table of models, with what an operator may do.

import { at, make, mark, say } from "./dom.js"
import { clock, duration, gib, rate } from "./format.js"
import { DEEDS, carryOut, lend, manual, pin, takeBack, unlock } from "./operate.js"
import { shape } from "./palette.js"
import { figure } from "./table.js"

const rows = new Map()
const DONE = { wake: "wakes", sleep: "goes to sleep", unpin: "is no longer pinned", reset: "is reset" }
let world = null

export function showModels(now) {
  world = now
  const { status } = world, table = at("models"), body = table.tBodies[0]
  for (const [name, row] of rows) {
    if (!(name in status.models)) {
      row.element.remove()
      rows.delete(name)
    }
  }
  const models = Object.entries(status.models)
  // Columns of which nothing would be said are not there.
  for (const [name, there] of [["memory", status.memory != null], ["error", models.some(([, model]) => model.last_error)]]) {
    for (const cell of table.querySelectorAll(`.of-${name}`)) cell.hidden = !there
    table.toggleAttribute(`data-${name}`, there)
  }
  for (const [name, model] of models) {
    if (!rows.has(name)) {
      const row = rowOf(name)
      rows.set(name, row)
      body.append(row.element)
    }
    update(rows.get(name), model, world.rate(name))
  }
  tools(status)
}

at("unlock").addEventListener("click", unlock)

function tools(status) {
  at("onlooker").hidden = world.mayRead
  const lent = status.lease != null
  at("lend").disabled = at("manual").disabled = false // As long as nothing is known, nothing can be done.
  say(at("lend"), lent ? "Take the GPU back…" : "Lend the GPU…")
  mark(at("manual"), "aria-pressed", String(status.manual))
  say(at("manual"), status.manual ? "End manual mode…" : "Manual mode…")
}

at("lend").addEventListener("click", event => {
  if (world.status.lease) takeBack(event.currentTarget, world.status.lease)
  else lend(event.currentTarget, world)
})
at("manual").addEventListener("click", event => manual(event.currentTarget, !world.status.manual, world))

function rowOf(name) {
  const cells = {}
  const cell = (key, label, attributes = {}, ...children) =>
    cells[key] = make("td", { role: "cell", "data-label": label, ...attributes }, ...children)
  const button = (deed, word) => make("button", {
    type: "button", "data-deed": deed, "aria-label": `${word} ${name}`, onclick: event => act(event.currentTarget, name),
  }, word)
  const pinning = button("pin", "Pin"), reset = button("reset", "Reset")
  const wake = button("wake", "Wake"), sleep = button("sleep", "Sleep")
  const aliases = make("span", { class: "aliases" })
  const element = make("tr", { role: "row", "data-model": name },
    make("th", { role: "rowheader", scope: "row" }, make("span", { class: "model" }, shape(name), make("bdi", {}, name)), aliases),
    cell("phase", "phase", { class: "phase" }, make("span"), make("span", { class: "terms" }), make("span", { class: "refused" })),
    cell("memory", "memory", { class: "number of-memory" }),
    cell("queued", "queued", { class: "number" }),
    cell("oldest", "oldest", { class: "number" }),
    cell("flight", "in flight", { class: "number" }),
    cell("rate", "tokens/s", { class: "number" }),
    cell("awake", "awake for", { class: "number" }),
    cell("error", "last error", { class: "error of-error" }),
    cell("deeds", "", { class: "deeds" }, wake, sleep, pinning, reset),
  )
  return { element, cells, wake, sleep, pin: pinning, reset, aliases, name }
}

function update(row, model, speed) {
  const { cells, name } = row, [phase, pinned, refused] = cells.phase.children
  mark(row.element, "data-phase", model.phase)
  say(row.aliases, model.aliases?.length ? `(${model.aliases.join(", ")})` : "")
  say(phase, phaseOf(model))
  say(pinned, terms(model))
  say(refused, refusal(name, model))
  mark(cells.phase, "title", model.pinned ? model.pin_reason : model.evicted?.reason)
  figure(cells.memory, typeof model.memory === "number" ? `${gib(model.memory)} GiB` : total(model.memory))
  cells.memory.hidden = world.status.memory == null
  figure(cells.queued, String(model.queued))
  figure(cells.oldest, duration(model.oldest_wait))
  figure(cells.flight, String(model.in_flight))
  figure(cells.rate, rate(model.phase === "awake" || model.phase === "draining" ? speed : null))
  figure(cells.awake, duration(model.awake_for))
  say(cells.error, model.last_error ?? "")
  mark(cells.error, "title", model.last_error)
  cells.error.hidden = !at("models").hasAttribute("data-error")
  mark(row.wake, "aria-disabled", model.phase === "awake" || model.phase === "waking" ? "true" : null)
  mark(row.sleep, "aria-disabled", ["asleep", "deepening", "sleeping"].includes(model.phase) ? "true" : null)
  const word = model.pinned ? "Unpin" : "Pin"
  mark(row.pin, "data-deed", word.toLowerCase())
  mark(row.pin, "aria-label", `${word} ${name}`)
  say(row.pin, model.pinned ? "Unpin" : "Pin…")
  row.reset.hidden = !(model.phase === "faulted" || model.phase === "lost" || model.backoff_until)
}

const total = memory => memory == null ? "–" : `${gib(Object.values(memory).reduce((sum, one) => sum + one, 0))} GiB`

function phaseOf(model) {
  const parts = [model.phase]
  if (model.level) parts.push(`level ${model.level}`)
  if (model.pinned) parts.push("pinned")
  return parts.join(" · ")
}

const terms = model => model.pinned ? [model.pin_expires_in == null ? "" : `${duration(model.pin_expires_in)} left`, model.pin_reason].filter(Boolean).join(", ") : ""

// Until when requests for this model are refused, and why.
function refusal(name, model) {
  if (model.expected_wait !== null) return ""
  const { status } = world
  const end = left => left == null ? "" : ` until ${clock(status.time + left, left < 3600)}`
  if (status.lease?.requests === "reject") return `refused${end(status.lease.expires_in)}: the GPU is lent`
  if (model.backoff_until) return `refused${end(model.backoff_until - status.time)}: backing off`
  const pins = Object.entries(status.models).filter(([other, it]) => other !== name && it.pinned)
  if (pins.length) {
    const lefts = pins.map(([, it]) => it.pin_expires_in)
    return `refused${end(lefts.includes(null) ? null : Math.max(...lefts))}: ${pins.map(([other]) => other).join(", ")} pinned`
  }
  return "refused for now"
}

function act(button, name) {
  if (button.getAttribute("aria-disabled")) return
  const { deed } = button.dataset
  if (deed === "pin") pin(button, name, world)
  else carryOut(button, name, DEEDS[deed](name), answer => `${name} ${answer.switch == null && deed === "wake" ? "is awake" : DONE[deed]}`)
}

// The table of models, with what an operator may do.

import { askForKey, operate } from "./api.js"
import { at, make, mark, say } from "./dom.js"
import { duration, rate } from "./format.js"
import { shape } from "./palette.js"

const SHOWN = 30_000 // ms that an answer stays
const rows = new Map()
let forget
const DEEDS = { wake: "wakes", sleep: "goes to sleep", pin: "is pinned", unpin: "is no longer pinned" }

export function showModels(world) {
  const body = at("models").tBodies[0]
  for (const [name, row] of rows) {
    if (!(name in world.status.models)) {
      row.element.remove()
      rows.delete(name)
    }
  }
  for (const [name, model] of Object.entries(world.status.models)) {
    if (!rows.has(name)) {
      const row = rowOf(name)
      rows.set(name, row)
      body.append(row.element)
    }
    update(rows.get(name), model, world.rate(name))
  }
}

function rowOf(name) {
  const cells = {}
  const cell = (key, label, attributes = {}, ...children) =>
    cells[key] = make("td", { role: "cell", "data-label": label, ...attributes }, ...children)
  const button = (deed, word) => make("button", {
    type: "button", "data-deed": deed, "aria-label": `${word} ${name}`, onclick: event => act(event.currentTarget, name),
  }, word)
  const pin = button("pin", "Pin")
  const wake = button("wake", "Wake"), sleep = button("sleep", "Sleep")
  const element = make("tr", { role: "row", "data-model": name },
    make("th", { role: "rowheader", scope: "row" }, make("span", { class: "model" }, shape(name), make("bdi", {}, name))),
    cell("phase", "phase", { class: "phase" }),
    cell("queued", "queued", { class: "number" }),
    cell("oldest", "oldest", { class: "number" }),
    cell("flight", "in flight", { class: "number" }),
    cell("rate", "tokens/s", { class: "number" }),
    cell("awake", "awake for", { class: "number" }),
    cell("error", "last error", { class: "error" }),
    cell("deeds", "", { class: "deeds" }, wake, sleep, pin),
  )
  return { element, cells, wake, sleep, pin, name }
}

function update(row, model, speed) {
  const { cells, name } = row
  mark(row.element, "data-phase", model.phase)
  say(cells.phase, phase(model))
  mark(cells.phase, "title", model.pinned ? model.pin_reason : model.evicted?.reason)
  say(cells.queued, String(model.queued))
  say(cells.oldest, duration(model.oldest_wait))
  say(cells.flight, String(model.in_flight))
  say(cells.rate, rate(model.phase === "awake" || model.phase === "draining" ? speed : null))
  say(cells.awake, duration(model.awake_for))
  say(cells.error, model.last_error ?? "")
  mark(cells.error, "title", model.last_error)
  mark(row.wake, "aria-disabled", model.phase === "awake" || model.phase === "waking" ? "true" : null)
  mark(row.sleep, "aria-disabled", ["asleep", "deepening", "sleeping"].includes(model.phase) ? "true" : null)
  const word = model.pinned ? "Unpin" : "Pin"
  mark(row.pin, "data-deed", word.toLowerCase())
  mark(row.pin, "aria-label", `${word} ${name}`)
  say(row.pin, word)
}

function phase(model) {
  const parts = [model.phase]
  if (model.level) parts.push(`level ${model.level}`)
  if (model.pinned) parts.push(model.pin_expires_in == null ? "pinned" : `pinned, ${duration(model.pin_expires_in)} left`)
  return parts.join(" · ")
}

async function act(button, name) {
  if (button.getAttribute("aria-disabled")) return
  const deed = button.dataset.deed, line = at("answer")
  mark(button, "data-busy", "")
  try {
    let done
    try {
      done = await operate(name, deed)
    } catch (error) {
      if (error.status !== 401 || !await askForKey("Operating this llmux needs its admin key.", true)) throw error
      dispatchEvent(new Event("llmux-key"))
      done = await operate(name, deed)
    }
    line.dataset.kind = "done"
    say(line, `${name} ${done.switch == null && deed === "wake" ? "is awake" : DEEDS[deed]}${done.switch == null ? "" : ` (switch ${done.switch})`}.`)
  } catch (error) {
    line.dataset.kind = "refused"
    say(line, `${name}: ${error.message}`)
  } finally {
    mark(button, "data-busy", null)
    clearTimeout(forget)
    forget = setTimeout(() => say(line, ""), SHOWN)
  }
}

// The requests: those that wait, or are in flight for long, from the status; those that have ended, asked for while
// they are looked at.

import { Refused, read } from "./api.js"
import { at, make, mark, only, say } from "./dom.js"
import { amount, choose, duration, moment, rate } from "./format.js"
import { cancel } from "./operate.js"
import { shape } from "./palette.js"
import { details } from "./request.js"
import { figure, row, Rows } from "./table.js"
import { tab } from "./tabs.js"

const EVERY = 900 // ms
const PAGE = 200
const WAITING = 8 // that are shown at first
const LONG = 30 // seconds in flight after which a request is shown
const NEAR = 1 // seconds
const SETTLED = 5 // seconds after its end by which the ledger knows what a request cost
let world = null
let asked = -Infinity
let asking = false
let known = [] // newest first
let more = false // there are older ones in memory
let past = [] // before these, out of the ledger
let further = null // how the ledger goes on: a query; null: it does not
let wish = PAGE // as many are shown
let filter = null // what `known` is of, null: nothing yet
const choices = new Map() // by the id of the request: between targets
let allWaiting = false
let open = null // the id of the request whose details are shown

const named = model => make("span", { class: "model" }, shape(model), make("bdi", {}, model))
const rowOf = (one, ...figures) => {
  const button = make("button", { type: "button", "aria-label": `Cancel request ${one.request_id}`, onclick: event => cancel(event.currentTarget, one) }, "Cancel…")
  return row([
    [named(one.model), "model", "subject"], [make("bdi", {}, one.key ?? "–"), "key", "key"], ...figures,
    [one.request_id ?? "", "request id", "id"], [one.request_id ? button : "", "", "deeds"],
  ])
}
const waiting = new Rows(at("waiting").tBodies[0], one =>
  rowOf(one, ["", "position", "number"], ["", "waited", "number"], ["", "expected still", "number"]))
const serving = new Rows(at("serving").tBodies[0], one => rowOf(one, ["", "in flight", "number"], ["", "answer", "number"]))
const ended = new Rows(at("ended").tBodies[0], endedRow)

export function showRequests(now) {
  world = now
  choose(at("requests-of"), Object.keys(world.status.models), () => refresh(true))
  if (tab !== "requests") return
  showWaiting()
  showServing()
  if (world.link === "live") refresh()
}

// Another connection: what llmux has counted may begin anew.
export function forget() {
  filter = null
  choices.clear()
}

export async function refresh(now = false) {
  if (asking || !world || (!now && performance.now() - asked < EVERY)) return
  asking = true
  asked = performance.now()
  const model = at("requests-of").value, key = at("requests-by").value
  const wanted = `${model && `&model=${encodeURIComponent(model)}`}${key && `&key=${encodeURIComponent(key)}`}`
  try {
    if (filter !== wanted) {
      wish = PAGE
      known = await list(`limit=${PAGE}${wanted}`)
      more = known.length === PAGE
      past = []
      further = known.length ? `&until=${endOf(known.at(-1)) + NEAR}` : ""
      if (!more) await look(wanted)
      filter = wanted
    } else {
      // Those of a moment ago once more: what they cost comes after their end.
      const since = known.find(one => one.time + one.duration < world.now() - SETTLED)?.id ?? 0
      const fresh = await list(`limit=${wish}&after=${since}${wanted}`)
      const missed = fresh.length === wish // there are more of them than are shown
      if (missed) past = []
      more ||= missed
      known = missed ? fresh : [...fresh, ...known.filter(one => one.id <= since)]
      // What is of the ledger begins where these end.
      if (!past.length && known.length > wish) {
        known = known.slice(0, wish)
        more = true
      }
    }
    showEnded()
  } catch {
    // The stream says that the connection is lost; the next turn asks again.
  } finally {
    asking = false
    if (at("requests-of").value !== model || at("requests-by").value !== key) refresh(true)
  }
}

const endOf = one => one.time + one.duration
// Memory and the ledger read their clocks a moment apart.
const isKnown = one => known.some(it => it.request_id === one.request_id && Math.abs(endOf(it) - endOf(one)) < NEAR)
const list = async query => (await read(`activity?${query}`)).requests

// Whether the ledger has any that memory has not; without a ledger there are none.
async function look(of) {
  if (further === null) return
  try {
    const { requests, next } = await read(`activity?from=ledger&limit=50${further}${of}`)
    if (next === null && requests.every(isKnown)) further = null
  } catch (error) {
    if (!(error instanceof Refused)) throw error
    further = null
  }
}

async function older() {
  const button = at("older"), of = filter
  if (button.dataset.busy !== undefined || of === null) return
  mark(button, "data-busy", "")
  try {
    if (more) {
      const found = await list(`limit=${PAGE}&before=${known.at(-1).id}${of}`)
      if (of !== filter) return
      more = found.length === PAGE
      wish += PAGE
      known = [...known, ...found]
      further = `&until=${endOf(known.at(-1)) + NEAR}`
      if (!more) await look(of)
    } else {
      const { requests, next } = await read(`activity?from=ledger&limit=${PAGE}${further}${of}`)
      if (of !== filter) return
      past = [...past, ...requests.filter(one => !isKnown(one)).map(one => ({ ...one, id: `past ${one.id}`, old: true }))]
      further = next === null ? null : `&before=${next}`
    }
    showEnded()
  } catch {
    // As above.
  } finally {
    mark(button, "data-busy", null)
  }
}
at("older").addEventListener("click", older)

at("all-waiting").addEventListener("click", () => {
  allWaiting = true
  showWaiting()
})

function showWaiting() {
  const rows = Object.entries(world.status.models).flatMap(([model, it]) => it.waiting.map(one => ({ model, ...one })))
  rows.sort((one, other) => other.waited - one.waited)
  at("of-waiting").hidden = !rows.length
  at("waiting").toggleAttribute("data-keys", rows.some(one => one.key))
  tellApart(rows)
  const most = allWaiting ? rows.length : WAITING
  at("all-waiting").hidden = rows.length <= most
  say(at("all-waiting"), `All ${rows.length}`)
  waiting.show(rows.slice(0, most), one => one.identity, ([element], one) => {
    const [, , position, waited, expected] = element.cells
    say(position, String(one.position))
    say(waited, duration(one.waited))
    say(expected, duration(one.expected))
  })
}

function showServing() {
  const rows = Object.entries(world.status.models).flatMap(([model, it]) =>
    it.serving.filter(one => it.phase === "draining" || one.for > LONG).map(one => ({ model, ...one })))
  rows.sort((one, other) => other.for - one.for)
  at("of-serving").hidden = !rows.length
  at("serving").toggleAttribute("data-keys", rows.some(one => one.key))
  tellApart(rows)
  serving.show(rows, one => `${one.identity}\n${one.answering}`, ([element], one) => {
    const [, , since, answer] = element.cells
    say(since, duration(one.for))
    say(answer, one.answering ? "has begun" : "not yet")
  })
}

// A client may give several requests one id.
function tellApart(rows) {
  const times = new Map()
  for (const one of rows) {
    const name = `${one.model}\n${one.request_id}`
    times.set(name, (times.get(name) ?? 0) + 1)
    one.identity = `${name}\n${times.get(name)}`
  }
}

function showEnded() {
  const table = at("ended"), all = [...known, ...past]
  at("no-requests").hidden = all.length > 0
  say(at("no-requests"), filter ? "None of these has ended lately." : "No request has ended yet.")
  table.hidden = all.length === 0
  at("older").hidden = !more && further === null
  say(at("older"), more ? "Older ones" : "Older ones, out of the ledger")
  table.toggleAttribute("data-keys", all.some(one => one.key))
  table.toggleAttribute("data-costs", all.some(one => one.cost))
  const names = [...new Set([...[...at("requests-by").options].map(option => option.value), ...all.map(one => one.key)])].filter(Boolean)
  at("by-key").hidden = names.length === 0
  choose(at("requests-by"), names, () => refresh(true), "all keys")
  ended.show(all, one => one.id, update)
}

function endedRow(one) {
  const button = make("button", { type: "button", class: "plain", "aria-expanded": "false", "aria-label": `${moment(endOf(one))}, ${one.model ?? "no model"}: what became of the request` }, moment(endOf(one)))
  const model = one.model === null ? make("span", { class: "sub" }, "none") : named(one.model)
  const name = make("div", {}, model, one.asked && one.asked !== one.model ? make("span", { class: "aliases" }, `as ${one.asked}`) : null)
  const element = row([
    [button, "ended", "time"], [name, "model", "subject"], [make("bdi", {}, one.key ?? "–"), "key", "key"],
    [status(one), "status", "status"], [duration(one.waited), "waited", "number"], [duration(one.first_byte), "first byte", "number"],
    [duration(one.duration), "in all", "number"], ["–", "tokens", "number"], ["–", "tokens/s", "number"], ["–", "cost", "number cost"],
  ])
  mark(element, "data-kind", one.status >= 400 || one.error ? "failed" : null)
  element.addEventListener("click", event => {
    if (getSelection().isCollapsed || event.target === button) toggle(one.id)
  })
  return element
}

function update(elements, one) {
  const [element] = elements, { cells } = element, shown = one.id === open
  figure(cells[7], tokens(one))
  figure(cells[8], rate(one.tokens_per_second))
  figure(cells[9], one.cost == null ? "–" : amount(one.cost, one.currency))
  mark(cells[0].firstChild, "aria-expanded", String(shown))
  mark(element, "data-open", shown ? "" : null)
  if (!shown) {
    elements.splice(1).forEach(below => below.remove())
    return
  }
  if (elements.length < 2) elements.push(make("tr", { role: "row", class: "below" }, make("td", { role: "cell", colspan: 10 })))
  const cell = elements[1].firstChild, choice = choices.get(one.id), key = `${one.cost} ${one.output_tokens} ${world.begins} ${choice?.time}`
  if (cell.dataset.key === key) return
  cell.dataset.key = key
  only(cell, details(choice ? { ...one, choice } : one, world, known))
}

async function toggle(id) {
  open = open === id ? null : id
  showEnded()
  const one = known.find(it => it.id === open)
  if (!one || one.asked === null || one.asked === one.model || choices.has(id)) return
  // Of a virtual model: why this one stood for it.
  choices.set(id, null)
  try {
    const { targets = [] } = await read("decisions")
    const made = targets.findLast(it => it.request_id === one.request_id && it.asked === one.asked && Math.abs(it.time - one.time) < NEAR)
    if (!made) return
    choices.set(id, made)
    showEnded()
  } catch {
    choices.delete(id)
  }
}

function status(one) {
  if (one.status === 499) return "499 client left"
  return one.error ? `${one.status} ${one.error.replaceAll("_", " ")}` : String(one.status)
}

function tokens(one) {
  if (one.input_tokens === null && one.output_tokens === null) return "–"
  return `${one.estimated ? "~" : ""}${one.input_tokens ?? "?"} → ${one.output_tokens ?? "?"}`
}

// What keys used, by day: out of the ledger, asked for while it is looked at.

import { Refused, read } from "./api.js"
import { Columns, share } from "./chart.js"
import { at, make, mark, only, say } from "./dom.js"
import { amount, compact, count, duration } from "./format.js"
import { colour, shape } from "./palette.js"
import { row } from "./table.js"
import { tab } from "./tabs.js"

const EVERY = 60_000 // ms
const TOP = 7 // keys or models that have a colour of their own
const ROWS = 30 // that are shown at first
const OTHERS = "(others)", HOUSE = "(house)"
const HOUR = 3600, DAY = 24 * HOUR
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
const percent = value => `${Math.round(100 * value)} %`
const WORDS = { [OTHERS]: "others", [HOUSE]: "house: idle, or operators", "": "no key" }

const FIGURES = [
  { id: "tokens", name: "tokens", of: one => one.input_tokens + one.output_tokens, spell: compact },
  { id: "written", name: "tokens written", of: one => one.output_tokens, spell: compact },
  { id: "requests", name: "requests", of: one => one.requests, spell: compact },
  { id: "gpu", name: "GPU time", of: one => one.gpu_seconds + one.switch_seconds, spell: duration },
  { id: "switch", name: "switching", of: one => one.switch_seconds, spell: duration },
]

const chart = new Columns(at("usage-chart"), at("usage-readout"), "Point at a column, or use ← and →, for its figures.")
const choices = ["usage-figure", "usage-by", "usage-since"].map(at)
let asked = -Infinity
let asking = false
let found = null // {by, since, hourly, split, uses}: the last answer, and what it answers
let wanted = ""
let whole = false // all rows are shown

export function showUsage(world) {
  if (tab !== "usage" || world.link !== "live") return
  refresh()
}

at("uses-all").addEventListener("click", () => {
  whole = true
  table(found.uses)
})
for (const choice of choices) choice.addEventListener("change", () => found && (choice.id === "usage-figure" ? show() : refresh()))

async function refresh() {
  const by = at("usage-by").value, since = at("usage-since").value, now = `${by} ${since}`
  if (asking || (now === wanted && performance.now() - asked < EVERY)) return
  asking = true
  asked = performance.now()
  wanted = now
  const hourly = since === "24h"
  try {
    const [split, uses] = await Promise.all([
      read(`usage?by=${hourly ? "hour" : "day"},${by}&since=${since}&top=${TOP}`), read(`usage?by=key,model&since=${since}&top=30`),
    ])
    found = { by, hourly, split, uses }
    fail("")
    show()
  } catch (error) {
    const none = error instanceof Refused && error.status === 404
    at("no-ledger").hidden = !none
    if (!none) fail(error.message)
  } finally {
    asking = false
    if (`${at("usage-by").value} ${at("usage-since").value}` !== now) refresh()
  }
}

function fail(text) {
  const box = at("usage-error")
  box.hidden = !text
  say(box, text)
}

const named = (name, by) => name === null ? by === "key" ? WORDS[""] : "no model" : by === "key" || name === OTHERS ? WORDS[name] ?? name : name

function show() {
  const { split, uses } = found
  at("no-ledger").hidden = true
  at("of-usage").hidden = false
  figures(uses)
  draw(split)
  causers(uses)
  table(uses)
}

// What there is to choose from: money where there are prices, in each currency.
let offered = ""

function figures(uses) {
  const currencies = uses.total.map(one => one.currency).filter(Boolean)
  const select = at("usage-figure"), key = currencies.join()
  if (select.options.length && key === offered) return
  const before = select.options.length && offered.length ? select.value : null
  offered = key
  const all = [...currencies.map(currency => ({ id: `cost ${currency}`, name: currencies.length > 1 ? `cost (${currency})` : "cost" })), ...FIGURES]
  only(select, ...all.map(one => make("option", { value: one.id }, one.name)))
  if (before && all.some(one => one.id === before)) select.value = before
}

function chosen() {
  const { value } = at("usage-figure")
  if (!value.startsWith("cost ")) return FIGURES.find(one => one.id === value)
  const currency = value.slice(5)
  return { name: "cost", of: one => one.currency === currency ? one.cost : 0, spell: (it, step) => amount(it, currency, step) }
}

// The days or hours from `since` on, also those of which there is nothing.
function columns({ since }, hourly) {
  const step = hourly ? HOUR : DAY, end = Date.now() / 1000
  const list = []
  for (let time = since - since % step; time <= end; time += step) {
    const iso = new Date(time * 1000).toISOString()
    list.push(hourly ? { key: `${iso.slice(0, 13)}:00Z`, name: `${iso.slice(0, 10)}, ${iso.slice(11, 13)}:00 UTC`, short: `${iso.slice(11, 13)} h` }
      : { key: iso.slice(0, 10), name: iso.slice(0, 10), short: `${Number(iso.slice(8, 10))} ${MONTHS[Number(iso.slice(5, 7)) - 1]}` })
  }
  return list
}

function draw(split) {
  const { by, hourly } = found, figure = chosen(), places = columns(split, hourly)
  const index = new Map(places.map((one, place) => [one.key, place]))
  const sums = new Map()
  for (const one of split.usage) {
    const place = index.get(one[hourly ? "hour" : "day"])
    if (place === undefined) continue
    if (!sums.has(one[by])) sums.set(one[by], places.map(() => 0))
    sums.get(one[by])[place] += figure.of(one)
  }
  const whole = values => values.reduce((sum, value) => sum + value, 0)
  const last = name => name === OTHERS ? 2 : name === HOUSE || name === null ? 1 : 0 // these stand above the others
  const series = [...sums].filter(([, values]) => whole(values) > 0)
    .sort((one, other) => last(one[0]) - last(other[0]) || whole(other[1]) - whole(one[1]))
    .map(([name, values], place) => ({ id: name, name: named(name, by), look: look(name, by, place), values }))
  const total = series.reduce((sum, one) => sum + whole(one.values), 0)
  say(at("usage-title"), `${figure.name[0].toUpperCase()}${figure.name.slice(1)} by ${hourly ? "hour" : "day"}, UTC`)
  say(at("usage-sum"), total ? figure.spell(total) : "Nothing in this time.")
  chart.show({ columns: places, series, spell: figure.spell, label: `${figure.name} by ${hourly ? "hour" : "day"}: ${figure.spell(total)} in all` })
  only(at("usage-legend"), ...series.map(one => make("li", {}, chip(one, by), make("span", {}, make("bdi", { title: one.name }, one.name), ` ${figure.spell(whole(one.values))}`, make("span", { class: "sub" }, ` ${percent(whole(one.values) / total)}`)))))
}

const look = (name, by, place) => name === OTHERS || name === HOUSE || name === null ? "rest" : by === "model" ? colour(name) : `m${place % 8}`

function chip(one, by) {
  return by === "model" && one.look !== "rest" ? shape(one.id) : make("i", { class: `chip ${one.look}` })
}

const keyed = name => make("bdi", { class: name === null || name in WORDS ? "sub" : null }, named(name, "key"))

function causers(uses) {
  const keys = new Map()
  for (const one of uses.usage) {
    const all = keys.get(one.key) ?? { key: one.key, seconds: 0, gpu: 0, to: new Map() }
    all.seconds += one.switch_seconds
    all.gpu += one.gpu_seconds
    all.to.set(one.model, (all.to.get(one.model) ?? 0) + one.switch_seconds)
    keys.set(one.key, all)
  }
  const list = [...keys.values()].filter(one => one.seconds > 0).sort((one, other) => other.seconds - one.seconds)
  at("of-causers").hidden = !list.length
  const sum = list.reduce((all, one) => all + one.seconds, 0)
  only(at("causers").tBodies[0], ...list.slice(0, ROWS).map(one => {
    const [model] = [...one.to].sort((a, b) => b[1] - a[1])[0]
    return row([
      [keyed(one.key), "key", "subject"], [duration(one.seconds), "switches", "number"],
      [make("span", { class: "shared" }, share(one.seconds / sum), make("span", {}, percent(one.seconds / sum))), "of all", "number"],
      [percent(one.seconds / (one.seconds + one.gpu)), "of its GPU time", "number"],
      [make("span", { class: "model" }, model && model !== OTHERS ? shape(model) : null, make("bdi", {}, named(model, "model"))), "mostly to", "to"],
    ])
  }))
}

function table(uses) {
  const list = uses.usage.filter(one => one.requests || one.gpu_seconds || one.switch_seconds)
  const weight = one => [one.cost ?? 0, one.gpu_seconds + one.switch_seconds, one.input_tokens + one.output_tokens, one.requests]
  list.sort((one, other) => {
    const [mine, its] = [weight(one), weight(other)]
    const place = mine.findIndex((value, at) => value !== its[at])
    return place < 0 ? 0 : its[place] - mine[place]
  })
  at("of-uses").hidden = !list.length
  at("uses").toggleAttribute("data-costs", uses.total.some(one => one.currency))
  const rows = whole ? list : list.slice(0, ROWS)
  at("uses-all").hidden = rows.length === list.length
  say(at("uses-all"), `All ${list.length}`)
  only(at("uses").tBodies[0], ...rows.map(one => {
    const about = one.estimated ? "~" : ""
    const element = row([
      [keyed(one.key), "key", "subject"],
      [one.model === null ? make("span", { class: "sub" }, "no model") : make("span", { class: "model" }, one.model === OTHERS ? null : shape(one.model), make("bdi", {}, named(one.model, "model"))), "model", "of"],
      [compact(one.requests), "requests", "number"], [one.failed ? compact(one.failed) : "–", "failed", "number"],
      [`${about}${compact(one.input_tokens)}`, "read", "number"], [`${about}${compact(one.output_tokens)}`, "written", "number"],
      [one.requests ? duration(one.waited_seconds / one.requests) : "–", "mean wait", "number"],
      [duration(one.gpu_seconds + one.switch_seconds), "GPU", "number"], [one.currency ? amount(one.cost, one.currency) : "–", "cost", "number cost"],
    ])
    mark(element, "data-kind", one.key === HOUSE ? "house" : null)
    return element
  }))
  const notes = [
    list.some(one => one.estimated) && "~: some are estimates, because the answers had no report of their tokens.",
    rows.length < list.length && `These are the ${ROWS} with the highest ${uses.total.some(one => one.currency) ? "cost" : "use"}.`,
    uses.lost && `${count(uses.lost, "row")} could not be written, and ${uses.lost === 1 ? "is" : "are"} missing.`,
  ]
  say(at("uses-note"), notes.filter(Boolean).join(" "))
}

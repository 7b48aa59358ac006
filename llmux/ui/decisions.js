// The last decisions in words, and what switches cost.

import { at, make, mark, only, say } from "./dom.js"
import { clock, duration } from "./format.js"
import { shape } from "./palette.js"

const WORDS = { stay: "stay", wait: "wait", switch: "switch", adopt: "policy" }
const BY = { core: "no policy asked" } // of the others the reason tells it
const SHOWN = 50

const items = new Map()

export function showDecisions(world) {
  const list = at("decisions")
  const last = world.decisions.slice(-SHOWN)
  at("of-decisions").hidden = !last.length
  const wanted = new Set(last.map(one => one.id))
  for (const [id, item] of items) {
    if (!wanted.has(id)) {
      item.remove()
      items.delete(id)
    }
  }
  if (!last.length) {
    only(list)
    items.clear()
    return
  }
  if (!items.size) only(list)
  for (const decision of last) {
    if (!items.has(decision.id)) {
      const item = make("li", {}, make("time"), make("span", { class: "tag" }), make("span", { class: "text" }))
      items.set(decision.id, item)
      item.dataset.id = decision.id
      // The newest stands first, whenever it was heard of.
      list.insertBefore(item, [...list.children].find(other => Number(other.dataset.id) < decision.id) ?? null)
    }
    const item = items.get(decision.id), [time, tag, text] = item.children
    mark(item, "class", decision.kind)
    say(time, clock(decision.time))
    say(tag, WORDS[decision.kind] ?? decision.kind)
    const more = [BY[decision.by], decision.times > 1 && `${decision.times} times until ${clock(decision.last)}`]
    mark(item, "title", decision.kind !== "adopt" && decision.by !== "core" && decision.said ? `${world.status.policy.use}: ${decision.said}` : null)
    say(text, [decision.reason, ...more.filter(Boolean)].join(" · "))
  }
}

const SQUARE = 7 // rows and columns; of more models the square would be all but empty, and wider than the page
let drawn = ""

export function showCosts(world) {
  const costs = world.status.switch_costs
  const key = JSON.stringify([costs, Object.keys(world.status.models)])
  if (key === drawn) return
  drawn = key
  const known = new Map(costs.map(cost => [JSON.stringify([cost.from ?? null, cost.to ?? null]), cost]))
  const names = Object.keys(world.status.models)
  const rows = [null, ...names].filter(name => costs.some(cost => (cost.from ?? null) === name))
  const columns = [...names, null].filter(name => costs.some(cost => (cost.to ?? null) === name))
  at("of-costs").hidden = !rows.length
  if (!rows.length) return
  const seconds = costs.map(cost => cost.seconds)
  const least = Math.min(...seconds), most = Math.max(...seconds)
  const label = (name, none) => name === null ? [make("span", {}, none)] : [shape(name), make("bdi", { title: name }, name)]
  const cell = cost => {
    const heat = most > least ? (Math.log(cost.seconds + .05) - Math.log(least + .05)) / (Math.log(most + .05) - Math.log(least + .05)) : 0
    const found = make("td", { class: "number" }, make("b", {}, duration(cost.seconds)), make("small", {}, `×${cost.samples}`))
    found.style.setProperty("--heat", `${Math.round(8 + heat * 44)}%`)
    return found
  }
  const many = Math.max(rows.length, columns.length) > SQUARE
  at("costs").toggleAttribute("data-list", many)
  if (many) {
    const often = costs.toSorted((one, other) => other.samples - one.samples || other.seconds - one.seconds)
    only(at("costs"), make("tbody", {}, ...often.map(cost => make("tr", {},
      make("th", { scope: "row" }, ...label(cost.from ?? null, "no model"), " → ", ...label(cost.to ?? null, "asleep")), cell(cost)))))
    return
  }
  only(at("costs"),
    make("thead", {}, make("tr", {},
      make("td", { class: "corner" }, make("span", { class: "hidden" }, "from, by row; to, by column")),
      ...columns.map(name => make("th", { scope: "col" }, ...label(name, "asleep"))))),
    make("tbody", {}, ...rows.map(from => make("tr", {}, make("th", { scope: "row" }, ...label(from, "no model")), ...columns.map(to => {
      const cost = known.get(JSON.stringify([from, to]))
      return cost ? cell(cost) : make("td", { class: "none" }, from === to ? "" : "·")
    })))))
}

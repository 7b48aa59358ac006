// What holds the GPU, and why: the answer to the first question, at a glance.

import { at, make, mark, only, say } from "./dom.js"
import { clock, duration, gib, rate, several } from "./format.js"
import { colour, shape } from "./palette.js"

const STAGES = [["draining", "drain"], ["sleeping", "sleep"], ["waking", "wake"]]
const HOLDING = new Set(["awake", "draining", "waking", "sleeping", "lost", "faulted"])

const named = model => make("span", { class: "model" }, shape(model), make("bdi", {}, model))

function list(models) {
  return models.flatMap((model, place) => place ? [make("span", { class: "and" }, "+"), named(model)] : [named(model)])
}

let shown = ""

export function showHolder(world) {
  const { status } = world
  const move = status.switch
  const key = JSON.stringify([status.awake, move && [move.from, move.to], status.lease?.held, status.lease?.reason, status.ready, holders(status)])
  if (key !== shown) {
    shown = key
    only(at("who"), ...who(status))
  }
  say(at("who-facts"), facts(world))
  memory(world)
  steps(world)
  why(world)
}

export function showTitle({ link, status }) {
  const move = status.switch
  if (link === "live") document.title = `${move ? `${several(move.from)} → ${move.to ?? "asleep"}` : several(status.awake)} · llmux`
}

const holders = status => Object.entries(status.models).filter(([, it]) => HOLDING.has(it.phase)).map(([name]) => name)

function who(status) {
  const move = status.switch
  if (move) {
    const arrow = make("span", { class: "arrow", role: "img", "aria-label": "makes room for" }, "→")
    const from = move.from.length ? list(move.from) : [make("span", { class: "none" }, "no model")]
    return [...from, arrow, move.to ? named(move.to) : make("span", { class: "none" }, "asleep")]
  }
  if (status.lease?.held) return [make("span", { class: "none" }, "lent to another job"), status.lease.reason ? make("bdi", {}, status.lease.reason) : null]
  const all = holders(status)
  return all.length ? list(all) : [make("span", { class: "none" }, status.ready ? "no model" : "…")]
}

function facts(world) {
  const { status } = world, move = status.switch
  if (move) {
    const expected = world.cost(move.from, move.to)
    const left = move.from.filter(name => name !== move.to && status.models[name]?.queued).map(name => `${status.models[name].queued} for ${name}`)
    const others = status.awake.filter(name => name !== move.to && !move.from.includes(name))
    return [
      `switch ${move.id}, for ${duration(move.since)}`,
      move.phase === "draining" && drained(move.from.flatMap(name => status.models[name]?.serving ?? [])),
      left.length && `${several(left)} wait until it is back`,
      expected != null && `it costs about ${duration(expected)} after the drain`,
      others.length && `${several(others)} ${others.length > 1 ? "stay" : "stays"} awake`,
    ].filter(Boolean).join(" · ")
  }
  const parts = []
  const { lease } = status
  if (lease) {
    const left = lease.expires_in == null ? "until it is given back" : `${duration(lease.expires_in)} left`
    parts.push(`${lease.held ? "lent" : "to be lent"} for ${duration(lease.for)}, ${left}${lease.reason && !lease.held ? ` (${lease.reason})` : ""}; requests ${lease.requests === "wait" ? "wait" : "are refused"}`)
  }
  const alone = holders(status).length === 1
  for (const name of holders(status)) {
    const it = status.models[name]
    if (it.phase === "faulted") parts.push(`${name} is faulted: it may still hold the GPU, so nothing that conflicts with it is woken. Free the GPU by hand, then press Reset`)
    else if (it.phase !== "awake") parts.push(`${name} is ${it.phase}`)
    else if (alone) parts.push(`awake for ${duration(it.awake_for)}`)
    if (it.pinned) parts.push(`${alone ? "" : `${name} is `}pinned${it.pin_expires_in == null ? "" : `, ${duration(it.pin_expires_in)} left`}`)
  }
  if (status.awake.length) {
    const speed = status.awake.reduce((sum, name) => sum + (world.rate(name) ?? 0), 0)
    parts.push(`${status.awake.reduce((sum, name) => sum + status.models[name].in_flight, 0)} in flight`)
    if (speed) parts.push(`${rate(speed)} tokens/s`)
  }
  if (!parts.length) return status.ready ? "The first request wakes its model." : "Looking at what runs."
  return parts.join(" · ")
}

// What a drain waits for: these are the ones that have been in flight longest.
function drained(serving) {
  if (!serving.length) return ""
  const longest = serving.reduce((one, other) => other.for > one.for ? other : one)
  return `waits for ${longest.request_id || "a request"}, in flight for ${duration(longest.for)}${longest.answering ? "" : " without an answer"}`
}

// What the models on the GPU take of the capacity.
let drawn = ""

function memory({ status }) {
  const box = at("memory"), found = status.memory
  box.hidden = !found
  const key = JSON.stringify(found)
  if (!found || key === drawn) return
  drawn = key
  const taken = Object.entries(found.taken), all = taken.reduce((sum, [, bytes]) => sum + bytes, 0)
  const text = `${gib(all)} of ${gib(found.capacity)} GiB`
  const bar = make("div", { class: "bar", role: "meter", "aria-label": "memory of the models on the GPU", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * all / found.capacity), "aria-valuetext": text })
  for (const [model, bytes] of taken) {
    const part = make("i", { class: colour(model), title: `${model}: ${gib(bytes)} GiB` })
    part.style.inlineSize = `${100 * Math.min(1, bytes / found.capacity)}%`
    bar.append(part)
  }
  only(box, bar, make("span", { class: "number" }, text))
}

function steps(world) {
  const move = world.status.switch, list = at("steps")
  list.hidden = !move
  // Its place is kept once there has been a switch.
  mark(list, "data-calm", !move && !world.notes.length ? "" : null)
  if (!move) return
  const cleanup = move.phase === "cleanup"
  const stages = STAGES.filter(([stage]) =>
    stage === "waking" ? move.to : cleanup || move.from.length || stage === move.phase)
  const here = stages.findIndex(([stage]) => stage === (cleanup ? "sleeping" : move.phase))
  while (list.children.length > stages.length) list.lastChild.remove()
  stages.forEach(([, word], place) => {
    const item = list.children[place] ?? list.appendChild(make("li"))
    mark(item, "class", place < here ? "done" : place === here ? "here" : null)
    mark(item, "aria-current", place === here ? "step" : null)
    say(item, place === here && cleanup ? "clean up" : word)
  })
}

function why(world) {
  const { status } = world, lines = []
  const last = world.decisions.at(-1)
  const left = ({ last_eviction: made }, id) => {
    if (made?.switch === id && made.models.length > 1) lines.push(["What left", made.reason])
  }
  const move = status.switch
  if (move) {
    const by = world.decisions.findLast(one => one.switch === move.id)
    lines.push(["Why", by?.reason ?? move.reason])
    left(status, move.id)
  } else {
    // Of several the one that came last; the list of decisions has the others.
    const by = status.awake.map(name => world.cameBy(name)).filter(Boolean).sort((one, other) => other.id - one.id)[0]
    if (by) {
      lines.push([`Since ${clock(by.time)}`, by.reason])
      left(status, by.switch)
    }
    if (last && last.switch == null && last.kind !== "switch" && last.waiting.length && waits(status)) lines.push(["Now", last.reason])
  }
  for (const [name, model] of Object.entries(status.models)) {
    if (model.pinned) lines.push(["Pinned", pinned(name, model, status)])
  }
  if (status.manual) lines.push(["Manual mode", "operators alone switch; requests for a model that is asleep wait until it is woken"])
  const box = at("why")
  while (box.children.length > lines.length) box.lastChild.remove()
  lines.forEach(([title, text], place) => {
    const line = box.children[place] ?? box.appendChild(make("p", {}, make("b"), make("span")))
    say(line.firstChild, title)
    say(line.lastChild, text)
  })
}

function pinned(name, model, status) {
  const until = model.pin_expires_in == null ? "until an operator unpins it" : `until ${clock(status.time + model.pin_expires_in)}`
  const refused = Object.keys(status.models).filter(other => other !== name && status.models[other].expected_wait === null)
  return `${name} stays awake ${until}${model.pin_reason ? ` (${model.pin_reason})` : ""}${refused.length ? `; requests for ${several(refused)} are refused` : ""}`
}

const waits = status => Object.values(status.models).some(model => model.queued && model.phase !== "awake")

// ---- sums

const span = seconds => seconds >= 3570 ? "1 h" : seconds >= 120 ? `${Math.floor(seconds / 60)} min` : duration(seconds)

export function showSums(world) {
  const { status } = world, models = Object.values(status.models)
  const hour = world.now() - 3600
  const ended = world.notes.filter(note => note.event === "switch_ended" && note.time >= hour)
  const oldest = Math.max(...models.map(model => model.oldest_wait ?? -1), -1)
  const speeds = Object.keys(status.models).map(name => world.rate(name)).filter(speed => speed !== null)
  const speed = speeds.length ? speeds.reduce((one, other) => one + other, 0) : null
  const spent = ended.reduce((sum, note) => sum + note.duration_secs - note.drain_secs, 0)
  const known = Math.max(1, Math.min(3600, world.now() - (world.begins ?? hour)))
  const sums = [
    ["waiting", models.reduce((sum, model) => sum + model.queued, 0)],
    ["oldest", oldest < 0 ? "–" : duration(oldest)],
    ["in flight", models.reduce((sum, model) => sum + model.in_flight, 0)],
    ["tokens/s", rate(speed)],
    [`switches in ${span(known)}`, ended.length],
    ["lost to switching", ended.length ? `${duration(spent)} · ${Math.round(100 * Math.min(1, spent / known))}\u00a0%` : "0 s"],
  ]
  const box = at("sums")
  sums.forEach(([name, value], place) => {
    const item = box.children[place] ?? box.appendChild(make("div", {}, make("dt"), make("dd")))
    say(item.firstChild, name)
    say(item.lastChild, String(value))
    mark(item, "data-none", ["0", "–", "0.0", "0 s"].includes(String(value)) ? "" : null)
  })
}

// ---- GPUs

export function showGpus(world) {
  const box = at("gpus"), found = world.gpus
  if (!found) return
  const key = `${found.gpus.length} ${found.error}`
  if (box.dataset.key !== key) {
    box.dataset.key = key
    only(box, ...found.gpus.map(card), found.error && make("p", { class: "sub" }, `No figures of the GPU: ${found.error}`))
  }
  found.gpus.forEach((gpu, place) => {
    const { memory_used: used, memory_total: total } = gpu
    const parts = box.children[place].children
    say(parts[0], `GPU ${gpu.index} · ${gpu.name}`)
    meter(parts[1], "memory", used == null ? null : used / total, used == null ? "not told" : `${gib(used)} of ${gib(total)} GiB`)
    meter(parts[2], "load", gpu.load, gpu.load == null ? "not told" : `${Math.round(gpu.load * 100)} %`)
    const more = [gpu.temperature != null && `${gpu.temperature} °C`, gpu.power != null && `${Math.round(gpu.power)} W`]
    say(parts[3], more.filter(Boolean).join(" · "))
  })
}

function card() {
  const bar = () => make("div", { class: "meter" }, make("span"), make("div", { class: "bar", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100 }, make("i")), make("span", { class: "number" }))
  return make("div", { class: "gpu" }, make("p", { class: "name" }), bar(), bar(), make("p", { class: "sub" }))
}

function meter(element, name, share, text) {
  const [label, bar, value] = element.children
  say(label, name)
  say(value, text)
  mark(bar, "aria-label", name)
  mark(bar, "aria-valuenow", Math.round((share ?? 0) * 100))
  mark(bar, "aria-valuetext", text)
  bar.firstChild.style.inlineSize = `${Math.min(1, share ?? 0) * 100}%`
}

export const summary = status =>
  status.awake.length ? `${several(status.awake)} ${status.awake.length > 1 ? "hold" : "holds"} the GPU` : "no model holds the GPU"

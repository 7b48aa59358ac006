// What became of one request, and why it waited: put together from what the page knows of that time.

import { make } from "./dom.js"
import { amount, clock, count, duration, moment, rate, several } from "./format.js"

const INSTANT = .005 // seconds that are not worth a word
const DECISIONS = 4 // that are told
const SWITCHES = 6 // that are told one by one

// How long the parts of its wait were, in words.
const WAITS = {
  behind: () => "until its turn came",
  lent: () => "while the GPU was lent to another job",
  draining: models => `for ${several(models)} to finish ${models.length > 1 ? "their" : "its"} answers (drain)`,
  sleeping: models => `for ${several(models)} to go to sleep`,
  waking: models => `for ${several(models)} to wake`,
  place: () => "for a place at its engine",
}

// Whether an engine had it: the ledger knows, else as far as that shows.
function began(one) {
  if (one.gpu_seconds !== undefined) return one.input_tokens !== null
  if (one.first_byte === null) return one.duration - one.waited > INSTANT
  return !(one.error && one.first_byte === one.duration)
}

// {parts: [{kind, from, to, models}], lines: [{time, text, kind}]}; `others` are requests that ended about then.
export function story(one, world, others = []) {
  const start = one.time, end = start + one.duration
  const admitted = start + Math.min(one.waited, one.duration), served = one.model !== null && began(one)
  const first = served && one.first_byte !== null ? start + one.first_byte : null
  const parts = one.model === null ? [] : waits(one, world, start, admitted)
  // The ledger does not have the first byte.
  if (served) parts.push({ kind: one.old ? "answering" : "reading", from: admitted, to: first ?? end })
  if (first !== null) parts.push({ kind: "answering", from: first, to: end })
  const lines = [{ time: start, text: arrival(one, others, start, admitted), kind: "arrived" }]
  const decisions = one.model === null ? [] : made(one, world, start, admitted)
  for (const decision of decisions) {
    const before = decision.time < start
    lines.push({ time: before ? start : decision.time, text: `${before ? "decided before it came" : "decided"}: ${decision.reason}`, kind: "decided" })
  }
  lines.push(...told(parts.filter(part => part.kind in WAITS), switches(world)))
  if (served) {
    const sums = summary(parts)
    const turn = admitted - start <= INSTANT ? "no wait" : sums.length > 1 ? `its turn after ${duration(admitted - start)} (${sums.join(", ")})` : "its turn"
    lines.push({ time: admitted, text: `${turn}: sent to ${one.model}`, kind: "sent" })
    if (first !== null && first < end - INSTANT) lines.push({ time: first, text: `first byte of the answer, ${duration(first - admitted)} after that`, kind: "first" })
  }
  const why = cause(one, world, start, end)
  if (why) lines.push({ time: end, text: why, kind: "decided" })
  lines.push({ time: end, text: ending(one), kind: one.status >= 400 || one.error ? "failed" : "ended" })
  if (one.choice) lines.push({ time: start, text: `chosen for ${one.asked}: ${one.choice.target} (${one.choice.reason.replaceAll("_", " ")})`, kind: "decided" })
  lines.sort((a, b) => a.time - b.time)
  return { parts, lines, known: world.begins !== null && world.begins <= start + INSTANT }
}

function arrival(one, others, start, admitted) {
  const asked = one.asked && one.asked !== one.model ? ` under the name ${one.asked}` : ""
  if (one.model === null) return "arrived; it named no model that is configured"
  const ahead = others.filter(it => it.model === one.model && it.id !== one.id && it.time < start && it.time + it.waited > start).length
  const behind = ahead && admitted - start > INSTANT ? `; ${count(ahead, "request")} for ${one.model} waited before it` : ""
  return `arrived, for ${one.model}${asked}${behind}`
}

// The decisions while it waited that had it in mind, and the one before that was being carried out when it came.
function made(one, world, start, admitted) {
  if (admitted - start <= INSTANT) return []
  const under = switches(world).find(it => it.from < start && it.to > start)
  const found = world.decisions.filter(it =>
    (it.last >= start && it.time <= admitted && (it.target === one.model || it.waiting.some(each => each.model === one.model)))
    || (under && it.switch === under.id && it.last >= under.from - 1 && it.time <= under.to))
  if (found.length <= DECISIONS) return found
  return [...found.slice(0, 1), ...found.slice(1 - DECISIONS)]
}

function switches(world) {
  const found = []
  for (const note of world.notes) {
    // Another llmux in its place counts anew.
    if (note.event === "switch_started") found.push({ id: note.switch, from: note.time, to: Infinity, sources: note.from, target: note.to })
    const last = found.at(-1)
    if (note.event === "switch_ended" && last?.id === note.switch) last.to = note.time
  }
  return found
}

const STEPS = { draining: "drain", sleeping: "sleep", waking: "wake" }

// The waits in words, those of one switch together.
function told(parts, known) {
  const groups = []
  for (const part of parts) {
    const middle = (part.from + part.to) / 2
    const of = part.kind in STEPS ? known.find(it => it.from <= middle && it.to >= middle) : undefined
    const last = groups.at(-1)
    if (of && last?.of === of) last.parts.push(part)
    else groups.push({ of, parts: [part] })
  }
  const lines = groups.flatMap(({ of, parts: its }) => {
    const [{ from, kind, models }] = its, { to } = its.at(-1)
    if (to - from <= INSTANT) return []
    if (!of || of.sources === "idle") return its.map(it => ({ time: it.from, text: `waited ${duration(it.to - it.from)} ${WAITS[it.kind](it.models)}`, kind: it.kind }))
    const steps = its.filter(it => it.to - it.from > INSTANT).map(it => `${STEPS[it.kind]} ${duration(it.to - it.from)}`)
    return [{ time: from, text: `waited ${duration(to - from)} for the switch ${of.sources.replaceAll(",", " and ")} → ${of.target ?? "asleep"} (${steps.join(", ")})`, kind: models.length ? kind : "behind" }]
  })
  if (lines.length <= SWITCHES) return lines
  const half = SWITCHES / 2
  return [...lines.slice(0, half), { time: lines[half].time, text: `… ${lines.length - SWITCHES} more waits as these`, kind: "behind" }, ...lines.slice(-half)]
}

const SUMS = { draining: "drain", sleeping: "sleep", waking: "wake", place: "for a place", behind: "until its turn", lent: "lent" }

function summary(parts) {
  return Object.entries(SUMS).flatMap(([kind, word]) => {
    const sum = parts.filter(part => part.kind === kind).reduce((all, part) => all + part.to - part.from, 0)
    return sum > INSTANT ? [`${word} ${duration(sum)}`] : []
  })
}

// What it waited for, moment by moment.
function waits(one, world, start, admitted) {
  if (admitted - start <= INSTANT) return []
  const all = [...world.stretches(start, admitted).values()].flat()
  const cuts = [...new Set([start, admitted, ...all.flatMap(it => [it.from, it.to])])].filter(time => time >= start && time <= admitted).sort((a, b) => a - b)
  const parts = []
  cuts.slice(1).forEach((to, place) => {
    const from = cuts[place], middle = (from + to) / 2
    const now = all.filter(it => it.from <= middle && it.to >= middle)
    const of = phase => now.filter(it => it.phase === phase).map(it => it.model)
    const own = now.find(it => it.model === one.model)?.phase
    const kind = own === "awake" ? "place" : ["waking", "sleeping", "draining"].find(phase => of(phase).length) ?? (lent(world, middle) ? "lent" : "behind")
    const models = of(kind), last = parts.at(-1)
    if (last && last.kind === kind && last.models.join() === models.join()) last.to = to
    else parts.push({ kind, from, to, models })
  })
  return parts
}

function lent(world, time) {
  const last = world.notes.findLast(note => note.event === "lease_set" && note.time <= time)
  return last ? last.leased : false
}

const FAILED = new Set(["wake_failed", "backing_off", "engine_error"])
const NOT_ITS_OWN = new Set(["faulted", "sleep_failed"])

// Why it was refused or broken off, as far as that was told then.
function cause(one, world, start, end) {
  const past = world.notes.filter(note => note.time <= end + .5)
  if (one.error === "pinned") {
    const pins = new Map(past.filter(note => note.event === "pin_set").map(note => [note.model, note]))
    const held = [...pins.values()].filter(note => note.pinned && note.model !== one.model)
    return held.length ? `${held.map(note => `${note.model} was pinned at ${clock(note.time)}${note.reason ? ` (${note.reason})` : ""}`).join("; ")}` : null
  }
  if (one.error === "leased") {
    const note = past.findLast(it => it.event === "lease_set" && it.leased)
    return note ? `the GPU was lent to another job at ${clock(note.time)}${note.reason ? ` (${note.reason})` : ""}` : null
  }
  const others = NOT_ITS_OWN.has(one.error)
  if (!others && !FAILED.has(one.error)) return null
  const old = others || one.error === "backing_off"
  const note = past.findLast(it => it.error && it.event !== "backoff_started" && (others || it.model === one.model) && (old || it.time >= start - .5))
  return note ? `${note.model} at ${clock(note.time)}: ${note.error}` : null
}

function ending(one) {
  const took = `${duration(one.duration)} after it came`
  if (one.status === 499) return `its client left, ${took}`
  if (one.error) return `${one.status} ${one.error.replaceAll("_", " ")}, ${took}`
  return `${one.status}, the end of the answer, ${took}`
}

function facts(one) {
  const share = seconds => seconds == null ? null : duration(seconds)
  const about = one.estimated ? "about " : ""
  const more = (number, word) => number ? ` (${number} ${word})` : ""
  return [
    ["request id", one.request_id],
    ["key", one.key],
    ["read", one.input_tokens === null ? null : `${about}${count(one.input_tokens, "token")}${more(one.cached_tokens, "from a cache")}`],
    ["written", one.output_tokens === null ? null : `${about}${count(one.output_tokens, "token")}${more(one.reasoning_tokens, "of reasoning")}`],
    ["speed", one.tokens_per_second === null ? null : `${rate(one.tokens_per_second)} tokens/s`],
    ["in the engine", one.decode_seconds == null ? null : `${share(one.prompt_seconds)} to read, ${share(one.decode_seconds)} to write`],
    ["its share of the GPU", share(one.gpu_seconds)],
    ["charged for switches", one.switch_seconds ? share(one.switch_seconds) : null],
    ["cost", one.cost == null ? null : amount(one.cost, one.currency)],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "")
}

const PARTS = { behind: "waits", lent: "the GPU is lent", draining: "drain", sleeping: "sleep", waking: "wake", place: "for a place", reading: "to the first byte", answering: "answer" }

// The request as an element: a bar of its parts, each moment in words, and its figures.
export function details(one, world, others) {
  const { parts, lines, known } = story(one, world, others)
  const bar = make("div", { class: "parts", role: "img", "aria-label": `${duration(one.duration)} in all` })
  for (const { kind, from, to } of parts) {
    const part = make("i", { class: kind, title: `${PARTS[kind]}: ${duration(to - from)}` })
    part.style.flexGrow = 1000 * (to - from) / one.duration
    bar.append(part)
  }
  return make("div", { class: "story" },
    parts.length ? bar : null,
    make("ol", { class: "moments" }, ...lines.map(({ time, text, kind }) => make("li", { class: kind },
      make("span", { class: "after" }, kind === "arrived" ? moment(time) : time - one.time < 5e-4 ? "" : `+${duration(time - one.time)}`), make("i"), make("span", { class: "text" }, text)))),
    known || one.waited < INSTANT || one.model === null ? null : make("p", { class: "sub" }, "What the models did then is no longer known: it is kept for an hour."),
    make("dl", { class: "facts" }, ...facts(one).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, make("bdi", {}, value))])))
}

// The last hour: which models were awake when, drains, sleeps, wakes, failures. It can be zoomed, and read as a table.

import { at, draw, make, mark, only, say } from "./dom.js"
import { clock, count, duration } from "./format.js"
import { colour, shape } from "./palette.js"

const HOUR = 3600, LEAST = 5 // seconds
const PRESETS = [[60, "1 min"], [300, "5 min"], [900, "15 min"], [HOUR, "1 h"]]
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800]
const FAILURES = {
  switch_failed: note => [note.model, `a switch failed: ${note.error}`],
  sleep_hook_failed: note => [note.model, `its sleep failed: ${note.error}`],
  model_lost: note => [note.model, `its engine is gone: ${note.error}`],
  model_faulted: note => [note.model, `faulted: ${note.error}; look, repair, then: ${note.repair}`],
  model_assumed_asleep: note => [note.model, `counts as asleep, unproven: ${note.error}`],
}
const OTHERS = {
  switch_ended: note => [note.to ?? note.from, `switch ${note.switch} from ${note.from} to ${note.to ?? "asleep"}: ${note.result}${
    note.cost_secs == null ? "" : `, cost ${duration(note.cost_secs)} after ${duration(note.drain_secs)} of drain`}`],
  backoff_started: note => [note.model, `not tried again for ${duration(note.secs)} after failure ${note.failures}`],
  model_reset: note => [note.model, "reset by an operator"],
  pin_set: note => [note.model, note.pinned ? `pinned${note.reason ? ` (${note.reason})` : ""}` : "no longer pinned"],
  model_deepened: note => [note.model, `sleeps deeper: from ${note.from_level} to ${note.to_level}`],
  lease_set: note => ["", note.leased ? `the GPU is lent to another job${note.reason ? ` (${note.reason})` : ""}` : "the GPU came back"],
  lease_held: note => ["", `the GPU is free for that job, after ${duration(note.after_secs)}`],
  manual_set: note => ["", note.manual ? "manual mode: operators alone switch" : "the policy switches again"],
}
const LEGEND = [["awake", "awake"], ["waking", "wakes"], ["draining", "drains"], ["sleeping", "goes to sleep"], ["lost", "lost, faulted or failed to wake"], ["failure", "failure"], ["unseen", "not known"], ["lent", "lent to another job"]]
const IN_TABLE = 200
const FEW = 10 // models

export class Timeline {
  #chosen = false
  #span = HOUR
  #end = null // null: now
  #pointer = null
  #drag = null
  #names = new Map()
  #said = 0
  #rows = ""
  #buttons = {}

  constructor(world) {
    this.world = world
    this.box = at("plot")
    this.svg = this.box.appendChild(draw("svg", { role: "img", "aria-label": "The last hour" }))
    this.#tools()
    only(at("legend"), ...LEGEND.map(([kind, word]) => make("li", {}, swatch(kind), word)))
    new ResizeObserver(() => this.show()).observe(at("timeline"))
    at("table").addEventListener("toggle", () => this.show())
    this.#listen()
  }

  // ---- zoom

  get range() {
    const now = this.world.now(), end = this.#end ?? now
    if (!this.#chosen && this.world.begins !== null) {
      // Until a span is chosen: as much as there is to see.
      this.#span = PRESETS.map(([span]) => span).find(span => 1.5 * span >= now - this.world.begins) ?? HOUR
    }
    return [end - this.#span, end]
  }

  zoom(factor, anchor = null) {
    const [start, end] = this.range
    const place = anchor ?? (this.#end === null ? end : (start + end) / 2)
    const span = Math.min(HOUR, Math.max(LEAST, this.#span * factor))
    this.#set(span, place + (end - place) * span / this.#span)
  }

  move(share) {
    this.#set(this.#span, this.range[1] + share * this.#span)
  }

  whole(span = HOUR) {
    this.#set(span, Infinity)
  }

  #set(span, end) {
    this.#chosen = true
    const now = this.world.now()
    this.#span = span
    const last = Math.max(end, now - HOUR + span)
    this.#end = last >= now - 1e-3 * span ? null : last
    this.show()
  }

  #tools() {
    const button = (name, label, text, act) => this.#buttons[name] = make("button", { type: "button", "aria-label": label, title: label, onclick: act }, text)
    only(at("zoom"),
      button("back", "Earlier", "‹", () => this.move(-.5)), button("on", "Later", "›", () => this.move(.5)),
      button("in", "Zoom in", "+", () => this.zoom(.5)), button("out", "Zoom out", "−", () => this.zoom(2)),
      ...PRESETS.map(([span, text]) =>
        button(span, `The last ${text}`, text, () => this.whole(span))))
  }

  #listen() {
    const { box } = this
    const keys = { "+": () => this.zoom(.5), "=": () => this.zoom(.5), "-": () => this.zoom(2), ArrowLeft: () => this.move(-.25), ArrowRight: () => this.move(.25), 0: () => this.whole(), End: () => this.whole(this.#span) }
    box.addEventListener("keydown", event => {
      const act = keys[event.key]
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return
      event.preventDefault()
      act()
    })
    box.addEventListener("wheel", event => {
      const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)
      // Where there is nothing more to see the page scrolls on.
      if (event.ctrlKey || (!sideways && event.deltaY > 0 && this.#span >= HOUR)) return
      event.preventDefault()
      const unit = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1
      if (sideways) this.move((event.deltaX || event.deltaY) * unit / this.width)
      else this.zoom(Math.exp(event.deltaY * unit / 400), this.#time(event))
    }, { passive: false })
    box.addEventListener("pointerdown", event => {
      if (event.button !== 0 || this.#span >= HOUR) return
      this.#drag = { x: event.clientX, end: this.range[1] }
      box.setPointerCapture(event.pointerId)
    })
    box.addEventListener("pointermove", event => {
      this.#pointer = event
      if (this.#drag) this.#set(this.#span, this.#drag.end - (event.clientX - this.#drag.x) / this.width * this.#span)
      this.#read()
    })
    for (const name of ["pointerup", "pointercancel"]) box.addEventListener(name, () => { this.#drag = null })
    box.addEventListener("pointerleave", () => {
      this.#pointer = null
      this.#read()
    })
  }

  #time(event) {
    const [start, end] = this.range
    const x = event.clientX - this.box.getBoundingClientRect().left - this.gutter
    return start + Math.min(1, Math.max(0, x / this.width)) * (end - start)
  }

  // ---- drawing

  show() {
    const { world } = this
    const whole = at("timeline").clientWidth - 28
    if (!world.status || whole <= 0) return
    const narrow = whole < 620
    this.gutter = narrow ? 0 : Math.min(180, Math.round(whole * .16))
    this.width = whole - this.gutter
    this.lane = narrow ? 38 : 26
    this.top = narrow ? 16 : 6
    const [start, end] = this.range
    this.stretches = world.stretches(start, end)
    this.failures = world.notes.flatMap(note => FAILURES[note.event] && note.time >= start && note.time <= end ? [{ time: note.time, said: FAILURES[note.event](note) }] : [])
    const models = this.#lanes()
    // While there is nothing to draw, a line says so.
    const calm = !this.failures.length && !this.world.status.lease && !world.gaps.length && this.#end === null
      && [...this.stretches.values()].every(list => list.every(one => one.phase === "asleep" || one.phase === "unknown"))
    const known = world.begins === null ? null : Math.max(world.begins, start)
    at("calm").hidden = !calm
    for (const name of ["plot", "readout", "legend", "table", "zoom"]) at(name).hidden = calm
    if (calm) {
      say(at("calm"), known === null ? "…" : `No model has been awake since ${clock(known, false)}.`)
      return
    }
    const height = 8 + models.length * this.lane + 22
    mark(this.svg, "width", whole)
    mark(this.svg, "height", height)
    mark(this.svg, "viewBox", `0 0 ${whole} ${height}`)
    const x = time => this.gutter + (time - start) / (end - start) * this.width
    only(this.svg, ...this.#patterns(models), ...this.#unseen(x, start, end, models.length), ...this.#lent(x, start, end, models.length), ...this.#axis(x, start, end, models.length),
      ...models.map((model, place) => this.#lane(model, 8 + place * this.lane, x, start, end)))
    this.#tell(start, end)
    this.#read()
    this.#table(start, end)
    for (const [name, button] of Object.entries(this.#buttons)) {
      if (Number(name)) mark(button, "aria-pressed", String(this.#end === null && Math.abs(this.#span - name) < 1e-6))
    }
    mark(this.#buttons.out, "aria-disabled", this.#span >= HOUR ? "true" : null)
    mark(this.#buttons.back, "aria-disabled", end - this.#span <= world.now() - HOUR + 1 ? "true" : null)
    mark(this.#buttons.on, "aria-disabled", this.#end === null ? "true" : null)
    mark(this.#buttons.in, "aria-disabled", this.#span <= LEAST ? "true" : null)
  }

  // Of many models those that only slept have no lane.
  #lanes() {
    const all = [...this.stretches.keys()]
    if (all.length <= FEW) return all
    const failed = new Set(this.failures.map(one => one.said[0]))
    return all.filter(model => failed.has(model) || this.stretches.get(model).some(one => one.phase !== "asleep" && one.phase !== "unknown"))
  }

  #patterns(models) {
    const hatch = (id, d, cls) => draw("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse", class: cls }, draw("rect", { width: 6, height: 6, class: "ground" }), draw("path", { d }))
    const seen = new Set(models.map(colour))
    return [draw("defs", {},
      ...[...seen].flatMap(name => [
        hatch(`waking-${name}`, "M-1 1 1-1M0 6 6 0M5 7 7 5", name),
        hatch(`draining-${name}`, "M1 0V6M4 0V6", name),
        hatch(`sleeping-${name}`, "M-1 5 1 7M0 0 6 6M5-1 7 1", name),
      ]),
      hatch("lost", "M0 0 6 6M0 6 6 0", "danger"), hatch("unseen", "M0 6 6 0", "faint"), hatch("unknown", "M0 3H6", "faint"))]
  }

  #unseen(x, start, end, lanes) {
    const begins = this.world.begins ?? start
    const gaps = [...this.world.gaps, ...(begins > start ? [[start, Math.min(begins, end)]] : [])]
    return gaps.filter(([from, to]) => to > start && from < end).map(([from, to]) => {
      const left = Math.max(x(from), this.gutter)
      return draw("rect", { x: left, y: 4, width: Math.max(0, Math.min(x(to), x(end)) - left), height: lanes * this.lane + 4, fill: "url(#unseen)" })
    })
  }

  // When the GPU was lent to another job.
  #lent(x, start, end, lanes) {
    const found = []
    let from = null
    for (const note of this.world.notes) {
      if (note.event !== "lease_set") continue
      if (note.leased) from ??= note.time
      else {
        found.push([from ?? start, note.time])
        from = null
      }
    }
    const { lease } = this.world.status
    if (lease) found.push([from ?? this.world.now() - lease.for, end])
    return found.filter(([from, to]) => to > start && from < end).map(([from, to]) => {
      const left = Math.max(x(from), this.gutter)
      return draw("rect", { class: "lent", x: left, y: 4, width: Math.max(1, Math.min(x(to), x(end)) - left), height: lanes * this.lane + 4 })
    })
  }

  #axis(x, start, end, lanes) {
    const bottom = 8 + lanes * this.lane
    const step = STEPS.find(one => one / (end - start) * this.width >= (one < 60 ? 78 : 58)) ?? STEPS.at(-1)
    // Whole minutes of the clock on the wall, in whatever time zone.
    const zone = new Date(end * 1000).getTimezoneOffset() * 60
    const marks = []
    for (let time = Math.ceil((start - zone) / step) * step + zone; time <= end; time += step) {
      const at = x(time)
      marks.push(draw("path", { class: "grid", d: `M${at} 4V${bottom + 4}` }))
      const half = step < 60 ? 26 : 16 // of its text
      const middle = Math.min(Math.max(at, this.gutter + half), this.gutter + this.width - half)
      marks.push(draw("text", { class: "tick", x: middle, y: bottom + 17, "text-anchor": "middle" }, clock(time, step < 60)))
    }
    return marks
  }

  #lane(model, y, x, start, end) {
    const stretches = this.stretches.get(model), bar = 14, top = y + (this.lane - bar - this.top) / 2 + (this.gutter ? this.top / 2 : this.top)
    const group = draw("g", { class: `lane ${colour(model)}`, "data-model": model })
    group.append(draw("path", { class: "base", d: `M${this.gutter} ${top + bar / 2}H${this.gutter + this.width}` }))
    let edge = -1
    for (const { phase, from, to, failed } of stretches) {
      if (phase === "asleep") continue
      const left = Math.max(this.gutter, x(from)), right = Math.min(x(end), x(to))
      const wide = Math.max(1, right - left)
      // Where many are narrower than a dot the first stands for them, and for none that failed.
      if (right <= edge && !failed) continue
      edge = left + wide
      const thin = wide < 4 && phase !== "awake" // no room for hatching
      const look = failed ? "lost" : phase
      group.append(draw("rect", { class: `stretch ${look}${thin ? " thin" : ""}`, "data-phase": phase, "data-failed": failed, x: left, y: top, width: wide, height: bar, fill: thin ? "currentColor" : fillOf(look, model) }))
    }
    for (const { time, said } of this.failures) {
      if (said[0] === model) group.append(draw("path", { class: "failure", d: `M${x(time) - 4} ${top - 1}l8 8m0-8l-8 8` }))
    }
    const label = draw("text", { class: "name", x: this.gutter ? 18 : 15, y: this.gutter ? top + 11 : y + 11 })
    const chip = shape(model)
    for (const [name, value] of [["x", 0], ["y", this.gutter ? top + 1.5 : y + 1], ["width", 11], ["height", 11]]) chip.setAttribute(name, value)
    group.append(chip, label)
    this.#name(label, model, group)
    return group
  }

  // Shorten a name to what fits, once for each width.
  #name(label, model) {
    const room = (this.gutter || this.width) - 26, key = `${model}\n${room}`
    if (!this.#names.has(key)) {
      if (this.#names.size > 500) this.#names.clear()
      const pen = this.pen ??= document.createElement("canvas").getContext("2d")
      pen.font = `12px ${getComputedStyle(this.box).fontFamily}`
      const letters = [...model]
      let text = model
      while (letters.length > 1 && pen.measureText(text).width > room) {
        letters.pop()
        text = `${letters.join("")}…`
      }
      this.#names.set(key, text)
    }
    label.append(this.#names.get(key))
    if (this.#names.get(key) !== model) label.append(draw("title", {}, model))
  }

  // ---- in words

  #tell(start, end) {
    if (Date.now() - this.#said < 5000) return // it changes all the time
    this.#said = Date.now()
    const parts = [...this.stretches].map(([model, list]) => {
      const awake = list.filter(one => one.phase === "awake")
      const seconds = awake.reduce((sum, one) => sum + Math.min(one.to, end) - Math.max(one.from, start), 0)
      return `${model} awake ${duration(seconds)}`
    })
    const failed = this.failures.length ? `, ${count(this.failures.length, "failure")}` : ""
    mark(this.svg, "aria-label", `From ${clock(start)} to ${clock(end)}: ${parts.join(", ")}${failed}. The table below has the details.`)
  }

  #read() {
    const line = at("readout"), event = this.#pointer
    const [start, end] = this.range
    const slept = this.stretches ? this.stretches.size - this.#lanes().length : 0
    let text = `${clock(start)} – ${this.#end === null ? "now" : clock(end)}. Wheel, + and − zoom; ← and → move; 0 shows the hour.${slept ? ` ${count(slept, "model")} that only slept ${slept === 1 ? "is" : "are"} not shown.` : ""}`
    if (event && this.stretches) {
      const time = this.#time(event)
      const place = Math.floor((event.clientY - this.box.getBoundingClientRect().top - 8) / this.lane)
      const model = this.#lanes()[place]
      const near = 6 / this.width * (end - start)
      const failure = this.failures.find(one => one.said[0] === model && Math.abs(one.time - time) < near)
      const list = this.stretches.get(model) ?? []
      const found = list.find(one => one.phase !== "asleep" && time >= one.from - near / 3 && time <= one.to + near / 3) ?? list.find(one => time >= one.from && time <= one.to)
      text = clock(time)
      if (failure) text = `${clock(failure.time)}  ${model}: ${failure.said[1]}`
      else if (found) text = `${clock(time)}  ${model}: ${found.phase}${found.failed ? ", which failed," : ""} for ${duration(found.to - found.from)}, ${clock(found.from)} – ${found.to >= this.world.now() - .5 ? "now" : clock(found.to)}`
    }
    say(line, text)
  }

  #table(start, end) {
    if (!at("table").open) return
    const rows = [...this.stretches.values()].flat()
      .filter(one => one.phase !== "asleep")
      .map(one => [Math.max(one.from, start), one.model, one.failed ? `${one.phase}, failed` : one.phase, one.to >= end - .5 && this.#end === null ? null : one.to - one.from])
    for (const note of this.world.notes) {
      const words = FAILURES[note.event] ?? OTHERS[note.event]
      if (words && note.time >= start && note.time <= end) rows.push([note.time, ...words(note), undefined])
    }
    rows.sort((one, other) => other[0] - one[0])
    const key = JSON.stringify(rows.map(row => [Math.round(row[0]), row[1], row[2], row[3] === null]))
    if (key === this.#rows) return
    this.#rows = key
    only(at("table").querySelector("tbody"), ...rows.slice(0, IN_TABLE).map(([time, model, what, long]) => make("tr", {},
      make("td", {}, clock(time)), make("td", {}, make("bdi", {}, model)), make("td", {}, what),
      make("td", { class: "number" }, long === undefined ? "" : long === null ? "until now" : duration(long)))))
  }
}

function fillOf(phase, model) {
  if (phase === "deepening") return `url(#sleeping-${colour(model)})`
  if (["waking", "draining", "sleeping"].includes(phase)) return `url(#${phase}-${colour(model)})`
  if (phase === "lost" || phase === "faulted") return "url(#lost)"
  return phase === "awake" ? "currentColor" : "url(#unknown)"
}

function swatch(kind) {
  const lines = { waking: "M-1 11 11-1M4 14 20-2M12 14 25 1", draining: "M3 0V12M8 0V12M13 0V12M18 0V12", sleeping: "M-1 1 11 13M4-2 20 14M12-2 25 11", lost: "M0 0 12 12M10 0 22 12M12 0 0 12M22 0 10 12", unseen: "M-1 11 11-1M4 14 20-2M12 14 25 1" }
  const inside = kind === "failure" ? [draw("path", { class: "failure", d: "M7 2l8 8m0-8l-8 8" })]
    : [draw("rect", { width: 22, height: 12, class: kind === "awake" ? "full" : "ground" }), draw("path", { d: lines[kind] ?? "" })]
  return draw("svg", { class: `swatch ${kind}`, viewBox: "0 0 22 12", width: 22, height: 12, "aria-hidden": "true" }, ...inside)
}

// What is known of llmux at this moment. No markup here: events in, state out.

const LINES = 400
const NOTES = 2000
const DECISIONS = 200
const START = 60 // seconds that the first look at what runs may take
const WINDOW = 4 // seconds over which tokens are averaged

export const NOTED = new Set([
  "switch_started", "switch_ended", "switch_failed", "sleep_hook_failed", "backoff_started", "model_lost",
  "model_faulted", "model_assumed_asleep", "model_reset", "model_deepened", "pin_set", "lease_set", "lease_held",
  "manual_set",
])
export const HOOKS = new Set(["hook_started", "hook_output", "hook_completed", "hook_failed"])

export class World {
  status = null
  gpus = null
  begins = null // what was before is not known
  gaps = [] // [from, to]: llmux was not reached
  moves = []
  notes = []
  decisions = []
  output = []
  mayRead = true // what hooks print
  link = "connecting"
  seen = null // server's time of the last word
  #offset = 0
  #streamed = new Map()
  #born = new Map() // models that came while this page looked on, and when
  #waiting = [] // what comes while the history is on its way; null: it is here

  // The server's clock, in Unix seconds.
  now() {
    return this.link === "live" ? Date.now() / 1000 + this.#offset : this.seen ?? Date.now() / 1000
  }

  connecting() {
    for (const [name, data] of this.#waiting ?? []) this.#event(name, data)
    this.#waiting = []
    this.#streamed.clear()
  }

  apply(name, data) {
    if (name === "status") this.#status(data)
    else if (name === "gpus") this.gpus = data
    else if (this.#waiting) keep(this.#waiting, [name, data], NOTES)
    else this.#event(name, data)
  }

  // The last hour, as the server has kept it; what this page has seen before that stays.
  load(history, decisions) {
    const before = this.moves.filter(move => move.time < history.begins)
    if (this.lostAt != null && history.begins > this.lostAt) this.gaps.push([this.lostAt, history.begins])
    this.begins = before.length || this.gaps.length ? Math.min(this.begins ?? Infinity, history.begins) : history.begins
    this.moves = [...before, ...history.moves]
    this.notes = [...this.notes.filter(note => note.time < history.begins), ...history.notes]
    this.decisions = merge([], decisions)
    this.mayRead = history.output !== null
    this.output = history.output?.map(line => ({ ...line, name: "hook_output" })) ?? []
    const last = history.moves.at(-1)?.id ?? 0
    const late = this.#waiting ?? []
    this.#waiting = null
    for (const [name, data] of late) {
      if (name === "phase" ? data.id > last : name === "decision" || data.time > history.now) this.#event(name, data)
    }
  }

  #status(status) {
    for (const name of Object.keys(status.models)) {
      if (this.status && !(name in this.status.models)) this.#born.set(name, status.time)
    }
    this.status = status
    this.seen = status.time
    this.#offset = status.time - Date.now() / 1000
    for (const [name, model] of Object.entries(status.models)) {
      const samples = this.#streamed.get(name) ?? []
      if (samples.length && model.streamed < samples.at(-1)[1]) samples.length = 0 // another engine
      samples.push([status.time, model.streamed])
      while (samples.length > 2 && samples[1][0] <= status.time - WINDOW) samples.shift()
      this.#streamed.set(name, samples)
    }
    for (const decision of status.decisions) this.#decision(decision)
    const hour = status.time - 3700
    while (this.moves.length && this.moves[0].time < hour - 3600) this.moves.shift()
    this.gaps = this.gaps.filter(gap => gap[1] > hour)
  }

  #event(name, data) {
    if (name === "phase") this.moves.push(data)
    else if (name === "decision") this.#decision(data)
    else if (HOOKS.has(name)) keep(this.output, { ...data, name }, LINES)
    else if (NOTED.has(name)) keep(this.notes, { ...data, event: name }, NOTES)
  }

  #decision(decision) {
    const known = this.decisions.findLastIndex(one => one.id === decision.id)
    if (known >= 0) this.decisions[known] = decision
    else this.decisions = merge(this.decisions, [decision])
  }

  // Events streamed per second; null while that is not known yet.
  rate(model) {
    const samples = this.#streamed.get(model)
    if (!samples || samples.length < 2) return null
    const [then, before] = samples[0], [time, streamed] = samples.at(-1)
    return time > then ? (streamed - before) / (time - then) : null
  }

  // Why the model is there: the last decision that brought it.
  cameBy(model) {
    return this.decisions.findLast(one => one.kind === "switch" && one.target === model) ?? null
  }

  cost(from, to) {
    const source = from.length === 1 ? from[0] : null
    if (from.length > 1) return null
    return this.status.switch_costs.find(one => (one.from ?? null) === source && one.to === to)?.seconds ?? null
  }

  // Since when a model was in the phase that its first known move ends. What a reload adds was not there before.
  #since(move, first) {
    if (move.from !== "unknown") return this.#born.get(move.model) ?? first
    const started = this.moves.find(one => one.from !== "unknown")
    const added = this.#born.has(move.model) || (started && started.id < move.id) || move.time - first > START
    return added ? move.time : first
  }

  // The phases of every model between two times, as [{model, phase, from, to}] by model.
  stretches(start, end) {
    const now = this.now()
    const found = new Map(Object.keys(this.status?.models ?? {}).map(name => [name, []]))
    const open = new Map()
    const close = (model, time) => {
      const last = open.get(model)
      if (last && last.from < time && time > start && last.from < end) {
        found.get(model).push({ model, phase: last.phase, from: last.from, to: time, ...(last.failed && { failed: true }) })
      }
    }
    const first = this.begins ?? start
    for (const move of this.moves) {
      if (!found.has(move.model)) found.set(move.model, [])
      // A move that does not go on from the last one comes after a gap.
      const last = open.get(move.model)
      if (!last) open.set(move.model, { phase: move.from, from: this.#since(move, first) })
      else if (last.phase !== move.from) {
        const gap = this.gaps.find(([from, to]) => from <= move.time && to > last.from)
        close(move.model, gap?.[0] ?? move.time)
        open.set(move.model, { phase: move.from, from: gap?.[1] ?? move.time })
      }
      if (move.from === "waking" && move.to !== "awake" && open.get(move.model)) open.get(move.model).failed = true
      close(move.model, move.time)
      open.set(move.model, { phase: move.to, from: move.time })
    }
    for (const [model, { phase }] of Object.entries(this.status?.models ?? {})) {
      if (!open.has(model)) open.set(model, { phase, from: this.#born.get(model) ?? first })
    }
    for (const model of open.keys()) if (found.has(model)) close(model, now)
    return found
  }
}

// By id: what comes later from the server may be older.
function merge(known, more) {
  const all = new Map([...known, ...more].map(one => [one.id, one]))
  return [...all.values()].sort((one, other) => one.id - other.id).slice(-DECISIONS)
}

function keep(list, item, most) {
  list.push(item)
  if (list.length > most) list.splice(0, list.length - most)
}

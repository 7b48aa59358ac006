// What hooks print, as they print it.

import { at, make, only } from "./dom.js"
import { choose, clock, duration } from "./format.js"
import { unlock } from "./operate.js"
import { shape } from "./palette.js"

const MOST = 300
let last = null // the newest line that is shown
let filter = ""
let state = ""

export function showHooks(world) {
  const select = at("hooks-of")
  choose(select, Object.keys(world.status.models), () => showHooks(world))
  filter = select.value
  const box = at("hooks")
  const now = `${world.mayRead} ${world.output.length > 0} ${filter}`
  if (now !== state || (last && !world.output.includes(last))) {
    state = now
    last = null
    only(box)
    if (!world.mayRead) {
      box.append(make("p", { class: "sub" }, "What hooks print is shown to operators. ", make("button", { type: "button", onclick: unlock }, "Give the admin key")))
    } else if (!world.output.length) {
      box.append(make("p", { class: "sub" }, "No hook has printed anything yet."))
    }
  }
  const begin = last ? world.output.indexOf(last) + 1 : 0
  const fresh = world.output.slice(begin).filter(line => !filter || line.model === filter)
  last = world.output.at(-1) ?? null
  if (!fresh.length) return
  const follow = box.scrollHeight - box.scrollTop - box.clientHeight < 30
  box.append(...fresh.slice(-MOST).map(lineOf))
  while (box.children.length > MOST) box.firstChild.remove()
  if (follow) box.scrollTop = box.scrollHeight
}

function lineOf(line) {
  return make("p", { class: line.name },
    make("time", {}, clock(line.time)), make("span", { class: "model" }, shape(line.model), make("bdi", {}, line.model)),
    make("span", { class: "hook" }, line.hook), make("span", { class: "text" }, words(line)))
}

function words(line) {
  if (line.name === "hook_started") return "begins"
  if (line.name === "hook_completed") return `done after ${duration(line.duration_secs)}`
  if (line.name === "hook_failed") {
    const code = line.exit_code
    const how = code == null ? "failed" : code < 0 ? `was ended by signal ${-code}` : `exited with ${code}`
    return `${how} after ${duration(line.duration_secs)}`
  }
  return line.line
}

// The views of the page, one at a time; the address's fragment says which.

import { at, mark } from "./dom.js"

const NAMES = ["overview", "requests", "logs", "try"]
const button = name => at(`tab-${name}`)

export let tab = "overview"
let changed = () => {}

export function begin(listener) {
  changed = listener
  for (const name of NAMES) button(name).addEventListener("click", () => go(name))
  at("tabs").addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key]
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    const place = NAMES.indexOf(tab) + step
    const next = Number.isFinite(step) ? NAMES.at(place % NAMES.length) : step < 0 ? NAMES[0] : NAMES.at(-1)
    go(next)
    button(next).focus()
  })
  addEventListener("hashchange", follow)
  follow()
}

function go(name) {
  history.pushState(null, "", name === "overview" ? location.pathname : `#${name}`)
  show(name)
}

function follow() {
  const name = location.hash.slice(1)
  if (NAMES.includes(name)) show(name)
  else if (!name || at("overview").querySelector(`#${CSS.escape(name)}`)) show("overview")
}

addEventListener("popstate", follow)

function show(name) {
  tab = name
  for (const one of NAMES) {
    at(one).hidden = one !== name
    mark(button(one), "aria-selected", String(one === name))
    mark(button(one), "tabindex", one === name ? null : "-1")
  }
  changed(name)
}

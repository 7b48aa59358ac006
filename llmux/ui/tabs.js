// The views of a page, one at a time; the address's fragment says which. They are what the element `tabs` has.

import { at, mark } from "./dom.js"

const buttons = [...at("tabs").querySelectorAll("[role=tab]")]
const names = buttons.map(button => button.getAttribute("aria-controls"))

export let tab = names[0]
let changed = () => {}

export function begin(listener) {
  changed = listener
  buttons.forEach((button, place) => button.addEventListener("click", () => go(names[place])))
  at("tabs").addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key]
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    const place = names.indexOf(tab) + step
    const next = Number.isFinite(step) ? names.at(place % names.length) : step < 0 ? names[0] : names.at(-1)
    go(next)
    buttons[names.indexOf(next)].focus()
  })
  addEventListener("hashchange", follow)
  addEventListener("popstate", follow)
  follow()
}

export function go(name) {
  history.pushState(null, "", name === names[0] ? location.pathname : `#${name}`)
  show(name)
}

function follow() {
  const name = location.hash.slice(1)
  if (names.includes(name)) show(name)
  else if (!name || at(names[0]).querySelector(`#${CSS.escape(name)}`)) show(names[0])
}

function show(name) {
  tab = name
  names.forEach((one, place) => {
    at(one).hidden = one !== name
    mark(buttons[place], "aria-selected", String(one === name))
    mark(buttons[place], "tabindex", one === name ? null : "-1")
  })
  changed(name)
}

// Tables that stay in place: a row is made once, and only what has changed of it is touched.

import { make, mark, say } from "./dom.js"

export class Rows {
  #rows = new Map()

  // make(item) returns the row's element.
  constructor(body, make) {
    this.body = body
    this.make = make
  }

  // Show these items, in this order; `update(elements, item)` is called with every one, and may add elements.
  show(items, key, update = null) {
    const wanted = new Set(items.map(key))
    for (const [name, elements] of this.#rows) {
      if (wanted.has(name)) continue
      for (const element of elements) element.remove()
      this.#rows.delete(name)
    }
    let place = this.body.firstChild
    for (const item of items) {
      const name = key(item)
      if (!this.#rows.has(name)) this.#rows.set(name, [this.make(item)])
      const elements = this.#rows.get(name)
      update?.(elements, item)
      for (const element of elements) {
        if (element === place) place = place.nextSibling
        else this.body.insertBefore(element, place)
      }
    }
  }

  clear() {
    for (const elements of this.#rows.values()) for (const element of elements) element.remove()
    this.#rows.clear()
  }
}

// A row of cells, each [content, label, class]; where there is no room for columns the label stands in the cell.
export const row = cells => make("tr", { role: "row" }, ...cells.map(([content, label, kind]) =>
  make("td", { role: "cell", "data-label": label, class: kind, ...(content === "–" ? { "data-none": "" } : {}) }, content)))

// Change a cell that holds text.
export function figure(cell, text) {
  say(cell, text)
  mark(cell, "data-none", text === "0" || text === "–" ? "" : null)
}

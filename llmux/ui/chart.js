// A chart of stacked columns: drawn anew when its figures change, read with the pointer or the arrow keys.

import { draw, make, mark, only, say } from "./dom.js"

const HEIGHT = 220, LEFT = 62, BOTTOM = 22, TOP = 8
const TICKS = 4

// 1, 2 or 5 times a power of ten, so that there are at most so many steps up to `most`.
export function step(most, ticks = TICKS) {
  if (!(most > 0)) return 1
  const power = 10 ** Math.floor(Math.log10(most / ticks))
  return [1, 2, 5, 10].map(one => one * power).find(one => most / one <= ticks)
}

export class Columns {
  #data = { columns: [], series: [] }
  #at = null // the column that is read
  #drawn = ""

  // `readout` is the element that has the figures in words; `note` what stands there otherwise.
  constructor(box, readout, note = "") {
    Object.assign(this, { box, readout, note })
    this.svg = box.appendChild(draw("svg", { role: "img" }))
    new ResizeObserver(() => this.#draw()).observe(box)
    box.addEventListener("pointermove", event => this.#read(this.#under(event)))
    box.addEventListener("pointerdown", event => this.#read(this.#under(event)))
    box.addEventListener("pointerleave", () => this.#read(null))
    box.addEventListener("blur", () => this.#read(null))
    box.addEventListener("keydown", event => {
      const last = this.#data.columns.length - 1, now = this.#at ?? last + 1
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key]
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return
      event.preventDefault()
      this.#read(Math.min(last, Math.max(0, to)))
    })
  }

  // columns: [{name, short}]; series: [{name, look, values}] from the bottom up; spell(value, step) in words, where the others are a step apart; label: of all.
  show(data) {
    this.#data = data
    this.#draw()
  }

  #draw() {
    const { columns, series, spell, label } = this.#data
    const width = this.box.clientWidth
    if (!width || !columns.length) return
    const key = JSON.stringify([width, columns, series, label])
    if (key === this.#drawn) return
    this.#drawn = key
    const sums = columns.map((_, place) => series.reduce((sum, one) => sum + one.values[place], 0))
    const most = Math.max(...sums), by = step(most)
    const top = Math.max(by, Math.ceil(most / by - 1e-9) * by)
    const room = HEIGHT - BOTTOM - TOP, y = value => TOP + room * (1 - value / top)
    const wide = (width - LEFT) / columns.length, bar = Math.max(1, Math.min(wide * .72, 46))
    this.wide = wide
    mark(this.svg, "width", width)
    mark(this.svg, "height", HEIGHT)
    mark(this.svg, "viewBox", `0 0 ${width} ${HEIGHT}`)
    mark(this.svg, "aria-label", `${label}. The arrow keys read it column by column.`)
    const parts = []
    for (let value = 0; value <= top + by / 2; value += by) {
      parts.push(draw("path", { class: value ? "grid" : "base", d: `M${LEFT} ${y(value)}H${width}` }))
      parts.push(draw("text", { class: "tick", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, spell(value, by)))
    }
    const every = Math.ceil(62 / wide) // columns that have a name below
    columns.forEach((column, place) => {
      const left = LEFT + wide * place + (wide - bar) / 2
      const group = draw("g", { class: "column", "data-place": place }, draw("rect", { class: "under", x: LEFT + wide * place, y: TOP, width: wide, height: room }))
      let sum = 0
      for (const { look, values } of series) {
        if (!(values[place] > 0)) continue
        const low = y(sum), high = y(sum += values[place])
        // A line of the ground between two parts tells them apart, whatever their colours.
        group.append(draw("rect", { class: look, fill: "currentColor", x: left, y: high, width: bar, height: Math.max(.75, low - high - (low - high > 3 ? 1 : 0)) }))
      }
      parts.push(group)
      if ((columns.length - 1 - place) % every === 0) {
        const middle = Math.min(left + bar / 2, width - 20)
        parts.push(draw("text", { class: "tick", x: middle, y: HEIGHT - 6, "text-anchor": "middle" }, column.short))
      }
    })
    only(this.svg, ...parts)
    this.#read(this.#at)
  }

  #under(event) {
    const x = event.clientX - this.box.getBoundingClientRect().left - LEFT
    const place = Math.floor(x / this.wide)
    return place >= 0 && place < this.#data.columns.length ? place : null
  }

  #read(place) {
    const { columns, series, spell } = this.#data
    this.#at = place !== null && place < columns.length ? place : null
    for (const group of this.svg.querySelectorAll(".column")) mark(group, "data-here", Number(group.dataset.place) === this.#at ? "" : null)
    if (this.#at === null) return say(this.readout, this.note)
    const found = series.map(one => [one.name, one.values[this.#at]]).filter(([, value]) => value > 0)
    const sum = found.reduce((all, [, value]) => all + value, 0)
    found.sort((one, other) => other[1] - one[1])
    say(this.readout, `${columns[this.#at].name}: ${spell(sum)}${found.length ? ` · ${found.map(([name, value]) => `${name} ${spell(value)}`).join(", ")}` : ""}`)
  }
}

// A bar as long as a share of 1, beside a figure.
export function share(value) {
  const bar = make("span", { class: "bar share" }, make("i"))
  bar.firstChild.style.inlineSize = `${Math.round(1000 * Math.min(1, value)) / 10}%`
  return bar
}

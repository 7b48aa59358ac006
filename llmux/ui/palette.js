// A model's colour and shape, the same everywhere. Nothing is told by colour alone.

import { draw } from "./dom.js"

const SHAPES = [
  draw("circle", { cx: 6, cy: 6, r: 5 }),
  draw("rect", { x: 1.5, y: 1.5, width: 9, height: 9 }),
  draw("path", { d: "M6 .5 11.800 10.800H.2z" }),
  draw("path", { d: "M6 0 12 6 6 12 0 6z" }),
  draw("path", { d: "M4 0h4v4h4v4H8v4H4V8H0V4h4z" }),
  draw("path", { d: "M3 .8h6L12 6 9 11.200H3L0 6z" }),
  draw("path", { d: "M0 1.500h12L6 11.500z" }),
  draw("path", { d: "M2.500 0 6 3.500 9.500 0 12 2.500 8.500 6 12 9.500 9.500 12 6 8.500 2.500 12 0 9.500 3.500 6 0 2.500z" }),
]
export const COLOURS = SHAPES.length

const places = new Map()

// Give out places in this order, the configuration's: every page has the same.
export function settle(models) {
  for (const model of models) place(model)
}

function place(model) {
  if (!places.has(model)) places.set(model, places.size)
  return places.get(model)
}

export const colour = model => `m${place(model) % COLOURS}`

export function shape(model) {
  // With more models than colours, those of one colour differ in shape.
  const round = Math.floor(place(model) / COLOURS)
  const it = SHAPES[(place(model) + round) % COLOURS].cloneNode()
  return draw("svg", { class: `mark ${colour(model)}`, viewBox: "0 0 12 12", "aria-hidden": "true" }, it)
}

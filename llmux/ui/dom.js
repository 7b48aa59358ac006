// Making elements. Whatever comes from outside is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg"

export const at = id => document.getElementById(id)

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value)
    else if (value === true) element.setAttribute(name, "")
    else if (value !== false && value != null) element.setAttribute(name, value)
  }
  element.append(...children.filter(child => child != null))
  return element
}

export const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children)

export const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children)

// Only what has changed is touched: a selection or a screen reader is not disturbed for nothing.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text
}

export function mark(element, name, value) {
  if (value == null || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name)
  } else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value)
}

export function only(element, ...children) {
  element.replaceChildren(...children.filter(child => child != null))
}

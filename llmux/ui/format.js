// Figures and times for people.

const two = number => String(number).padStart(2, "0")

// 40 ms, 0.4 s, 14 s, 3 min 20 s, 2 h 5 min
export function duration(seconds) {
  if (seconds == null) return "–"
  const value = Math.max(0, seconds)
  if (value < .0995) return `${Math.round(value * 1000)} ms`
  if (value < 9.95) return `${value.toFixed(1)} s`
  const whole = Math.round(value)
  if (whole < 120) return `${whole} s`
  if (whole < 7200) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`
  return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole % 3600 / 60))} min`
}

export function clock(time, seconds = true) {
  const date = new Date(time * 1000)
  return `${two(date.getHours())}:${two(date.getMinutes())}${seconds ? `:${two(date.getSeconds())}` : ""}`
}

// The time of today, and of another day with that.
export function moment(time) {
  const date = new Date(time * 1000)
  const day = date.toDateString() === new Date().toDateString() ? "" : `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} `
  return `${day}${clock(time)}`
}

export const rate = number => number == null ? "–" : number < 99.95 ? number.toFixed(1) : String(Math.round(number))

const plain = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 })

// 950, 12.3K, 4.5M
export const compact = number => plain.format(number)

const moneys = new Map()

// $0.00042, €1.50, 12.5 credits; one of several amounts that are `step` apart is told from the next.
export function amount(value, currency, step = 1) {
  const most = Math.max(2, -Math.floor(Math.log10(step) + 1e-9))
  const small = value !== 0 && Math.abs(value) < .01 && most === 2, key = `${currency} ${small} ${most}`
  if (!moneys.has(key)) {
    const digits = small ? { maximumSignificantDigits: 2 } : { minimumFractionDigits: 2, maximumFractionDigits: most }
    let format
    try {
      format = new Intl.NumberFormat("en", { style: "currency", currency, ...digits })
    } catch { // not one of ISO 4217
      const number = new Intl.NumberFormat("en", digits)
      format = { format: it => `${number.format(it)} ${currency}` }
    }
    moneys.set(key, format)
  }
  return moneys.get(key).format(value)
}

export const gib = bytes => (bytes / 2 ** 30).toFixed(1)

export const several = (names, none = "no model") => names.length ? names.join(" and ") : none

export const count = (number, one, more = `${one}s`) => `${number} ${number === 1 ? one : more}`

// The options of a select that names models; what is chosen stays.
export function choose(select, names, changed, all = "all models") {
  const wanted = all === null ? names : ["", ...names]
  const options = [...select.options]
  if (options.length === wanted.length && wanted.every((name, place) => options[place].value === name)) return
  const { value } = select
  select.replaceChildren(...wanted.map(name => {
    const option = document.createElement("option")
    option.value = name
    option.textContent = name || all
    return option
  }))
  select.value = wanted.includes(value) ? value : wanted[0] ?? ""
  select.onchange = changed
}

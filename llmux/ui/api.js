// Talking to llmux. The key lives in this tab's session storage and goes nowhere else.

import { at, say } from "./dom.js"

const BASE = new URL("../", import.meta.url) // …/llmux/
const NAME = "llmux-key"

export const address = path => new URL(path, BASE)

export function headers() {
  const key = sessionStorage.getItem(NAME)
  return key ? { Authorization: `Bearer ${key}` } : {}
}

export const hasKey = () => sessionStorage.getItem(NAME) !== null

export class Refused extends Error {
  constructor(status, message) {
    super(message)
    this.status = status
  }
}

async function refused(response) {
  const text = await response.text()
  try {
    return new Refused(response.status, JSON.parse(text).error.message)
  } catch {
    return new Refused(response.status, `llmux answered ${response.status}`)
  }
}

export async function ask(path, options = {}) {
  const response = await fetch(address(path), {
    cache: "no-store", credentials: "omit", redirect: "error", ...options, headers: { ...options.headers, ...headers() },
  })
  if (!response.ok) throw await refused(response)
  return response
}

export const read = async path => (await ask(path)).json()

// Whether the key of this tab, or none, is enough to operate llmux.
const operates = async () => (await read("history")).output !== null

// Ask for the admin key. Raises an Error where none is given, or one that does not open: then the old key stays.
export async function askForAdminKey(why) {
  const before = sessionStorage.getItem(NAME)
  if (!await askForKey(why)) throw new Error("nothing was done; operating takes the admin key (`admin_key` of the configuration)")
  let opens = false
  try {
    opens = await operates()
  } catch (error) {
    if (!(error instanceof Refused)) throw error
  } finally {
    if (!opens && before === null) sessionStorage.removeItem(NAME)
    else if (!opens) sessionStorage.setItem(NAME, before)
  }
  if (!opens) throw new Error("nothing was done; that is not the admin key (`admin_key` of the configuration)")
  dispatchEvent(new Event("llmux-key"))
}

// Ask for a key; true when there is a new one.
export function askForKey(why, wrong = false) {
  const dialog = at("ask"), field = at("ask-key")
  if (dialog.open) return Promise.resolve(false)
  say(at("ask-why"), wrong && hasKey() ? `The key that was given is not the right one. ${why}` : why)
  field.value = ""
  dialog.showModal()
  return new Promise(resolve => {
    const end = given => {
      controller.abort()
      dialog.close()
      const key = field.value.trim()
      field.value = ""
      if (given && key) sessionStorage.setItem(NAME, key)
      else if (given) sessionStorage.removeItem(NAME)
      resolve(given)
    }
    const controller = new AbortController(), { signal } = controller
    dialog.querySelector("form").addEventListener("submit", event => { event.preventDefault(); end(true) }, { signal })
    at("ask-cancel").addEventListener("click", () => end(false), { signal })
    dialog.addEventListener("cancel", event => { event.preventDefault(); end(false) }, { signal })
  })
}

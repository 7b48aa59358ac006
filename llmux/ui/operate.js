// What an operator does: a request to llmux, its key asked for where that is needed, and what came of it in words.

import { ask, askForAdminKey } from "./api.js"
import { at, mark, say } from "./dom.js"
import { clock, count, duration, several } from "./format.js"

const SHOWN = { done: 8000, refused: 30_000 } // ms that an answer stays
let forget

function told(kind, text) {
  const line = at("answer")
  line.dataset.kind = kind
  say(line, text)
  clearTimeout(forget)
  forget = setTimeout(() => say(line, ""), SHOWN[kind])
}

at("answer").addEventListener("click", () => say(at("answer"), ""))

// A model's name is one path segment, whatever is in it.
const path = (model, deed) => `models/${encodeURIComponent(model)}/${deed}`

export async function carryOut(button, subject, request, words) {
  mark(button, "data-busy", "")
  try {
    let answer
    try {
      answer = await send(request)
    } catch (error) {
      if (error.status !== 401) throw error
      await askForAdminKey("Operating this llmux takes its admin key.")
      answer = await send(request)
    }
    told("done", `${words(answer)}${answer.switch == null ? "" : ` (switch ${answer.switch})`}.`)
  } catch (error) {
    told("refused", `${subject}: ${error.message}`)
  } finally {
    mark(button, "data-busy", null)
  }
}

const send = ({ to, method = "POST", options }) =>
  ask(to, { method, body: options && JSON.stringify(options) }).then(response => response.json())

// Become an operator, before anything is done.
export async function unlock() {
  try {
    await askForAdminKey("Operating this llmux takes its admin key; it also shows what hooks print.")
    told("done", "The admin key is right.")
  } catch (error) {
    told("refused", error.message)
  }
}

export const DEEDS = {
  wake: name => ({ to: path(name, "wake") }),
  sleep: name => ({ to: path(name, "sleep") }),
  reset: name => ({ to: path(name, "reset") }),
  unpin: name => ({ to: path(name, "unpin") }),
}

export const pin = (button, name, world) => open({
  title: `Pin ${name}`, word: "Pin it",
  note: until => `${name} stays awake ${until}. Requests for models that cannot be awake beside it are refused meanwhile: 503, with Retry-After.`,
}, options => carryOut(button, name, { to: path(name, "pin"), options }, () => `${name} is pinned${until(options, world)}`))

export const lend = (button, world) => open({
  title: "Lend the GPU to another job", word: "Lend it", requests: true,
  note: (until, requests) => {
    const held = world.status.awake
    const first = held.length ? `${several(held)} ${held.length > 1 ? "finish their answers and go" : "finishes its answers and goes"} to sleep` : "No model is awake"
    return `${first}; no model wakes ${until}. Requests ${requests === "wait" ? "wait" : "are refused meanwhile: 503, with Retry-After"}.`
  },
}, options => carryOut(button, "lease", { to: "lease", options }, answer => `${answer.held ? "The GPU is lent to another job" : "The GPU is lent as soon as it is free"}${until(options, world)}`))

export const takeBack = (button, { id, reason, held, for: long }) => open({
  title: "Take the GPU back", word: "Take it back", choices: false,
  note: () => `${reason ? `The job “${reason}”` : "Another job"} has had it ${held ? `for ${duration(long)}` : "promised, and not got it yet"}. llmux cannot know whether it has let go of the GPU's memory: if it has not, the next wake fails.`,
  // That lease, and not one that has taken its place meanwhile.
}, () => carryOut(button, "lease", { to: `lease?id=${encodeURIComponent(id)}`, method: "DELETE" }, () => "The GPU is llmux's again"))

export const manual = (button, begins, world) => open({
  title: begins ? "Manual mode" : "End manual mode", word: begins ? "Begin it" : "End it", choices: false,
  note: () => {
    if (begins) return "The policy is not asked any more: only operators wake models. Requests for a model that is asleep wait until one does."
    const waiting = Object.values(world.status.models).filter(model => model.phase !== "awake").reduce((sum, model) => sum + model.queued, 0)
    return `The policy switches again${waiting ? `, and ${count(waiting, "request")} for models that are asleep may have it do so at once` : ""}.`
  },
}, () => carryOut(button, "manual mode", { to: "manual", method: begins ? "POST" : "DELETE" },
  () => begins ? "Manual mode: only operators switch" : "The policy switches again"))

export const cancel = (button, { model, request_id: id, key, answering }) => open({
  title: "Cancel a request", word: "Cancel it", stop: "Leave it", choices: false,
  note: () => `The request ${id}${key ? ` of ${key}` : ""} for ${model} ${answering ? "ends in the middle of its answer" : "is answered with 410 at once"}. Of several that have this id all end, also those in flight.`,
}, () => carryOut(button, "cancel", { to: `requests/${encodeURIComponent(id)}/cancel` }, () => `Request ${id} is cancelled`))

const LENGTHS = { m: 60, h: 3600 }
const seconds = length => length ? Number(length.slice(0, -1)) * LENGTHS[length.at(-1)] : null

function until(options, world) {
  return options.for ? ` until ${clock(world.now() + seconds(options.for), false)}` : ""
}

// A dialog, where there are choices for how long and why; what is chosen goes to `then`.
function open({ title, word, note, stop = "Cancel", choices = true, requests = false }, then) {
  const dialog = at("deed")
  if (dialog.open) return
  const length = at("deed-for"), reason = at("deed-reason"), wait = at("deed-requests")
  say(at("deed-title"), title)
  say(at("deed-do"), word)
  say(at("deed-cancel"), stop)
  reason.value = ""
  length.value = "1h"
  wait.value = "reject"
  at("deed-choices").hidden = !choices
  at("deed-requests-of").hidden = !requests
  const explain = () => {
    const end = seconds(length.value)
    say(at("deed-note"), note(end === null ? "until an operator ends it" : `until ${clock(Date.now() / 1000 + end, false)} (${duration(end)})`, wait.value))
  }
  explain()
  const controller = new AbortController(), { signal } = controller
  const close = () => {
    controller.abort()
    dialog.close()
  }
  length.addEventListener("change", explain, { signal })
  wait.addEventListener("change", explain, { signal })
  dialog.addEventListener("cancel", event => { event.preventDefault(); close() }, { signal })
  at("deed-cancel").addEventListener("click", close, { signal })
  dialog.querySelector("form").addEventListener("submit", event => {
    event.preventDefault()
    close()
    const options = {}
    if (!choices) return then()
    if (length.value) options.for = length.value
    if (reason.value.trim()) options.reason = reason.value.trim()
    if (requests) options.requests = wait.value
    then(options)
  }, { signal })
  dialog.showModal()
}

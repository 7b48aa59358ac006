// One prompt to one model, as any client would send it: where it waits, its first token, how fast it comes.

import { address, askForKey, headers } from "./api.js"
import { at, make, mark, only, say } from "./dom.js"
import { choose, duration, rate } from "./format.js"

let world = null
let running = null // the request under way

export function showTry(now) {
  world = now
  choose(at("try-model"), Object.keys(world.status.models), null, null)
  if (running) tell()
}

export function begin() {
  at("try-form").addEventListener("submit", event => {
    event.preventDefault()
    if (!running) send()
  })
  at("try-prompt").addEventListener("keydown", event => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return
    event.preventDefault()
    at("try-form").requestSubmit()
  })
  at("try-stop").addEventListener("click", () => running?.controller.abort())
}

async function send() {
  const it = running = {
    model: at("try-model").value, controller: new AbortController(), id: `try-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`,
    began: performance.now(), first: null, last: null, pieces: 0, usage: null, queued: null,
  }
  const box = at("try-answer")
  only(box)
  box.hidden = at("try-figures").hidden = true
  mark(at("try-state"), "data-kind", null)
  mark(at("try-send"), "aria-disabled", "true")
  at("try-stop").hidden = false
  const timer = setInterval(tell, 200)
  tell()
  try {
    let response = await post(it)
    if (response.status === 401 && await askForKey("This llmux serves its models only with one of its keys.", true)) {
      dispatchEvent(new Event("llmux-key"))
      response = await post(it)
    }
    if (!response.ok) throw new Error(await refusal(response))
    it.queued = Number(response.headers.get("X-LLMux-Queue-Seconds") ?? 0)
    await listen(it, response, box)
    done(it, "done")
  } catch (error) {
    done(it, it.controller.signal.aborted ? "stopped" : "failed", error.message)
  } finally {
    clearInterval(timer)
    running = null
    at("try-stop").hidden = true
    mark(at("try-send"), "aria-disabled", null)
  }
}

function post(it) {
  return fetch(address("../v1/chat/completions"), {
    method: "POST", cache: "no-store", credentials: "omit", redirect: "error", signal: it.controller.signal,
    headers: { "Content-Type": "application/json", "X-Request-ID": it.id, "X-LLMux-Progress": "off", ...headers() },
    body: JSON.stringify({
      model: it.model, stream: true, stream_options: { include_usage: true }, max_tokens: Number(at("try-tokens").value) || 256,
      messages: [{ role: "user", content: at("try-prompt").value }],
    }),
  })
}

async function refusal(response) {
  const text = await response.text()
  const after = response.headers.get("Retry-After")
  let message = `it was answered with ${response.status}`
  try {
    const { error } = JSON.parse(text)
    message = `${response.status}: ${error.message ?? error}`
  } catch { /* not in the usual form */ }
  return after ? `${message.replace(/\.$/, "")}. Again in ${duration(Number(after))}.` : message
}

async function listen(it, response, box) {
  if (!/event-stream/.test(response.headers.get("Content-Type") ?? "")) {
    const document = JSON.parse(await response.text())
    it.usage = document.usage
    add(it, box, "content", document.choices?.[0]?.message?.content ?? "")
    return
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  for (;;) {
    const { value, done } = await reader.read()
    const lines = (text + (value ?? "")).split("\n")
    text = done ? "" : lines.pop()
    for (const line of lines) if (line.startsWith("data:")) event(it, box, line.slice(5).trim())
    if (done) return
  }
}

function event(it, box, data) {
  if (data === "[DONE]") return
  let document
  try {
    document = JSON.parse(data)
  } catch {
    return
  }
  if (document.error) throw new Error(document.error.message ?? String(document.error))
  if (document.usage) it.usage = document.usage
  const delta = document.choices?.[0]?.delta ?? {}
  for (const [kind, piece] of [["thinking", delta.reasoning_content ?? delta.reasoning], ["content", delta.content]]) {
    if (piece) add(it, box, kind, piece)
  }
}

function add(it, box, kind, text) {
  it.last = performance.now()
  it.first ??= it.last
  it.pieces++
  box.hidden = false
  const part = box.lastChild?.className === kind ? box.lastChild : box.appendChild(make("span", { class: kind }))
  part.append(text)
  box.scrollTop = box.scrollHeight
}

function tell() {
  const it = running, model = world?.status.models[it?.model]
  if (!it || !model) return
  const took = duration((performance.now() - it.began) / 1000)
  let text = `sent, ${took}`
  const place = model.waiting.find(one => one.request_id === it.id)
  if (it.first !== null) text = `answering, ${took}`
  else if (place) text = `waiting for ${took}: position ${place.position} of ${model.queued}, about ${duration(place.expected)} to go (${model.phase})`
  else if (model.phase !== "awake") text = `waiting for ${took}: ${it.model} is ${model.phase}`
  say(at("try-state"), text)
}

function done(it, how, why = "") {
  const seconds = time => time === null ? null : (time - it.began) / 1000
  const end = performance.now(), made = it.usage?.completion_tokens ?? it.pieces
  const streamed = it.first === null ? null : (it.last - it.first) / 1000
  mark(at("try-state"), "data-kind", how)
  say(at("try-state"), how === "failed" ? `Failed after ${duration(seconds(end))}: ${why}` : how === "stopped" ? `Stopped after ${duration(seconds(end))}.` : "")
  const figures = [
    ["waited", it.queued === null ? "–" : duration(it.queued)],
    ["first token", duration(seconds(it.first))],
    ["in all", duration(seconds(end))],
    [it.usage ? "tokens" : "pieces", it.usage ? `${it.usage.prompt_tokens ?? "?"} → ${made}` : String(made)],
    [it.usage ? "tokens/s" : "pieces/s", streamed && made > 1 ? rate((made - 1) / streamed) : "–"],
  ]
  at("try-figures").hidden = it.queued === null
  only(at("try-figures"), ...figures.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))))
}

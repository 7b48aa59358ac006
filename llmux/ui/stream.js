// Server-sent events over fetch: an EventSource could not show a key. It connects again for ever.

import { address, headers } from "./api.js"

const SILENCE = 5000 // ms without a byte, where one comes every second
const PAUSES = [300, 600, 1200, 2000, 3000] // ms before the next attempt

export class Stream {
  // told(name, data) for every event; changed("live" | "lost" | "locked", error)
  constructor(path, told, changed) {
    this.path = path
    this.told = told
    this.changed = changed
    this.failures = 0
    this.hurry = () => {}
    addEventListener("online", () => this.hurry())
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry())
  }

  async run() {
    for (;;) {
      let state = "lost", patience = 0, why = "llmux has closed the connection"
      try {
        await this.once()
      } catch (error) {
        if (error.status === 401) state = "locked"
        if (error.status === 429) patience = 10_000 // too many wrong keys
        why = error.message
      }
      this.changed(state, why)
      const pause = patience || PAUSES[Math.min(this.failures++, PAUSES.length - 1)]
      await new Promise(resolve => {
        this.hurry = resolve
        if (state === "lost") setTimeout(resolve, pause)
      })
    }
  }

  // Connect anew, at once: there is another key.
  again() {
    this.controller?.abort(new Error("connecting again"))
    this.failures = 0
    this.hurry()
  }

  async once() {
    const controller = this.controller = new AbortController()
    let timer
    const heard = () => {
      clearTimeout(timer)
      timer = setTimeout(() => controller.abort(new Error("llmux says nothing")), SILENCE)
    }
    heard()
    try {
      const response = await fetch(address(this.path), {
        headers: headers(), cache: "no-store", credentials: "omit", redirect: "error", signal: controller.signal,
      })
      if (!response.ok) throw Object.assign(new Error(`llmux answered ${response.status}`), { status: response.status })
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
      let text = ""
      for (;;) {
        const { value, done } = await reader.read()
        if (done) return
        heard()
        const events = (text + value).split("\n\n")
        text = events.pop()
        for (const event of events) this.tell(event)
      }
    } finally {
      clearTimeout(timer)
      controller.abort()
    }
  }

  tell(event) {
    let name = "", data = ""
    for (const line of event.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7)
      else if (line.startsWith("data: ")) data += line.slice(6)
    }
    if (!name) return
    if (name === "status") {
      this.failures = 0
      this.changed("live")
    }
    this.told(name, JSON.parse(data))
  }
}

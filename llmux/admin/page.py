"""The page for people: what ``/llmux/status`` says, kept fresh by ``/llmux/events``. It needs nothing else."""

from __future__ import annotations

import json

from llmux.observability.events import CATALOGUE

_TEXT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llmux</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884 }
.number { text-align: right; font-variant-numeric: tabular-nums }
.awake { color: #2a2 } .faulted, .lost, .error { color: #d33 }
.waking, .draining, .sleeping, .deepening { color: #c80 }
#news { font: 12px/1.5 ui-monospace, monospace; white-space: pre-wrap; max-height: 20rem; overflow: auto }
</style>
<h1>llmux</h1><p id="now">…</p><p id="why"></p>
<table><thead><tr><th>model<th>phase<th class="number">queued<th class="number">in flight
<th class="number">oldest wait<th>last error</thead><tbody id="models"></tbody></table>
<table><thead><tr><th>from<th>to<th class="number">seconds<th class="number">times</thead>
<tbody id="costs"></tbody></table>
<div id="news"></div>
<script>
const at = id => document.getElementById(id)
// A model's name and a hook's words are text, never markup.
const row = cells => {
  const line = document.createElement("tr")
  for (const [text, kind] of cells) {
    const cell = line.appendChild(document.createElement("td"))
    cell.textContent = text ?? ""
    if (kind) cell.className = kind
  }
  return line
}
const secs = number => number == null ? "" : number.toFixed(1) + " s"
async function look() {
  try {
    const answer = await fetch("/llmux/status")
    if (!answer.ok) throw new Error((await answer.json()).error.message)
    const now = await answer.json(), move = now.switch
    at("now").textContent = `${now.version}, policy ${now.policy.use}; ` + (move
      ? `switch ${move.id}: ${move.from.join(", ") || "nobody"} → ${move.to ?? "sleep"}, ${move.phase}`
      : `awake: ${now.awake.join(", ") || "nobody"}`) + (now.lease ? "; the GPU is lent" : "")
    at("why").textContent = now.last_eviction?.reason ?? ""
    at("models").replaceChildren(...Object.entries(now.models).map(([name, it]) => row([
      [name + (it.pinned ? " (pinned)" : "")],
      [it.phase + (it.level == null ? "" : ` (${it.level})`), it.phase.toLowerCase()], [it.queued, "number"],
      [it.in_flight, "number"], [secs(it.oldest_wait), "number"], [it.last_error, "error"]])))
    at("costs").replaceChildren(...now.switch_costs.map(it => row([
      [it.from ?? "nobody"], [it.to ?? "sleep"], [it.seconds.toFixed(2), "number"], [it.samples, "number"]])))
  } catch (error) { at("now").textContent = String(error) }
}
let due = 0
const soon = () => { due ||= setTimeout(() => { due = 0; look() }, 100) }
const events = new EventSource("/llmux/events")
const tell = name => event => {
  const line = document.createElement("div")
  line.textContent = `${new Date().toLocaleTimeString()}  ${name}  ${event.data}`
  at("news").prepend(line)
  while (at("news").children.length > 200) at("news").lastChild.remove()
  soon()
}
for (const name of NAMES) events.addEventListener(name, tell(name))
events.addEventListener("status", soon)
setInterval(look, 2000); look()
</script>
</html>
"""
PAGE = _TEXT.replace("NAMES", json.dumps(sorted(CATALOGUE)))
"""The page, whole."""

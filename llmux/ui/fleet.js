// The page of a gateway: its hosts, read again each second while the page is seen.

import { ask, askForKey, read, Refused } from "./api.js"
import { at, make, mark, only, say } from "./dom.js"
import { count, duration } from "./format.js"
import { settle, shape } from "./palette.js"

const EVERY = 1000 // milliseconds
const WORDS = { live: "live", lost: "connection lost", locked: "a key is needed" }
let asking = false

const cell = (...children) => make("td", {}, ...children)
const figure = value => make("td", { class: "number" }, String(value))

function link(state) {
  mark(document.body, "data-link", state)
  say(at("link-text"), WORDS[state])
}

const named = (model, remark = "") => make("span", { class: "phase" }, shape(model), " ", make("bdi", {}, model), remark)

function listed(names) {
  return names.length ? names.flatMap((name, place) => place ? [", ", name] : [name]) : ["–"]
}

function waitOn(host) {
  const waits = Object.values(host.models).filter(model => model.queued && model.expected_wait != null)
  return waits.length ? Math.max(...waits.map(model => model.expected_wait)) : null
}

function hostRow(name, host) {
  const holds = [...host.awake.map(model => named(model)), ...host.waking.map(model => named(model, " (waking)"))]
  const leased = host.state === "leased"
  const operate = make("button", {
    type: "button", "aria-label": `${leased ? "Undrain" : "Drain"} ${name}`,
    onclick: () => operateOn(name, leased ? "undrain" : "drain"),
  }, leased ? "Undrain" : "Drain…")
  const trouble = host.trouble ? make("span", { class: "sub" }, ` ${host.trouble}`) : null
  const wait = waitOn(host)
  return make("tr", { "data-host": name, "data-state": host.state },
    make("th", { scope: "row" }, make("bdi", {}, name)),
    make("td", {}, host.state, ...(trouble ? [trouble] : [])),
    cell(...listed(holds)),
    figure(host.queued), figure(host.in_flight), figure(host.placed),
    figure(wait == null ? "–" : duration(wait)), figure(host.wakes_per_minute),
    figure(host.age == null ? "–" : duration(host.age)), cell(operate))
}

function modelRow(model, hosts, waiting) {
  const having = Object.entries(hosts).filter(([, host]) => model in host.models)
  const awake = having.filter(([, host]) => host.models[model].phase === "awake").map(([name]) => name)
  const sum = key => having.reduce((total, [, host]) => total + host.models[model][key], 0)
  const waits = having
    .filter(([, host]) => host.state === "ready" && host.models[model].expected_wait != null)
    .map(([, host]) => host.models[model].expected_wait)
  return make("tr", { "data-model": model },
    make("th", { scope: "row" }, named(model)),
    cell(awake.join(", ") || "–"), figure(having.length), figure(sum("queued")), figure(waiting),
    figure(sum("in_flight")), figure(waits.length ? duration(Math.min(...waits)) : "–"))
}

// A row is only made anew when something in it has changed: a focused button stays focused.
function rows(table, made) {
  const body = table.tBodies[0], old = new Map([...body.rows].map(row => [row.dataset.host ?? row.dataset.model, row]))
  only(body, ...made.map(row => {
    const before = old.get(row.dataset.host ?? row.dataset.model)
    return before?.isEqualNode(row) ? before : row
  }))
}

function show(fleet) {
  const hosts = Object.entries(fleet.hosts)
  const models = [...new Set(hosts.flatMap(([, host]) => Object.keys(host.models)))].sort()
  settle(models)
  const focused = document.activeElement?.getAttribute("aria-label")
  rows(at("hosts"), hosts.map(([name, host]) => hostRow(name, host)))
  rows(at("models"), models.map(model => modelRow(model, fleet.hosts, fleet.queued[model] ?? 0)))
  if (focused && document.activeElement === document.body) {
    [...document.querySelectorAll("button")].find(button => button.getAttribute("aria-label") === focused)?.focus()
  }
  const ready = hosts.filter(([, host]) => host.state === "ready").length
  say(at("facts"), `${ready} of ${count(hosts.length, "host")} ready · route ${fleet.route} · llmux ${fleet.version}`)
  document.title = `${ready}/${hosts.length} hosts – llmux fleet`
}

function sure(question) {
  const dialog = at("deed")
  say(at("deed-title"), question)
  dialog.returnValue = ""
  dialog.showModal()
  return new Promise(resolve => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true })
  })
}

async function operateOn(host, verb, again = true) {
  if (verb === "drain" && again && !await sure(`Drain ${host}? It takes nothing new, and its models go to sleep.`)) return
  try {
    await ask(`fleet/${encodeURIComponent(host)}/${verb}`, { method: "POST", body: "{}" })
    say(at("answer"), verb === "drain" ? `${host} drains.` : `${host} takes requests again.`)
  } catch (error) {
    if (again && error instanceof Refused && [401, 403].includes(error.status)
        && await askForKey("To operate takes the gateway's admin key.", true)) await operateOn(host, verb, false)
    else say(at("answer"), error.message)
  }
}

async function look() {
  if (!document.hidden && !asking) {
    asking = true
    try {
      show(await read("fleet"))
      link("live")
    } catch (error) {
      const locked = error instanceof Refused && error.status === 401
      link(locked ? "locked" : "lost")
      if (locked) await askForKey("The gateway wants one of its `api_keys`.", true)
    } finally {
      asking = false
    }
  }
  setTimeout(look, EVERY)
}

at("key").addEventListener("click", () => askForKey("One of the gateway's `api_keys`, or its `admin_key`."))
look()

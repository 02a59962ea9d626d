// The status page: asks for status.json every two seconds and shows it. Everything that a client could have named is
// put in as text, never as markup.

import { Chart, clock, element } from "./charts.js";

const POLL_MS = 2000;
const PATIENCE_MS = 6000;
const MOST_SAMPLES = 1800;
const MOST_CONNECTIONS = 200;
const SERIES = 5;

let minutes = 10;
let seen = null; // the newest document
let history = null; // every sample of the last hour that this page has
const charts = new Map();
const byId = (id) => document.getElementById(id);

// Words

function scaled(value, base, units) {
  let index = 0;
  while (value >= base && index < units.length - 1) {
    value /= base;
    index += 1;
  }
  return `${value >= 100 || Number.isInteger(value) ? Math.round(value) : value.toPrecision(value < 1 ? 2 : 3)} ${units[index]}`;
}
const bytes = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
const speed = (value) => scaled(value, 1000, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"]);
const count = (value) => Math.round(value).toLocaleString("en");
const perSecond = (value) => `${value >= 100 ? count(value) : Number(value.toPrecision(2))}/s`;
const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
const latency = (value) => (value < 1e-3 ? `${Math.round(value * 1e6)} µs` : `${Number((value * 1e3).toPrecision(3))} ms`);
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

function lasting(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = Math.max(0, units.findIndex(([, size]) => seconds >= size));
  const parts = [];
  let rest = Math.floor(Math.max(0, seconds));
  for (const [unit, size] of units.slice(seconds >= 1 ? first : 3).slice(0, 2)) {
    parts.push(`${Math.floor(rest / size)} ${unit}`);
    rest %= size;
  }
  return parts.join(" ");
}

// Data

// Joins newer samples to those at hand. Columns end with the newest sample; one of another server begins anew.
function joined(old, fresh) {
  if (!old || fresh.times.length >= fresh.count) return fresh;
  const end = (before = [], after) => [...before, ...after].slice(-MOST_SAMPLES);
  const pools = fresh.pools.map((pool) => {
    const known = old.pools.find((other) => other.tenant === pool.tenant && other.fingerprint === pool.fingerprint);
    if (!known) return pool;
    const tiers = {};
    for (const [name, tier] of Object.entries(pool.tiers)) {
      const before = Object.hasOwn(known.tiers, name) ? known.tiers[name] : {};
      tiers[name] = Object.fromEntries(Object.entries(tier).map(([column, values]) => [column, end(before[column], values)]));
    }
    return { ...pool, tiers, hit_rate: end(known.hit_rate, pool.hit_rate), miss_rate: end(known.miss_rate, pool.miss_rate) };
  });
  return {
    ...fresh,
    pools,
    times: end(old.times, fresh.times),
    requests: end(old.requests, fresh.requests),
    lookup_p99: end(old.lookup_p99, fresh.lookup_p99),
  };
}

async function ask() {
  const since = history ? history.count : 0;
  const answer = await fetch(`status.json?since=${since}`, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  const found = await answer.json();
  const isOther = seen && (found.status.server_id !== seen.status.server_id || found.history.count < since);
  if (isOther) {
    history = seen = null;
    return ask();
  }
  history = joined(history, found.history);
  seen = found;
  return seen;
}

// Drawing

function chart(id, title, format, top, smallest) {
  if (!charts.has(id)) charts.set(id, new Chart(title, format, top, smallest));
  const found = charts.get(id);
  found.isUsed = true;
  return found;
}

function draw(id, title, series, format, top = null, smallest = 0) {
  const found = chart(id, title, format, top, smallest);
  found.update(history.times, series, minutes * 60, history.interval_s);
  return found.root;
}

const colour = (index) => `var(--series-${index % SERIES})`;

function badge(text, kind) {
  const shown = byId("badge");
  shown.textContent = text;
  shown.className = `badge ${kind}`;
}

function showServer({ status, lookups }) {
  if (status.is_draining) badge("draining", "warn");
  else badge(status.is_ready ? "ready" : "starting", status.is_ready ? "good" : "warn");
  const refused = Object.entries(status.refused_connections).map(([reason, number]) => `${count(number)} ${reason}`);
  const facts = [
    `version ${status.version}`,
    `server ${status.server_id.slice(0, 16)}`,
    `up ${lasting(status.now - status.started)}`,
    plural(status.pools.length, "pool"),
    plural(lookups, "lookup"),
  ];
  if (refused.length) facts.push(`connections refused: ${refused.join(", ")}`);
  byId("facts").textContent = facts.join(" · ");
  byId("server").replaceChildren(
    draw("requests", "Requests", [{ name: "requests", colour: colour(0), values: history.requests }], perSecond),
    draw("lookups", "Lookup answered within, 99 %", [{ name: "p99", colour: colour(0), values: history.lookup_p99 }], latency),
  );
}

function cell(label, content, className = "") {
  const made = element("td", { "data-label": label, class: className });
  made.append(content);
  return made;
}

const number = (label, value) => cell(label, count(value), "number");

function fillCell(used, capacity, shade) {
  const words = element("div", { class: "words" }, element("span", { text: bytes(used) }));
  const made = element("td", { class: "fill wide" }, words);
  if (!capacity) {
    words.append(element("span", { class: "quiet", text: "no bound" }));
    return made;
  }
  const part = Math.min(1, used / capacity);
  words.append(element("span", { class: "quiet", text: `${percent(part)} of ${bytes(capacity)}` }));
  const inner = element("div");
  inner.style.width = `${100 * part}%`;
  made.append(element("div", { class: "bar", colour: shade, role: "meter", "aria-label": "fill", "aria-valuenow": Math.round(100 * part) }, inner));
  return made;
}

function breaker(state) {
  const kinds = { closed: ["working", "good"], half_open: ["trying again", "warn"], open: ["paused", "bad"] };
  const [text, kind] = Object.hasOwn(kinds, state) ? kinds[state] : [state, "bad"];
  return element("span", { class: `chip ${kind}`, text, title: `circuit breaker: ${state}` });
}

function tierRow(name, index, tier, rates) {
  const newest = (values) => values[values.length - 1] ?? null;
  const orNothing = (value, format) => (value === null ? "–" : format(value));
  return element(
    "tr",
    {},
    element("td", { class: "wide" }, element("span", { class: "key", colour: colour(index), text: name })),
    fillCell(tier.used, tier.capacity, colour(index)),
    number("Blocks", tier.blocks),
    cell("Hit rate", orNothing(newest(rates.hit_rate), percent), "number"),
    cell("Read", orNothing(newest(rates.loaded), speed), "number"),
    cell("Written", orNothing(newest(rates.stored), speed), "number"),
    number("Evicted", tier.evictions),
    number("Refused", tier.refused),
    number("Failed", tier.failed),
    number("Not stored", tier.shed),
    cell("State", breaker(tier.breaker), "number"),
  );
}

const sum = (object) => Object.values(object).reduce((total, value) => total + value, 0);

function tiersOf(counters) {
  const used = Math.round((counters.capacity_bytes / Math.max(1, counters.slots)) * counters.used_slots);
  const host = {
    used,
    capacity: counters.capacity_bytes,
    blocks: counters.host_blocks,
    evictions: counters.host_evictions,
    refused: 0,
    failed: 0,
    shed: counters.decisions.no_room,
    breaker: "closed",
  };
  const lower = Object.entries(counters.tiers).map(([name, tier]) => [
    name,
    {
      used: tier.used_bytes,
      capacity: tier.capacity_bytes,
      blocks: tier.blocks,
      evictions: tier.evictions,
      refused: sum(tier.refused),
      failed: tier.failed_loads + tier.failed_stores - sum(tier.refused),
      shed: tier.shed_stores + tier.no_room_stores,
      breaker: tier.breaker,
    },
  ]);
  return [["host", host], ...lower];
}

function tierTable(tiers, past) {
  const heads = ["Tier", "Fill", "Blocks", "Hit rate", "Read", "Written", "Evicted", "Refused", "Failed", "Not stored", "State"];
  const row = element("tr");
  heads.forEach((head, index) => row.append(element("th", { class: index > 1 ? "number" : "", text: head })));
  const body = element("tbody");
  const none = { hit_rate: [], loaded: [], stored: [] };
  tiers.forEach(([name, tier], index) => {
    body.append(tierRow(name, index, tier, Object.hasOwn(past, name) ? past[name] : none));
  });
  return element("div", { class: "table" }, element("table", {}, element("thead", {}, row), body));
}

function poolCharts(id, names, past, hitRate) {
  const columns = (column) =>
    names.map((name, index) => ({ name, colour: colour(index), values: Object.hasOwn(past, name) ? past[name][column] : [] }));
  const all = { name: "all tiers", colour: "var(--text)", values: hitRate, isDashed: names.length > 1 };
  return element(
    "div",
    { class: "charts" },
    draw(`${id} hit`, "Hit rate", names.length > 1 ? [all, ...columns("hit_rate")] : columns("hit_rate"), percent, 1),
    draw(`${id} read`, "Read", columns("loaded"), speed, null, 1e6),
    draw(`${id} written`, "Written", columns("stored"), speed, null, 1e6),
    draw(`${id} fill`, "Fill", columns("fill"), percent, 1),
  );
}

function poolCard(pool) {
  const found = history.pools.find((other) => other.tenant === pool.tenant && other.fingerprint === pool.fingerprint);
  const past = found ? found.tiers : {};
  const { counters } = pool;
  const tiers = tiersOf(counters);
  const about = [
    `${bytes(pool.block_bytes)} a block of ${pool.block_tokens} tokens`,
    plural(pool.connections, "connection"),
    plural(counters.leases, "lease"),
    plural(counters.reservations, "reservation"),
  ];
  const card = element(
    "article",
    { class: "card" },
    element("h2", { text: `${pool.tenant || "default tenant"} · model ${pool.fingerprint}` }, element("span", { class: "about", text: about.join(" · ") })),
  );
  for (const problem of pool.problems) card.append(element("p", { class: "note bad", text: problem }));
  if (pool.dead_writers) {
    const text = `${plural(pool.dead_writers, "engine")} gone while a process may still write: their slots wait`;
    card.append(element("p", { class: "note warn", text }));
  }
  const legend = tiers.map(([name], index) => element("span", { class: "key", colour: colour(index), text: name }));
  const names = tiers.map(([name]) => name);
  if (tiers.length > 1) legend.push(element("span", { class: "key", colour: "var(--text)", text: "all tiers (dotted)" }));
  legend.push(element("span", { text: "host: what engines read and saved" }));
  card.append(element("div", { class: "legend" }, ...legend));
  card.append(poolCharts(JSON.stringify([pool.tenant, pool.fingerprint]), names, past, found ? found.hit_rate : []));
  card.append(tierTable(tiers, past), reasons(counters.decisions.misses));
  return card;
}

function reasons(misses) {
  const list = element("ul", { class: "reasons" }, element("li", { class: "quiet", text: "Why lookups ended:" }));
  const sorted = Object.entries(misses).sort((one, other) => other[1] - one[1]);
  for (const [reason, times] of sorted) {
    list.append(element("li", {}, element("b", { text: count(times) }), ` ${reason.replaceAll("_", " ")}`));
  }
  list.hidden = !sorted.length;
  return list;
}

function showConnections(connections) {
  const sorted = [...connections].sort((one, other) => other.connected_s - one.connected_s);
  const body = element("tbody");
  for (const one of sorted.slice(0, MOST_CONNECTIONS)) {
    body.append(
      element(
        "tr",
        {},
        element("td", { class: "wide", text: one.engine || "without a name" }),
        cell("Tenant", one.tenant || "default"),
        cell("Model", one.fingerprint),
        cell("Mode", one.mode),
        cell("Connected", lasting(one.connected_s), "number"),
        number("Requests", one.requests),
      ),
    );
  }
  const row = element("tr");
  ["Engine", "Tenant", "Model", "Mode", "Connected", "Requests"].forEach((head, index) =>
    row.append(element("th", { class: index > 3 ? "number" : "", text: head })),
  );
  const parts = [element("h2", { text: plural(connections.length, "connection") })];
  if (connections.length) parts.push(element("div", { class: "table" }, element("table", {}, element("thead", {}, row), body)));
  else parts.push(element("p", { class: "quiet", text: "No engine is connected." }));
  if (sorted.length > MOST_CONNECTIONS) parts.push(element("p", { class: "quiet", text: `and ${count(sorted.length - MOST_CONNECTIONS)} more` }));
  byId("connections").replaceChildren(...parts);
}

function show() {
  if (!seen) return;
  charts.forEach((one) => (one.isUsed = false));
  showServer(seen);
  const cards = seen.status.pools.map(poolCard);
  const none = element("p", { class: "card quiet", text: "No pool yet: the first engine that connects opens one." });
  byId("pools").replaceChildren(...(cards.length ? cards : [none]));
  showConnections(seen.status.connections);
  for (const [id, one] of charts) if (!one.isUsed) charts.delete(id);
}

async function poll() {
  try {
    await ask();
    document.body.classList.remove("away");
    show();
  } catch (error) {
    const last = seen ? `, last seen ${clock(seen.status.now)}` : "";
    badge(`server away${last}`, "bad");
    byId("badge").title = String(error);
    document.body.classList.add("away");
  }
  setTimeout(poll, POLL_MS);
}

for (const button of document.querySelectorAll(".ranges button")) {
  button.addEventListener("click", () => {
    minutes = Number(button.dataset.minutes);
    for (const other of document.querySelectorAll(".ranges button")) other.setAttribute("aria-pressed", String(other === button));
    show();
  });
}
poll();

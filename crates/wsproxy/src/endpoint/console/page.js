// The console: asks the API with the operator's key, which only this module's memory holds, and shows the answers.

import { bytes, chart, element, milliseconds, number, rate } from "./chart.js";
import { connections, duration, moment, past, pasts, sum } from "./found.js";

const byId = (id) => document.getElementById(id);

let key = null;
let overviewTimer = 0;
// Data on the page: samples column by column, and the last search.
let samples = null;
let looked = null;
let uptime = 0;

// ---- calls ----

class Refused extends Error {}

async function call(path, body) {
  const used = key;
  const headers = { authorization: `Bearer ${used}` };
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit", redirect: "error" };
  const response = await fetch(`api/v1/console/${path}`, options);
  const answer = await response.json().catch(() => ({}));
  if (used !== key) throw new Refused("The key was forgotten.");
  if (response.ok) return answer;
  const { code, message } = answer.error ?? {};
  const isOfKey = response.status === 401 || ["invalid_token", "missing_scope_admin"].includes(code);
  if (isOfKey) {
    forget(code === "missing_scope_admin" ? "This key lacks the scope admin." : "The key is not known here: it is wrong, or it was taken out of use.");
    throw new Refused(message);
  }
  throw new Error(message ?? `The instance answered ${response.status}.`);
}

const told = (error) => (error instanceof TypeError ? "The instance does not answer." : error.message);

// ---- the key ----

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const typed = byId("key").value.trim();
  byId("key-error").textContent = "";
  if (!/^[\x21-\x7e]+$/.test(typed)) {
    byId("key-error").textContent = "A key has visible ASCII characters only.";
    return;
  }
  key = typed;
  samples = null;
  const button = event.target.querySelector("button");
  button.disabled = true;
  try {
    await overview();
    byId("key").value = "";
    byId("key-card").hidden = true;
    byId("main").hidden = byId("signed").hidden = false;
    byId("id").focus();
  } catch (error) {
    if (!(error instanceof Refused)) {
      key = null;
      byId("key-error").textContent = told(error);
    }
  } finally {
    button.disabled = false;
  }
});

// Forgets the key, and all that was shown with it.
function forget(why = "") {
  key = samples = looked = null;
  clearTimeout(overviewTimer);
  for (const id of ["troubles", "found-notes", "found-connections", "found-past", "facts", "latest", "config"]) byId(id).replaceChildren();
  for (const id of ["fine", "found-title", "found-sum", "done", "find-error", "config-error", "key-name"]) byId(id).textContent = "";
  byId("id").value = byId("message").value = "";
  byId("found").hidden = byId("main").hidden = byId("signed").hidden = byId("config-changed-label").hidden = true;
  if (byId("confirm").open) byId("confirm").close();
  byId("key-card").hidden = false;
  status("closed", "No key yet");
  byId("key-error").textContent = why;
  byId("key").value = "";
  byId("key").focus();
}

byId("forget").addEventListener("click", () => forget());

function status(state, text) {
  byId("status").dataset.state = state;
  // A live region speaks whenever its text is set.
  if (byId("status-text").textContent !== text) byId("status-text").textContent = text;
}

// ---- the overview ----

const families = ["sessions", "events", "rooms", "agents", "echo"];
const charts = {
  connections: chart("Connections", families, number),
  messages: chart("Messages", ["from clients", "to clients"], rate),
  latency: chart("Latency: Redis to socket", ["half below", "99 % below"], milliseconds),
  bus: chart("Redis", ["read", "published"], rate),
  memory: chart("Memory of the process", ["in use"], bytes),
  waiting: chart("Waiting for slow clients", ["bytes"], bytes),
};
byId("charts").append(...Object.values(charts).map(({ figure }) => figure));

async function overview() {
  const after = samples?.at.at(-1) ?? 0;
  const answer = await call(`overview?after=${after}`);
  if (answer.uptime_seconds < uptime) samples = null;
  uptime = answer.uptime_seconds;
  merge(answer.samples);
  show(answer);
  schedule(answer.interval_seconds);
}

function schedule(seconds) {
  clearTimeout(overviewTimer);
  overviewTimer = setTimeout(async () => {
    if (key === null) return;
    // A page in the background asks nothing.
    if (document.hidden) return schedule(seconds);
    try {
      await overview();
    } catch (error) {
      if (error instanceof Refused) return;
      status("wrong", told(error));
      schedule(seconds);
    }
  }, seconds * 1000);
}

function merge(fresh) {
  if (samples === null) { samples = fresh; return; }
  const joined = (old, more) => (Array.isArray(old) ? [...old, ...more].slice(-360) : Object.fromEntries(Object.keys(old).map((name) => [name, joined(old[name], more[name])])));
  samples = joined(samples, fresh);
}

function show(answer) {
  const { now, bus, connections: seats, troubles, latest } = answer;
  byId("key-name").textContent = answer.key;
  const isWrong = troubles.some(({ weight }) => weight === "now");
  status(isWrong ? "wrong" : "open", `${answer.server_id}: ${isWrong ? troubles[0].what : "works"}`);
  const { at } = samples;
  charts.connections.update(at, families.map((name) => samples.connections[name]), now);
  charts.messages.update(at, [samples.received, samples.sent], now);
  charts.latency.update(at, [samples.latency_p50_ms, samples.latency_p99_ms], now);
  charts.bus.update(at, [samples.bus_in, samples.bus_out], now, samples.bus_whole);
  charts.memory.update(at, [samples.memory_bytes], now);
  charts.waiting.update(at, [samples.waiting_bytes], now);
  const facts = [
    ["Instance", answer.server_id], ["Version", answer.version], ["Running for", duration(answer.uptime_seconds * 1000)],
    ["Connections", `${number(seats.active)} of ${number(seats.max)}`],
    ["Bus", `${bus.kind === "redis" ? "Redis" : "in this process"}, ${!bus.connected ? "away" : bus.subscribed && bus.writable ? "connected" : "connected in part"}`],
    ["Channels", number(bus.channels)],
  ];
  byId("facts").replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  const grave = troubles.filter(({ weight }) => weight !== "clients");
  const fine = grave.length === 0 ? "Nothing was lost and nothing failed in the last hour." : "";
  if (byId("fine").textContent !== fine) byId("fine").textContent = fine;
  replace(byId("troubles"), troubles.map(trouble));
  replace(byId("latest"), latest.length > 0 ? latest.map((row) => past(row, find)) : [element("li", { className: "empty", textContent: "No client was refused or cut off since the start." })]);
}

// Replaces the children, unless the keyboard is in them: a focus must not be lost every ten seconds.
function replace(list, children) {
  if (!list.contains(document.activeElement)) list.replaceChildren(...children);
}

function trouble({ weight, count, last_at: at, what, advice, page, metric, labels }) {
  const when = count === undefined ? "It lasts now." : element("span", {}, `${number(count)} in the last hour, the last at `, moment(new Date(at * 1000).toISOString()), ".");
  const source = metric ? `${metric}${labels ? ` (${labels})` : ""}; ` : "";
  const made = element("li", {}, element("p", {}, element("b", { textContent: what }), " ", when), element("p", { textContent: advice }),
    element("p", { className: "meta", textContent: `${source}runbook docs/runbooks/${page}.md` }));
  made.dataset.weight = weight;
  return made;
}

// ---- the search ----

byId("find-form").addEventListener("submit", (event) => {
  event.preventDefault();
  find(byId("kind").value, byId("id").value.trim());
});
byId("find-again").addEventListener("click", () => find(looked.kind, looked.id));

async function find(kind, id, { quiet = false } = {}) {
  byId("kind").value = kind;
  byId("id").value = id;
  byId("find-error").textContent = "";
  if (!quiet) byId("done").textContent = "";
  try {
    const found = await call(`find?kind=${encodeURIComponent(kind)}&id=${encodeURIComponent(id)}`);
    if (looked?.kind !== kind || looked?.id !== id) openSend(false);
    looked = { kind, id };
    showFound(found);
    if (!quiet) byId("found-title").focus();
  } catch (error) {
    if (error instanceof Refused) return;
    byId("found").hidden = true;
    byId("find-error").textContent = told(error);
  }
}

const KINDS = { user: "User", session: "Session", room: "Room", agent: "Agent of", connection: "Connection" };

function showFound(found) {
  const { kind, id } = looked;
  byId("found").hidden = false;
  byId("found-title").textContent = `${KINDS[kind]} ${id}`;
  byId("found-sum").textContent = sum(found);
  byId("found-notes").replaceChildren(...found.notes.map((note) => element("li", { textContent: note })));
  const canEnd = kind !== "connection";
  const single = (row) => (kind === "room" ? row.client_id : row.connection_id && row.endpoint !== "rooms" && row.endpoint !== "agents");
  const end = (row) => confirmEnd(row);
  const rows = found.connections.map((row) => connections([row], { find, end: canEnd && single(row) ? end : null }).firstChild);
  byId("found-connections").replaceChildren(rows.length > 0 ? element("ul", { className: "rows" }, ...rows) : "");
  // A user's memberships and agent are ended by the room and by the agent.
  const isEndable = (row) => kind !== "user" || row.endpoint === "events";
  byId("end-all").hidden = !canEnd || !found.connections.some(isEndable);
  byId("send-open").hidden = !canEnd;
  const sections = [["Why it was disconnected, the newest first", found.ends], ["Refused attempts, the newest first", found.refusals]].filter(([, list]) => list.length > 0);
  byId("found-past").replaceChildren(...sections.flatMap(([title, list]) => [element("h4", { textContent: title }), pasts(list, find)]));
}

// ---- actions ----

let ending = null;

function confirmEnd(row) {
  const { kind, id } = looked;
  ending = { kind, id };
  if (row && kind === "room") ending.client_id = row.client_id;
  else if (row) ending.connection_id = row.connection_id;
  const what = row ? `the connection ${row.client_id ?? row.connection_id} of ${kind} ${id}` : `all connections of ${kind} ${id}`;
  byId("confirm-title").textContent = "End connections";
  const stays = !row && kind === "user" ? " to the event endpoint" : "";
  const others = stays && " The user's rooms and agent stay: find the room or the agent to end those.";
  byId("confirm-text").textContent = `This ends ${what}${stays}, on all instances.${others} A client that has a good token can come back.`;
  byId("reason").value = "";
  byId("confirm").showModal();
}

byId("end-all").addEventListener("click", () => confirmEnd(null));
byId("confirm-cancel").addEventListener("click", () => byId("confirm").close());
byId("confirm-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const reason = byId("reason").value.trim();
  byId("confirm").close();
  await act("end", { ...ending, ...(reason ? { reason } : {}) }, ({ receivers, instances, members }) => {
    if (receivers !== undefined) return receivers === 0 ? "No connection was told: it was gone already." : `Told to end: ${count(receivers, "connection")}.`;
    if (members !== undefined) return `Sent away: ${count(members, "member")}.`;
    return `Told: ${count(instances, "instance")}, and each ends its own connections.`;
  });
});

const count = (n, what) => (n === 1 ? `one ${what}` : `${n} ${what}s`);

const EXAMPLES = {
  session: ['{"type":"notice","text":"Hello"}', "It goes to all connections of the session as it is."],
  user: ['{"type":"notice","data":{"text":"Hello"}}', "An event with a type. It goes to all of the user's connections to the event endpoint."],
  room: ['{"chatMessage":{"text":"Hello"}}', "An envelope of rooms as JSON. It goes to all members, without a sender."],
  agent: ['{"tool":"ping","params":{}}', "A call of a tool. The agent runs it, and the answer is shown here."],
};

function openSend(isOpen) {
  byId("send-form").hidden = !isOpen;
  byId("send-open").ariaExpanded = String(isOpen);
  if (!isOpen) return;
  const [example, note] = EXAMPLES[looked.kind];
  byId("message").value = example;
  byId("message-note").textContent = note;
  byId("message").focus();
}

byId("send-open").addEventListener("click", () => openSend(byId("send-form").hidden));
byId("send-close").addEventListener("click", () => { openSend(false); byId("send-open").focus(); });
byId("send-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  let message;
  try {
    message = JSON.parse(byId("message").value);
  } catch (error) {
    return tellDone(`This is no JSON: ${error.message}`, true);
  }
  await act("send", { ...looked, message }, (answer) => {
    if (looked.kind === "agent") return `The agent answered: ${JSON.stringify(answer)}`;
    return answer.receivers === 0 ? "Sent, but no instance has such a client now." : `Sent: ${count(answer.receivers, "receiver")} on the bus took it.`;
  });
});

function tellDone(text, isFailure = false) {
  byId("done").className = isFailure ? "done failed" : "done";
  byId("done").textContent = text;
}

async function act(what, body, describe) {
  tellDone("");
  try {
    tellDone(describe(await call(what, body)));
    if (what === "end") {
      byId("find-again").focus();
      // The end arrives a moment later.
      setTimeout(() => { if (key !== null && looked?.id === body.id) find(body.kind, body.id, { quiet: true }); }, 700);
    }
  } catch (error) {
    if (!(error instanceof Refused)) tellDone(told(error), true);
  }
}

// ---- the configuration ----

let settings = [];

byId("config-load").addEventListener("click", async () => {
  byId("config-error").textContent = "";
  try {
    ({ settings } = await call("config"));
    byId("config-changed-label").hidden = false;
    showConfig();
  } catch (error) {
    if (!(error instanceof Refused)) byId("config-error").textContent = told(error);
  }
});
byId("config-changed").addEventListener("change", showConfig);

function showConfig() {
  const wanted = settings.filter((one) => !one.is_default || !byId("config-changed").checked);
  const sections = Map.groupBy(wanted, ({ section }) => section);
  const made = [...sections].flatMap(([name, all]) => [element("h3", { textContent: `[${name}]` }), element("dl", {}, ...all.map(setting))]);
  byId("config").replaceChildren(...(made.length > 0 ? made : [element("p", { className: "empty", textContent: "Every value is the default." })]));
}

function setting({ name, value, origin, doc }) {
  return element("div", {}, element("dt", { textContent: name }), element("dd", {}, element("code", { textContent: value }), element("p", { textContent: `${origin ? `From: ${origin}. ` : ""}${doc}` })));
}

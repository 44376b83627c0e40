// The development page: one session against the demo worker, shown with what the gateway says about it.
// Knows only what any browser client could know: a token, a WebSocket, and /metrics.

const RETRY_FIRST_MS = 150; // Short, so that a stream that goes on meanwhile loses little.
const RETRY_MAX_MS = 5000;
const EVENTS_MAX = 200;
const POLL_MS = 1000;
const HISTORY = 30;

const byId = (id) => document.getElementById(id);
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

// ---- the session ----

const session = {
  id: null,
  agent: "demo",
  socket: null,
  wanted: false, // Whether the person wants it open: decides if an ending leads to a reconnect.
  tries: 0,
  timer: 0,
  lostAt: 0,
};

async function post(path, body) {
  const response = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  const text = await response.text();
  if (!response.ok) {
    let detail = text;
    try { detail = JSON.parse(text).error.message; } catch { /* Not the gateway's own body: show it as it is. */ }
    throw new Error(`${path} answered ${response.status}: ${detail}`);
  }
  return text ? JSON.parse(text) : {};
}

// A browser cannot set headers on a WebSocket, so the token travels as a subprotocol.
function protocols(token) {
  if (/^[\w!#$%&'*+.^`|~-]+$/.test(token)) return ["wsproxy.v1", `bearer.${token}`];
  const bytes = String.fromCharCode(...new TextEncoder().encode(token));
  return ["wsproxy.v1", `bearer64.${btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`];
}

async function connect() {
  clearTimeout(session.timer);
  state("connecting", session.lostAt ? "reconnecting" : "connecting");
  let issued;
  try {
    // Tokens are good for one handshake: every attempt asks for a fresh one.
    issued = await post("/dev/session", session.id ? { session_id: session.id } : {});
  } catch (error) {
    log("error", "token", error.message);
    return retry();
  }
  if (!session.wanted) return;
  if (session.id !== issued.session_id) {
    session.id = issued.session_id;
    session.agent = issued.agent_id;
    byId("session-id").textContent = session.id;
    shell();
  }
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const resume = `last_event_id=${encodeURIComponent(session.lastEventId ?? "")}`;
  const socket = new WebSocket(`${scheme}://${location.host}/${session.agent}/ws/${session.id}?${resume}`, protocols(issued.token));
  session.socket = socket;
  socket.onopen = () => opened(socket);
  socket.onclose = (event) => closed(socket, event);
  socket.onmessage = (event) => received(event.data);
}

function opened(socket) {
  const again = session.lostAt ? `again after ${Math.round(performance.now() - session.lostAt)} ms, with a fresh token` : "";
  const deflate = socket.extensions.includes("permessage-deflate") ? "permessage-deflate" : "";
  log("open", "open", [again, deflate].filter(Boolean).join(" · ") || "accepted");
  session.away = session.lostAt ? Math.round(performance.now() - session.lostAt) : 0;
  session.tries = 0;
  session.lostAt = 0;
  state("open", "open");
}

function closed(socket, { code, reason, wasClean }) {
  if (socket !== session.socket) return;
  session.socket = null;
  const meaning = CODES[code] ?? "";
  log("close", `close ${code}`, [reason, meaning, wasClean ? "" : "no close frame"].filter(Boolean).join(" · "));
  if (session.wanted && !FINAL.has(code)) return lost();
  session.wanted = false;
  finish();
  state("closed", `closed (${code})`);
}

function lost() {
  session.lostAt ||= performance.now();
  retry();
}

function retry() {
  if (!session.wanted) return state("closed", "closed");
  const ceiling = Math.min(RETRY_MAX_MS, RETRY_FIRST_MS * 2 ** session.tries++);
  state("connecting", "reconnecting");
  // Jitter: the clients of a restarted instance must not come back in step.
  session.timer = setTimeout(connect, ceiling * (0.5 + Math.random() / 2));
}

// What the codes mean which a client of this gateway can see.
const CODES = {
  1000: "normal", 1003: "kind of data not accepted", 1006: "connection lost", 1007: "not UTF-8 or damaged",
  1008: "policy", 1009: "message too big", 1011: "internal error", 1012: "instance restarting", 1013: "try again later",
  4001: "replaced", 4002: "heartbeat timeout", 4003: "idle timeout", 4004: "ended by the backend", 4401: "credential expired",
};
// After these a reconnect would only be ended again.
const FINAL = new Set([1000, 1003, 1007, 1009, 4001, 4003, 4004, 4401]);

// ---- the conversation ----

let turn = null; // The worker's answer that is being streamed.

function received(data) {
  if (typeof data !== "string") return log("message", "binary", `${data.size} bytes`);
  let message;
  try { message = JSON.parse(data); } catch { return log("message", "message", data); }
  // A member of the application's own is no position.
  if (/^\d+-\d+-[\da-f]{8}$/.test(message?.event_id)) session.lastEventId = message.event_id;
  switch (message?.type) {
    case "token": return token(message.text);
    case "done": return finish();
    case "opened": return;
    case "resumed": return resumed(message.count);
    case "error":
      if (message.code === "history_lost") gap(session.away);
      return log("error", message.code, message.message);
    case "bus_recovered": log("message", "bus recovered", `messages of ${message.gap_ms} ms may be missing`); return gap(message.gap_ms);
    default: return log("message", "message", data);
  }
}

function token(text) {
  if (!turn) {
    turn = append(element("div", { className: "turn worker" }));
    turn.dataset.streaming = "true";
  }
  stick(() => turn.append(text));
}

function finish() {
  if (!turn) return;
  turn.dataset.streaming = "false";
  byId("announce").textContent = turn.textContent;
  turn = null;
}

function resumed(count) {
  log("open", "resumed", `${count} missed messages follow`);
  if (!turn) return;
  const title = `Away for ${session.away} ms. ${count} messages were missed, and come now.`;
  stick(() => turn.append(element("span", { className: "resumed", title, textContent: "⟳" })));
}

function gap(ms) {
  if (!turn) return;
  const title = "What was sent meanwhile is not held any more.";
  stick(() => turn.append(element("span", { className: "gap", title, textContent: `away ${ms} ms` })));
}

function append(child) {
  byId("empty")?.remove();
  stick(() => byId("transcript").append(child));
  return child;
}

// Follows the newest text, unless the person has scrolled up to read.
function stick(change) {
  const box = byId("transcript");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

// ---- status and event log ----

function state(name, text) {
  byId("status").dataset.state = name;
  if (byId("status-text").textContent !== text) byId("status-text").textContent = text;
  const open = name === "open";
  for (const id of ["cut", "send"]) byId(id).disabled = !open;
  // The input stays usable while reconnecting: who types must not lose the focus.
  byId("prompt").disabled = !session.wanted;
  if (document.activeElement === byId("open") && session.wanted) byId("prompt").focus();
  byId("open").disabled = session.wanted;
  byId("close").disabled = !session.wanted;
}

function log(kind, title, detail = "") {
  const list = byId("events");
  const time = element("time", { textContent: new Date().toTimeString().slice(0, 8) });
  const item = element("li", {}, time, element("b", { textContent: title }), element("span", { textContent: detail }));
  item.dataset.kind = kind;
  list.append(item);
  while (list.children.length > EVENTS_MAX) list.firstChild.remove();
  list.scrollTop = list.scrollHeight;
}

// ---- metrics ----

const CARDS = [
  { name: "Connections", metric: "wsproxy_active_connections" },
  { name: "Accepted so far", metric: "wsproxy_connections_total" },
  { name: "Messages up", metric: "wsproxy_messages_received_total", rate: true },
  { name: "Messages down", metric: "wsproxy_messages_sent_total", rate: true },
  { name: "Latency, mean", latency: "wsproxy_message_latency_seconds" },
  { name: "Bus channels", metric: "wsproxy_redis_pubsub_channels_active" },
];
let previous = null;

function buildCards() {
  for (const card of CARDS) {
    card.value = element("b", { textContent: "–" });
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    card.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    svg.setAttribute("viewBox", "0 0 64 24");
    svg.setAttribute("aria-hidden", "true");
    svg.append(card.line);
    card.points = [];
    const box = element("div", { className: "metric" }, element("dt", { textContent: card.name }), element("dd", {}, card.value, svg));
    box.dataset.metric = card.metric ?? card.latency;
    byId("metrics").append(box);
  }
}

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("/metrics", { headers: { accept: "application/json" }, cache: "no-store" });
      const totals = new Map();
      // Series of one name differ only in their labels; the page shows their sum.
      for (const { name, value } of (await response.json()).metrics) totals.set(name, (totals.get(name) ?? 0) + Number(value));
      const now = { totals, at: performance.now() };
      CARDS.forEach((card) => show(card, now, previous));
      previous = now;
    } catch { previous = null; /* The gateway is away: the event log says so, the cards keep their last value. */ }
  }
  setTimeout(poll, POLL_MS);
}

function show(card, now, before) {
  const grown = (name) => (before ? (now.totals.get(name) ?? 0) - (before.totals.get(name) ?? 0) : 0);
  const seconds = before ? (now.at - before.at) / 1000 : 1;
  let point;
  if (card.latency) {
    const count = grown(`${card.latency}_count`);
    if (count > 0) card.value.replaceChildren(...latencyText(grown(`${card.latency}_sum`) / count));
    point = count > 0 ? grown(`${card.latency}_sum`) / count : 0;
  } else {
    const total = now.totals.get(card.metric) ?? 0;
    card.value.textContent = total.toLocaleString("en");
    point = card.rate ? Math.max(0, grown(card.metric)) / seconds : total;
    if (card.rate) card.value.append(" ", element("small", { textContent: `${Math.round(point)}/s` }));
  }
  card.points = [...card.points, point].slice(-HISTORY);
  const top = Math.max(...card.points, card.latency ? 1e-9 : 1);
  card.line.setAttribute("points", card.points.map((y, i) => `${64 - (card.points.length - 1 - i) * (64 / (HISTORY - 1))},${23 - (y / top) * 22}`).join(" "));
}

function latencyText(seconds) {
  const [value, unit] = seconds < 1e-3 ? [seconds * 1e6, "µs"] : [seconds * 1e3, "ms"];
  return [value.toPrecision(3), " ", element("small", { textContent: unit })];
}

// ---- shell lines ----

function shell() {
  const http = location.origin;
  const ws = http.replace(/^http/, "ws");
  const id = session.id;
  const body = id ? ` -d '{"session_id":"${id}"}'` : "";
  const url = `${ws}/${session.agent}/ws/${id ?? "$S"}`;
  const field = (name) => `sed 's/.*"${name}": *"\\([^"]*\\)".*/\\1/'`;
  const lines = [
    [id ? "A further one-time token for this session" : "A session and its one-time token",
      id ? `T=$(curl -s -X POST ${http}/dev/session${body} | ${field("token")})`
        : `R=$(curl -s -X POST ${http}/dev/session); S=$(echo "$R" | ${field("session_id")}); T=$(echo "$R" | ${field("token")})`],
    ["Connect with it, then type: {\"type\":\"prompt\",\"text\":\"hello\"}", `npx -y wscat -H "Authorization: Bearer $T" -c ${url}`],
    ["Or with Python (pip install websockets)", `websockets "${url}?token=$T"`],
    ["Or only listen, as an EventSource does: a token for event streams, which may come back with it",
      `curl -sN -H "Accept: text/event-stream" "${http}/${session.agent}/ws/${id ?? "$S"}?token=$(curl -s -X POST ${http}/dev/session -d '{"session_id":"'${id ?? "$S"}'","event_stream":true}' | ${field("token")})"`],
    ["Cut this session's connections", `curl -s -X POST ${http}/dev/cut -d '{"session_id":"${id ?? "'$S'"}"}'`],
    ["Watch the metrics", `curl -s ${http}/metrics | grep '^wsproxy_'`],
  ];
  byId("shell").replaceChildren(...lines.map(([what, line]) => {
    const copy = element("button", { type: "button", className: "quiet copy", textContent: "Copy", ariaLabel: `Copy: ${what}` });
    copy.onclick = () => copyLine(copy, line);
    return element("li", {}, element("p", { textContent: what }), element("div", {}, element("code", { textContent: line }), copy));
  }));
}

async function copyLine(button, line) {
  try {
    await navigator.clipboard.writeText(line);
    button.textContent = "Copied";
  } catch {
    // Without https or localhost there is no clipboard: select the line instead.
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ---- wiring ----

byId("open").onclick = () => {
  Object.assign(session, { wanted: true, tries: 0, lostAt: 0 });
  connect();
};
byId("close").onclick = () => {
  session.wanted = false;
  clearTimeout(session.timer);
  if (session.socket) session.socket.close(1000);
  else state("closed", "closed");
};
byId("cut").onclick = async () => {
  log("message", "cut", "asking the gateway to drop the TCP connection");
  try {
    await post("/dev/cut", { session_id: session.id });
  } catch (error) {
    log("error", "cut", error.message);
  }
};
byId("clear").onclick = () => byId("events").replaceChildren();
byId("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (!text || session.socket?.readyState !== WebSocket.OPEN) return;
  finish();
  append(element("div", { className: "turn me", textContent: text }));
  session.socket.send(JSON.stringify({ type: "prompt", text }));
  byId("prompt").value = "";
};

buildCards();
shell();
poll();

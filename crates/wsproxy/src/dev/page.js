// The development page: one session against the demo worker, shown with the gateway's view of it.
// Knows only what any browser client could know: a token, a WebSocket, and /metrics.

import { byId, call, CODES, element, field, fill, FINAL, line, protocols, seconds } from "./common.js";

const RETRY_FIRST_MS = 150; // Short, so that few messages of a running stream are missed.
const RETRY_MAX_MS = 5000;
const AWAY_MS = 5000; // Long enough for a person to see it.
const EVENTS_MAX = 200;
const POLL_MS = 1000;
const HISTORY = 30;

// ---- the session ----

const session = {
  id: null,
  agent: "demo",
  socket: null,
  wanted: true, // Set while the person wants the connection: then its end leads to a reconnect.
  attempt: 0, // A number for each attempt to connect: only the newest counts.
  tries: 0,
  timer: 0,
  lostAt: 0, // When the connection was lost; 0 while there is one.
  awayMs: 0, // Pause that the person has chosen, which begins when the connection is lost.
  stayUntil: 0, // End of that pause.
  missed: null, // The missed messages that follow: see `resumed`.
};

async function connect() {
  clearTimeout(session.timer);
  session.stayUntil = 0;
  const { agent } = session;
  const attempt = ++session.attempt;
  state("connecting", session.lostAt ? "reconnecting" : "connecting");
  if (session.lostAt) tell("wait", "Coming back: asking for a fresh one-time token …");
  let issued;
  try {
    // Tokens are good for one handshake: every attempt asks for a fresh one.
    issued = await call("/dev/session", { body: { agent_id: agent, ...(session.id && { session_id: session.id }) } });
  } catch (error) {
    if (attempt !== session.attempt) return;
    log("error", "no token", error.message);
    session.lostAt ||= performance.now();
    // Without an answer the browser has no text to show.
    return retry(error instanceof TypeError ? "The gateway does not answer. Is “wsproxy dev” still running?" : error.message);
  }
  // Closed, or another worker chosen, while the token was on its way.
  if (attempt !== session.attempt) return;
  session.id = issued.session_id;
  if (byId("session-id").textContent !== session.id) {
    byId("session-id").textContent = session.id;
    shell();
  }
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const resume = `last_event_id=${encodeURIComponent(session.lastEventId ?? "")}`;
  const socket = new WebSocket(`${scheme}://${location.host}/${agent}/ws/${session.id}?${resume}`, protocols(issued.token));
  session.socket = socket;
  socket.onopen = () => opened(socket);
  socket.onclose = (event) => closed(socket, event);
  socket.onmessage = (event) => { if (socket === session.socket) received(event.data); };
}

function opened(socket) {
  session.away = session.lostAt ? performance.now() - session.lostAt : 0;
  const again = session.lostAt ? `again after ${seconds(session.away)}, with a fresh token` : "";
  const deflate = socket.extensions.includes("permessage-deflate") ? "permessage-deflate" : "";
  log("open", "open", [again, deflate].filter(Boolean).join(" · ") || "accepted");
  session.tries = 0;
  session.lostAt = 0;
  state("open", "connected");
  if (session.agent === "mine") tell("open", "Connected. Start your worker with the command below, then ask something.");
  else if (!again) tell("open", "Connected. Ask something, and stay away for a while in the middle of the answer.");
  findOwn();
}

function closed(socket, { code, reason, wasClean }) {
  if (socket !== session.socket) return;
  session.socket = null;
  const meaning = CODES[code] ?? "";
  log("close", `close ${code}`, [reason, meaning, wasClean ? "" : "no close frame"].filter(Boolean).join(" · "));
  if (session.wanted && !FINAL.has(code)) {
    session.lostAt ||= performance.now();
    if (session.awayMs > 0) Object.assign(session, { stayUntil: performance.now() + session.awayMs, awayMs: 0 });
    return retry();
  }
  const isAsked = !session.wanted;
  session.wanted = false;
  finish();
  state("closed", `closed (${code})`);
  if (isAsked) tell("closed", "Closed. Connect opens the same session again.");
  else tell("error", `The session was ended: ${code}, ${reason || meaning || "without a reason"}. Connect opens it again.`);
}

function retry(why) {
  if (session.stayUntil > performance.now()) return stayAway();
  const ceiling = Math.min(RETRY_MAX_MS, RETRY_FIRST_MS * 2 ** session.tries++);
  state("connecting", "reconnecting");
  if (why) tell("error", `${why} Trying again.`);
  else tell("wait", session.tries > 2 ? "The connection is lost, and the gateway does not let us in. Trying again." : "The connection is lost. Coming back …");
  // Jitter: the clients of a restarted instance must not come back in step.
  session.timer = setTimeout(connect, ceiling * (0.5 + Math.random() / 2));
}

// Counts down, and connects at the end.
function stayAway() {
  const left = Math.ceil((session.stayUntil - performance.now()) / 1000);
  if (left <= 0) return connect();
  state("away", `away, back in ${left} s`);
  tell("away", `You are away: there is no connection, and the worker ${turn ? "goes on talking" : "is still there"}.`, `Back in ${left} s.`);
  session.timer = setTimeout(stayAway, 200);
}

async function drop(ms) {
  step("away");
  byId("away").disabled = byId("cut").disabled = true;
  session.awayMs = ms;
  log("message", "cut", "asking the gateway to drop the TCP connection");
  try {
    const { cut } = await call("/dev/cut", { body: { session_id: session.id } });
    if (cut === 0) throw new Error("the gateway knows no connection of this session");
  } catch (error) {
    session.awayMs = 0;
    log("error", "cut", error.message);
    state(byId("status").dataset.state, byId("status-text").textContent);
  }
}

// ---- the conversation ----

let turn = null; // The worker's answer that is being streamed.

function received(data) {
  if (typeof data !== "string") return log("message", "binary", `${data.size} bytes`);
  let message;
  try { message = JSON.parse(data); } catch { return log("message", "message", data); }
  // A member of the application's own is no position.
  if (/^\d+-\d+-[\da-f]{8}$/.test(message?.event_id)) session.lastEventId = message.event_id;
  if (message?.type === "resumed") return resumed(message.count);
  show(message, data);
  if (session.missed && --session.missed.left === 0) madeUp();
}

function show(message, data) {
  switch (message?.type) {
    case "token": return token(message.text);
    case "message": return whole(message.text);
    case "done":
      if (turn && byId("story").dataset.kind === "open") tell("open", "The answer is complete. Ask again, and stay away in the middle of it.");
      return finish();
    case "opened": return;
    case "error": return problem(message);
    case "bus_recovered":
      log("error", "bus recovered", `messages of ${message.gap_ms} ms may be missing`);
      tell("lost", `The bus was away for ${seconds(message.gap_ms)}. What was said meanwhile may be missing.`);
      return gap(`bus away for ${seconds(message.gap_ms)}`);
    default: return log("message", "message", data);
  }
}

function problem({ code, message, reason }) {
  log("error", code, message);
  if (code === "history_lost") {
    // This message may also come in mid-stream, after an outage of the bus.
    const [label, back] = session.away ? [`away ${seconds(session.away)}, words lost`, `Back after ${seconds(session.away)}`] : ["words lost", "Connected"];
    gap(label);
    finish();
    return tell("lost", `${back}, but what was said meanwhile is no longer kept${reason ? ` (${reason})` : ""}. An application loads its state anew now.`);
  }
  if (code !== "no_receiver") return tell("error", message);
  append(element("p", { className: "note", textContent: "No worker listens to this session." }));
  tell("error", session.agent === "mine" ? "No worker listens yet. Start yours with the command below, and ask again." : message);
}

function token(text) {
  step("own", session.agent === "mine");
  turn ??= append(element("div", { className: "turn worker" }));
  turn.dataset.streaming = "true";
  const { missed } = session;
  if (missed) missed.words += 1;
  // Late messages are marked, so that a person sees them.
  stick(() => (missed ? marked() : turn).append(text));
}

// The place for words that came while the page was away.
function marked() {
  const { missed } = session;
  if (missed.place?.parentNode !== turn) {
    missed.place = element("span", { className: "missed" });
    turn.append(pause(`away ${seconds(session.away)}`, "pause"), missed.place);
  }
  return missed.place;
}

// A label that is no part of the text, not even when the text is copied.
function pause(label, className) {
  const made = element("span", { className });
  made.dataset.label = label;
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  return made;
}

function whole(text) {
  step("own", session.agent === "mine");
  append(element("div", { className: "turn worker", textContent: text }));
}

function finish() {
  if (!turn) return;
  turn.dataset.streaming = "false";
  byId("announce").textContent = turn.textContent;
  turn = null;
}

// `count` messages were missed and follow, in order, before anything new.
function resumed(count) {
  log("open", "resumed", `${count} missed messages follow`);
  session.missed = { left: count, words: 0, place: null };
  if (count === 0) madeUp();
}

function madeUp() {
  const { words } = session.missed;
  session.missed = null;
  const back = `Back after ${seconds(session.away)}.`;
  if (words === 0) return tell("resumed", `${back} Nothing was said meanwhile, so nothing was missed.`);
  step("read");
  const all = words === 1 ? "1 word was missed, and it has arrived" : `${words} words were missed, and all ${words} have arrived`;
  log("open", "delivered", `${words} missed ${words === 1 ? "word" : "words"}, in order`);
  tell("resumed", `${back} ${all}, in order and once. They are marked in the answer.`);
}

function gap(label) {
  if (turn) stick(() => turn.append(pause(label, "gap")));
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

// ---- the state in words ----

// `aside` changes every second: screen readers must not read it aloud.
function tell(kind, text, aside = "") {
  byId("story").dataset.kind = kind;
  if (byId("story-text").textContent !== text) byId("story-text").textContent = text;
  byId("story-aside").textContent = aside;
}

// Ticks off what the person has tried; the last step is never forced on anybody.
function step(name, isDone = true) {
  if (isDone) document.querySelector(`[data-step="${name}"]`).dataset.done = "true";
}

function state(name, text) {
  byId("status").dataset.state = name;
  if (byId("status-text").textContent !== text) byId("status-text").textContent = text;
  for (const id of ["away", "cut", "send"]) byId(id).disabled = name !== "open";
  byId("toggle").textContent = session.wanted ? "Close" : "Connect";
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

// The cards stand in the page already, so that nothing moves when the first numbers come.
const CARDS = [...document.querySelectorAll("[data-metric]")].map((card) => ({
  metric: card.dataset.metric,
  isLatency: card.dataset.metric.endsWith("_seconds"),
  isRate: card.dataset.metric.startsWith("wsproxy_messages_"),
  value: card.querySelector("b"),
  line: card.querySelector("polyline"),
  points: [],
}));
let previous = null;

async function poll() {
  if (!document.hidden) {
    try {
      const response = await fetch("/metrics", { headers: { accept: "application/json" }, cache: "no-store" });
      const totals = new Map();
      // Series of one name differ only in their labels; the page shows their sum.
      for (const { name, value } of (await response.json()).metrics) totals.set(name, (totals.get(name) ?? 0) + Number(value));
      const now = { totals, at: performance.now() };
      CARDS.forEach((card) => showCard(card, now, previous));
      previous = now;
    } catch { previous = null; /* The gateway is away: the event log says so, the cards keep their last value. */ }
  }
  setTimeout(poll, POLL_MS);
}

function showCard(card, now, before) {
  const grown = (name) => (before ? (now.totals.get(name) ?? 0) - (before.totals.get(name) ?? 0) : 0);
  const elapsed = before ? (now.at - before.at) / 1000 : 1;
  let point;
  if (card.isLatency) {
    const count = grown(`${card.metric}_count`);
    if (count > 0) card.value.replaceChildren(...latencyText(grown(`${card.metric}_sum`) / count));
    point = count > 0 ? grown(`${card.metric}_sum`) / count : 0;
  } else {
    const total = now.totals.get(card.metric) ?? 0;
    card.value.textContent = total.toLocaleString("en");
    point = card.isRate ? Math.max(0, grown(card.metric)) / elapsed : total;
    if (card.isRate) card.value.append(" ", element("small", { textContent: `${Math.round(point)}/s` }));
  }
  card.points = [...card.points, point].slice(-HISTORY);
  const top = Math.max(...card.points, card.isLatency ? 1e-9 : 1);
  card.line.setAttribute("points", card.points.map((y, i) => `${64 - (card.points.length - 1 - i) * (64 / (HISTORY - 1))},${23 - (y / top) * 22}`).join(" "));
}

function latencyText(seconds) {
  const [value, unit] = seconds < 1e-3 ? [seconds * 1e6, "µs"] : [seconds * 1e3, "ms"];
  return [value.toPrecision(3), " ", element("small", { textContent: unit })];
}

// ---- lines for a shell ----

function shell() {
  const http = location.origin;
  const url = `${http.replace(/^http/, "ws")}/${session.agent}/ws/${session.id}`;
  const issue = (more) => `curl -s -X POST ${http}/dev/session -d '{"agent_id":"${session.agent}","session_id":"${session.id}"${more}}' | ${field("token")}`;
  fill("shell", [
    ["A further one-time token for this session", `T=$(${issue("")})`],
    ["Connect with it, then type: {\"type\":\"prompt\",\"text\":\"hello\"}", `npx -y wscat -H "Authorization: Bearer $T" -c ${url}`],
    ["Or with Python (pip install websockets)", `websockets "${url}?token=$T"`],
    ["Or only listen, as an EventSource does: a token for event streams may be used again",
      `curl -sN -H "Accept: text/event-stream" "${http}/${session.agent}/ws/${session.id}?token=$(${issue(',"event_stream":true')})"`],
    ["Cut this session's connections", `curl -s -X POST ${http}/dev/cut -d '{"session_id":"${session.id}"}'`],
    ["Watch the metrics", `curl -s ${http}/metrics | grep '^wsproxy_'`],
  ]);
}

const own = { id: "…".repeat(36), key: "…".repeat(43) };

// The session without a demo worker, and the key of this run: a restarted gateway has another one.
async function findOwn() {
  try {
    const { api_key: key } = await call("/dev/key", { method: "GET" });
    if (key === own.key) return;
    const id = own.id.startsWith("…") ? (await call("/dev/session", { body: { agent_id: "mine" } })).session_id : own.id;
    Object.assign(own, { id, key });
    ownWorker();
    for (const radio of document.getElementsByName("who")) radio.disabled = false;
  } catch (error) { log("error", "own worker", error.message); }
}

function ownWorker() {
  const url = `${location.origin}/api/v1/sessions/${own.id}`;
  const bearer = `-H 'Authorization: Bearer ${own.key}'`;
  byId("own-worker").replaceChildren(...line("Paste this into a terminal: a whole worker, with nothing but Python 3.", workerSource(url)));
  fill("own-lines", [
    ["Or be the worker by hand. Hear what the page sends:", `curl -sN ${bearer} ${url}/upstream`],
    ["Say something, in a second terminal:", `curl -s ${bearer} '${url}/messages?history=true' -d '{"type":"message","text":"Hello from my shell."}'`],
    ["End the session with a close code of your own:", `curl -s ${bearer} ${url}/close -d '{"code":4004,"reason":"that was all"}'`],
  ]);
}

// Holds no single quotes and no backslashes, so that every shell takes it in single quotes.
const workerSource = (url) => `python3 -uc '
import json, time, urllib.request as http

session = "${url}"
headers = {"Authorization": "Bearer ${own.key}"}

def call(path, body=None):
    return http.urlopen(http.Request(session + path, body, headers))

def say(message):
    call("/messages?history=true", json.dumps(message).encode())

heard = call("/upstream")
print("Your worker listens. Ask something on the page. Ctrl-C ends it.")
for line in heard:
    if line.startswith(b"data: {"):
        text = json.loads(line[6:]).get("text", "")
        for word in ("I am your own worker, and I heard: " + text).split():
            say({"type": "token", "text": word + " "})
            time.sleep(0.3)
        say({"type": "done"})
'`;

// ---- wiring ----

function open() {
  Object.assign(session, { wanted: true, tries: 0, lostAt: 0 });
  connect();
}

function close() {
  session.wanted = false;
  session.attempt += 1;
  Object.assign(session, { awayMs: 0, stayUntil: 0 });
  clearTimeout(session.timer);
  if (session.socket) return session.socket.close(1000);
  finish();
  state("closed", "closed");
  tell("closed", "Closed. Connect opens the same session again.");
}

// Another worker is another session; what was said stays on the page.
function answeredBy(agent) {
  const { socket } = session;
  clearTimeout(session.timer);
  finish();
  Object.assign(session, { agent, socket: null, id: agent === "mine" ? own.id : null, lastEventId: undefined, missed: null, awayMs: 0, stayUntil: 0 });
  socket?.close(1000);
  const who = agent === "mine" ? "Your own worker answers from here on." : "The demo worker answers from here on.";
  append(element("p", { className: "note", textContent: who }));
  open();
}

byId("toggle").onclick = () => (session.wanted ? close() : open());
byId("away").onclick = () => drop(AWAY_MS);
byId("cut").onclick = () => drop(0);
byId("clear").onclick = () => byId("events").replaceChildren();
for (const radio of document.getElementsByName("who")) radio.onchange = () => answeredBy(radio.value);
byId("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (!text || session.socket?.readyState !== WebSocket.OPEN) return;
  append(element("div", { className: "turn me", textContent: text }));
  byId("transcript").scrollTop = byId("transcript").scrollHeight;
  session.socket.send(JSON.stringify({ type: "prompt", text }));
  byId("prompt").value = "";
  step("ask", session.agent === "demo");
  tell("open", session.agent === "mine" ? "Sent to your own worker." : "The worker answers, word by word. Now stay away for 5 s.");
};

// A reload keeps the choice of some browsers.
document.querySelector('[name="who"][value="demo"]').checked = true;
ownWorker();
poll();
open();

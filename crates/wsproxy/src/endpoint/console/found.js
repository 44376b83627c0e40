// Rows about clients: where one is connected, and why one is gone. Texts of clients are shown as texts only.

import { bytes, element } from "./chart.js";

// The kind under which each id is found.
const IDS = { user_id: ["user", "User"], session_id: ["session", "Session"], room_id: ["room", "Room"], connection_id: ["connection", "Connection"] };

const BY = { client: "Ended by the client", network: "Broken off", worker: "Ended by a worker or an operator", gateway: "Ended by the gateway" };

export function duration(ms) {
  const [s, m, h] = [Math.round(ms / 1000), Math.round(ms / 60_000), Math.round(ms / 3_600_000)];
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (s < 120) return `${s} s`;
  if (m < 120) return `${m} min`;
  return h < 72 ? `${h} h` : `${Math.round(h / 24)} days`;
}

// The time for people, with how long ago it was.
export function moment(text, now = Date.now()) {
  const at = new Date(text);
  const isToday = at.toDateString() === new Date(now).toDateString();
  const shown = isToday ? at.toLocaleTimeString() : at.toLocaleString();
  return element("time", { dateTime: text, title: text, textContent: `${shown}, ${duration(Math.max(0, now - at))} ago` });
}

const pair = (name, ...value) => element("div", {}, element("dt", { textContent: name }), element("dd", {}, ...value));

// The ids of a row, each of which can be looked for.
function ids(row, find) {
  const made = Object.entries(IDS).filter(([name]) => row[name]).map(([name, [kind, title]]) => {
    const asked = row.endpoint === "agents" && name === "user_id" ? "agent" : kind;
    const link = element("button", { type: "button", className: "link", textContent: row[name] });
    link.addEventListener("click", () => find(asked, row[name]));
    return pair(title, link);
  });
  for (const [name, title] of [["agent_id", "Agent id"], ["client_id", "Client"], ["address", "Address"], ["server_id", "Instance"]]) {
    if (row[name]) made.push(pair(title, element("code", { textContent: row[name] })));
  }
  return made;
}

export function connections(rows, { find, end }) {
  const made = rows.map((row) => {
    const waiting = row.waiting_bytes === undefined ? "not known: its instance did not answer" : `${bytes(row.waiting_bytes)} of ${bytes(row.waiting_bytes_max)}`;
    const head = element("p", {}, element("b", { textContent: `Connected to ${row.endpoint ?? "an endpoint"}` }), row.since ? " since " : "", row.since ? moment(row.since) : "");
    const one = end && element("button", { type: "button", className: "danger small", textContent: "End this one …", ariaLabel: `End the connection ${row.connection_id ?? row.client_id} …` });
    one?.addEventListener("click", () => end(row));
    const parts = [...ids(row, find), pair("Transport", row.transport === "sse" ? "event stream" : "WebSocket"), pair("Waiting for it", waiting)];
    if (row.closing) parts.push(pair("State", "about to end"));
    return element("li", {}, element("div", { className: "head" }, head, one ?? ""), element("dl", { className: "pairs" }, ...parts));
  });
  return element("ul", { className: "rows" }, ...made);
}

// One end or refusal: what happened, what to do, and the facts.
export function past(row, find) {
  const isEnd = row.kind === "end";
  const facts = isEnd
    ? [pair("How", BY[row.by] ?? row.by), pair("Close code", `${row.code} (${row.reason})`), pair("Was open for", row.duration_ms === null ? "–" : duration(row.duration_ms)), pair("Messages to it", String(row.messages_out))]
    : [pair("Answer", `${row.status} ${row.code}`)];
  if (!isEnd && row.message !== row.what) facts.push(pair("Told", row.message));
  if (row.error) facts.push(pair("Error", element("code", { textContent: row.error })));
  const made = element("li", {},
    element("p", { className: "when" }, `${isEnd ? "Ended" : "Refused"} at `, moment(row.at), `, ${row.endpoint}`),
    element("p", { className: "what", textContent: row.what }),
    element("p", { textContent: row.advice }),
    element("dl", { className: "pairs" }, ...facts, ...ids(row, find)),
    row.more ? alike(row.more, find) : "");
  made.dataset.kind = row.kind;
  if (row.by) made.dataset.by = row.by;
  return made;
}

// The number of further ends or refusals of one reason, and some of their clients.
function alike({ count, since, clients }, find) {
  const links = clients.flatMap(({ session_id: session, user_id: user }, i) => {
    const link = element("button", { type: "button", className: "link", textContent: session ?? user });
    link.addEventListener("click", () => find(session ? "session" : "user", session ?? user));
    return [i === 0 ? ", of " : ", ", link];
  });
  return element("p", { className: "more" }, `And ${count} more for this reason since `, moment(since), ...links, ".");
}

// Rows in their order. Those that follow each other for one reason are folded behind the newest of them.
export function pasts(rows, find) {
  const groups = [];
  for (const row of rows) {
    const last = groups.at(-1);
    if (last && last[0].what === row.what && last[0].endpoint === row.endpoint) last.push(row);
    else groups.push([row]);
  }
  const made = groups.map(([newest, ...others]) => {
    const item = past(newest, find);
    if (others.length > 0) {
      const title = element("summary", {}, `${others.length} more for this reason since `, moment(others.at(-1).at));
      item.append(element("details", {}, title, element("ol", { className: "past" }, ...others.map((row) => past(row, find)))));
    }
    return item;
  });
  return element("ol", { className: "past" }, ...made);
}

// The answer to "why is it not connected" in one sentence.
export function sum({ connections: here, ends, refusals }) {
  const count = (n, one, many) => (n === 1 ? `one ${one}` : `${n} ${many}`);
  const latest = [...ends, ...refusals].sort((a, b) => (a.at < b.at ? 1 : -1))[0];
  if (here.length > 0) return `Connected now: ${count(here.length, "connection", "connections")}.${latest ? ` ${latest.kind === "end" ? "Another connection" : "Another attempt"} ${told(latest)}` : ""}`;
  if (!latest) return "Not connected, and nothing is remembered of it: it never came, or longer ago than the instances remember. Is the id right?";
  return `Not connected. ${latest.kind === "end" ? "The last connection" : "The last attempt"} ${told(latest)}`;
}

const told = ({ kind, at, what }) => `${kind === "end" ? "ended" : "was refused"} ${duration(Date.now() - new Date(at))} ago: ${what}`;
